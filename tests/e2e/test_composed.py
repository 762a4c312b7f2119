"""GRPO, self-distillation and replayed preferences in one step of two trainer ranks: each channel finds what rollouts
hold for it, and a run that died goes on bit for bit."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from model_folders import make_model_folder
from running import (
    RunJob,
    comparable,
    died_after,
    job_process,
    only_run,
    read_jsonl,
    steps_of,
    tensors_below,
    write_jsonl,
)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

STEPS, DIED_AFTER, GROUPS, SAMPLES = 4, 2, 4, 4
THRESHOLD, MIN_GAP = 0.5, 0.6
OVERRIDES = (
    "rollout=torch",
    f"steps={STEPS}",
    f"data.prompts_per_step={GROUPS}",
    f"rollout.samples_per_prompt={SAMPLES}",
    "reward.parts.correct.use=rewards_for_runs.digits",
    "trainer.ranks=2",
    "trainer.lr=1e-2",
    "trainer.micro_batch_tokens=288",
    "hints.max_tokens=64",
    "algorithm.distillation.divergence=taid",
    f"hints.threshold={THRESHOLD}",
    "eval.every=2",
    "eval.problems=4",
    "checkpoint.every=1",
    "checkpoint.keep_last=9",
    "tracker.rollouts=64",
)
FROM_GROUPS = (f"replay.min_gap={MIN_GAP}",)
FROM_FILE = ("replay.source=file", "replay.pairs_per_step=3", "trainer.updates_per_step=2")


class Whole(NamedTuple):
    """A run that was never interrupted. overrides: of it."""

    folder: Path
    overrides: tuple[str, ...]


def pair_rows(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{i:02d}+{i + 1:02d}=", "chosen": f"{2 * i + 1:03d}", "rejected": "abc"} for i in range(count)]


@pytest.fixture(scope="module")
def run_job() -> Iterator[RunJob]:
    with job_process() as run:
        yield run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A model, and pairs to train on and to measure; overrides."""
    root = tmp_path_factory.mktemp("inputs")
    model = make_model_folder(root / "model", max_length=256)
    held_out = write_jsonl(root / "held_out.jsonl", pair_rows(3))
    return (f"model.path={model}", f"replay.eval_path={held_out}")


@pytest.fixture(scope="module")
def whole(run_job: RunJob, inputs: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Whole:
    root, overrides = tmp_path_factory.mktemp("whole"), (*OVERRIDES, *FROM_GROUPS, *inputs)
    assert run_job(root, *overrides, recipe="composer_qwen") == 0
    return Whole(only_run(root), overrides)


def controller_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "controller.json").read_text())["extra"]


def groups_of(folder: Path, step: int) -> list[list[dict[str, Any]]]:
    rows = read_jsonl(folder / "rollouts" / f"step-{step:06d}.jsonl")
    assert len(rows) == GROUPS * SAMPLES
    return [list(rows) for _, rows in groupby(rows, key=lambda row: row["uid"])]


def test_every_channel_is_live_as_far_as_the_rollouts_say(whole: Whole) -> None:
    taught, paired = [], []
    for step in steps_of(whole.folder):
        groups = groups_of(whole.folder, step["step"])
        rewards = [[row["reward"] for row in group] for group in groups]
        solved = [[reward >= THRESHOLD for reward in group] for group in rewards]
        live = [any(s for j, s in enumerate(group) if j != i) for group in solved for i in range(len(group))]
        pairs = [max(group) - min(group) >= MIN_GAP for group in rewards]
        assert step["policy/live_fraction"] == 1
        assert step["distillation/live_fraction"] == sum(live) / len(live) == step["hints/live"] / len(live)
        assert step["preference/live_fraction"] == sum(pairs) / GROUPS
        assert step["preference/pairs"] == sum(pairs)
        lengths = [sum(row["response_mask"]) for group in groups for row in group]
        assert step["policy/tokens"] == sum(lengths)
        assert step["distillation/tokens"] == sum(n for n, here in zip(lengths, live, strict=True) if here)
        for channel, weight in (("policy", 1.0), ("distillation", 0.1), ("preference", 0.05)):
            assert math.isfinite(step[f"{channel}/loss"])
            assert step[f"{channel}/weight"] == weight
        taught.append(sum(live))
        paired.append(sum(pairs))
    # it would prove little if all of them, or none, were live
    assert 0 < min(taught) < GROUPS * SAMPLES
    assert sum(paired) > 0
    assert min(paired) < GROUPS


def test_the_loss_is_the_weighted_sum_of_its_channels(whole: Whole) -> None:
    for step in steps_of(whole.folder):
        parts = sum(step[f"{name}/weight"] * step[f"{name}/loss"] for name in ("policy", "distillation", "preference"))
        assert step["train/loss"] == pytest.approx(parts, abs=1e-6)


def test_held_out_pairs_are_measured_beside_the_problems(whole: Whole) -> None:
    measured = {line["step"]: line for line in comparable(whole.folder) if "eval/pair_margin" in line}
    assert sorted(measured) == [0, 2, 4]
    assert measured[0]["eval/pair_margin"] == pytest.approx(0, abs=1e-4)  # the policy still is the reference
    assert measured[4]["eval/pair_margin"] != measured[2]["eval/pair_margin"] != 0


def test_a_checkpoint_holds_teacher_and_taid(whole: Whole) -> None:
    checkpoint = whole.folder / "checkpoints" / f"step-{STEPS:08d}"
    for rank in ("00001-of-00002", "00002-of-00002"):
        teacher = (checkpoint / f"teacher-{rank}.safetensors").read_bytes()
        first = whole.folder / "checkpoints" / "step-00000001"
        assert teacher != (first / f"teacher-{rank}.safetensors").read_bytes()
        assert teacher != (checkpoint / f"model-{rank}.safetensors").read_bytes()
    steps = steps_of(whole.folder)
    shown = [line["distillation/t"] for line in steps]
    assert shown == sorted(shown)
    assert shown[-1] > shown[0]
    taid = controller_state(checkpoint)["taid"]
    assert taid["last_loss"] == steps[-1]["distillation/loss"]
    assert taid["t"] >= shown[-1]


def check_resumed(whole: Whole, run_job: RunJob, root: Path) -> Path:
    folder = died_after(DIED_AFTER, whole.folder, root)
    assert run_job(root, *whole.overrides, f"resume={folder}", recipe="composer_qwen") == 0
    assert comparable(folder) == comparable(whole.folder)
    assert tensors_below(folder / "checkpoints").keys() == tensors_below(whole.folder / "checkpoints").keys()
    for name, content in tensors_below(whole.folder).items():
        assert (folder / name).read_bytes() == content, name
    for step in range(1, STEPS + 1):
        name = f"rollouts/step-{step:06d}.jsonl"
        assert read_jsonl(folder / name) == read_jsonl(whole.folder / name)
    last = f"checkpoints/step-{STEPS:08d}"
    assert controller_state(folder / last) == controller_state(whole.folder / last)
    return folder


@pytest.mark.slow
def test_a_run_that_died_goes_on_bit_for_bit_on_two_ranks(whole: Whole, run_job: RunJob, tmp_path: Path) -> None:
    folder = check_resumed(whole, run_job, tmp_path)
    assert (folder / "model" / "model.safetensors").is_file()
    assert [event["kind"] for event in read_jsonl(folder / "events.jsonl")].count("resume") == 1


@pytest.mark.slow
def test_pairs_of_a_file_go_on_where_they_stopped(
    run_job: RunJob, inputs: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Seven pairs, three a step: the order is a new one in the third step."""
    root = tmp_path_factory.mktemp("file")
    file = write_jsonl(root / "pairs.jsonl", pair_rows(7))
    overrides = (*OVERRIDES, *FROM_FILE, f"replay.path={file}", *inputs)
    assert run_job(root, *overrides, recipe="composer_qwen") == 0
    whole = Whole(only_run(root), overrides)
    for line in steps_of(whole.folder):
        assert line["preference/live_fraction"] == 1
        assert line["preference/pairs"] == 3
    positions = [controller_state(path)["pairs"] for path in sorted((whole.folder / "checkpoints").iterdir())]
    assert len({json.dumps(position) for position in positions}) == STEPS
    check_resumed(whole, run_job, tmp_path_factory.mktemp("resumed"))
