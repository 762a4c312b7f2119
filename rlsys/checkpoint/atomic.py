"""Writing so that a reader sees the old content or the new, never half: beside, flushed to the disk, renamed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from rlsys.config.errors import UserError

PARTIAL = ".partial-"
REPLACED = ".replaced-"

_REASONS = {
    errno.ENOSPC: ("the disk is full", "free some space, or choose a folder on another disk"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, or choose a folder on another disk"),
    errno.EACCES: ("there is no permission to write", "choose a folder that you may write to"),
    errno.EPERM: ("there is no permission to write", "choose a folder that you may write to"),
    errno.EROFS: ("the file system is read-only", "choose a folder that you may write to"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "choose another folder"),
    errno.EEXIST: ("a file of that name is in the way", "move the file away, or choose another folder"),
}


@contextmanager
def writing(what: str, where: Path) -> Iterator[None]:
    """Turns a failed write into a :class:`UserError` that says what could not be written, and why."""
    try:
        yield
    except OSError as error:
        number = error.errno if error.errno is not None else -1
        reason, fix = _REASONS.get(number, (str(error), "check the disk and the folder"))
        raise UserError(f"{what} could not be written: {reason}", where=str(where), fix=fix) from error


def append(file: FileIO, line: bytes) -> None:
    """Appends the whole line, or nothing: half of one would spoil the next.

    Raises:
        OSError: the disk is full.
    """
    before = os.fstat(file.fileno()).st_size
    try:
        written = 0
        while written < len(line):
            written += file.write(line[written:]) or 0
    except OSError:
        os.ftruncate(file.fileno(), before)
        raise


def fsync(path: Path) -> None:
    """Flushes a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Writes strict JSON (NaN is a ValueError) beside and renames it into place.

    Raises:
        UserError: the disk is full, or the folder cannot be written to.
    """
    beside = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    with writing(path.name, path):
        try:
            with beside.open("w", encoding="utf-8") as file:
                json.dump(content, file, indent=2, allow_nan=False, ensure_ascii=False)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            beside.rename(path)
        finally:
            beside.unlink(missing_ok=True)
        fsync(path.parent)


def move_into_place(partial: Path, final: Path) -> None:
    """Renames the finished folder ``partial`` to ``final``, replacing a folder that is there.

    A folder cannot be renamed over another one that is not empty, so the old one steps aside first; a crash between
    the two renames leaves it as ``.replaced-NAME``, from where :func:`clear_leftovers` brings it back.
    """
    aside = final.with_name(REPLACED + final.name)
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
    partial.rename(final)
    fsync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def clear_leftovers(folder: Path) -> None:
    """Removes what an interrupted writer left in ``folder``, and brings back what it was about to replace."""
    for path in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for aside in folder.glob(f"{REPLACED}*"):
        final = folder / aside.name.removeprefix(REPLACED)
        if final.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(final)
