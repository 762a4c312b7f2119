"""What a job decides without asking an actor."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
from composing import run_config
from experiences import make_experience
from training_batches import random_batch

from rlsys.algorithms.requirements import needs_old_logprobs, penalises_kl
from rlsys.checkpoint.controller_state import ControllerState
from rlsys.config.errors import UserError
from rlsys.controller.job import Job, Observers
from rlsys.controller.metrics import experience_metrics
from rlsys.engines.sync.verify import SyncError
from rlsys.replay.pair_files import Pair
from rlsys.replay.pairs import PairStream
from rlsys.workers.trainer import Slice, TrainerWorker
from rlsys.workers.waits import StopFlag

KL_IN_REWARD = ("algorithm.kl.coef=0.1", "algorithm.kl.placement=reward")


def make_job(*overrides: str, step: int = 0) -> Job:
    """A job without actors, data and observers: what is tested here needs none."""
    absent: Any = None
    return Job(
        config=run_config("rollout=torch", *overrides),
        groups=absent,
        prompts=absent,
        held_out=None,
        store=absent,
        observers=absent,
        stop=StopFlag(),
        state=ControllerState(step=step, lineage=0),
    )


@pytest.mark.parametrize(
    ("overrides", "own_pass"),
    [
        ((), False),
        (("algorithm.kl.coef=0.1",), False),
        (("trainer.updates_per_step=2",), True),
        (("trainer.updates_per_step=2", "algorithm.old_logprobs=sampler"), False),
        (KL_IN_REWARD, True),
        ((*KL_IN_REWARD, "algorithm.old_logprobs=sampler"), True),
    ],
)
def test_old_logprobs_take_a_pass_of_their_own_only_where_nothing_else_has_them(
    overrides: tuple[str, ...], own_pass: bool
) -> None:
    assert needs_old_logprobs(run_config(*overrides)) is own_pass


def test_kl_is_a_penalty_on_the_reward_only_with_a_coefficient() -> None:
    assert penalises_kl(run_config(*KL_IN_REWARD))
    assert not penalises_kl(run_config("algorithm.kl.placement=reward"))
    assert not penalises_kl(run_config("algorithm.kl.coef=0.1"))


# --- advantages ---

REWARDS = [0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0]
EXPERIENCE = make_experience([[1] * 4, [1] * 4], shards=2, rewards=REWARDS)


def test_advantages_are_relative_to_the_group() -> None:
    advantages = make_job().advantages(EXPERIENCE, None)
    assert advantages.reshape(2, 4).sum(axis=1) == pytest.approx([0, 0])
    assert ((advantages > 0) == (np.array(REWARDS) > 0)).all()


def test_permuted_rewards_change_advantages_and_not_the_rewards_that_are_logged() -> None:
    job, plain = make_job("reward.permute=true"), make_job()
    before = EXPERIENCE.rewards.copy()
    permuted = job.advantages(EXPERIENCE, None)
    assert not np.array_equal(permuted, plain.advantages(EXPERIENCE, None))
    assert (EXPERIENCE.rewards == before).all()
    logged = [experience_metrics(EXPERIENCE, config, step=0) for config in (job.config, plain.config)]
    assert logged[0] == logged[1]
    assert np.array_equal(permuted, job.advantages(EXPERIENCE, None)), "the permutation is the step's own, not chance"
    other_step = make_job("reward.permute=true", step=1)
    assert not np.array_equal(permuted, other_step.advantages(EXPERIENCE, None))


def test_kl_to_the_reference_is_taken_off_the_reward() -> None:
    """A reward of 1 with a KL of 10 at 0.1 is worth as much as a reward of 0 without."""
    reference_kl = np.array([0.0, 10.0, 0.0, 10.0, 0.0, 0.0, 0.0, 0.0])
    advantages = make_job(*KL_IN_REWARD).advantages(EXPERIENCE, reference_kl)
    assert advantages[:4] == pytest.approx([0, 0, 0, 0], abs=1e-6)
    assert (advantages[4:6] > 0).all()


# --- pairs of a file ---


@pytest.mark.ray
def test_a_rank_without_pairs_has_their_columns(ray_cluster: None) -> None:
    """Two pairs over two updates of three ranks: most have none, and still take part in the loss."""
    job = make_job("trainer.updates_per_step=2")
    pairs = [Pair(f"p{i}", [5, 6], [7, 8, 1], [9, 1], f"pairs.jsonl:{i + 1}") for i in range(2)]
    job.pairs = PairStream(pairs, pairs_per_step=2, seed=0)
    job.groups = SimpleNamespace(trainer=range(3), reference=None, fleets=None)  # type: ignore[assignment]
    samples = ray.put(random_batch(rows=4))
    found = []
    for rank, slices in enumerate(job._next_pairs()):
        worker = TrainerWorker(rank, 3)
        worker.load_batch([[Slice((samples,), np.array([u]))] for u in range(2)], pairs=slices)
        for batch in worker._updates:
            columns = batch.batch
            assert len(columns["response_ids"].offsets()) == len(columns["chosen_ids"].offsets()) == len(batch) + 1
            found.append(int(columns["pair_slot"].sum()))
    assert sorted(found) == [0, 0, 0, 0, 1, 1]


# --- a run that ends between an update and the end of its step ---


class Recorder:
    """Stands for folder, trackers, display and memory: keeps what it is given."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.peak_bytes = 0

    def log_metrics(self, metrics: dict[str, Any], *, step: int, lineage: int) -> None:
        self.lines.append({"step": step, **metrics})

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def observed(job: Job) -> Recorder:
    recorder = Recorder()
    job.observers = Observers(recorder, recorder, recorder, recorder)  # type: ignore[arg-type]
    return recorder


def test_a_trained_step_is_written_even_when_what_follows_it_is_interrupted() -> None:
    job = make_job(step=3)
    nobody = SimpleNamespace(
        present=list, trainer=None, critic=None, rollout=None, fleets=None
    )  # no actors to be asked for figures
    job.groups = nobody  # type: ignore[assignment]
    recorder = observed(job)
    job.begin_step()
    job._unwritten = (EXPERIENCE, np.zeros(len(REWARDS)))  # as the update leaves it; then the sync was interrupted
    job._metrics = {"mismatch/logprob_abs_mean": 0.0, "policy/live_fraction": 1.0}
    job.end_step()
    job.end_step()  # whoever ends the run calls it too
    assert [line["step"] for line in recorder.lines] == [3]
    assert recorder.lines[0]["reward/mean"] == pytest.approx(0.5)


def test_a_channel_without_input_for_many_steps_stops_the_run() -> None:
    job = make_job()
    for _ in range(19):
        job._stop_on_dead_channel({"policy/live_fraction": 0.0})
    job._stop_on_dead_channel({"policy/live_fraction": 0.1})  # one live step starts the count anew
    for _ in range(19):
        job._stop_on_dead_channel({"policy/live_fraction": 0.0})
    with pytest.raises(UserError, match="channel 'policy' found no input in 20 steps"):
        job._stop_on_dead_channel({"policy/live_fraction": 0.0})


def test_hybrid_advantages_without_a_teacher_stop_the_run_after_as_many_steps() -> None:
    job = make_job("guards.dead_steps=3")
    dead = {"policy/live_fraction": 1.0, "policy/hybrid/live_fraction": 0.0}
    for metrics in (dead, dead, dead | {"policy/hybrid/live_fraction": 0.1}, dead, dead):
        job._stop_on_dead_channel(metrics)
    with pytest.raises(UserError, match=r"'policy/hybrid' found no input in 3 steps: .*hints\.source") as error:
        job._stop_on_dead_channel(dead)
    assert "algorithm.distillation.hybrid" in (error.value.fix or "")


def test_samples_of_other_weights_are_not_trained_on() -> None:
    make_job(step=0)._require_fresh(EXPERIENCE)
    with pytest.raises(SyncError, match="a sample comes from weights"):
        make_job(step=1)._require_fresh(EXPERIENCE)
