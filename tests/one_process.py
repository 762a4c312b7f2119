"""Whole runs in this very process: its actors are plain objects, so that no time goes by while processes start.

Everything else is the run's own: the workers' code, the object store that columns travel through, reward processes,
the run folder, checkpoints, exit codes. One trainer rank, and a critic of one rank.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from composing import run_config
from running import SMALL
from training_batches import process_group

from rlsys.cluster.session import Session
from rlsys.cluster.topology import one_host
from rlsys.controller import run as controller
from rlsys.workers import actors, trainer

Run = Callable[..., int]


class _Method:
    """A method of an actor: what it returns is in the object store before ``remote`` returns."""

    def __init__(self, bound: Callable[..., Any], loop: asyncio.AbstractEventLoop, returns: int = 1):
        self._bound, self._loop, self._returns = bound, loop, returns

    def options(self, *, num_returns: int) -> _Method:
        return _Method(self._bound, self._loop, num_returns)

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        fetched = [ray.get(a) if isinstance(a, ray.ObjectRef) else a for a in args]
        result = self._bound(*fetched, **kwargs)
        if inspect.isawaitable(result):
            result = self._loop.run_until_complete(result)
        return ray.put(result) if self._returns == 1 else tuple(ray.put(part) for part in result)


class _Handle:
    def __init__(self, worker: Any, loop: asyncio.AbstractEventLoop):
        self._worker, self._loop = worker, loop

    def __getattr__(self, name: str) -> _Method:
        return _Method(getattr(self._worker, name), self._loop)


@contextmanager
def _session(*_: object, **__: object) -> Iterator[Session]:
    yield Session(one_host(gpus=0, cores=1), local=True, logs="")


@contextmanager
def one_process() -> Iterator[Run]:
    """Runs jobs here. Needs a running Ray cluster (the fixture ``ray_cluster``).

    Yields:
        ``run(root, *overrides, recipe=…)``: the exit code of that job; its run folder is below ``root/runs``.
    """
    loop, threads = asyncio.new_event_loop(), torch.get_num_threads()

    def actor(worker: type) -> Any:
        return SimpleNamespace(
            options=lambda **_: SimpleNamespace(remote=lambda *arguments: _Handle(worker(*arguments), loop))
        )

    def run(root: Path, *overrides: str, recipe: str = "grpo_qwen") -> int:
        return controller.run_job(
            run_config(*SMALL, "rollout=torch", f"run_root={root / 'runs'}", *overrides, recipe=recipe)
        )

    def remote(worker: type | None = None, **_: Any) -> Any:
        return actor if worker is None else actor(worker)

    here = SimpleNamespace(remote=remote, kill=lambda handle: None, ObjectRef=ray.ObjectRef)
    with pytest.MonkeyPatch.context() as patch, process_group():
        patch.setattr(actors, "ray", here)
        patch.setattr(controller, "connect", _session)
        patch.setattr(trainer, "init_process_group", lambda *_, **__: None)  # trainer and critic share this one
        patch.setattr(trainer.TrainerWorker, "close", lambda self: None)
        try:
            yield run
        finally:
            loop.close()
            torch.set_num_threads(threads)
