"""A training job: the worker groups, and the stages that the loop composes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlsys.algorithms.advantages import estimate
from rlsys.batch import DataProto
from rlsys.batch.versions import WeightVersion
from rlsys.checkpoint.controller_state import ControllerState
from rlsys.checkpoint.store import CheckpointStore
from rlsys.config.errors import UserError
from rlsys.config.schema import RunConfig
from rlsys.controller.metrics import combine_updates, experience_metrics, mismatch_metrics
from rlsys.data.sampler import PromptStream
from rlsys.engines.sync.verify import SyncError
from rlsys.evals.heldout import evaluate
from rlsys.rewards.budget import FailureBudget
from rlsys.tracking import alerts
from rlsys.tracking.display import Display
from rlsys.tracking.memory import MemoryMonitor
from rlsys.tracking.run import RunFolder
from rlsys.tracking.trackers import TrackerSet
from rlsys.workers.experience import Experience, assign, collect
from rlsys.workers.groups import ReferenceGroup, RewardGroup, RolloutGroup, TrainerGroup
from rlsys.workers.rollout import SampleRequest
from rlsys.workers.waits import StopFlag

_DEAD_STEPS = 20  # steps without input after which a loss channel stops the run
_UPDATE_GRACE_S = 10.0  # an update that has begun may finish, so that the checkpoint is that of a whole step


@dataclass
class Groups:
    """The four kinds of actor; no reference where nothing reads it."""

    trainer: TrainerGroup
    rollout: RolloutGroup
    reward: RewardGroup
    reference: ReferenceGroup | None


@dataclass
class Observers:
    """Who watches the run; none of them can change it."""

    folder: RunFolder
    trackers: TrackerSet
    display: Display
    memory: MemoryMonitor


@dataclass
class Job:
    """State of a run between the stages of a step.

    state: where the last whole step left data, versions and best figure.
    whole: False while weights and optimiser are between two steps.
    """

    config: RunConfig
    groups: Groups
    prompts: PromptStream
    held_out: DataProto | None
    store: CheckpointStore
    observers: Observers
    stop: StopFlag
    state: ControllerState
    whole: bool = True
    _rows: list[list[np.ndarray]] = field(default_factory=list)
    _metrics: dict[str, float] = field(default_factory=dict)
    _seconds: dict[str, float] = field(default_factory=dict)
    _began: float = 0.0
    _unwritten: tuple[Experience, np.ndarray] | None = None
    _dead_steps: Counter[str] = field(default_factory=Counter)
    _saved_step: int | None = None

    # --- the stages of a step, in the order of the data flow ---

    def begin_step(self) -> None:
        # A checkpoint is written after its step's line: its time is in the next one.
        self._seconds = {name: s for name, s in self._seconds.items() if name == "checkpoint"}
        self._metrics, self._began = {}, time.monotonic()

    def next_prompts(self) -> DataProto:
        with self._phase("prompts"):
            return self.prompts.next_batch()

    def collect(self, prompts: DataProto) -> Experience:
        """Samples, scores and reference log-probs of the step's prompt groups.

        Raises:
            RewardBudgetExceeded: too many rewards failed.
        """
        self.observers.display.phase("rollout")
        request = SampleRequest(
            samples=self.config.rollout.samples_per_prompt,
            temperature=self.config.rollout.temperature,
            max_tokens=self.config.data.max_response_tokens,
            run_seed=self.config.seed,
        )
        groups = self.groups
        experience = collect(
            prompts,
            request,
            groups.rollout,
            groups.reward,
            groups.reference,
            self.config.deadlines,
            self.stop,
            record_rows=self._recorded_rows(),
            # The torch sampler's samples depend on its batch in the last bits: one shard a worker makes runs
            # repeatable.
            **({"shards_per_worker": 1} if self.config.rollout.engine == "torch" else {}),
        )
        self._seconds |= experience.seconds
        self._record_failures(experience.failures(), len(experience), step=self.state.step + 1)
        self._require_current(experience)
        return experience

    def load(self, experience: Experience) -> None:
        """Each trainer rank fetches its rows from the workers that made them; whole groups, balanced by tokens."""
        with self._phase("load"):
            trainer = self.config.trainer
            self._rows = assign(experience, ranks=len(self.groups.trainer), updates=trainer.updates_per_step)
            columns = (0,) if self.groups.reference is None else (0, 2)
            slices = [[experience.slices(rows, columns) for rows in updates] for updates in self._rows]
            self.groups.trainer.load_batch(slices, bypass=self.config.algorithm.old_logprobs == "sampler")

    def old_logprobs(self) -> np.ndarray | None:
        """π_old of the step's samples, unless the first update computes it on the way.

        Returns:
            [B] Σ over tokens of the KL to the reference, where the reward is to be penalised with it.
        """
        if not needs_old_logprobs(self.config):
            return None
        with self._phase("old_logprobs"):
            penalise = reward_kl(self.config)
            ranks = self.groups.trainer.forward(reference_kl=self.config.algorithm.kl.estimator if penalise else None)
            self._metrics |= mismatch_metrics([part for rank in ranks for part in rank.mismatch])
            if not penalise:
                return None
            result = np.zeros(sum(len(rows) for updates in self._rows for rows in updates))
            for updates, rank in zip(self._rows, ranks, strict=True):
                for rows, sums in zip(updates, rank.kl_sums or [], strict=True):
                    result[rows] = sums
            return result

    def advantages(self, experience: Experience, reference_kl: np.ndarray | None) -> np.ndarray:
        """[B] one advantage a sample, from its group's rewards."""
        algorithm = self.config.algorithm
        rewards = experience.rewards.astype(np.float64)
        if reference_kl is not None:
            rewards = rewards - algorithm.kl.coef * reference_kl
            self._metrics["policy/kl_ref"] = float(
                reference_kl.sum() / max(experience.rollout("sampled_tokens").sum(), 1)
            )
        if self.config.reward.permute:
            rewards = np.random.default_rng([self.config.seed, self.state.step]).permutation(rewards)
        advantages, metrics = estimate(
            algorithm.advantage,
            torch.from_numpy(rewards),
            list(experience.rollout("uids")),
            **algorithm.advantage_options,
        )
        self._metrics |= {f"advantage/{name}": value for name, value in metrics.items()}
        return advantages.numpy()

    def update(self, experience: Experience, advantages: np.ndarray) -> None:
        """The optimiser steps of this training step; from here on the step counts as done."""
        with self._phase("update"):
            updates = self.config.trainer.updates_per_step
            self.stop.grace_s = _UPDATE_GRACE_S
            totals: list[dict[str, float]] = []
            for u in range(updates):
                columns = [{"advantages": advantages[rank[u]]} for rank in self._rows]
                metrics = self.groups.trainer.forward_backward(u, columns)
                self.whole = False  # gradients change nothing; from the first optimiser step on weights are in between
                totals.append(metrics | self.groups.trainer.optim_step())
            self.stop.grace_s, self.whole = 0.0, True
        self._metrics |= combine_updates(totals)
        self.state = replace(self.state, step=self.state.step + 1, data=self.prompts.state_dict())
        self._unwritten = (experience, advantages)

    def sync_weights(self) -> None:
        """Hands the trainer's weights to the samplers and checks that they arrived."""
        with self._phase("sync"):
            buckets, checksum = self.groups.trainer.export_weights(self.config.rollout.dtype)
            self.groups.rollout.update_weights(buckets, self.version, checksum)

    @property
    def version(self) -> WeightVersion:
        return WeightVersion(self.state.lineage, self.state.step)

    # --- between steps ---

    def evaluate_if_due(self) -> None:
        """Held-out evaluation before the first step, every ``eval.every`` steps and after the last; also when an
        interrupted run left one out."""
        step, every = self.state.step, self.config.eval.every
        due = self.held_out is not None and every and (step % every == 0 or step == self.config.steps)
        if not due or self.held_out is None or self.state.extra.get("evaluated") == step:
            return
        with self._phase("eval"):
            metrics, failures, rows = evaluate(
                self.config, self.held_out, self.groups.rollout, self.groups.reward, self.stop
            )
        self._record_failures(failures, rows, step=step)
        done = {"evaluated": step, "accuracy": metrics["eval/accuracy"]}
        self.state = replace(self.state, extra=self.state.extra | done)
        if self._began:
            self._metrics |= metrics
        else:  # before the first step of this process: a line of its own
            self._log(metrics)

    def end_step(self) -> None:
        """Writes the step's line of metrics and its sampled rollouts. Also called by whoever ends the run between the
        update and the end of its step; then what came after the update is missing in the line, and nothing else."""
        if self._unwritten is None:
            return
        (experience, advantages), self._unwritten = self._unwritten, None
        step_s = time.monotonic() - self._began
        metrics = experience_metrics(experience, self.config, step=self.state.step - 1) | self._metrics
        metrics |= {f"time/{name}_s": seconds for name, seconds in self._seconds.items()} | {"time/step_s": step_s}
        metrics["throughput/tokens_per_s"] = metrics["rollout/tokens"] / step_s
        metrics |= {"version/lineage": self.state.lineage, "version/step": self.state.step}
        metrics["memory/pss_bytes"] = float(self.observers.memory.peak_bytes)
        raised = alerts.check(metrics, mismatch_alarm=self.config.rollout.mismatch_alarm)
        metrics |= alerts.as_metrics(raised)
        for alert in raised:
            self.observers.folder.log_event("alert", alert.text, step=self.state.step)
            self.observers.display.note(alert.text, alert=True)
        self._log(metrics)
        self._write_rollouts(experience, advantages)
        self._began = 0.0
        self._stop_on_dead_channel(metrics)

    def checkpoint_if_due(self) -> None:
        if self.state.step % self.config.checkpoint.every == 0 or self.state.step == self.config.steps:
            self.checkpoint()

    def checkpoint(self) -> Path | None:
        """Saves the last whole step. None where that step has been saved already."""
        if self._saved_step == self.state.step:
            return None
        with self._phase("checkpoint"):
            partial = self.store.begin(self.state.step)
            try:
                self.groups.trainer.save_state(str(partial))
                self.state.write(partial)
                current = self.state.extra.get("evaluated") == self.state.step
                path = self.store.commit(
                    partial,
                    step=self.state.step,
                    metric=self.state.extra["accuracy"] if current else None,
                    lineage=self.state.lineage,
                )
            except BaseException:
                self.store.abort(partial)
                raise
        self._saved_step = self.state.step
        return path

    def restore(self, checkpoint: Path) -> None:
        """Trainer, data and controller as they were when ``checkpoint`` was written."""
        self.groups.trainer.load_state(str(checkpoint))
        self.prompts.load_state_dict(self.state.data)
        self._saved_step = self.state.step

    # --- inside ---

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.observers.display.phase(name)
        began = time.monotonic()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - began

    def _log(self, metrics: dict[str, float]) -> None:
        self.observers.folder.log_metrics(metrics, step=self.state.step, lineage=self.state.lineage)
        self.observers.trackers.log(metrics, self.state.step)
        self.observers.display.step({"step": self.state.step, **metrics})

    def _recorded_rows(self) -> int:
        """Rows of whole groups to be written out in full."""
        samples = self.config.rollout.samples_per_prompt
        return -(-self.config.tracker.rollouts // samples) * samples

    def _write_rollouts(self, experience: Experience, advantages: np.ndarray) -> None:
        records = [record for shard in experience.shards for record in shard.reward.records]
        if records:
            # The recorded rows are the step's first ones, in order.
            rows = [record | {"advantage": float(a)} for record, a in zip(records, advantages, strict=False)]
            self.observers.folder.write_rollouts(self.state.step, rows)

    def _record_failures(self, failures: list[dict[str, Any]], samples: int, *, step: int) -> None:
        FailureBudget(self.config.reward.max_failure_rate).check(failures, total=samples)
        for failure in failures:  # where the budget is exceeded, whoever ends the run writes them
            self.observers.folder.log_failure({"step": step, **failure})

    def _require_current(self, experience: Experience) -> None:
        """The synchronous loop trains on samples of the present weights, and on nothing else."""
        for shard in experience.shards:
            oldest = shard.rollout.oldest_version
            if oldest is not None and oldest != self.version:
                raise SyncError(
                    f"a sample comes from weights {tuple(oldest)}, and the trainer is at {tuple(self.version)}"
                )

    def _stop_on_dead_channel(self, metrics: dict[str, float]) -> None:
        """A channel that finds no input for many steps is a mistake in the configuration, not patience."""
        for name, fraction in metrics.items():
            if name.endswith("/live_fraction"):
                self._dead_steps[name] = 0 if fraction else self._dead_steps[name] + 1
                if self._dead_steps[name] >= _DEAD_STEPS:
                    channel = name.removesuffix("/live_fraction")
                    raise UserError(
                        f"the loss channel '{channel}' found no input in {_DEAD_STEPS} steps",
                        where=f"step {self.state.step}",
                        fix="give it weight 0, or look at the rollouts: no sampled token reached it",
                    )


def reward_kl(config: RunConfig) -> bool:
    """Whether the KL to the reference is a penalty on the reward."""
    return config.algorithm.kl.coef > 0 and config.algorithm.kl.placement == "reward"


def needs_old_logprobs(config: RunConfig) -> bool:
    """Whether π_old takes a forward pass of its own. With one optimiser step a batch the update computes it on the
    way; with ``old_logprobs=sampler`` the sampler has."""
    return reward_kl(config) or (config.trainer.updates_per_step > 1 and config.algorithm.old_logprobs == "trainer")
