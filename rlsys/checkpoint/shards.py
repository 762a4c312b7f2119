"""Sharded tensors on disk: every rank writes what it holds, any number of ranks reads the slices that it needs.

One safetensors file a rank, ``<kind>-00001-of-00004.safetensors``. Its header says for each tensor the shape of the
whole and the row (index of dimension 0) at which this rank's slice starts, so a reader needs no other index.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rlsys.config.errors import UserError

_LAYOUT = "layout"


@dataclass(frozen=True)
class Shard:
    """Rows ``start : start + len(local)`` of a tensor of the global ``shape``. ``local`` may have no rows."""

    local: torch.Tensor
    shape: tuple[int, ...]
    start: int

    def __post_init__(self) -> None:
        if not self.shape or self.local.shape[1:] != self.shape[1:]:
            raise ValueError(f"{tuple(self.local.shape)} is no slice along dimension 0 of {self.shape}")
        if self.local.shape[0] and not 0 <= self.start <= self.shape[0] - self.local.shape[0]:
            raise ValueError(f"rows {self.start} + {self.local.shape[0]} are not within {self.shape}")


def write_shards(folder: Path, kind: str, rank: int, world_size: int, shards: Mapping[str, Shard]) -> Path:
    """Writes one rank's slices.

    Args:
        folder: exists.
        kind: first part of the file's name (``model``).
        rank: of the writer, from 0.
        world_size: number of writers.
        shards: by tensor name.

    Returns:
        The file.
    """
    path = folder / f"{kind}-{rank + 1:05d}-of-{world_size:05d}.safetensors"
    layout = {name: {"shape": list(shard.shape), "start": shard.start} for name, shard in shards.items()}
    tensors = {name: shard.local.detach().cpu().contiguous() for name, shard in shards.items()}
    save_file(tensors, path, metadata={_LAYOUT: json.dumps(layout)})
    return path


@dataclass(frozen=True)
class _Slice:
    file: Any
    start: int
    rows: int


class ShardReader:
    """Reads rows of tensors, whoever wrote them. A context manager: files are mapped, not loaded.

    Args:
        folder: what :func:`write_shards` wrote into.
        kind: first part of the files' names.

    Raises:
        UserError: there are no such files, one of a set is missing, or one cannot be read.
    """

    def __init__(self, folder: Path, kind: str):
        self._folder, self._kind = Path(folder), kind
        self._stack = ExitStack()
        self._slices: dict[str, list[_Slice]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in _complete_set(self._folder, kind):
            self._open(path)

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows ``start:stop`` of the whole tensor (all of them by default).

        Raises:
            UserError: no tensor of that name, or rows that no file holds.
        """
        if name not in self._slices:
            raise UserError(f"the checkpoint has no tensor '{name}' in its {self._kind} files", where=str(self._folder))
        stop = self.shapes[name][0] if stop is None else stop
        parts, at = [], start
        for piece in self._slices[name]:
            end = min(stop, piece.start + piece.rows)
            if piece.start <= at < end:
                parts.append(piece.file.get_slice(name)[at - piece.start : end - piece.start])
                at = end
        if at < stop:
            raise UserError(f"rows {at} to {stop} of '{name}' are in no {self._kind} file", where=str(self._folder))
        if not parts:
            return self._slices[name][0].file.get_slice(name)[0:0]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _open(self, path: Path) -> None:
        try:
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            layout = json.loads(file.metadata()[_LAYOUT])
        except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            self._stack.close()
            raise UserError(f"not a shard of a checkpoint: {error}", where=str(path)) from error
        for name, entry in layout.items():
            shape = tuple(entry["shape"])
            if self.shapes.setdefault(name, shape) != shape:
                raise UserError(
                    f"'{name}' has the shape {shape} here and {self.shapes[name]} elsewhere", where=str(path)
                )
            pieces = self._slices.setdefault(name, [])
            pieces.append(_Slice(file, entry["start"], file.get_slice(name).get_shape()[0]))
            pieces.sort(key=lambda piece: piece.start)


def _complete_set(folder: Path, kind: str) -> list[Path]:
    """The files of ``kind``, all ranks' and of one number of ranks."""
    pattern = re.compile(rf"{re.escape(kind)}-(\d+)-of-(\d+)\.safetensors")
    found = {path: match for path in sorted(folder.glob(f"{kind}-*")) if (match := pattern.fullmatch(path.name))}
    if not found:
        raise UserError(f"the checkpoint has no {kind} files", where=str(folder))
    sizes = {int(match[2]) for match in found.values()}
    ranks = [int(match[1]) for match in found.values()]
    if len(sizes) > 1 or ranks != list(range(1, max(sizes) + 1)):
        raise UserError(
            f"the {kind} files are not one complete set: {', '.join(path.name for path in found)}",
            where=str(folder),
            fix="restore the missing files, or go back to an earlier checkpoint",
        )
    return list(found)
