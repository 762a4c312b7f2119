"""Does the program pass its tests? The response's code runs with them in a sandbox."""

from __future__ import annotations

import re
import secrets
from typing import Any

from rlsys.config.errors import UserError
from rlsys.rewards.base import REWARDS, RewardResult, hooks
from rlsys.rewards.sandbox import Isolation, Limits, Outcome, check_namespaces, run_program

_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_WORDS = {
    "timeout": "it did not end in time",
    "memory": "it used too much memory",
    "processes": "it started too many processes",
    "output": "it printed too much",
    "signal": "it crashed the interpreter",
}

# The token and the tests come by standard input and are read before the candidate begins, which finds neither there nor
# in the file that runs. Printing the token is the last act: a candidate that ends the program early, with whatever exit
# code, has not passed. (It shares an interpreter with its tests, though: one that searches the frames of its callers
# finds everything.)
_HARNESS = """
def _run():
    import os, sys
    token, tests = sys.stdin.readline(), sys.stdin.read()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    write, flush = sys.stdout.write, sys.stdout.flush
    exec(compile({candidate!r}, "program.py", "exec"), globals())
    exec(compile(tests, "tests.py", "exec"), globals())
    {call}
    write("\\n" + token)
    flush()
_run()
"""


def _check_options(*, isolation: Isolation = "namespaces", **_: Any) -> None:
    if isolation == "namespaces":
        try:
            check_namespaces()
        except UserError as error:
            raise UserError(error.what, where="isolation", fix=error.fix) from None


@REWARDS.register("code")
@hooks(needs=("test",), check=_check_options)
def code(
    response: str,
    task: dict[str, Any],
    *,
    isolation: Isolation = "namespaces",
    seconds: float = 4.0,
    memory_mib: int = 512,
) -> RewardResult:
    """1 if the program of the response passes ``task["test"]``, else 0.

    The program is the last fenced block of the response, or else all of it; where ``task["stub"]`` is given (the
    signature that the response goes on from), it comes first. With ``task["entry_point"]`` the tests define
    ``check(candidate)``, as HumanEval's do; without, they are statements that raise where the program is wrong.

    Args:
        isolation: ``limits`` accepts a sandbox without namespaces, in which a program may read, change and send what
            this process may.
        seconds: of wall time; keep it below ``reward.timeout_s``.
        memory_mib: of all its processes together.

    Raises:
        UserError: the sandbox does not work here.
    """
    token = secrets.token_hex(16)
    outcome = run_program(
        program(response, task),
        stdin=f"{token}\n{task['test']}\n",
        limits=Limits(seconds=seconds, memory_mib=memory_mib),
        isolation=isolation,
    )
    if outcome.ok and outcome.stdout.endswith(f"\n{token}\n"):
        return RewardResult(1.0)
    return RewardResult(0.0, _why(outcome))


def program(response: str, task: dict[str, Any]) -> str:
    """What runs in the sandbox. It wants the token and the tests by standard input."""
    blocks = _BLOCK.findall(response)
    candidate = str(task.get("stub") or "") + (blocks[-1] if blocks else response)
    entry = task.get("entry_point")
    call = f"exec({f'check({entry})'!r}, globals())" if entry else "pass"
    return _HARNESS.format(candidate=candidate + "\n", call=call)


def _why(outcome: Outcome) -> str:
    if outcome.ending != "exited":
        return f"the program failed: {_WORDS[outcome.ending]}"
    lines = outcome.stderr.strip().splitlines()
    if outcome.ok or not lines:
        return "the program ended before its tests did"
    return f"the program failed: {lines[-1][:200]}"
