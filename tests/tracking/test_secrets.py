"""What looks like a secret, or is one of this process's, stays out of configs, events and errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlsys.config.errors import UserError
from rlsys.launch import show_error
from rlsys.tracking.run import RunFolder
from rlsys.tracking.secrets import MASK, mask, mask_text

SECRET = "s3cr3t-0f-a-kind-4711"


@pytest.mark.parametrize(
    "text",
    [
        f"https://user:{SECRET}@hub/x",
        f"https://{SECRET}@hub/x",
        f"https://hub/x?access_token={SECRET}&rows=3",
        f"https://bucket/x?X-Amz-Signature={SECRET}",
        f"https://bucket/x?rows=3&sig={SECRET}",
        f"Authorization: Bearer {SECRET}",
    ],
)
def test_credentials_in_texts(text: str) -> None:
    masked = mask_text(f"GET {text} failed")
    assert SECRET not in masked
    assert MASK in masked
    assert masked.startswith("GET ")
    assert masked.endswith(" failed")


@pytest.mark.parametrize(
    "text",
    ["https://host:8265/jobs?rows=3", "git@github.com:a/b", "max_prompt_tokens=512", "ssh://git@host/a", "basic"],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert mask_text(text) == text


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PWD", "RAY_AUTH_TOKEN"])
def test_what_the_environment_has_under_the_name_of_a_secret(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert SECRET in mask_text(SECRET)
    monkeypatch.setenv(name, SECRET)
    assert mask_text(f"401 for {SECRET}") == f"401 for {MASK}"
    assert mask({"url": f"http://host/{SECRET}", "env_vars": {name: "short"}}) == {
        "url": f"http://host/{MASK}",
        "env_vars": {name: MASK},
    }


def test_a_short_value_is_not_cut_out_of_other_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", "grpo")
    assert mask_text("grpo_qwen") == "grpo_qwen"


def test_events_failures_and_errors_hold_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SERVICE_TOKEN", SECRET)
    with RunFolder.create(tmp_path, "run", {}) as folder:
        folder.log_event("alert", f"no answer from https://u:{SECRET}@host", why={"header": f"Bearer {SECRET}"})
        folder.log_failure({"row": 1, "message": f"401 for {SECRET}"})
    written = "".join(path.read_text() for path in folder.path.rglob("*") if path.is_file())
    assert "no answer" in written
    assert SECRET not in written
    show_error(UserError(f"cannot read https://u:{SECRET}@host/x", where=f"data.path={SECRET}"))
    said = capsys.readouterr().err
    assert "cannot read" in said
    assert SECRET not in said
