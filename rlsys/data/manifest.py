"""``data-manifest.json`` beside data files: their sizes and checksums, and whether they are a fixture.

A fixture is made to try machinery, not to learn from. Training on one has to be asked for, in the path itself:
``data.path=fixture:FILE``, so that the run's config says it for ever.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsys.checkpoint.atomic import write_json
from rlsys.checkpoint.manifest import FileRecord
from rlsys.config.errors import UserError
from rlsys.config.paths import inside

NAME = "data-manifest.json"
FORMAT = 1
FIXTURE = "fixture:"


@dataclass(frozen=True)
class DataManifest:
    """fixture: not to be trained on without being asked for; files: by name in the manifest's folder; rows: of each."""

    fixture: bool
    files: dict[str, FileRecord]
    rows: dict[str, int]


def write_manifest(folder: Path, rows: dict[str, int], *, fixture: bool) -> Path:
    """Of files in ``folder``. rows: by name.

    Raises:
        UserError: it cannot be written.
    """
    files = {name: {**_record(folder / name), "rows": count} for name, count in sorted(rows.items())}
    write_json(folder / NAME, {"format": FORMAT, "fixture": fixture, "files": files})
    return folder / NAME


def read_manifest(folder: Path) -> DataManifest | None:
    """Of the files in ``folder``; None: there is none.

    Raises:
        UserError: it is damaged, or of another format.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        if body["format"] != FORMAT or not isinstance(body["fixture"], bool):
            raise ValueError(f"format {body['format']}, fixture {body['fixture']!r}")
        files = {name: FileRecord(int(entry["bytes"]), str(entry["sha256"])) for name, entry in body["files"].items()}
        rows = {name: int(entry["rows"]) for name, entry in body["files"].items() if "rows" in entry}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"the data's manifest cannot be read: {error}", where=str(path), fix="write it anew, or remove it"
        ) from error
    return DataManifest(body["fixture"], files, rows)


def data_path(path: str, *, where: str) -> Path:
    """The file or folder that a config key names; ``fixture:`` in front of it allows a fixture.

    Args:
        where: the key, for the error message.

    Raises:
        UserError: it is a fixture and nobody said so, or the other way round.
    """
    allowed = path.startswith(FIXTURE)
    file = Path(path.removeprefix(FIXTURE)).expanduser()
    manifest = read_manifest(file if file.is_dir() else file.parent)
    listed = manifest is not None and (file.is_dir() or file.name in manifest.files)
    if listed and manifest is not None and manifest.fixture and not allowed:
        raise UserError(
            f"this is fixture data, made to try machinery and not to learn from: {file}",
            where=where,
            fix=f"give real data, or say that it is meant: {where}={FIXTURE}{path}",
        )
    if allowed and not (listed and manifest is not None and manifest.fixture) and file.exists():
        raise UserError(
            f"no {NAME} beside it says that this is fixture data: {file}", where=where, fix=f"write {where}={file}"
        )
    return file


def differences(folder: Path, manifest: DataManifest, names: Iterable[str] | None = None) -> list[str]:
    """What of the listed files (of all, or of ``names``) is not as the manifest says, in words."""
    found = []
    for name in sorted(manifest.files if names is None else set(names) & set(manifest.files)):
        stated = manifest.files[name]
        path = inside(folder, name, where=str(folder / NAME))
        if not path.is_file():
            found.append(f"{name} is missing")
            continue
        now = _record(path)
        if now["bytes"] != stated.bytes:
            found.append(f"{name} has {now['bytes']:,} bytes, and the manifest says {stated.bytes:,}")
        elif now["sha256"] != stated.sha256:
            found.append(f"{name} has another content (SHA-256 {now['sha256'][:12]}…, not {stated.sha256[:12]}…)")
    return found


def _record(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
