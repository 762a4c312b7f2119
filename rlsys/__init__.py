"""rlsys: reinforcement learning of language models on a Ray cluster."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """``rlsys.compose_loss``, imported when it is first asked for: it brings torch and transformers along."""
    if name != "compose_loss":
        raise AttributeError(f"module 'rlsys' has no attribute '{name}'")
    from importlib import import_module  # not an import statement: the rooms do not hang on the package's front door

    return import_module("rlsys.engines.train.compose").compose_loss


def __dir__() -> list[str]:
    return [*globals(), "compose_loss"]
