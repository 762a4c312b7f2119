"""The controller's benchmark goes through the controller as it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.ray
def test_it_runs_and_counts_what_a_step_costs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.controller_scale", "--quick", "--json", str(tmp_path / "found.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    settings = json.loads((tmp_path / "found.json").read_text())["settings"]
    assert [name.split()[0] for name in settings] == ["8", "32"]
    assert all(found["cpu_s"] > 0 and found["calls"] > 0 for found in settings.values())
