"""A reward worker process: scores what its pool sends, one result at a time. It imports no torch and no Ray."""

from __future__ import annotations

import faulthandler
import fcntl
import importlib
import os
import resource
import socket
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from rlsys.config.errors import UserError
from rlsys.rewards.base import Failure, RewardFunction, RewardResult, as_result, hooks_of
from rlsys.rewards.channel import Channel
from rlsys.rewards.conditions import Condition, parse_condition

WORKER_FILE = __file__
_MESSAGE_CHARACTERS = 2000


class PartSpec(NamedTuple):
    """A part as it is sent to a worker: ``path`` is ``module:name``, ``when`` the text of the condition."""

    name: str
    path: str
    args: dict[str, Any]
    when: str | None


class CallDone(NamedTuple):
    """A worker's message: the call of the part at ``position`` has ended, for the sample in progress.

    following: position of the part that is called next; None: the sample is finished, and the next one begins.
    """

    position: int
    outcome: RewardResult | Failure
    following: int | None


@dataclass(frozen=True)
class _Part:
    name: str
    function: RewardFunction
    args: dict[str, Any]
    when: Condition | None


def main(channel_fd: int, lifeline_fd: int, trace_fd: int) -> None:
    """Serves until the pool closes its end.

    Args:
        channel_fd: socket: part specs first, then lists of (response, task).
        lifeline_fd: socket on which nothing is ever sent; its end is the end of the parent.
        trace_fd: pipe that a fatal signal's traceback is written to.
    """
    for fd in (channel_fd, lifeline_fd, trace_fd):
        os.set_inheritable(fd, False)
    _die_with(lifeline_fd)
    faulthandler.enable(file=trace_fd, all_threads=False)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a reward that is ended leaves no core file
    channel = Channel(socket.socket(fileno=channel_fd))
    parts: list[_Part] | None = None
    while True:
        try:
            messages = channel.receive()
        except EOFError:
            return
        for message in messages:
            if parts is not None:
                for response, task in message:
                    _score(parts, response, task, channel)
                continue
            try:
                parts = _load(message)
            except Exception:  # noqa: BLE001 (whatever the user's module does on import; the pool raises it)
                channel.send(UserError(f"a reward worker did not start: {_traceback_tail()}", where="reward.parts"))
                return
            channel.send(None)


def _die_with(lifeline_fd: int) -> None:
    """The kernel ends this process (SIGIO's default action) when the other end of the lifeline closes, that is when the
    parent closed it or died, even while C code holds the interpreter."""
    fcntl.fcntl(lifeline_fd, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline_fd, fcntl.F_SETFL, fcntl.fcntl(lifeline_fd, fcntl.F_GETFL) | os.O_ASYNC)


def _load(specs: Iterable[PartSpec]) -> list[_Part]:
    parts: list[_Part] = []
    for name, path, args, when in specs:
        module, _, attribute = path.replace(":", ".").rpartition(".")
        function = getattr(importlib.import_module(module), attribute)
        warm_up = hooks_of(function).warm_up
        if warm_up is not None:
            warm_up()
        earlier = [part.name for part in parts]
        condition = None if when is None else parse_condition(when, earlier, [name], where=f"reward.parts.{name}.when")
        parts.append(_Part(name, function, args, condition))
    return parts


def _score(parts: list[_Part], response: str, task: dict[str, Any], channel: Channel) -> None:
    """Calls the parts whose conditions hold, in order, until one fails, and reports each."""
    scores: dict[str, float | None] = {}
    position: int | None = 0
    while position is not None:
        part = parts[position]
        outcome = _call(part, response, task)
        following = None
        if isinstance(outcome, RewardResult):
            scores[part.name] = outcome.score
            following = _next(parts, position + 1, scores)
        channel.send(CallDone(position, outcome, following))
        position = following


def _next(parts: list[_Part], start: int, scores: dict[str, float | None]) -> int | None:
    for position in range(start, len(parts)):
        when = parts[position].when
        if when is None or when.holds(scores):
            return position
    return None


def _call(part: _Part, response: str, task: dict[str, Any]) -> RewardResult | Failure:
    try:
        value = part.function(response, task, **part.args)
    except BaseException:  # noqa: BLE001 (SystemExit too: recorded, counted against the budget, reported)
        return Failure("raised", part.name, _traceback_tail(own_frames=1))
    try:
        return as_result(value)
    except Exception as error:  # noqa: BLE001 (a value's own float() or str() may raise anything; reported)
        return Failure("bad value", part.name, str(error) or type(error).__name__)


def _traceback_tail(own_frames: int = 0) -> str:
    """The end of the traceback of the exception being handled, without the first ``own_frames`` frames."""
    kind, error, frames = sys.exc_info()
    for _ in range(own_frames):
        frames = frames and frames.tb_next
    return "".join(traceback.format_exception(kind, error, frames)).strip()[-_MESSAGE_CHARACTERS:]
