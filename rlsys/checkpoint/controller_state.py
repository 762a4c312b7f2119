"""``controller.json``: the controller's part of a checkpoint. JSON, so that a person can read it; never pickle."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlsys.checkpoint.atomic import write_json
from rlsys.config.errors import UserError

NAME = "controller.json"


@dataclass(frozen=True, kw_only=True)
class ControllerState:
    """Where the controller stood after a step.

    It has no random state: data order and sampling seeds are functions of the run's seed and of what is here. The
    trainer ranks' generators are in their own files.

    step: training steps done; lineage: of the run that wrote it.
    data: position in the data (epoch, offset, …), as the data set's own state.
    extra: other JSON state.
    """

    step: int
    lineage: int
    data: dict[str, Any] = field(default_factory=dict)
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
