"""TensorBoard: event files in the run folder."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rlsys.config.errors import UserError
from rlsys.tracking.trackers.base import TRACKERS


@TRACKERS.register("tensorboard")
class TensorBoard:
    """Writes ``<run folder>/tensorboard``. A resumed run adds a file that replaces older points from its start on."""

    def __init__(self) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise UserError(
                "the package 'tensorboard' is not installed",
                where="tracker.use",
                fix="pip install 'rlsys[tracking]', or leave tensorboard out of tracker.use",
            )
        self._writer: Any = None
        self._folder = Path()

    def start(self, config: Mapping[str, Any], folder: Path) -> str | None:
        self._folder = folder / "tensorboard"
        self._config = yaml.safe_dump(dict(config), sort_keys=False)
        return f"tensorboard --logdir {self._folder}"

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if self._writer is None:
            self._writer = self._open(step)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self, summary: Mapping[str, Any]) -> None:
        if self._writer is not None:
            self._writer.close()

    def _open(self, step: int) -> Any:
        """The writer; ``purge_step`` hides what an earlier session logged from ``step`` on."""
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(self._folder), purge_step=step)
        writer.add_text("config", f"```yaml\n{self._config}```", step)
        return writer
