"""What the controller does around the loss: filters and refills, an adaptive KL penalty, the critic."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from composing import with_leaves
from experiences import make_experience
from model_folders import make_model_folder
from rich.console import Console
from training_batches import process_group, random_batch

from knobs.table import Actors, Bench, entry, updating_trainer
from rlsys.algorithms.requirements import critic_objective
from rlsys.batch import jagged
from rlsys.cluster.session import Session
from rlsys.cluster.topology import one_host
from rlsys.controller import collecting, starting
from rlsys.engines.train.fsdp import FsdpEngine
from rlsys.tracking.display import PlainDisplay
from rlsys.workers.experience import Experience
from rlsys.workers.waits import StopFlag

# --- filters ---


@entry("algorithm.filters", "algorithm.max_refills")
def filters(bench: Bench) -> None:
    asked: list[int] = []

    def play(prompts: Any, *_: Any, **__: Any) -> Experience:
        """Two groups, whatever is asked for: one whose rewards differ, one whose rewards are all 1."""
        asked.append(len(prompts))
        return make_experience([[2, 2], [2, 2]], rewards=[0.0, 1.0, 1.0, 1.0])

    bench.monkeypatch.setattr(collecting, "collect", play)

    with bench.job("data.prompts_per_step=2") as job:
        plain = job.config

        def rounds(filters: dict[str, Any], max_refills: int) -> tuple[list[int], int]:
            """What was asked for, and how many samples the step has."""
            asked.clear()
            leaves = {"algorithm.filters": filters, "algorithm.max_refills": max_refills}
            job.config = with_leaves(plain, leaves)
            job.begin()
            experience = job.experience()
            job.close()
            return list(asked), len(experience)

        assert rounds({}, 2) == ([2], 4)
        assert rounds({"zero_variance": {}}, 0) == ([2], 2)
        # the groups of all rounds have one name here, so that one stays missing
        assert rounds({"zero_variance": {}}, 2) == ([2, 1, 1], 6)
        nothing_passes = {"difficulty": {"low": None, "high": 0.4}}
        assert rounds(nothing_passes, 1) == ([2, 2], 4), "the step is as it was sampled"


# --- the KL penalty ---


@entry("algorithm.kl.target", "algorithm.kl.horizon")
def kl_target(bench: Bench) -> None:
    experience = make_experience([[2] * 4] * 8, rewards=[0.0, 1.0] * 16)
    with bench.job("algorithm.kl.coef=0.1", "algorithm.kl.placement=reward", trainer=updating_trainer()) as job:
        plain, start = job.config, job.state

        def second(**changes: Any) -> float:
            """The coefficient in the second step, after a first one with a KL of 2 nats a token."""
            job.config = with_leaves(plain, {f"algorithm.kl.{name}": value for name, value in changes.items()})
            job.state = start
            job._rows = [[np.arange(len(experience))]]
            for _ in range(2):
                job.begin_step()
                job.update(experience, job.advantages(experience, np.linspace(2.0, 6.0, len(experience))))
            return job._metrics["policy/kl_coef"]

        assert second() == 0.1, "fixed"
        assert second(target=0.1, horizon=320) == pytest.approx(0.1 * 1.02)
        assert second(target=10.0, horizon=320) == pytest.approx(0.1 * 0.98)
        assert second(target=0.1, horizon=3200) == pytest.approx(0.1 * 1.002)


# --- the critic ---


class Group(Actors):
    """A worker group that is started without a cluster."""

    def __init__(self, *_: Any):
        super().__init__({"starting": lambda *_, **__: [], "free_and_total": lambda: (1 << 40, 1 << 40)})


def started_critic(bench: Bench, *overrides: str) -> FsdpEngine:
    """The critic's engine, loaded as the run tells its ranks to."""
    inputs = bench.inputs(*overrides)
    session = Session(one_host(gpus=0, cores=1), local=True, logs="")
    display = PlainDisplay(Console(file=io.StringIO()), title="", steps=1)
    observers: Any = SimpleNamespace(
        display=display, folder=SimpleNamespace(path=bench.tmp, log_event=lambda *_, **__: None)
    )
    with starting.started(inputs.config, session, inputs, StopFlag(), observers, None) as made:
        critic: Any = made.groups.critic
        ((arguments, options),) = critic.given("starting")
    return FsdpEngine.load(*arguments, **options, critic=True)


def critic_batch() -> Any:
    batch = random_batch()
    lengths = jagged.lengths(batch.batch["response_ids"])
    generator = torch.Generator().manual_seed(3)
    for name in ("values", "returns"):
        batch.batch[name] = jagged.from_values(torch.randn(int(lengths.sum()), generator=generator), lengths)
    return batch


GAE = ["algorithm.advantage=gae"]
LEAF = "trainer.critic.value_clip"


@entry("trainer.critic.path", "trainer.critic.lr", "trainer.critic.value_clip")
def critic(bench: Bench) -> None:
    for name in ("TrainerGroup", "RolloutGroup", "RewardGroup", "ReferenceGroup", "CriticGroup"):
        bench.monkeypatch.setattr(starting, name, Group)
    bench.monkeypatch.setattr(starting, "Placement", lambda *_, **__: SimpleNamespace(release=lambda: None))
    other = make_model_folder(bench.tmp / "other", hidden=96)
    options = [*GAE, f"model.path={bench.model}"]
    with process_group():
        plain = started_critic(bench, *options)
        changed = started_critic(bench, *options, f"trainer.critic.path={other}", "trainer.critic.lr=0.5")
        assert changed.parameter_count > plain.parameter_count
        config = bench.config(*options)
        losses = [
            plain.forward_backward(critic_batch(), critic_objective(with_leaves(config, {LEAF: clip})))["loss"]
            for clip in (None, 0.5, 0.1)
        ]
        assert losses == sorted(set(losses)), "the tighter the bound, the larger the loss"
        changed.forward_backward(critic_batch(), critic_objective(config))
        assert [engine.optim_step()["lr"] for engine in (plain, changed)] == [1e-5, 0.5]


@entry("trainer.critic.warmup_steps")
def critic_warmup(bench: Bench) -> None:
    experience = make_experience([[2, 2]] * 4)
    with bench.job("data.prompts_per_step=4", *GAE) as job:
        plain, start = job.config, job.state

        def updates(warmup: int) -> list[int]:
            """How often critic and policy have been updated after two steps."""
            groups = updating_trainer(), updating_trainer()
            job.groups.critic, job.groups.trainer = groups  # type: ignore[assignment]
            job.config, job.state = with_leaves(plain, {"trainer.critic.warmup_steps": warmup}), start
            for _ in range(2):
                job.begin_step()
                job._rows = [[np.arange(len(experience))]]
                job.update(experience, np.zeros(len(experience)))
            return [len(group.given("optim_step")) for group in groups]

        assert updates(0) == [2, 2]
        assert updates(1) == [2, 1]
