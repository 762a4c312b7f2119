"""HumanEval's reference solutions pass, and nothing else does."""

from __future__ import annotations

import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rlsys.config.errors import UserError
from rlsys.config.schema import RewardPart
from rlsys.rewards.code import code, program
from rlsys.rewards.compose import build_parts

DATA = Path(__file__).parent / "humaneval" / "HumanEval.jsonl.gz"


pytestmark = pytest.mark.usefixtures("namespaces")


def problems() -> list[dict[str, Any]]:
    with gzip.open(DATA, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def task_of(problem: dict[str, Any]) -> dict[str, Any]:
    return {"stub": problem["prompt"], "test": problem["test"], "entry_point": problem["entry_point"]}


def score(problem: dict[str, Any], response: str) -> float:
    return code(response, task_of(problem), seconds=20.0).score


def without_body(problem: dict[str, Any]) -> str:
    return "    pass\n"


@pytest.mark.parametrize(
    "part", [slice(0, None, 16), pytest.param(slice(None), marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_reference_solutions_pass_and_none_without_its_body(part: slice) -> None:
    chosen = problems()[part]
    with ThreadPoolExecutor(2) as pool:
        solved = list(pool.map(lambda p: score(p, p["canonical_solution"]), chosen))
        empty = list(pool.map(lambda p: score(p, without_body(p)), chosen))
    assert [p["task_id"] for p, s in zip(chosen, solved, strict=True) if s != 1.0] == []
    assert [p["task_id"] for p, s in zip(chosen, empty, strict=True) if s != 0.0] == []


def test_the_last_block_of_a_response_is_the_program() -> None:
    task = {"test": "assert double(4) == 8"}
    response = (
        "Wrong:\n```python\ndef double(x): return x\n```\nRight:\n```python\ndef double(x): return 2 * x\n```\nDone."
    )
    assert "return x" not in program(response, task)
    assert code(response, task).score == 1.0


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("import sys; sys.exit(0)", "before its tests"),
        ("import os; os._exit(0)", "before its tests"),
        ("print('\\n' + '0' * 32)\nimport os; os._exit(0)", "before its tests"),
        ("import sys\nprint('\\n' + sys.stdin.readline(), end='')\nsys.exit(0)", "before its tests"),
        ("import os\nos.write(1, b'\\n' + os.read(0, 33))\nos._exit(0)", "before its tests"),
        ("print('\\n' + input())\nexit()", "EOFError"),
        ("def f(x): return 2 if 'f(1) ' + '== 2' in open('/box/program.py').read() else 1", "AssertionError"),
        ("def f(x): return 1", "AssertionError"),
        ("def f(x):\n  while True: pass", "in time"),
        ("def f(x): return [0] * 10**9", "MemoryError"),
        ("def f(x)", "SyntaxError"),
        ("import os\ndef f(x): os.kill(os.getpid(), 11)", "crashed"),
        ("def f(x):\n  while True: print('a' * 1000)", "printed too much"),
    ],
)
def test_what_does_not_pass_says_why(response: str, reason: str) -> None:
    result = code(response, {"test": "assert f(1) == 2"}, seconds=2.0)
    assert result.score == 0.0
    assert reason in (result.feedback or "")


def test_what_a_program_prints_or_does_with_its_output_is_its_own_affair() -> None:
    task = {"test": "assert f(1) == 2", "entry_point": None}
    assert code("print('x', end='')\ndef f(x): return 2 * x", task).score == 1.0
    assert code("import io, sys\nsys.stdout = io.StringIO()\ndef f(x): return 2 * x", task).score == 1.0
    assert code("from __future__ import annotations\nimport sys\ndef f(x: Any): return 2 * x", task).score == 1.0


def test_an_isolation_that_is_none_is_refused_before_a_run() -> None:
    with pytest.raises(UserError, match="should be 'namespaces' or 'limits'"):
        build_parts({"correct": RewardPart(use="code", args={"isolation": "none"})})
