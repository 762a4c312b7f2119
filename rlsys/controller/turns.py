"""Who has the memory of the devices that trainer and samplers share: with ``cluster.placement=colocated`` they take
turns, with any other both stay as they are.

    phase                    samplers                      trainer and critic
    training                 asleep                        loaded
    sync, before             weights                       weights
    sampling, evaluation     awake                         in main memory
    checkpoint, export       weights, without a cache      loaded, without a gradient or activations

The reference stays loaded in every phase: it answers while samplers sample and, about preference pairs, while the
trainer trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Literal

from rlsys.config.schema import RunConfig
from rlsys.engines.rollout.base import Rest
from rlsys.workers.groups import RolloutGroup, TrainerGroup
from rlsys.workers.waits import ActorFailed, DeadlineExceeded

if TYPE_CHECKING:
    from rlsys.controller.job import Groups, Observers

_NOISE_BYTES = 64 << 20  # a process's memory goes up and down by so much for other reasons
_LEAST = 0.5  # share of what was given back by which use must fall: others may have taken a little meanwhile


def turns_of(config: RunConfig, groups: Groups, observers: Observers) -> Turns:
    """Of a job."""

    def warn(text: str) -> None:
        observers.folder.log_event("memory", text)
        observers.display.note(text, alert=True)

    trainers = [group for group in (groups.trainer, groups.critic) if group is not None]
    return Turns(groups.rollout, trainers, colocated=config.cluster.placement == "colocated", warn=warn)


class Turns:
    """At the start samplers sleep and the trainer is loaded.

    Args:
        rollout: the samplers; trainers: trainer, and critic where there is one.
        colocated: they take turns; otherwise nothing here does anything.
        warn: told, once for each kind of actor, that memory was not given back.
    """

    def __init__(
        self, rollout: RolloutGroup, trainers: list[TrainerGroup], *, colocated: bool, warn: Callable[[str], None]
    ):
        self._rollout, self._trainers, self._colocated, self._warn = rollout, trainers, colocated, warn
        self._samplers: Literal["asleep", "weights", "awake"] = "asleep"
        self._trainer: Literal["away", "weights", "loaded"] = "loaded"
        self._metrics: dict[str, float] = {}
        self._warned: set[str] = set()

    def sampling(self) -> None:
        """From here on the samplers are asked."""
        if self._colocated:
            self._offload(weights=True)
            self._wake()

    def training(self) -> None:
        """From here on the trainer is asked, and samplers need new weights before they are."""
        if self._colocated:
            self._sleep(weights=True)
            self._onload(optimizer=True)

    @contextmanager
    def syncing(self) -> Iterator[None]:
        """Weights go from one to the other inside; afterwards the samplers have their turn. The optimiser leaves before
        the samplers' weights take memory, and the trainer's weights before their cache does."""
        if not self._colocated:
            yield
            return
        self._sleep(weights=True)
        self._onload(optimizer=False)
        self._offload(weights=False)
        yield
        self._samplers = "weights"
        self.sampling()

    @contextmanager
    def visiting(self, *, optimizer: bool) -> Iterator[None]:
        """The trainer is asked inside for something that is not training; samplers keep their weights, if they have
        any. What they sampled is given up.

        Args:
            optimizer: is needed too.
        """
        if self._colocated:
            with suppress(ActorFailed, DeadlineExceeded):  # a sampler that is gone holds nothing
                self._sleep(weights=False)
            self._onload(optimizer=optimizer)
        yield

    def metrics(self) -> dict[str, float]:
        """``memory/…`` since the last time: the largest use by one actor, or of its GPU, after each change."""
        found, self._metrics = self._metrics, {}
        return found

    def _sleep(self, *, weights: bool) -> None:
        if self._samplers == "asleep" or (self._samplers == "weights" and not weights):
            return
        self._note("sampler", "awake", "asleep", self._rollout.sleep(weights=weights))
        self._samplers = "asleep" if weights else "weights"

    def _wake(self) -> None:
        if self._samplers != "awake":
            self._note("sampler", "woken", "awake", self._rollout.wake())
            self._samplers = "awake"

    def _offload(self, *, weights: bool) -> None:
        if self._trainer == "away" or (self._trainer == "weights" and not weights):
            return
        rests = [rest for group in self._trainers for rest in group.offload(weights=weights)]
        if weights:
            self._note("trainer", "loaded", "offloaded", rests)
        self._trainer = "away" if weights else "weights"

    def _onload(self, *, optimizer: bool) -> None:
        if self._trainer == "loaded" or (self._trainer == "weights" and not optimizer):
            return
        for group in self._trainers:
            group.onload(optimizer=optimizer)
        self._trainer = "loaded" if optimizer else "weights"

    def _note(self, who: str, before: str, after: str, rests: list[Rest]) -> None:
        if not rests:  # all of them are on their way back
            return
        for name, used in (
            (before, max(rest.before for rest in rests)),
            (after, max(rest.after for rest in rests)),
        ):
            key = f"memory/{who}_{name}_bytes"
            self._metrics[key] = max(self._metrics.get(key, 0.0), float(used))
        kept = [r for r in rests if r.due > _NOISE_BYTES and r.before - r.after < _LEAST * r.due]
        if kept and who not in self._warned:
            self._warned.add(who)
            due, freed = kept[0].due / 2**20, (kept[0].before - kept[0].after) / 2**20
            self._warn(f"a {who} gave back {due:,.0f} MiB for the other's turn, and memory in use fell by {freed:,.0f}")
