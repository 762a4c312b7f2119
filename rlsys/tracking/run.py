"""A run's folder: the only interface between a run and whatever watches it.

runs/20260131-120000-grpo_qwen/
  config.yaml          resolved, secrets masked
  environment.json     interpreter, packages, machine, git state
  metrics.jsonl        one line a step
  rollouts/            step-000012.jsonl: sampled responses
  events.jsonl         start, resume, notes, alerts, a tracker's failure
  failures.jsonl       rewards that raised or timed out, with their rows
  checkpoints/
  summary.json         curves.png
"""

from __future__ import annotations

import fcntl
import json
import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from datetime import datetime
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rlsys.checkpoint.atomic import PARTIAL, append, write_json, writing
from rlsys.config.errors import UserError
from rlsys.tracking import provenance
from rlsys.tracking.metrics import to_line
from rlsys.tracking.secrets import mask

_STAMP = re.compile(r"(\d{8}-\d{6})-(.+?)(?:~(\d+))?")


class RunFolder:
    """One run's folder, open for appending. Make it with :meth:`create` or :meth:`open`; use it as a context manager.

    Every line is flushed when it is written; a crash tears at most the last one.
    """

    def __init__(self, path: Path):
        self.path = path.absolute()
        self._files: dict[str, FileIO] = {}
        self.session = round(time.time(), 3)
        """Unix time at which this process opened the folder: tells sessions of one run apart."""
        self._opened = time.monotonic()

    @classmethod
    def create(cls, run_root: Path, name: str, config: Any, *, now: datetime | None = None) -> RunFolder:
        """Makes ``<run_root>/<YYYYmmdd-HHMMSS>-<name>/`` with ``config.yaml`` and ``environment.json``.

        Args:
            run_root: made if it is missing.
            name: of the run; characters that do not belong in a file name become ``-``.
            config: the resolved config, a dataclass or a mapping.
            now: time in the folder's name; None: the local time.

        Raises:
            UserError: the folder cannot be made or written to.
        """
        stamp = (now or datetime.now()).strftime("%Y%m%d-%H%M%S")
        with writing("the run folder", run_root):
            run_root.mkdir(parents=True, exist_ok=True)
            run = cls(_make_unique(run_root, f"{stamp}-{_slug(name)}"))
            run._lock()
            for folder in (run.rollouts, run.checkpoints):
                folder.mkdir()
            content = asdict(config) if is_dataclass(config) and not isinstance(config, type) else dict(config)
            run.config.write_text(yaml.safe_dump(mask(content), sort_keys=False, allow_unicode=True), encoding="utf-8")
        write_json(run.path / "environment.json", provenance.record())
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Goes on with the run at ``path``.

        Raises:
            UserError: that is no run folder, or it cannot be written to.
        """
        if not (path / "config.yaml").is_file():
            raise UserError(
                "this is no run folder: it has no config.yaml",
                where=str(path),
                fix="give the path of runs/<time>-<name>",
            )
        run = cls(path)
        with writing("the run folder", path):
            run._lock()
            for folder in (run.rollouts, run.checkpoints):
                folder.mkdir(exist_ok=True)
            run._append_to("events.jsonl")
        return run

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    def elapsed_s(self) -> float:
        """Seconds since this process opened the folder."""
        return time.monotonic() - self._opened

    def log_metrics(self, metrics: Mapping[str, Any], *, step: int, lineage: int) -> None:
        """Appends one line to ``metrics.jsonl``, with ``time/session`` (Unix time at which this process opened the
        folder) and ``time/elapsed_s`` (since then), from which the wall time of all sessions adds up.

        Raises:
            TypeError: a metric is no number.
            UserError: the disk is full.
        """
        times = {"time/session": self.session, "time/elapsed_s": round(self.elapsed_s(), 3)}
        self._append("metrics.jsonl", to_line({**metrics, **times}, step=step, lineage=lineage))

    def log_event(self, kind: str, text: str, **fields: Any) -> None:
        """Appends to ``events.jsonl``: what happened, in one sentence, and its JSON fields."""
        time_now = datetime.now().astimezone().isoformat(timespec="seconds")
        self._append("events.jsonl", mask({"time": time_now, "kind": kind, "text": text, **fields}))

    def log_failure(self, failure: Mapping[str, Any]) -> None:
        """Appends to ``failures.jsonl``: a reward that raised or timed out, with the row it was given."""
        self._append("failures.jsonl", mask(dict(failure)))

    def write_rollouts(self, step: int, rows: Iterable[Mapping[str, Any]]) -> Path:
        """Writes ``rollouts/step-000012.jsonl`` in one go, over those of an abandoned lineage."""
        path = self.rollouts / f"step-{step:06d}.jsonl"
        beside = path.with_name(PARTIAL + path.name)
        with writing(path.name, path):
            beside.write_text("".join(_json_line(row) for row in rows), encoding="utf-8")
            beside.rename(path)
        return path

    def write_summary(self, summary: Mapping[str, Any]) -> Path:
        """Writes ``summary.json``, atomically."""
        write_json(self.summary, dict(summary))
        return self.summary

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        """Keeps a second process from writing into the folder, until :meth:`close` or the end of this process."""
        file = (self.path / ".lock").open("ab", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(
                "another process is writing into this run folder",
                where=str(self.path),
                fix="wait until that run has ended, or stop it",
            ) from None
        self._files[".lock"] = file

    def _append(self, name: str, content: Mapping[str, Any]) -> None:
        with writing(name, self.path / name):
            append(self._append_to(name), _json_line(content).encode())

    def _append_to(self, name: str) -> FileIO:
        """The file, open for appending, without the line that a crash may have torn."""
        if name not in self._files:
            path = self.path / name
            _drop_torn_line(path)
            self._files[name] = path.open("ab", buffering=0)
        return self._files[name]


class ResumePoint(NamedTuple):
    """Where a run goes on. checkpoint: the folder that was asked for; None: the run's newest."""

    run: RunFolder
    checkpoint: Path | None


def resolve_resume(resume: str | None, run_root: Path, name: str) -> ResumePoint | None:
    """What the config key ``resume`` means: ``auto`` (newest run of this name), a run folder, or a checkpoint in one.

    Returns:
        None: a new run (``resume`` is null, or ``auto`` found no run).

    Raises:
        UserError: the path is neither a run folder nor a checkpoint of one.
    """
    if resume is None:
        return None
    if resume == "auto":
        found = find_latest(run_root, name)
        return ResumePoint(found, None) if found else None
    path = Path(resume).expanduser().absolute()
    if path.parent.name == "checkpoints":
        if not path.is_dir():
            raise UserError("there is no such checkpoint", where=f"resume={resume}", fix=f"see {path.parent}")
        return ResumePoint(RunFolder.open(path.parent.parent), path)
    return ResumePoint(RunFolder.open(path), None)


def find_latest(run_root: Path, name: str) -> RunFolder | None:
    """The newest run called ``name`` under ``run_root`` that has a checkpoint; None where there is none. A run that was
    stopped before its first checkpoint has nothing to go on from."""
    runs = [path for path in _called(run_root, name) if any((path / "checkpoints").glob("step-*"))]
    return RunFolder.open(runs[-1]) if runs else None


def find_abandoned(run_root: Path, name: str) -> Path | None:
    """The newest run called ``name`` under ``run_root`` that no process writes into: it has ended, or its driver was
    killed, with or without a checkpoint. None where there is none."""
    return next((path for path in reversed(_called(run_root, name)) if not _is_open(path)), None)


def _called(run_root: Path, name: str) -> list[Path]:
    """Folders of the runs called ``name``, oldest first."""
    if not run_root.is_dir():
        return []
    matches = {path: _STAMP.fullmatch(path.name) for path in run_root.iterdir() if (path / "config.yaml").is_file()}
    found = [(m[1], int(m[3] or 1), path) for path, m in matches.items() if m and m[2] == _slug(name)]
    return [path for *_, path in sorted(found)]


def _is_open(path: Path) -> bool:
    """Whether some process, this one included, has the run folder open."""
    try:
        with (path / ".lock").open("r", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _make_unique(run_root: Path, name: str) -> Path:
    """Makes a folder that did not exist: ``name``, or ``name~2``, … for runs that start within one second."""
    number = 1
    while True:
        path = run_root / (name if number == 1 else f"{name}~{number}")
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path


def _slug(name: str) -> str:
    return re.sub(r"[^\w.\-]+", "-", name).strip("-.") or "run"


def _json_line(content: Mapping[str, Any]) -> str:
    """Strict JSON. Rows of a user's data may hold anything (dates, numpy values): those become text."""
    return json.dumps(_finite(content), allow_nan=False, ensure_ascii=False, default=str) + "\n"


def _finite(value: Any) -> Any:
    """``value`` with null for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drop_torn_line(path: Path) -> None:
    """Cuts the file after its last newline: what a killed writer left of a line would spoil the next one."""
    if not path.is_file():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
