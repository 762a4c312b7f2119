"""The tracker contract, and the set of trackers of a run, none of which can stop it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rlsys.config.errors import UserError
from rlsys.config.plugins import Registry


class Tracker(Protocol):
    """Sends metrics somewhere. Made without arguments, before anything starts: that a package it needs is missing is a
    :class:`UserError` there."""

    def start(self, config: Mapping[str, Any], folder: Path) -> str | None:
        """Begins, or goes on with, the run in ``folder``.

        Args:
            config: the resolved run config, secrets masked.

        Returns:
            Words for the user, such as where to look; None: nothing to say.
        """
        ...

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers of one step."""
        ...

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The run is over; ``summary`` is the content of ``summary.json``."""
        ...


TRACKERS: Registry[type[Tracker]] = Registry("tracker", "rlsys.tracking.trackers")


class TrackerSet:
    """The trackers of a run. One that raises is reported once and not called again: observing a run never breaks it.

    Args:
        names: registered names or import paths (config: ``tracker.use``).
        report: is given a sentence for the user and the event log.

    Raises:
        UserError: no such tracker, or its package is not installed.
    """

    def __init__(self, names: Sequence[str], report: Callable[[str], None]):
        self._trackers = {name: TRACKERS.get(name, where="tracker.use")() for name in names}
        self._report = report

    def start(self, config: Mapping[str, Any], folder: Path) -> None:
        for name, notice in self._each("start", config, folder).items():
            if notice:
                self._report(f"{name}: {notice}")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._each("log", metrics, step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._each("finish", summary)

    def _each(self, method: str, *arguments: Any) -> dict[str, Any]:
        """Calls every tracker that still works."""
        answers: dict[str, Any] = {}
        for name, tracker in list(self._trackers.items()):
            try:
                answers[name] = getattr(tracker, method)(*arguments)
            except UserError as error:
                self._disable(name, method, error.what)
            except Exception as error:  # noqa: BLE001 - a stranger's code on the network; reported, and never called again
                self._disable(name, method, f"{type(error).__name__}: {error}")
        return answers

    def _disable(self, name: str, method: str, reason: str) -> None:
        del self._trackers[name]
        self._report(f"tracker '{name}' failed in {method} and is off from here on; the run goes on ({reason})")
