"""``manifest.json``: what a checkpoint consists of, and the checksums that a damaged one is refused by."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import rlsys
from rlsys.checkpoint.atomic import fsync, write_json
from rlsys.config.errors import UserError
from rlsys.config.paths import inside

NAME = "manifest.json"
FORMAT = 1
_HASH_THREADS = 4  # hashlib lets go of the interpreter lock: several files are read and hashed at once
_FIX = "use another checkpoint"


@dataclass(frozen=True)
class FileRecord:
    """One file: its size in bytes and its SHA-256."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint says about itself.

    step: training steps behind it.
    lineage: of its weight version.
    metric: the figure that the best checkpoint is chosen by (higher is better); None: not evaluated.
    extra: whatever the writer wants to know without opening a file.
    files: by path relative to the folder.
    format: version of this layout; rlsys: version of the package that wrote it.
    """

    step: int
    lineage: int
    metric: float | None
    extra: dict[str, Any]
    files: dict[str, FileRecord]
    format: int = FORMAT
    rlsys: str = field(default=rlsys.__version__)


def seal(folder: Path, *, step: int, lineage: int, metric: float | None, extra: dict[str, Any]) -> Manifest:
    """Flushes and hashes every file of ``folder`` and writes the manifest, last."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        records = list(pool.map(_flush_and_record, paths))
    files = {path.relative_to(folder).as_posix(): record for path, record in zip(paths, records, strict=True)}
    manifest = Manifest(step=step, lineage=lineage, metric=metric, extra=extra, files=files)
    for inner in folder.rglob("*"):
        if inner.is_dir():
            fsync(inner)
    body = asdict(manifest)
    write_json(folder / NAME, body | {"sha256": _checksum_of(body)})
    return manifest


def read(folder: Path) -> Manifest:
    """Reads the manifest of ``folder`` and checks it against its own checksum; the other files are not looked at.

    Raises:
        UserError: there is none, it is damaged, or another version of the layout wrote it.
    """
    path = folder / NAME
    if not path.is_file():
        raise UserError(f"this is no finished checkpoint: it has no {NAME}", where=str(folder), fix=_FIX)
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        stated = body.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{NAME} is truncated or edited: {error}", where=str(path), fix=_FIX) from error
    if _checksum_of(body) != stated:
        raise UserError(
            f"{NAME} was edited: its checksum is {_short(_checksum_of(body))}, it states {_short(stated)}",
            where=str(path),
            fix=_FIX,
        )
    if body["format"] != FORMAT:
        raise UserError(
            f"the checkpoint has format {body['format']}, this version of rlsys reads format {FORMAT}",
            where=str(path),
            fix=f"it was written by rlsys {body['rlsys']}; use that version",
        )
    return Manifest(**body | {"files": {name: FileRecord(**record) for name, record in body["files"].items()}})


def check_files(folder: Path, manifest: Manifest) -> None:
    """Checks presence, size and checksum of every listed file. Files that it does not list do no harm: loaders
    open files by the names that the writer gave them.

    Raises:
        UserError: naming every file that is missing, truncated or edited, with what was expected and found.
    """
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        paths = {name: inside(folder, name, where=str(folder / NAME)) for name in manifest.files}
        findings = pool.map(lambda item: _fault(paths[item[0]], *item), manifest.files.items())
        faults = [fault for fault in findings if fault]
    if faults:
        raise UserError(
            "the checkpoint is damaged and is not loaded: " + "; ".join(faults), where=str(folder), fix=_FIX
        )


def _fault(path: Path, name: str, record: FileRecord) -> str | None:
    """What is wrong with one file, in words."""
    if not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    if size != record.bytes:
        kind = "truncated" if size < record.bytes else "longer than it was written"
        return f"{name} is {kind} ({size:,} bytes, written: {record.bytes:,})"
    found = _sha256(path)
    if found != record.sha256:
        return f"{name} was edited (SHA-256 {_short(found)}, written: {_short(record.sha256)})"
    return None


def _flush_and_record(path: Path) -> FileRecord:
    fsync(path)
    return FileRecord(path.stat().st_size, _sha256(path))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum_of(body: dict[str, Any]) -> str:
    """SHA-256 of the manifest's content, independent of white space and key order."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _short(checksum: object) -> str:
    return f"{str(checksum)[:12]}…"
