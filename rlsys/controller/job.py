"""A training job: the worker groups, and the stages that the loop composes."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlsys.algorithms.advantages import estimate
from rlsys.algorithms.channels.preference import needs_reference as preference_reads_reference
from rlsys.algorithms.objective import StepSettings
from rlsys.algorithms.requirements import (
    adapts,
    needs_old_logprobs,
    needs_reference,
    penalises_kl,
    token_level,
)
from rlsys.batch import DataProto
from rlsys.batch.versions import WeightVersion
from rlsys.checkpoint.controller_state import ControllerState
from rlsys.checkpoint.store import CheckpointStore
from rlsys.config.modes import staleness_bound
from rlsys.config.schema import RunConfig
from rlsys.controller import step_state
from rlsys.controller.clock import RunClock
from rlsys.controller.dead_channels import check_dead
from rlsys.controller.metrics import combine_updates, experience_metrics, hint_metrics, mismatch_metrics
from rlsys.controller.pair_scores import divided, scored_pairs
from rlsys.controller.profile import Profile
from rlsys.controller.readings import read_meters
from rlsys.controller.scaling import Scaling, free_gpus
from rlsys.controller.sources import Source, make_source
from rlsys.controller.stream import Pools
from rlsys.controller.turns import Turns, turns_of
from rlsys.data.sampler import PromptStream
from rlsys.engines.sync.verify import SyncError
from rlsys.evals.heldout import evaluate
from rlsys.replay.pairs import PairStream
from rlsys.rewards.budget import FailureBudget
from rlsys.tracking import alerts
from rlsys.tracking.collapse import CollapseMonitor
from rlsys.tracking.display import Display
from rlsys.tracking.ledger import FILE_NAME as LEDGER
from rlsys.tracking.ledger import Ledger
from rlsys.tracking.memory import MemoryMonitor
from rlsys.tracking.meter import Span
from rlsys.tracking.run import RunFolder
from rlsys.tracking.throughput import actor_metrics, step_metrics, trained_flops
from rlsys.tracking.trackers import TrackerSet
from rlsys.workers.experience import Experience, assign
from rlsys.workers.fleet import Fleets
from rlsys.workers.groups import CriticGroup, ReferenceGroup, RewardGroup, RolloutGroup, TrainerGroup
from rlsys.workers.trainer import Slice, TokenAdvantagesRequest
from rlsys.workers.waits import ActorFailed, DeadlineExceeded, StopFlag
from rlsys.workers.weight_sync import WeightSync

_CRITIC = "critic"  # its folder in a checkpoint
_UPDATE_GRACE_S = 10.0  # an update that has begun may finish, so that the checkpoint is that of a whole step


class GuardStop(RuntimeError):
    """A guard ended the run: it diverged or collapsed."""


@dataclass
class Groups:
    """The kinds of actor; no reference and no critic where nothing reads them."""

    trainer: TrainerGroup
    rollout: RolloutGroup
    reward: RewardGroup
    reference: ReferenceGroup | None
    critic: CriticGroup | None = None
    fleets: Fleets | None = None

    def present(self) -> list[TrainerGroup | RolloutGroup | RewardGroup | ReferenceGroup]:
        every = (self.trainer, self.critic, self.rollout, self.reward, self.reference)
        return [group for group in every if group is not None]


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
    pairs: preference pairs from a file; None: there is none.
    held_out_pairs: of which margin and accuracy are measured at evaluations.
    whole: False while weights and optimiser are between two steps.
    peak_flops: per second, of all trainer ranks, as measured at the start.
    profile: collects a trace; None: nobody asked for one.
    """

    config: RunConfig
    groups: Groups
    prompts: PromptStream
    held_out: DataProto | None
    store: CheckpointStore
    observers: Observers
    stop: StopFlag
    state: ControllerState
    pairs: PairStream | None = None
    held_out_pairs: DataProto | None = None
    collapse: CollapseMonitor = field(default_factory=lambda: CollapseMonitor({}))
    whole: bool = True
    peak_flops: float | None = None
    profile: Profile | None = None
    clock: RunClock = field(default_factory=RunClock)
    source: Source = field(init=False)
    _rows: list[list[np.ndarray]] = field(default_factory=list)
    _baselines: np.ndarray | None = None
    _extra: dict[str, Any] = field(default_factory=dict)
    _metrics: dict[str, float] = field(default_factory=dict)
    _seconds: dict[str, float] = field(default_factory=dict)
    _spans: list[Span] = field(default_factory=list)
    _began: float = 0.0
    _began_unix: float = 0.0
    _unwritten: tuple[Experience, np.ndarray] | None = None
    _dead_steps: Counter[str] = field(default_factory=Counter)
    _saved_step: int | None = None
    _weights: WeightSync | None = None
    _open: ExitStack = field(default_factory=ExitStack)
    _scaling: Scaling | None = None

    def begin(self) -> None:
        """Opens the ledger, and what experience will come from."""
        ledger = Ledger(self.observers.folder.path / LEDGER, self.observers.display.note)
        self._open.callback(ledger.close)
        if self.groups.fleets is not None:
            self.groups.fleets.catch_up = self._catch_up
            self._scaling = Scaling(
                self.observers.folder.path,
                self.groups.fleets.rollout,
                self.groups.rollout.specs,
                free_gpus,
                self.observers.display.note,
                "samplers take turns with the trainer" if self.groups.fleets.alone else None,
            )
        if self.state.step or ledger.path.stat().st_size:
            ledger.resumed(self.state.step, self.state.lineage)
        self.source = make_source(
            self.config,
            Pools(self.groups.rollout, self.groups.reward, self.groups.reference, self.groups.fleets),
            self.prompts,
            ledger,
            self.stop,
            check=self._check_experience,
            recorded_rows=self._recorded_rows(),
            outstanding=self.state.extra.get("outstanding", ()),
        )
        self._open.callback(self.source.close)

    def close(self) -> None:
        """Gives up what is being sampled. Whoever made the job calls it at its end, however it ended."""
        self._open.close()

    # --- the stages of a step, in the order of the data flow ---

    def begin_step(self) -> None:
        """Raises TimeIsUp where another step would not end before the time limit."""
        self.clock.step_begins()
        # A checkpoint is written after its step's line: its time is in the next one.
        self._seconds = {name: s for name, s in self._seconds.items() if name == "checkpoint"}
        if self.profile is not None:
            self.profile.before_step(last=self.state.step + 1 == self.config.steps)
        self._metrics, self._began = {}, time.monotonic()
        self._spans, self._began_unix = [], time.time()
        self._extra = dict(self.state.extra)

    def experience(self) -> Experience:
        """Samples, scores and reference log-probs of the step's prompt groups.

        Raises:
            RewardBudgetExceeded: too many rewards failed.
        """
        self.observers.display.phase("rollout")
        self.turns.sampling()
        began = time.time()
        found = self.source.next(self.state.step)
        experience, self._baselines = found.experience, found.baselines
        if found.scored:
            self._record_failures(found.failures, found.scored, step=self.state.step + 1)
        self._require_fresh(experience)
        self._spans.append(Span("collect", began, time.time()))
        self._metrics |= found.metrics | hint_metrics(experience)
        self._seconds |= experience.seconds
        return experience

    def load(self, experience: Experience) -> None:
        """Each trainer rank fetches its rows from the workers that made them; whole groups, balanced by tokens."""
        with self._phase("load"):
            self.turns.training()
            trainer, ranks = self.config.trainer, len(self.groups.trainer)
            self._rows = assign(experience, ranks=ranks, updates=trainer.updates_per_step)
            columns = range(3 if self.groups.reference is not None else 2)
            slices = [[experience.slices(rows, columns) for rows in updates] for updates in self._rows]
            wants_pairs = self.config.algorithm.preference.weight > 0
            self.groups.trainer.load_batch(
                slices,
                pairs=self._next_pairs() if self.pairs is not None else None,
                group_gap=self.config.replay.min_gap if wants_pairs and self.pairs is None else None,
                bypass=self.config.algorithm.old_logprobs == "sampler",
                reference=adapts(self.config) and needs_reference(self.config),
            )
            if self.groups.critic is not None:
                self.groups.critic.load_batch(slices)

    def old_logprobs(self) -> np.ndarray | None:
        """π_old of the step's samples, unless the first update computes it on the way.

        Returns:
            [B] Σ over tokens of the KL to the reference, where the reward is to be penalised with it.
        """
        if not needs_old_logprobs(self.config):
            return None
        with self._phase("old_logprobs"):
            penalise = penalises_kl(self.config)
            ranks = self.groups.trainer.forward(reference_kl=self.config.algorithm.kl.estimator if penalise else None)
            self._metrics |= mismatch_metrics([part for rank in ranks for part in rank.mismatch])
            if not penalise:
                return None
            result = np.zeros(sum(len(rows) for updates in self._rows for rows in updates))
            for updates, rank in zip(self._rows, ranks, strict=True):
                for rows, sums in zip(updates, rank.kl_sums or [], strict=True):
                    result[rows] = sums[: len(rows)]  # pairs follow the samples
            return result

    def advantages(self, experience: Experience, reference_kl: np.ndarray | None) -> np.ndarray:
        """[B] one advantage a sample, from its group's rewards; where the estimator goes by tokens the trainer ranks
        keep theirs, and this is the mean of each sample's."""
        order = np.arange(len(experience))
        if self.config.reward.permute:
            order = np.random.default_rng([self.config.seed, self.state.step]).permutation(order)
        rewards = experience.rewards.astype(np.float64)[order]
        if not self.config.algorithm.weight:  # nobody reads them
            return np.zeros(len(experience), dtype=np.float32)
        if reference_kl is not None:
            coef = step_state.kl_coef(self.config, self.state.extra)
            mean = float(reference_kl.sum() / max(experience.rollout("sampled_tokens").sum(), 1))
            self._metrics |= {"policy/kl_ref": mean, "policy/kl_coef": coef}
            self._extra = step_state.after_kl(self.config, self._extra, mean, len(experience))
            if not token_level(self.config):
                rewards = rewards - coef * reference_kl
        if token_level(self.config):
            return self._token_advantages(rewards)
        algorithm = self.config.algorithm
        parts = self.config.reward.parts
        inputs = {
            "lengths": torch.from_numpy(experience.rollout("sampled_tokens")),
            "scores": {name: torch.from_numpy(experience.scores(name)[order]) for name in parts},
            "weights": {name: part.weight for name, part in parts.items()},
            "baselines": None if self._baselines is None else torch.from_numpy(self._baselines),
        }
        advantages, metrics = estimate(
            algorithm.advantage,
            torch.from_numpy(rewards),
            list(experience.rollout("uids")),
            inputs=inputs,
            **algorithm.advantage_options,
        )
        self._metrics |= {f"advantage/{name}": value for name, value in metrics.items()}
        return advantages.numpy()

    def update(self, experience: Experience, advantages: np.ndarray) -> None:
        """The optimiser steps of this training step; from here on the step counts as done."""
        with self._phase("update"):
            config, step = self.config, self.state.step + 1
            self.stop.grace_s = _UPDATE_GRACE_S
            totals: list[dict[str, float]] = []
            try:
                for u in range(config.trainer.updates_per_step):
                    if self.pairs is None and not any(len(updates[u]) for updates in self._rows):
                        # Filters left fewer groups than updates; a step on nothing would be one of momentum alone.
                        continue
                    number = self.state.step * config.trainer.updates_per_step + u + 1
                    totals.append(self._update(u, advantages, step_state.settings(config, self._extra, step)))
                    self._extra = step_state.after_update(config, self._extra, totals[-1], number)
            finally:
                self.stop.grace_s = 0.0
        self.source.trained(step, self.state.lineage)  # before the step counts: no checkpoint may miss it
        self.whole = True
        self._metrics |= combine_updates(totals)
        extra = self._extra | ({"pairs": self.pairs.state_dict()} if self.pairs is not None else {})
        self.state = replace(self.state, step=step, extra=extra)
        self._unwritten = (experience, advantages)

    def _update(self, u: int, advantages: np.ndarray, settings: StepSettings) -> dict[str, float]:
        """One optimiser step of the policy and, where there is one, of the critic."""
        groups = self.groups
        metrics: dict[str, float] = {}
        if groups.critic is not None:
            found = groups.critic.forward_backward(u, [{} for _ in self._rows])
            self.whole = False
            found |= groups.critic.optim_step()
            # The engine's own are the critic's too, unless its loss has one of that name.
            metrics |= {name.replace("train/", "critic/"): value for name, value in found.items()}
            metrics |= {name: value for name, value in found.items() if name.startswith("critic/")}
            self._guard_skipped(metrics["critic/skipped"], u, groups.critic)
            if self.state.step < self.config.trainer.critic.warmup_steps:
                return metrics
        columns = [{} if token_level(self.config) else {"advantages": advantages[rank[u]]} for rank in self._rows]
        metrics |= groups.trainer.forward_backward(
            u, columns, settings, channel_gradients=self.config.guards.channel_gradients
        )
        self.whole = False  # gradients change nothing; from the first optimiser step on weights are in between
        metrics |= groups.trainer.optim_step()
        metrics |= {f"{name}/weight": weight for name, weight in settings.weights.items() if f"{name}/loss" in metrics}
        t = step_state.taid_t(self.config, self._extra)
        metrics |= {} if t is None else {"distillation/t": t}
        self._guard_skipped(metrics["train/skipped"], u, groups.trainer)
        return metrics

    def sync_weights(self) -> None:
        """Hands the trainer's weights to the samplers and checks that they arrived."""
        with self._phase("sync"):
            if self._weights is None:
                self._weights = WeightSync(self.groups.trainer, self.groups.rollout, self.config)
            with self.turns.syncing():
                self._metrics |= self._weights(self.version, in_flight=self.source.in_flight)
        self.source.advance(self.version)

    def _catch_up(self, samplers: list[int]) -> None:
        """Gives the present weights to samplers that were started anew; where they share their memory with the trainer,
        to all of them."""
        assert self._weights is not None
        if self.groups.fleets is not None and self.groups.fleets.alone:
            with self.turns.syncing():
                self._weights(self.version)
        else:
            self._weights(self.version, only=samplers)

    @functools.cached_property
    def turns(self) -> Turns:
        return turns_of(self.config, self.groups, self.observers)

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
            self.turns.sampling()
            groups = self.groups
            metrics, failures, rows = evaluate(
                self.config, self.held_out, groups.rollout, groups.reward, self.stop, groups.fleets
            )
        self._record_failures(failures, rows, step=step)
        metrics |= self._held_out_pairs()
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
        metrics |= self._read_meters(metrics) | self.turns.metrics()
        if self.groups.fleets is not None:
            self.groups.fleets.step_done()
            if self._scaling is not None:
                self._scaling.look()
            metrics |= self.groups.fleets.metrics()
        metrics |= {"version/lineage": self.state.lineage, "version/step": self.state.step}
        metrics["memory/pss_bytes"] = float(self.observers.memory.peak_bytes)
        raised = alerts.check(metrics, mismatch_alarm=self.config.rollout.mismatch_alarm)
        collapsed = self.collapse.check(metrics, self.state.step)
        raised = [*raised, *collapsed]
        metrics |= alerts.as_metrics(raised)
        for alert in raised:
            self.observers.folder.log_event("alert", alert.text, step=self.state.step)
            self.observers.display.note(alert.text, alert=True)
        self._log(metrics)
        self._write_rollouts(experience, advantages)
        self._began = 0.0
        self._stop_on_dead_channel(metrics)
        if collapsed and self.config.guards.on_collapse == "stop":
            raise GuardStop(f"the run collapsed at step {self.state.step}: {collapsed[0].text}")

    def checkpoint_if_due(self) -> None:
        step, every = self.state.step, self.config.checkpoint.every
        if step % every == 0 or step == self.config.steps or self.clock.checkpoint_due():
            self.checkpoint()

    def checkpoint(self) -> Path | None:
        """Saves the last whole step. None where that step has been saved already."""
        if self._saved_step == self.state.step:
            return None
        with self._phase("checkpoint"), self.clock.saving():
            partial = self.store.begin(self.state.step)
            try:
                with self.turns.visiting(optimizer=True):
                    self.groups.trainer.save_state(str(partial))
                    if self.groups.critic is not None:
                        (partial / _CRITIC).mkdir()
                        self.groups.critic.save_state(str(partial / _CRITIC))
                watched = {"collapse": self.collapse.state_dict(), "dead_steps": dict(self._dead_steps)}
                data, more = self.source.checkpoint(self.state.step, self.state.lineage)
                self.state = replace(self.state, data=data, extra=self.state.extra | watched | more)
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
        if self.groups.critic is not None:
            self.groups.critic.load_state(str(checkpoint / _CRITIC))
        self.prompts.load_state_dict(self.state.data)
        if self.pairs is not None and "pairs" in self.state.extra:
            self.pairs.load_state_dict(self.state.extra["pairs"])
        if "collapse" in self.state.extra:
            self.collapse.load_state_dict(self.state.extra["collapse"])
            self._dead_steps = Counter(self.state.extra["dead_steps"])
        self._saved_step = self.state.step

    # --- inside ---

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.observers.display.phase(name)
        began, unix = time.monotonic(), time.time()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - began
        self._spans.append(Span(name, unix, time.time()))

    def _read_meters(self, metrics: dict[str, float]) -> dict[str, float]:
        """What the actors measured in this step, as metrics."""
        try:
            readings = read_meters(self.groups.present(), self.state.step, everybody=self.profile is not None)
        except (ActorFailed, DeadlineExceeded) as error:  # the run is ending, or the next stage will find it out
            self.observers.folder.log_event("readings", f"no figures of the actors: {error}", step=self.state.step)
            return {}
        now, start = time.time(), self._began_unix
        found = step_metrics(metrics, self._seconds, ranks_peak=self.peak_flops, flops=trained_flops(readings))
        if self.profile is not None:
            last = self.state.step == self.config.steps
            self.profile.after_step(self.state.step, self._spans, readings, start, last=last)
        return found | actor_metrics(readings, start, now)

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
            own = experience.by_sample(advantages)
            # None: the group was filtered out
            rows = [record | {"advantage": own.get((record["uid"], record["sample_index"]))} for record in records]
            self.observers.folder.write_rollouts(self.state.step, rows)

    def _check_experience(self, experience: Experience) -> None:
        self._record_failures(experience.failures(), len(experience), step=self.state.step + 1)
        self._require_fresh(experience)

    def _token_advantages(self, rewards: np.ndarray) -> np.ndarray:
        """[B] the mean advantage of each sample."""
        algorithm = self.config.algorithm
        with self._phase("advantages"):
            values = self.groups.critic.values() if self.groups.critic is not None else None
            penalised = penalises_kl(self.config)
            requests = [
                TokenAdvantagesRequest(
                    algorithm.advantage,
                    algorithm.advantage_options,
                    [rewards[rows] for rows in updates],
                    step_state.kl_coef(self.config, self.state.extra) if penalised else 0.0,
                    algorithm.kl.estimator if penalised else None,
                )
                for updates in self._rows
            ]
            returns, summaries = self.groups.trainer.token_advantages(requests, values)
            if self.groups.critic is not None:
                self.groups.critic.join(returns)
        result = np.zeros(len(rewards), dtype=np.float32)
        for updates, summary in zip(self._rows, summaries, strict=True):
            for rows, means in zip(updates, summary.means, strict=True):
                result[rows] = means[: len(rows)]
        self._metrics |= summaries[0].metrics
        return result

    def _next_pairs(self) -> list[list[list[Slice]]]:
        """The step's pairs from the file, with reference log-probs where the loss reads them: [rank][update] slices."""
        assert self.pairs is not None
        pairs = self._with_reference(self.pairs.next_batch())
        return divided(pairs, ranks=len(self.groups.trainer), updates=self.config.trainer.updates_per_step)

    def _with_reference(self, pairs: DataProto) -> DataProto:
        groups = self.groups
        return scored_pairs(pairs, self.config, groups.trainer, groups.reference, groups.fleets, self.stop)

    def _held_out_pairs(self) -> dict[str, float]:
        """Margin and accuracy on preference pairs that are never trained on."""
        if self.held_out_pairs is None:
            return {}
        preference = self.config.algorithm.preference
        with self.turns.visiting(optimizer=False):
            if preference_reads_reference(preference.loss) and "chosen_ref_logprobs" not in self.held_out_pairs.batch:
                self.held_out_pairs = self._with_reference(self.held_out_pairs)
            margins = self.groups.trainer.pair_margins(self.held_out_pairs, preference.loss, preference.loss_options)
        return {"eval/pair_margin": float(np.mean(margins)), "eval/pair_accuracy": float(np.mean(margins > 0))}

    def _guard_skipped(self, skipped: float, update: int, group: TrainerGroup) -> None:
        """An update with a loss or gradient that is not finite has been skipped: its batch is kept, and the run goes on
        unless that has happened too often."""
        if not skipped:
            return
        step = self.state.step + 1
        folder = self.observers.folder.path / "skipped" / f"step-{step:06d}-update-{update}"
        folder.mkdir(parents=True, exist_ok=True)
        group.save_batch(update, folder)
        self._extra["skipped"] = count = int(self._extra.get("skipped", 0)) + 1
        text = f"loss or gradient of step {step} is not finite: the update was skipped, its batch is in {folder}"
        self.observers.folder.log_event("skipped", text, step=step)
        self.observers.display.note(text, alert=True)
        if count > self.config.guards.max_skipped:
            raise GuardStop(
                f"{count} updates had a loss or gradient that is not finite, and guards.max_skipped allows "
                f"{self.config.guards.max_skipped}: lower trainer.lr, or look at the batches in {folder.parent}"
            )

    def _record_failures(self, failures: list[dict[str, Any]], samples: int, *, step: int) -> None:
        FailureBudget(self.config.reward.max_failure_rate).check(failures, total=samples)
        for failure in failures:  # where the budget is exceeded, whoever ends the run writes them
            self.observers.folder.log_failure({"step": step, **failure})

    def _require_fresh(self, experience: Experience) -> None:
        """Nothing is trained on that is older than the controller's bound."""
        bound = staleness_bound(self.config.controller)
        for shard in experience.shards:
            oldest = shard.rollout.oldest_version
            if oldest is not None and not 0 <= self.state.step - oldest.step <= bound:
                raise SyncError(
                    f"a sample comes from weights {tuple(oldest)}, and the trainer is at {tuple(self.version)}: "
                    f"at most {bound} steps may lie between"
                )

    def _stop_on_dead_channel(self, metrics: dict[str, float]) -> None:
        check_dead(self._dead_steps, metrics, self.config.guards.dead_steps, step=self.state.step)
