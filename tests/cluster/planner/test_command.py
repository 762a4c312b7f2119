"""The command: exit codes, what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlsys.cli import main

QWEN3 = {
    "model_type": "qwen3", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "tie_word_embeddings": True, "max_position_embeddings": 40960,
}  # fmt: skip
NODE = ["+recipe=grpo_qwen", "cluster=h100_node", "data=gsm8k", "data.path=none", "model=hub", "model.path=none"]


@pytest.fixture
def shape(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(QWEN3), encoding="utf-8")
    return str(path)


def test_a_run_that_fits_ends_with_0(shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    status = main(["plan", "--shape", shape, "--json", str(out), *NODE, "rollout.workers=8"])
    printed = capsys.readouterr().out
    assert status == 0
    content = json.loads(out.read_text(encoding="utf-8"))
    assert content["memory"]["fits"]
    assert content["cluster"] == {"kind": "h100_node", "nodes": 1, "gpus": 8}
    for word in ("fits", "bottleneck", "[T+S]" * 8, "1,000 steps", "no GPU run of rlsys"):
        assert word in printed


def test_one_that_does_not_fit_ends_with_1_and_what_would(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["plan", "--shape", shape, *NODE, "rollout.workers=8", "rollout.gpu_memory_fraction=0.9"])
    printed = capsys.readouterr().out
    assert status == 1
    assert "does not fit" in printed
    assert "It fits with: " in printed


def test_the_bundled_model_is_planned_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "+recipe=grpo_qwen", "rollout=torch"]) == 0
    assert "trainer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["+recipe=nothing"], "there is no"),
        (["steps=3"], "no recipe"),
        (["+recipe=grpo_qwen", "trainer.rank=2"], "there is no key 'trainer.rank'"),
        (["+recipe=grpo_qwen", "trainer.critic.lr=1e-4"], "trainer.critic.lr"),
        (["+recipe=grpo_qwen", "model.path=bundled:none"], "no checkpoint called"),
        (["+recipe=grpo_qwen", "--shape", "/no/such.json"], "cannot read"),
        (["+recipe=grpo_qwen", "--json", "/no/such/folder/plan.json"], "no folder"),
        (["+recipe=grpo_qwen", "--dollars-per-hour", "-1"], "not negative"),
        (["+recipe=grpo_qwen", "--response-tokens", "99"], "--response-tokens"),
        (["+recipe=grpo_qwen", "cluster=ray"], "only known when it is there"),
    ],
)
def test_bad_input_ends_with_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
