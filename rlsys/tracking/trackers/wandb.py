"""Weights & Biases, online or offline."""

from __future__ import annotations

import importlib.util
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rlsys.config.errors import UserError
from rlsys.tracking.trackers.base import TRACKERS

_INIT_SECONDS = 60.0


@TRACKERS.register("wandb")
class WandB:
    """One W&B run for each run folder, under the same id when it is resumed. ``WANDB_MODE`` and W&B's other environment
    variables hold; without credentials it records offline instead of asking for a key."""

    def __init__(self) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise UserError(
                "the package 'wandb' is not installed",
                where="tracker.use",
                fix="pip install 'rlsys[tracking]', or leave wandb out of tracker.use",
            )
        self._run: Any = None

    def start(self, config: Mapping[str, Any], folder: Path) -> str | None:
        import wandb

        mode = os.environ.get("WANDB_MODE") or "online"
        if mode == "online" and not has_credentials():
            mode = "offline"
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "rlsys",
            name=config.get("name"),
            id=folder.name.replace("~", "-"),
            resume="allow" if mode == "online" else None,
            config=dict(config),
            dir=str(folder),
            mode=mode,  # type: ignore[arg-type]  # W&B itself refuses a mode that it does not know
            # The display owns the terminal: W&B neither prints nor captures what is printed.
            settings=wandb.Settings(silent=True, console="off", init_timeout=_INIT_SECONDS),
        )
        # Steps of our own: W&B's counter only goes up, while a resumed run may go back.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if mode == "online":
            return self._run.url
        if mode == "offline":
            return f"recording offline; to upload: wandb sync {folder / 'wandb'}/offline-run-*"
        return None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log({**metrics, "step": step})

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=0 if summary.get("status") == "finished" else 1)


def has_credentials() -> bool:
    """Whether W&B would log in without asking: an API key or an identity token in the environment, or an entry in the
    netrc file. Only presence is looked at."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc").expanduser()
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
