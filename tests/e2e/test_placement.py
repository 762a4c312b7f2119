"""Whole runs in which trainer and samplers take turns come out as those in which both stay loaded, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from one_process import one_process
from running import comparable, job_process, only_run, read_jsonl, steps_of, tensors_below, write_jsonl

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

TINY = (
    "steps=3",
    "data.prompts_per_step=4",
    "eval.problems=8",
    "eval.every=2",
    "checkpoint.every=2",
    "trainer.lr=1e-3",
)
EVERYBODY = (
    "algorithm.advantage=gae",
    "algorithm.kl.coef=0.05",
    "trainer.updates_per_step=2",
    "algorithm.preference.weight=0.5",
)


def assert_same(plain: Path, turns: Path) -> None:
    measured = {"memory/pss_bytes"}
    lines, others = comparable(plain), comparable(turns)
    assert [line.keys() - measured for line in lines] == [line.keys() - measured for line in others]
    assert lines == others
    weights = tensors_below(plain)
    assert weights
    assert weights == tensors_below(turns)


@pytest.mark.parametrize("actors", [(), EVERYBODY], ids=["policy alone", "critic, reference and pairs"])
def test_turns_change_nothing(ray_cluster: None, tmp_path: Path, actors: tuple[str, ...]) -> None:
    """Evaluation, held-out pairs, checkpoints and the export in between included."""
    more: tuple[str, ...] = actors
    if actors:
        pairs = [{"prompt": "1+1=", "chosen": "0002", "rejected": "0003"}] * 3
        more += (f"replay.eval_path={write_jsonl(tmp_path / 'pairs.jsonl', pairs)}",)
    folders = {}
    with one_process() as run:
        for placement in ("shared", "colocated"):
            root = tmp_path / placement
            assert run(root, *TINY, *more, f"cluster.placement={placement}") == 0
            folders[placement] = only_run(root)
    assert_same(folders["shared"], folders["colocated"])
    for line in steps_of(folders["colocated"]):
        for name in ("sampler_awake", "sampler_asleep", "trainer_offloaded"):
            assert line[f"memory/{name}_bytes"] > 0
    assert not any("memory/sampler_asleep_bytes" in line for line in steps_of(folders["shared"]))
    assert not [e for e in read_jsonl(folders["colocated"] / "events.jsonl") if e["kind"] == "memory"]


@pytest.mark.slow
@pytest.mark.vllm
def test_turns_with_vllm_change_nothing_and_its_memory_falls(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    folders: dict[str, Any] = {}
    with job_process() as run:
        for placement in ("shared", "colocated"):
            root = tmp_path / placement
            assert run(root, *TINY, "rollout.kv_cache_gib=0.2", f"cluster.placement={placement}") == 0
            folders[placement] = only_run(root)
    assert_same(folders["shared"], folders["colocated"])
    fell = [
        line["memory/sampler_awake_bytes"] - line["memory/sampler_asleep_bytes"]
        for line in steps_of(folders["colocated"])
    ]
    assert all(each > 0 for each in fell), "its weights, and the blocks that were written to since"
    alerts = [event["text"] for event in read_jsonl(folders["colocated"] / "events.jsonl") if event["kind"] == "alert"]
    assert not [text for text in alerts if "gave back" in text]
