"""The options of ``rlsys doctor`` and ``rlsys fixture``; what they do is imported when one of them runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parsers(subparsers: Any) -> None:
    """Adds the sub-commands ``doctor`` and ``fixture``."""
    _add_doctor(subparsers)
    _add_fixture(subparsers)


def _add_doctor(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="look at this machine, a cluster and a run's inputs; say what is wrong and what to do",
        description="Without overrides it looks at the machine; with those of a run (+recipe=…) at all that the run "
        "needs, also on the nodes of its cluster. Nothing is trained. Exit code 0: nothing stands against a run; "
        "2: errors were found.",
    )
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="+recipe=NAME and what to change of it")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the report to this file")
    parser.add_argument("--bandwidth", action="store_true", help="measure memory, disk, GPU copies and the network")
    parser.add_argument("--checksums", action="store_true", help="hash large files too: data, and weights of the hub")
    parser.set_defaults(handler=_doctor)


def _add_fixture(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "fixture",
        help="a deterministic run of one weight: a smoke test in seconds",
        description="Trains one weight for 50 steps without a model, Ray or a GPU, writes all that a run leaves, "
        "computes it again and compares the bits. Exit code 0: the same; 1: other bits; 2: bad input.",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="of the whole run (default: 50)")
    parser.add_argument("--stop-after", type=int, metavar="N", help="stop after so many steps; --resume goes on")
    parser.add_argument(
        "--resume", metavar="RUN", help="auto: the newest fixture run; or a run folder, or a checkpoint"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="(default: 0)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: cpu)")
    parser.add_argument("--run-root", type=Path, default=Path("runs"), metavar="PATH", help="(default: runs)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the determinism report to this file")
    parser.set_defaults(handler=_fixture)


def _doctor(arguments: argparse.Namespace) -> int:
    from rlsys.controller.doctor import handle

    return handle(arguments)


def _fixture(arguments: argparse.Namespace) -> int:
    from rlsys.controller.fixture import handle

    return handle(arguments)
