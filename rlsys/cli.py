"""The ``rlsys`` command. Training itself is ``python -m rlsys.launch``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import rlsys
from rlsys.config.errors import UserError
from rlsys.launch import EXIT_BAD_INPUT, show_error
from rlsys.rewards import check


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="rlsys", description="Tools around training runs.")
    root.add_argument("--version", action="version", version=f"rlsys {rlsys.__version__}")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    reward = commands.add_parser("reward", help="try reward functions without a run")
    check.add_parser(reward.add_subparsers(dest="reward_command", required=True, metavar="COMMAND"))
    return root


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        return int(arguments.handler(arguments))
    except UserError as error:
        show_error(error)
        return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
