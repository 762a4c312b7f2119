"""``controller.json``: the controller's part of a checkpoint. JSON, so that a person can read it; never pickle."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rlsys.checkpoint.atomic import write_json
from rlsys.config.errors import UserError

NAME = "controller.json"


@dataclass(frozen=True, kw_only=True)
class ControllerState:
    """Where the controller stood after a step.

    step: training steps done; lineage: of the run that wrote it.
    data: position in the data (epoch, offset, …), as the data set's own state.
    best_metric, best_step: best held-out figure so far.
    rng: see :func:`capture_rng`.
    extra: other JSON state.
    """

    step: int
    lineage: int
    data: dict[str, Any] = field(default_factory=dict)
    best_metric: float | None = None
    best_step: int | None = None
    rng: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Writes ``controller.json`` into a checkpoint that is being made.

        Raises:
            UserError: the disk is full or the folder cannot be written to.
        """
        write_json(folder / NAME, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> ControllerState:
        """Reads ``controller.json`` of a checkpoint.

        Raises:
            UserError: missing, not JSON, or not this layout.
        """
        path = folder / NAME
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"the controller's state cannot be read: {error}", where=str(path), fix="use another checkpoint"
            ) from error


def capture_rng() -> dict[str, Any]:
    """The global generators of ``random`` and ``numpy`` in this process, as JSON content."""
    version, words, gauss = random.getstate()
    numpy_state: dict[str, Any] = np.random.get_state(legacy=False)
    return {
        "python": [version, list(words), gauss],
        "numpy": numpy_state | {"state": {**numpy_state["state"], "key": numpy_state["state"]["key"].tolist()}},
    }


def restore_rng(rng: dict[str, Any]) -> None:
    """Puts the generators back to where :func:`capture_rng` found them."""
    version, words, gauss = rng["python"]
    random.setstate((version, tuple(words), gauss))
    state = rng["numpy"]
    key = np.array(state["state"]["key"], dtype=np.uint32)
    np.random.set_state(state | {"state": {**state["state"], "key": key}})
