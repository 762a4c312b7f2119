"""A cluster of the run's own lets nobody in without the token, which nobody else can read."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from rlsys.cluster.session import own_token

VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("before", [None, "a token of before"])
def test_the_token_is_this_users_alone(home: Path, before: str | None) -> None:
    path = home / ".ray" / "auth_token"
    if before is not None:
        path.parent.mkdir()
        path.write_text(before)
        path.chmod(0o644)
    own_token()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == before or len(path.read_text()) == 64
    assert os.environ["RAY_AUTH_MODE"] == "token"


OWN = """
import subprocess, sys
from composing import run_config
from rlsys.cluster.session import connect
with connect(run_config().cluster):
    import ray
    address = ray.get_runtime_context().gcs_address
    code = "import ray; ray.init(address=%r, log_to_driver=False); print(ray.cluster_resources())" % address
    import os
    for known in ({}, {"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "0" * 64}):
        done = subprocess.run([sys.executable, "-c", code], env=os.environ | known, capture_output=True, text=True)
        print("answer:", done.returncode == 0)
"""


@pytest.mark.slow
@pytest.mark.ray
def test_who_has_not_the_token_is_not_let_in(tmp_path: Path) -> None:
    tests = Path(__file__).resolve().parents[1]
    variables = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", OWN],
        env=variables | {"HOME": str(tmp_path), "PYTHONPATH": str(tests), "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = [line for line in done.stdout.splitlines() if line.startswith("answer:")]
    assert answers == ["answer: True", "answer: False", "answer: False"]
