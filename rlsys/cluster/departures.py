"""Which hosts have left a cluster since a run joined it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import ray

NOTICE_S = 60.0
"""Ray's default health check declares a host dead after five misses three seconds apart, each with ten to answer."""
_POLL_S = 0.5


def present() -> dict[str, str]:
    """Addresses of the live hosts, by Ray's node id."""
    return {node["NodeID"]: str(node["NodeManagerAddress"]) for node in ray.nodes() if node["Alive"]}


def departed(
    before: Mapping[str, str], *, within_s: float = 0.0, give_up: Callable[[], bool] = lambda: False
) -> list[str]:
    """Those of ``before`` that are gone, each with its address and why Ray thinks so.

    Args:
        before: as :func:`present` returned them.
        within_s: how long to wait for Ray to find it out. A lone host cannot leave its own run.
        give_up: asked while waiting.
    """
    deadline = time.monotonic() + (within_s if len(before) > 1 else 0.0)
    while True:
        gone = [node for node in ray.nodes() if node["NodeID"] in before and not node["Alive"]]
        if gone or give_up() or time.monotonic() >= deadline:
            return [_described(node, before[node["NodeID"]]) for node in gone]
        time.sleep(_POLL_S)


def _described(node: Mapping[str, Any], address: str) -> str:
    name, why = node.get("NodeManagerHostname") or "", node.get("DeathReasonMessage") or ""
    return f"{address}{f' ({name})' if name else ''}{f': {why}' if why else ''}"
