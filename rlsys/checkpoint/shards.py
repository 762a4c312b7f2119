"""Sharded tensors on disk: every rank writes what it holds, any number of ranks reads the slices that it needs.

One safetensors file a rank, ``<kind>-00001-of-00004.safetensors``. A slice is a range of a tensor's elements in the
order of memory, so it does not matter whether an engine cuts by rows (FSDP2) or by elements (ZeRO-3). The header says
for each tensor the shape of the whole and the element at which this rank's slice starts: a reader needs no other index.
"""

from __future__ import annotations

import json
import math
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
    """Elements ``start : start + local.numel()`` of a tensor of the global ``shape``, laid out flat.

    local: contiguous, of any shape; may be empty. copies: ranks that hold the same elements; copy: which this one is.
    """

    local: torch.Tensor
    shape: tuple[int, ...]
    start: int
    copies: int = 1
    copy: int = 0

    def __post_init__(self) -> None:
        numel = math.prod(self.shape)
        if self.local.numel() and not 0 <= self.start <= numel - self.local.numel():
            raise ValueError(f"elements {self.start} + {self.local.numel()} are not within {self.shape}")

    @property
    def stop(self) -> int:
        return self.start + self.local.numel()

    def share(self) -> Shard:
        """The part that this rank writes, of what several hold."""
        if self.copies == 1:
            return self
        size = -(-self.local.numel() // self.copies)
        part = self.local.reshape(-1)[self.copy * size : (self.copy + 1) * size]
        return Shard(part, self.shape, self.start + min(self.copy * size, self.local.numel()))

    @torch.no_grad()
    def fill(self, values: torch.Tensor) -> None:
        """Writes the elements over with as many ``values``."""
        self.local.copy_(values.view_as(self.local))


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
    written = {name: shard.share() for name, shard in shards.items()}
    layout = {name: {"shape": list(shard.shape), "element": shard.start} for name, shard in written.items()}
    tensors = {name: shard.local.detach().reshape(-1).cpu() for name, shard in written.items()}
    save_file(tensors, path, metadata={_LAYOUT: json.dumps(layout)})
    return path


@dataclass(frozen=True)
class _Slice:
    file: Any
    start: int
    size: int


class ShardReader:
    """Reads tensors or parts of them, whoever wrote them. A context manager: files are mapped, not loaded.

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

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor.

        Raises:
            UserError: no tensor of that name, or elements that no file holds.
        """
        return self.read_flat(name, 0, math.prod(self.shapes.get(name, ()))).view(self.shapes[name])

    def read_flat(self, name: str, start: int, stop: int) -> torch.Tensor:
        """[stop − start], elements ``start:stop`` of the tensor laid out flat; raises as :meth:`read`."""
        if name not in self._slices:
            raise UserError(f"the checkpoint has no tensor '{name}' in its {self._kind} files", where=str(self._folder))
        parts, at = [], start
        for piece in self._slices[name]:
            end = min(stop, piece.start + piece.size)
            if piece.start <= at < end:
                parts.append(piece.file.get_slice(name)[at - piece.start : end - piece.start])
                at = end
        if at < stop:
            raise UserError(f"elements {at} to {stop} of '{name}' are in no {self._kind} file", where=str(self._folder))
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
            pieces.append(_Slice(file, entry["element"], file.get_slice(name).get_shape()[0]))
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
