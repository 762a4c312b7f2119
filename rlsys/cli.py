"""The ``rlsys`` command. Training itself is ``python -m rlsys.launch``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import rlsys
from rlsys import launch
from rlsys.cluster import jobs
from rlsys.cluster.planner import command as planner
from rlsys.config.compose import overridden_keys
from rlsys.config.errors import UserError
from rlsys.controller import scaling
from rlsys.controller.commands import add_parsers
from rlsys.launch import EXIT_BAD_INPUT, show_error
from rlsys.rewards import check
from rlsys.tracking import ledger_command


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="rlsys", description="Tools around training runs.")
    root.add_argument("--version", action="version", version=f"rlsys {rlsys.__version__}")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    reward = commands.add_parser("reward", help="try reward functions without a run")
    check.add_parser(reward.add_subparsers(dest="reward_command", required=True, metavar="COMMAND"))
    jobs.add_parser(commands)
    planner.add_parser(commands)
    ledger_command.add_parser(commands)
    scaling.add_parser(commands)
    add_parsers(commands)
    profile = commands.add_parser(
        "profile",
        help="run a few steps; write a trace of all actors and print where the time went",
        description="Runs a few steps of a recipe without evaluations and writes trace.json into the run folder, for "
        "ui.perfetto.dev: every phase and every actor's verbs, and torch's operators in the last step.",
    )
    profile.add_argument("--steps", type=int, default=3, metavar="N")
    profile.add_argument("overrides", nargs="+", metavar="OVERRIDE", help="+recipe=NAME and what to change of it")
    profile.set_defaults(handler=run_profile)
    return root


# What profiling sets unless the command line does.
_PROFILED = ("eval.every=0", "checkpoint.export=false")


def run_profile(arguments: argparse.Namespace) -> int:
    """``rlsys profile``: exit code as of ``python -m rlsys.launch``.

    Raises:
        UserError: the number of steps is no number of steps, or was given twice.
    """
    given = overridden_keys(arguments.overrides)
    if "steps" in given:
        raise UserError("profiling has its own number of steps", where="steps", fix="use --steps N")
    if arguments.steps < 1:
        raise UserError("at least one step is profiled", where=f"--steps {arguments.steps}", fix="use --steps 3")
    own = [override for override in _PROFILED if override.partition("=")[0] not in given]
    return launch.main([*arguments.overrides, *own, f"steps={arguments.steps}"], profile=True)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        return int(arguments.handler(arguments))
    except UserError as error:
        show_error(error)
        return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
