"""Waits until a Ray cluster has its nodes: wait_for_nodes.py HOST:PORT NODES SECONDS."""

from __future__ import annotations

import logging
import sys
import time

import ray


def main(address: str, nodes: int, seconds: float) -> int:
    """Returns 0 when they are there, 1 when they are not in time."""
    deadline = time.monotonic() + seconds
    there: list[str] = []
    while time.monotonic() < deadline:
        try:
            if not ray.is_initialized():
                ray.init(address=address, logging_level=logging.CRITICAL, log_to_driver=False, configure_logging=False)
            there = sorted(node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"])
        except (ConnectionError, RuntimeError, ValueError) as error:  # the head is still starting
            print(f"not yet: {(str(error).strip() or type(error).__name__).splitlines()[0]}", file=sys.stderr)
        if len(there) >= nodes:
            print(f"Ray at {address} with {len(there)} nodes: {', '.join(there)}", file=sys.stderr)
            return 0
        time.sleep(1)
    print(f"{len(there)} of {nodes} nodes joined {address} within {seconds:g} s: {there}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
