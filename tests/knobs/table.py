"""The table of checks, one for every leaf: changing the leaf changes what uses it. And the bench that they share.

The other modules of this package fill ``TABLE``; ``config/test_no_dead_knobs.py`` runs it and fails for a leaf that is
not in it.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from composing import run_config
from rich.console import Console

from rlsys.config.schema import RunConfig
from rlsys.controller import run
from rlsys.controller.inputs import Inputs, check_inputs
from rlsys.controller.job import Groups, Job, Observers
from rlsys.controller.recovery import Ending
from rlsys.tracking.display import PlainDisplay
from rlsys.tracking.memory import MemoryMonitor
from rlsys.tracking.run import RunFolder
from rlsys.tracking.trackers import TrackerSet
from rlsys.workers.waits import StopFlag

Check = Callable[["Bench"], None]
TABLE: dict[str, Check] = {}


def entry(*leaves: str) -> Callable[[Check], Check]:
    """Decorator: this check tries each of ``leaves``."""

    def add(check: Check) -> Check:
        for leaf in leaves:
            assert leaf not in TABLE, f"{leaf} has two checks"
            TABLE[leaf] = check
        return check

    return add


@dataclass
class Actors:
    """Stands for a worker group of ``size`` actors: records what it is asked, answers what ``answers`` says."""

    answers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    size: int = 1
    asked: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def __len__(self) -> int:
        return self.size

    def asks(self, *_: Any, **__: Any) -> list[Any]:
        """It has no meters."""
        return []

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.asked.append((method, args, kwargs))
            return self.answers.get(method, lambda *_, **__: None)(*args, **kwargs)

        return call

    def given(self, method: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """The arguments of every call of ``method``."""
        return [(args, kwargs) for name, args, kwargs in self.asked if name == method]


def updating_trainer(**metrics: float) -> Actors:
    """Stands for the trainer group, whose updates come out with these metrics."""
    stepped = {"train/skipped": 0.0, "train/lr": 0.0, **metrics}
    return Actors({"forward_backward": lambda *_, **__: {"train/loss": 0.0}, "optim_step": lambda: stepped})


@dataclass
class Bench:
    """What a check may use.

    model: folder of a tiny random model; tmp: folder of this check; request: for fixtures that few checks need.
    """

    model: Path
    tmp: Path
    monkeypatch: pytest.MonkeyPatch
    request: pytest.FixtureRequest
    _count: Iterator[int] = field(default_factory=itertools.count)

    def config(self, *overrides: str) -> RunConfig:
        """The quick-start recipe with a few held-out problems, so that a check is quick."""
        return run_config(f"run_root={self.tmp / 'runs'}", *overrides)

    def inputs(self, *overrides: str) -> Inputs:
        """What a run reads before it starts anything."""
        return check_inputs(self.config("eval.problems=4", *overrides))

    @contextmanager
    def job(self, *overrides: str, trainer: Actors | None = None) -> Iterator[Job]:
        """A job as a run makes it, over actors that are only recorded."""
        inputs = self.inputs(*overrides)
        fleets: Any = Actors() if inputs.config.controller.kind != "sync" else None
        groups: Any = Groups(trainer or Actors(), Actors(), Actors(), None, fleets=fleets)  # type: ignore[arg-type]
        display = PlainDisplay(Console(file=io.StringIO()), title="", steps=1)
        with RunFolder.create(self.tmp / f"job{next(self._count)}", "job", {}) as folder:
            observers = Observers(folder, TrackerSet([], print), display, MemoryMonitor())
            job = run._job(inputs.config, inputs, None, observers, StopFlag(), groups)
            job.begin()
            yield job
            job.close()

    def started(self, *overrides: str) -> Observers:
        """``run_job`` without what happens inside the cluster; the observers that it made."""
        seen: list[Observers] = []

        def supervise(config: RunConfig, inputs: Inputs, origin: Any, observers: Observers, *_: Any) -> Ending:
            seen.append(observers)
            return Ending(run.FINISHED)

        self.monkeypatch.setattr(run, "_supervise", supervise)
        assert run.run_job(self.config("eval.problems=4", *overrides)) == run.FINISHED
        return seen[0]
