"""Where a resumed run goes on, and in which lineage."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from composing import run_config

from rlsys.checkpoint.controller_state import ControllerState
from rlsys.checkpoint.store import CheckpointStore
from rlsys.config.errors import UserError
from rlsys.config.schema import RunConfig
from rlsys.controller.resume import find_origin, folders_left, last_origin
from rlsys.tracking.run import RunFolder


def config_at(root: Path, *overrides: str) -> RunConfig:
    return run_config(f"run_root={root}", "checkpoint.keep_last=9", *overrides)


def make_run(root: Path, steps: int, *, checkpoints: tuple[int, ...], lineage: int = 0) -> RunFolder:
    with RunFolder.create(root, "grpo_qwen", config_at(root)) as run:
        extend(run, range(1, steps + 1), checkpoints=checkpoints, lineage=lineage)
    return run


def extend(run: RunFolder, steps: range, *, checkpoints: tuple[int, ...], lineage: int) -> None:
    """What a run leaves of these steps: lines of metrics and checkpoints."""
    store = CheckpointStore(run.checkpoints, 9, True)
    for step in steps:
        run.log_metrics({"reward/mean": 0.5}, step=step, lineage=lineage)
        if step in checkpoints:
            partial = store.begin(step)
            (partial / "weights").write_bytes(bytes([step]))
            ControllerState(step=step, lineage=lineage).write(partial)
            store.commit(partial, step=step, lineage=lineage)
    run.close()


def where(config: RunConfig) -> tuple[int, int]:
    origin = find_origin(config)
    assert origin is not None
    return origin.state.lineage, origin.state.step


def test_without_resume_every_run_is_new(tmp_path: Path) -> None:
    make_run(tmp_path, 4, checkpoints=(4,))
    assert find_origin(config_at(tmp_path)) is None


def test_auto_is_a_new_run_where_there_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    assert find_origin(config_at(tmp_path, "resume=auto")) is None
    run = make_run(tmp_path, 1, checkpoints=())
    assert find_origin(config_at(tmp_path, "resume=auto")) is None
    with pytest.raises(UserError, match="no checkpoint"):
        find_origin(config_at(tmp_path, f"resume={run.path}"))


def test_where_a_driver_before_this_one_may_have_left_processes(tmp_path: Path) -> None:
    """One whose run is still being written to is alive, and with it its actors."""
    make_run(tmp_path, 4, checkpoints=(4,))
    given_up = make_run(tmp_path, 1, checkpoints=())
    auto = config_at(tmp_path, "resume=auto")
    with RunFolder.create(tmp_path, "grpo_qwen", auto) as mine:
        assert folders_left(auto, mine.path) == [mine.path, given_up.path]
        assert folders_left(config_at(tmp_path), mine.path) == [mine.path]
        with RunFolder.open(given_up.path):
            assert given_up.path not in folders_left(auto, mine.path)


def test_a_run_that_stopped_at_its_checkpoint_stays_in_its_lineage(tmp_path: Path) -> None:
    run = make_run(tmp_path, 4, checkpoints=(2, 4))
    assert where(config_at(tmp_path, "resume=auto")) == (0, 4)
    assert where(config_at(tmp_path, f"resume={run.path}")) == (0, 4)


def test_steps_past_the_checkpoint_are_abandoned_in_a_new_lineage(tmp_path: Path) -> None:
    """Their weights may have been used: what is computed now must not be taken for them."""
    make_run(tmp_path, 5, checkpoints=(2, 4))
    assert where(config_at(tmp_path, "resume=auto")) == (1, 4)


def test_a_job_that_broke_off_goes_on_as_a_resumed_run_would(tmp_path: Path) -> None:
    """In the same process, which holds the folder's lock: the run cannot be opened a second time."""
    run = make_run(tmp_path, 5, checkpoints=(2, 4))
    with RunFolder.open(run.path) as folder:
        origin = last_origin(folder, config_at(tmp_path), ControllerState(step=0, lineage=0))
    assert (origin.state.lineage, origin.state.step, origin.folder) == (1, 4, folder)
    assert origin.checkpoint == run.checkpoints / "step-00000004"


def test_a_job_that_broke_off_before_its_first_checkpoint_begins_anew_in_a_new_lineage(tmp_path: Path) -> None:
    beginning = ControllerState(step=0, lineage=0, data={"position": 3})
    run = make_run(tmp_path, 0, checkpoints=())
    untouched = last_origin(run, config_at(tmp_path), beginning)
    assert (untouched.checkpoint, untouched.state) == (None, beginning)
    extend(run, range(1, 4), checkpoints=(), lineage=0)
    begun = last_origin(run, config_at(tmp_path), beginning)
    assert (begun.checkpoint, begun.state) == (None, replace(beginning, lineage=1))


def test_rolling_back_is_a_new_lineage_each_time(tmp_path: Path) -> None:
    run = make_run(tmp_path, 4, checkpoints=(2, 4))
    back = f"resume={run.checkpoints / 'step-00000002'}"
    assert where(config_at(tmp_path, back)) == (1, 2)
    extend(run, range(3, 4), checkpoints=(3,), lineage=1)
    assert where(config_at(tmp_path, "resume=auto")) == (1, 3), "newer than step 4 of the lineage that was left"
    assert where(config_at(tmp_path, back)) == (2, 2)
    assert where(config_at(tmp_path, f"resume={run.checkpoints / 'step-00000004'}")) == (2, 4)


def test_checkpoints_without_metrics_count_too(tmp_path: Path) -> None:
    """metrics.jsonl is for people, who may have moved it: weights of the checkpoints have existed all the same."""
    run = make_run(tmp_path, 4, checkpoints=(2, 4))
    run.metrics.unlink()
    assert where(config_at(tmp_path, f"resume={run.checkpoints / 'step-00000002'}")) == (1, 2)


@pytest.mark.parametrize("override", ["trainer.lr=1e-5", "seed=1", "data.prompts_per_step=16", "rollout=torch"])
def test_a_run_goes_on_only_as_it_was_started(override: str, tmp_path: Path) -> None:
    make_run(tmp_path, 4, checkpoints=(4,))
    with pytest.raises(UserError, match="the run was made with"):
        find_origin(config_at(tmp_path, "resume=auto", override))


@pytest.mark.parametrize(
    "override",
    [
        "steps=99",
        "cluster.threads=1",
        "deadlines.train=5",
        "reward.workers=2",
        "checkpoint.every=1",
        "rollout.workers=2",
        "rollout.tensor_parallel=2",
        "rollout.gpu_memory_fraction=0.3",
    ],
)
def test_what_does_not_change_the_remaining_steps_may_change(override: str, tmp_path: Path) -> None:
    make_run(tmp_path, 4, checkpoints=(4,))
    assert where(config_at(tmp_path, "resume=auto", override)) == (0, 4)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_offered(tmp_path: Path) -> None:
    run = make_run(tmp_path, 4, checkpoints=(2, 4))
    (run.checkpoints / "step-00000004" / "weights").write_bytes(b"?")
    with pytest.raises(UserError, match="step-00000002"):
        find_origin(config_at(tmp_path, "resume=auto"))
    shutil.rmtree(run.checkpoints / "step-00000004")
    assert where(config_at(tmp_path, "resume=auto")) == (1, 2)


def test_the_state_is_the_checkpoints_but_for_the_lineage(tmp_path: Path) -> None:
    run = make_run(tmp_path, 5, checkpoints=(4,))
    stored = ControllerState.read(run.checkpoints / "step-00000004")
    origin = find_origin(config_at(tmp_path, "resume=auto"))
    assert origin is not None
    assert origin.state == replace(stored, lineage=1)
