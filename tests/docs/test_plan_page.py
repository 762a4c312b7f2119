"""Every command on the page about plans is run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from pages import text_of

from rlsys.cli import main

PAGE = "how-to/plan-a-run.md"
COMMANDS = [line.strip() for line in text_of(PAGE).splitlines() if line.startswith("    rlsys plan")]
QWEN3 = {
    "model_type": "qwen3", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_plans_a_run_that_fits(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)[1:]) == 0
    assert "fits" in capsys.readouterr().out


def test_the_page_has_commands_and_every_option() -> None:
    assert len(COMMANDS) == 2
    for option in ("--shape", "--response-tokens", "--prompt-tokens", "--dollars-per-hour", "--json"):
        assert option in text_of(PAGE)
