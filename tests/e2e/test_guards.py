"""What ends a run, or a step, that has gone wrong: losses that are not finite, channels without input, collapse."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from model_folders import make_model_folder
from one_process import Run, one_process
from running import files_below, only_run, read_jsonl, said_at_the_end, steps_of, tensors_below, write_jsonl

from rlsys.batch import DataProto, jagged
from rlsys.checkpoint.store import CheckpointStore

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

TINY = (
    "steps=3",
    "data.prompts_per_step=4",
    "rollout.samples_per_prompt=4",
    "eval.every=0",
    "trainer.lr=1e-2",
    "checkpoint.every=1",
    "checkpoint.keep_last=9",
    "checkpoint.export=false",
)
DIGITS = "reward.parts.correct.use=rewards_for_runs.digits"
# In the second step one group's advantages are above what the loss is defined for.
PROMPTS = ["a", "b", "c", "d", "e", "f", "spike", "g", "h", "i", "j", "k"]
FROM_FILE = ("data=file", "data.shuffle=false", "data.max_prompt_tokens=16", "data.max_response_tokens=8")
FRAGILE = (
    *FROM_FILE,
    "reward.parts.correct.use=rewards_for_runs.spiky_digits",
    "algorithm.loss=plugins_for_runs.fragile",
    "+algorithm.loss_options.limit=1.5",
    "+algorithm.advantage_options.std=none",
)


MODEL = "model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def run(ray_cluster: None) -> Iterator[Run]:
    with one_process() as run:
        yield run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    root = tmp_path_factory.mktemp("inputs")
    write_jsonl(root / "rows.jsonl", [{"prompt": prompt, "answer": "1"} for prompt in PROMPTS])
    return (f"model.path={make_model_folder(root / 'model')}", f"data.path={root / 'rows.jsonl'}")


def weights(folder: Path, step: int) -> dict[str, bytes]:
    return tensors_below(folder / "checkpoints" / f"step-{step:08d}")


def test_a_step_whose_loss_is_not_a_number_is_skipped_and_kept_for_inspection(
    run: Run, inputs: tuple[str, ...], tmp_path: Path
) -> None:
    assert run(tmp_path, *TINY, *FRAGILE, *inputs) == 0
    folder = only_run(tmp_path)
    assert [line["train/skipped"] for line in steps_of(folder)] == [0, 1, 0]
    assert weights(folder, 1) == weights(folder, 2)
    assert weights(folder, 3)[MODEL] != weights(folder, 2)[MODEL]
    (kept,) = (folder / "skipped").rglob("*.safetensors")
    assert kept.relative_to(folder / "skipped").as_posix() == "step-000002-update-0/trainer-0.safetensors"
    batch = DataProto.load(kept)
    assert len(batch) == 16
    assert sum(task["prompt"] == "spike" for task in batch.non_tensor_batch["task"]) == 4
    assert jagged.values(batch.batch["advantages"]).max() > 1.5
    assert torch.isfinite(jagged.values(batch.batch["rollout_logprobs"])).all()
    (event,) = [event for event in read_jsonl(folder / "events.jsonl") if event["kind"] == "skipped"]
    assert event["step"] == 2


def test_more_skipped_updates_than_allowed_end_the_run(run: Run, inputs: tuple[str, ...], tmp_path: Path) -> None:
    assert run(tmp_path, *TINY, *FRAGILE, *inputs, "guards.max_skipped=0") == 1
    folder = only_run(tmp_path)
    assert "guards.max_skipped allows 0" in said_at_the_end(folder)
    assert CheckpointStore(folder / "checkpoints", 1, False).latest().step == 1  # type: ignore[union-attr]
    assert "skipped/step-000002-update-0/trainer-0.safetensors" in files_below(folder)


def test_a_channel_that_finds_no_input_ends_the_run_and_says_why(
    run: Run, inputs: tuple[str, ...], tmp_path: Path
) -> None:
    """The rows of the file have no field ``hint``."""
    overrides = (*FROM_FILE, DIGITS, "hints.source=[hint]", "hints.max_tokens=100", "guards.dead_steps=2")
    assert run(tmp_path, *TINY, *inputs, *overrides, recipe="composer_qwen") == 2
    said = said_at_the_end(only_run(tmp_path))
    assert "'distillation' found no input in 2 steps" in said
    assert "hints.source" in said
    assert [line["distillation/live_fraction"] for line in steps_of(only_run(tmp_path))] == [0, 0]


@pytest.mark.parametrize(("on_collapse", "status", "steps"), [("alert", 0, 3), ("stop", 1, 1)])
def test_a_collapse_is_an_alert_or_the_end(
    on_collapse: str, status: int, steps: int, run: Run, inputs: tuple[str, ...], tmp_path: Path
) -> None:
    limits = ("+guards.limits={kl: 1e-6, truncated: null}", f"guards.on_collapse={on_collapse}")
    assert run(tmp_path, *TINY, inputs[0], *limits, DIGITS, "trainer.updates_per_step=2") == status
    folder = only_run(tmp_path)
    lines = steps_of(folder)
    assert len(lines) == steps
    assert lines[0]["alerts/kl"] == 1
    alerts = [event["text"] for event in read_jsonl(folder / "events.jsonl") if event["kind"] == "alert"]
    assert any("policy/approx_kl" in text for text in alerts)
    assert ("collapsed at step 1" in said_at_the_end(folder)) is (on_collapse == "stop")
