"""Every command on the page about plans is run; those on pages about other machines are planned, and fit there."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from pages import commands, text_of

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


def of_size(hidden: int, inner: int, layers: int, heads: int, *, tied: bool) -> dict[str, object]:
    return QWEN3 | {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "tie_word_embeddings": tied,
    }  # fmt: skip


HUB = {
    "Qwen/Qwen3-0.6B": of_size(1024, 3072, 28, 16, tied=True),
    "Qwen/Qwen3-4B": of_size(2560, 9728, 36, 32, tied=True),
    "Qwen/Qwen3-8B": of_size(4096, 12288, 36, 32, tied=False),
    "Qwen/Qwen3-32B": of_size(5120, 25600, 64, 64, tied=False),
}
ELSEWHERE = [command for page in ("dgx-spark", "nvl72") for command in commands(f"how-to/{page}.md")]


@pytest.mark.parametrize("command", ELSEWHERE, ids=" ".join)
def test_what_is_advised_for_other_machines_fits_there(command: list[str], tmp_path: Path) -> None:
    (model,) = (word.removeprefix("model.path=") for word in command if word.startswith("model.path="))
    (tmp_path / "config.json").write_text(json.dumps(HUB[model]), encoding="utf-8")
    assert main(["plan", "--shape", str(tmp_path / "config.json"), *command]) == 0


def test_the_page_has_commands_and_every_option() -> None:
    assert (len(COMMANDS), len(ELSEWHERE)) == (2, 4)
    for option in ("--shape", "--response-tokens", "--prompt-tokens", "--dollars-per-hour", "--json"):
        assert option in text_of(PAGE)
