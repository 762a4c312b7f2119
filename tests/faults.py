"""Faults at a chosen moment, inside the actors of a run: what a chaos test cannot hit from outside.

``FAULT=TARGET;CALL;FILE`` in the environment of a run: the process that makes this call (from 1) dies by SIGKILL
in it, unless FILE is there already; it makes FILE first, so that one process dies, once. The recipe names
``faults.ppo_clip`` as its loss, which every trainer rank imports.
"""

from __future__ import annotations

import importlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlsys.algorithms.losses.ppo_clip import ppo_clip

__all__ = ["ppo_clip"]

LOSS = "algorithm.loss=faults.ppo_clip"


def fault(target: str, call: int, file: Path) -> str:
    """The value of FAULT. target: ``module:attribute`` or ``module:Class.method``; a leading ``after `` lets the call
    end first."""
    return f"{target};{call};{file}"


def _arm() -> None:
    target, call, file = os.environ["FAULT"].split(";")
    after = target.startswith("after ")
    module, _, path = target.removeprefix("after ").partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    setattr(owner, name, _fatal(getattr(owner, name), int(call), Path(file), after=after))


def _fatal(function: Callable[..., Any], call: int, file: Path, *, after: bool) -> Callable[..., Any]:
    calls = 0

    def fatal(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != call:
            return function(*args, **kwargs)
        try:
            file.touch(exist_ok=False)
        except FileExistsError:
            return function(*args, **kwargs)
        if after:
            function(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
        raise AssertionError("outlived SIGKILL")

    return fatal


if os.environ.get("FAULT"):
    _arm()
