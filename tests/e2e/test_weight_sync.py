"""Whole runs through each transport: the samplers draw the same responses, whatever way their weights came."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from model_folders import make_model_folder
from one_process import Run, one_process
from running import only_run, read_jsonl, steps_of

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

TINY = (
    "steps=2",
    "data.prompts_per_step=2",
    "rollout.samples_per_prompt=4",
    "reward.parts.correct.use=rewards_for_runs.digits",
    "eval.every=0",
    "checkpoint.export=false",
    "tracker.rollouts=64",
)
TRANSPORTS = ("shared_memory", "object_store", "delta")


@pytest.fixture(scope="module")
def runs(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """The run folder of each transport, float32 at a learning rate that bfloat16 would hardly notice."""
    model = make_model_folder(tmp_path_factory.mktemp("model"))
    folders = {}
    with one_process() as run:
        run_: Run = run
        for transport in TRANSPORTS:
            root = tmp_path_factory.mktemp(transport)
            options = (f"model.path={model}", f"rollout.sync={transport}", "trainer.lr=1e-6", "rollout.dtype=bfloat16")
            assert run_(root, *TINY, *options) == 0
            folders[transport] = only_run(root)
        yield folders


def responses(folder: Path) -> list[Any]:
    return [row["response"] for step in (1, 2) for row in read_jsonl(folder / "rollouts" / f"step-{step:06d}.jsonl")]


def test_every_transport_gives_the_same_responses(runs: dict[str, Path]) -> None:
    first, *others = (responses(runs[transport]) for transport in TRANSPORTS)
    assert first
    assert all(other == first for other in others)


def test_every_part_of_an_update_is_in_the_metrics(runs: dict[str, Path]) -> None:
    for folder in runs.values():
        for line in steps_of(folder):
            assert {"sync/bytes", "sync/total_s", "sync/gather_s", "sync/write_s", "sync/checksum_s"} <= line.keys()


def test_a_delta_sends_less(runs: dict[str, Path]) -> None:
    sent = {transport: [line["sync/bytes"] for line in steps_of(runs[transport])] for transport in TRANSPORTS}
    assert all(changes < whole / 2 for changes, whole in zip(sent["delta"], sent["object_store"], strict=True))
