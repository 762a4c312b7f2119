"""A trainer rank's state on disk, the same whichever engine writes it: weights and moments as shards, steps and
random-number generators beside them.

model-00001-of-00002.safetensors      this rank's part of every weight
teacher-00001-of-00002.safetensors    of a teacher's that moves, where there is one
optimizer-00001-of-00002.safetensors  of AdamW's moments, as exp_avg/NAME and exp_avg_sq/NAME (after the first step)
rng-00001-of-00002.safetensors        generators of torch, CUDA, numpy and Python
trainer.json                          {"optimizer_steps": …, "applied_steps": …, "ranks": …}
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rlsys.checkpoint.shards import Shard, ShardReader, write_shards
from rlsys.config.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
_PROGRESS = "trainer.json"


@dataclass(frozen=True)
class Place:
    """A checkpoint folder and which of its writers or readers this process is."""

    folder: Path
    rank: int
    ranks: int

    @property
    def rng(self) -> Path:
        return self.folder / f"rng-{self.rank + 1:05d}-of-{self.ranks:05d}.safetensors"


@dataclass(frozen=True)
class Progress:
    """steps: of the schedule; applied: those of them that AdamW took (a step that is not finite is skipped)."""

    steps: int = 0
    applied: int = 0


def save(place: Place, weights: Mapping[str, Shard], moments: Mapping[str, Shard], progress: Progress) -> None:
    """Writes this rank's files; rank 0 also the ranks' common one.

    Args:
        weights, moments: what this rank holds, by name; without a step behind them moments are not written.
        progress: how far the optimiser is.
    """
    write_shards(place.folder, "model", place.rank, place.ranks, weights)
    if progress.applied:
        write_shards(place.folder, "optimizer", place.rank, place.ranks, moments)
    _save_rng(place.rng)
    if place.rank == 0:
        said = {"optimizer_steps": progress.steps, "applied_steps": progress.applied, "ranks": place.ranks}
        (place.folder / _PROGRESS).write_text(json.dumps(said))


def load(place: Place, weights: Mapping[str, Shard], moments: Mapping[str, Shard], seed: int) -> Progress:
    """Reads what :func:`save` wrote on any number of ranks, into what this rank holds; without a step behind it,
    moments become 0.

    Returns:
        How far the optimiser was.

    Raises:
        UserError: not a trainer's checkpoint, or one of another model.
    """
    said = _read_progress(place.folder)
    progress = Progress(said["optimizer_steps"], said.get("applied_steps", said["optimizer_steps"]))
    with ShardReader(place.folder, "model") as reader:
        shapes = {name: shard.shape for name, shard in weights.items()}
        if reader.shapes != shapes:
            other = sorted(set(reader.shapes.items()) ^ set(shapes.items()))
            raise UserError(
                f"the checkpoint is of another model: '{other[0][0]}' differs",
                where=str(place.folder),
                fix="check model.path and model.lora",
            )
        _fill(reader, weights)
    if progress.applied:
        with ShardReader(place.folder, "optimizer") as reader:
            _fill(reader, moments)
    else:
        for shard in moments.values():
            shard.local.zero_()
    if said["ranks"] == place.ranks:
        _load_rng(place.rng)
    else:
        seed_generators(seed, place.rank, progress.steps)
    return progress


def save_weights(place: Place, kind: str, weights: Mapping[str, Shard]) -> None:
    """Writes this rank's part of further weights, ``KIND-00001-of-00002.safetensors``; none, no file."""
    if weights:
        write_shards(place.folder, kind, place.rank, place.ranks, weights)


def load_weights(place: Place, kind: str, weights: Mapping[str, Shard]) -> None:
    """Reads what :func:`save_weights` wrote on any number of ranks.

    Raises:
        UserError: the checkpoint does not have them.
    """
    if weights:
        with ShardReader(place.folder, kind) as reader:
            _fill(reader, weights)


def seed_generators(seed: int, rank: int, steps: int) -> None:
    """Seeds torch, CUDA, numpy and Python, differently on each rank and after each number of optimiser steps."""
    words = [int(word) for word in np.random.SeedSequence([seed, rank, steps]).generate_state(3)]
    torch.manual_seed(words[0])
    np.random.seed(words[1])
    random.seed(words[2])


def _fill(reader: ShardReader, shards: Mapping[str, Shard]) -> None:
    for name, shard in shards.items():
        shard.fill(reader.read_flat(name, shard.start, shard.stop))


def _read_progress(folder: Path) -> dict[str, int]:
    try:
        return json.loads((folder / _PROGRESS).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"no trainer state: {error}", where=str(folder / _PROGRESS)) from error


def _save_rng(path: Path) -> None:
    version, python_state, python_gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    scalars: dict[str, Any] = {
        "python": [version, python_gauss],
        "numpy": [int(numpy_state["state"]["pos"]), numpy_state["has_gauss"], numpy_state["gauss"]],
    }
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
        "python": torch.tensor(python_state, dtype=torch.int64),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    save_file(tensors, path, metadata={"scalars": json.dumps(scalars)})


def _load_rng(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        scalars = json.loads(file.metadata()["scalars"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    version, python_gauss = scalars["python"]
    position, has_gauss, numpy_gauss = scalars["numpy"]
    random.setstate((version, tuple(tensors["python"].tolist()), python_gauss))
    np.random.set_state(("MT19937", tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, numpy_gauss))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
