"""The sample ledger: what became of every prompt group that was handed out, as lines of ``ledger.jsonl``.

    {"event": "issued", "time": …, "version": [lineage, step], "groups": [[uid, attempt, samples], …]}
    {"event": "trained", "time": …, "step": …, "lineage": …, "groups": […]}

A sample's id is ``UID#INDEX``, of one attempt. A group is handed out (``issued``), comes back whole (``received``) and
is ``trained`` or ``filtered``; an attempt that is given up (``reissued``) is followed by another
``issued`` with a higher attempt. The file is append-only. What a crash made void is not taken out of it: ``resumed``
says from which checkpoint the run went on, and :func:`audit` follows the lineage that survived.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlsys.checkpoint.atomic import append, writing
from rlsys.config.errors import UserError

if TYPE_CHECKING:
    from rlsys.batch.versions import WeightVersion  # its package loads torch, which the command line does not wait for

FILE_NAME = "ledger.jsonl"


class LedgerGroup(NamedTuple):
    """A prompt group. attempt: how often its samples were given up before; samples: how many it has."""

    uid: str
    attempt: int
    samples: int


class Ledger:
    """The file of a run, open for appending. Its methods may be called from several threads; a line is with the
    operating system when a method returns, and on the disk after :meth:`flush` or :meth:`checkpointed`.

    Args:
        report: told, in one sentence, when the file ended in half a line, which is then cut off: its writer was killed.

    Raises:
        UserError: the file cannot be written to; so do all methods.
    """

    def __init__(self, path: Path, report: Callable[[str], None] | None = None):
        self.path = path
        self._lock = threading.Lock()
        with writing(path.name, path):
            cut = _cut_torn_lines(path)
            self._file = path.open("ab", buffering=0)
        if cut and report is not None:
            report(f"{path.name} ended in half a line, which was cut off ({cut} bytes): its writer was killed")

    def issued(self, groups: Sequence[LedgerGroup], version: WeightVersion) -> None:
        """Handed to samplers. version: of the weights that they have."""
        self._append("issued", groups, version=list(version))

    def received(self, groups: Sequence[LedgerGroup]) -> None:
        """Sampled and scored; they wait to be trained."""
        self._append("received", groups)

    def filtered(self, groups: Sequence[LedgerGroup], why: str) -> None:
        """Left out by a group filter, for good: one that is trained after all is not written here."""
        self._append("filtered", groups, why=why)

    def reissued(self, groups: Sequence[LedgerGroup], why: str) -> None:
        """Given up, to be handed out again. groups: with the attempt that is given up."""
        self._append("reissued", groups, why=why)

    def trained(self, groups: Sequence[LedgerGroup], step: int, lineage: int) -> None:
        """Part of the optimiser steps that end step ``step`` (the one that ``metrics.jsonl`` calls so)."""
        self._append("trained", groups, step=step, lineage=lineage)

    def checkpointed(self, outstanding: Sequence[LedgerGroup], step: int, lineage: int) -> None:
        """The state of step ``step`` is about to become a checkpoint; the line is on the disk when this returns.

        Args:
            outstanding: all groups that were handed out and are neither trained nor filtered, as whoever keeps
                them has them: one that the ledger knows and this list does not is lost. No other line may be written
                between the moment that the list (and what the checkpoint has of it) is of and this one.
        """
        self._append("checkpointed", outstanding, step=step, lineage=lineage)
        self.flush()

    def resumed(self, step: int, lineage: int) -> None:
        """The run goes on as the new ``lineage`` from its checkpoint of ``step`` (0: from its start): all that was
        written after that checkpoint is void, and its outstanding groups may be handed out anew, with the same attempt.
        A group that was handed out later, and is kept over it, is written anew.
        """
        self._append("resumed", (), step=step, lineage=lineage)

    def flush(self) -> None:
        """Everything written so far is on the disk."""
        with self._lock, writing(self.path.name, self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with self._lock:
            self._file.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, event: str, groups: Iterable[LedgerGroup], **fields: Any) -> None:
        content = {"event": event, "time": round(time.time(), 3), **fields, "groups": [list(group) for group in groups]}
        line = (json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n").encode()
        with self._lock, writing(self.path.name, self.path):
            append(self._file, line)


class State(StrEnum):
    """Of a group: with a sampler, sampled, given up and to be handed out again, or at its end."""

    IN_FLIGHT = "in flight"
    READY = "ready"
    WAITING = "waiting"
    TRAINED = "trained"
    FILTERED = "filtered"
    LOST = "lost"


OUTSTANDING = (State.IN_FLIGHT, State.READY, State.WAITING)


class Kind(StrEnum):
    """What can be wrong."""

    TWICE = "trained twice"
    LOST = "lost"
    NOT_WHOLE = "not whole"
    ATTEMPTS = "several attempts trained"
    ORDER = "out of order"


class Violation(NamedTuple):
    kind: Kind
    uid: str
    text: str


@dataclass
class _Group:
    """What is known of a group. reopened: the run was resumed since it was handed out."""

    state: State
    attempt: int
    samples: int
    reopened: bool = False


@dataclass
class Audit:
    """What a ledger says along the lineage that survived.

    groups, samples: how many, by :class:`State`.
    trained_ids: ids of the samples that were trained.
    voided: samples that were trained on a lineage that was given up; reissues: attempts that were given up; late:
        answers to such attempts, which nobody used; resumes: how often the run went on from a checkpoint.
    torn: the file ends in half a line, of a writer that is at work or was killed.
    """

    groups: dict[State, int]
    samples: dict[State, int]
    trained_ids: frozenset[str]
    violations: list[Violation]
    voided: int
    reissues: int
    late: int
    resumes: int
    torn: bool

    @property
    def ok(self) -> bool:
        return not self.violations

    @property
    def outstanding(self) -> int:
        """Groups that were handed out and have not come to an end."""
        return sum(self.groups[state] for state in OUTSTANDING)

    def count(self, kind: Kind) -> int:
        return sum(violation.kind is kind for violation in self.violations)


def audit(path: Path) -> Audit:
    """Replays the ledger at ``path`` (a file, or a run's folder).

    Raises:
        UserError: there is no such file, or a line in its midst is no line of a ledger.
    """
    lines, torn = read_ledger(path / FILE_NAME if path.is_dir() else path)
    kept, problems = surviving(lines)
    replay = _Replay()
    replay.violations += problems
    for line in kept:
        replay.follow(line)
    known = replay.groups.values()
    return Audit(
        groups={state: sum(group.state is state for group in known) for state in State},
        samples={state: sum(group.samples for group in known if group.state is state) for state in State},
        trained_ids=frozenset(replay.trained_ids),
        violations=replay.violations,
        voided=_trained_samples(lines) - _trained_samples(kept),
        reissues=sum(len(line["groups"]) for line in lines if line["event"] == "reissued"),
        late=replay.late,
        resumes=sum(line["event"] == "resumed" for line in lines),
        torn=torn,
    )


def read_ledger(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """The lines, groups as :class:`LedgerGroup`; and whether the last one is torn, and left out.

    Raises:
        UserError: as of :func:`audit`.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"there is no ledger: {error.strerror}", where=str(path), fix="give the path of runs/<time>-<name>"
        ) from None
    whole = _whole(content)
    lines = content[:whole].split(b"\n")[:-1]
    return [_parsed(line, number, path) for number, line in enumerate(lines, 1)], whole < len(content)


def surviving(lines: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Violation]]:
    """The lines that no ``resumed`` made void, with the ``resumed`` lines; and those of them that go on from a step of
    which there is no line.

    A run goes on from its newest ``checkpointed`` line of the step, or, where none was written, from its newest
    ``trained`` line.
    """
    kept: list[dict[str, Any]] = []
    problems: list[Violation] = []
    for line in lines:
        if line["event"] == "resumed":
            end = _line_of(kept, line["step"])
            if end is None:
                problems.append(
                    Violation(Kind.ORDER, "", f"the run went on from step {line['step']}, which it never did")
                )
            else:
                del kept[end:]
        kept.append(line)
    return kept, problems


def _line_of(lines: Sequence[Mapping[str, Any]], step: int) -> int | None:
    """After how many lines the state of ``step`` stood."""
    if step == 0:
        return 0
    for event in ("checkpointed", "trained"):
        for index in range(len(lines) - 1, -1, -1):
            if lines[index]["event"] == event and lines[index]["step"] == step:
                return index + 1
    return None


@dataclass
class _Replay:
    """Follows lines, one after the other."""

    groups: dict[str, _Group] = field(default_factory=dict)
    trained_ids: set[str] = field(default_factory=set)
    violations: list[Violation] = field(default_factory=list)
    late: int = 0

    def follow(self, line: Mapping[str, Any]) -> None:
        event = line["event"]
        if event == "resumed":
            for group in self.groups.values():
                group.reopened = group.state in OUTSTANDING
        elif event == "checkpointed":
            self._compare(line["groups"], line["step"])
        else:
            handler = getattr(self, f"_{event}")
            for group in line["groups"]:
                handler(group)

    def _issued(self, given: LedgerGroup) -> None:
        known = self.groups.get(given.uid)
        if known is not None and not _may_be_issued(known, given.attempt):
            self._wrong(Kind.ORDER, given, f"was handed out as attempt {given.attempt} while it was {_of(known)}")
        if known is None or known.state is not State.TRAINED:
            self.groups[given.uid] = _Group(State.IN_FLIGHT, given.attempt, given.samples)

    def _received(self, given: LedgerGroup) -> None:
        known = self.groups.get(given.uid)
        if known is None:
            self._wrong(Kind.ORDER, given, "was received and never handed out")
        elif known.state is State.IN_FLIGHT and known.attempt == given.attempt:
            known.state = State.READY
        elif known.attempt > given.attempt or known.state in (State.WAITING, State.FILTERED):
            self.late += 1
        else:
            self._wrong(Kind.ORDER, given, f"was received as attempt {given.attempt} while it was {_of(known)}")

    def _reissued(self, given: LedgerGroup) -> None:
        self._leave(given, State.WAITING, "given up")

    def _filtered(self, given: LedgerGroup) -> None:
        self._leave(given, State.FILTERED, "filtered")

    def _leave(self, given: LedgerGroup, state: State, verb: str) -> None:
        known = self.groups.get(given.uid)
        if known is None:
            self._wrong(Kind.ORDER, given, f"was {verb} and never handed out")
        elif known.state not in OUTSTANDING or known.attempt != given.attempt:
            self._wrong(Kind.ORDER, given, f"was {verb} as attempt {given.attempt} while it was {_of(known)}")
        else:
            known.state = state

    def _trained(self, given: LedgerGroup) -> None:
        known = self.groups.get(given.uid)
        if known is None:
            self._wrong(Kind.ORDER, given, "was trained and never handed out")
            known = self.groups[given.uid] = _Group(State.READY, given.attempt, given.samples)
        elif known.state is State.TRAINED and known.attempt == given.attempt:
            self._wrong(Kind.TWICE, given, "was trained twice")
        elif known.state is State.TRAINED:
            self._wrong(Kind.ATTEMPTS, given, f"was trained as attempts {known.attempt} and {given.attempt}")
        elif known.state is not State.READY or known.attempt != given.attempt:
            self._wrong(Kind.ORDER, given, f"was trained as attempt {given.attempt} while it was {_of(known)}")
        if known.samples != given.samples:
            self._wrong(
                Kind.NOT_WHOLE, given, f"was handed out as {known.samples} samples and trained as {given.samples}"
            )
        known.state = State.TRAINED
        self.trained_ids.update(sample_ids(given))

    def _compare(self, held: Iterable[LedgerGroup], step: int) -> None:
        """With what the keeper of the groups says is outstanding at a checkpoint."""
        by_uid = {group.uid: group for group in held}
        for uid, known in self.groups.items():
            if known.state in OUTSTANDING and uid not in by_uid:
                gone = f"was lost: it was {_of(known)}, and the checkpoint of step {step} does not have it"
                self._wrong(Kind.LOST, LedgerGroup(uid, known.attempt, known.samples), gone)
                known.state = State.LOST
        for group in by_uid.values():
            found = self.groups.get(group.uid)
            if found is None or found.state not in OUTSTANDING:
                state = "never handed out" if found is None else _of(found)
                self._wrong(Kind.ORDER, group, f"is outstanding in the checkpoint of step {step} and was {state}")

    def _wrong(self, kind: Kind, group: LedgerGroup, text: str) -> None:
        self.violations.append(Violation(kind, group.uid, f"{group.uid} {text}"))


def sample_ids(group: LedgerGroup) -> Iterator[str]:
    return (f"{group.uid}#{index}" for index in range(group.samples))


def _may_be_issued(known: _Group, attempt: int) -> bool:
    """After a resume what was under way may be sampled again as it was: the same seeds give the same samples."""
    if known.state not in OUTSTANDING:
        return False
    if known.reopened and known.state is not State.WAITING:
        return attempt >= known.attempt
    return known.state is State.WAITING and attempt > known.attempt


def _of(group: _Group) -> str:
    return f"{group.state} (attempt {group.attempt})"


def _trained_samples(lines: Iterable[Mapping[str, Any]]) -> int:
    return sum(group.samples for line in lines if line["event"] == "trained" for group in line["groups"])


_EVENTS = ("issued", "received", "filtered", "reissued", "trained", "checkpointed", "resumed")
_WITH_STEP = ("trained", "checkpointed", "resumed")


def _parsed(line: bytes, number: int, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(line)
        if content["event"] not in _EVENTS or (content["event"] in _WITH_STEP and not isinstance(content["step"], int)):
            raise ValueError(content["event"])
        return content | {"groups": [LedgerGroup(*group) for group in content["groups"]]}
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"line {number} is no line of a ledger", where=str(path), fix="restore the file: only its end may be torn"
        ) from None


def _whole(content: bytes) -> int:
    """How many bytes are whole lines. A host that lost its power may leave zeros in the place of the last ones."""
    end = content.rfind(b"\n") + 1
    while end and b"\0" in content[(start := content.rfind(b"\n", 0, end - 1) + 1) : end]:
        end = start
    return end


def _cut_torn_lines(path: Path) -> int:
    """Cuts what a killed writer left of a line; how many bytes that were."""
    if not path.is_file():
        return 0
    content = path.read_bytes()
    whole = _whole(content)
    if whole < len(content):
        os.truncate(path, whole)
    return len(content) - whole
