"""An environment that brings the faults of a chaos test (``FAULT``) into the samplers of a run."""

from __future__ import annotations

import faults  # noqa: F401 - it arms them

from rlsys.environments.single_turn import SingleTurn

__all__ = ["SingleTurn"]
