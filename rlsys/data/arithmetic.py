"""Generated arithmetic problems, and which of them no model is ever trained on."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from typing import NamedTuple, overload

from rlsys.config.errors import UserError
from rlsys.config.schema import ArithmeticData
from rlsys.data.base import Dataset, LazyRows, Row, user_row


class Problem(NamedTuple):
    """Two operands and ``+`` or ``-``."""

    a: int
    operation: str
    b: int


class Problems(Sequence[Problem]):
    """Problems by their numbers, so that four-digit ones (10⁸ of an operation) take 4 bytes each.

    Args:
        numbers: of all problems, in the split's order: number i is the i-th of (operation, a, b), counted through.
        places: which of them these are.
    """

    def __init__(self, numbers: array[int], places: range, digits: int, operations: Sequence[str]):
        self._numbers, self._places = numbers, places
        self._base, self._operations = 10**digits, operations

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> list[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | list[Problem]:
        if isinstance(index, slice):
            return [self._problem(place) for place in self._places[index]]
        return self._problem(self._places[index])

    def _problem(self, place: int) -> Problem:
        rest, b = divmod(self._numbers[place], self._base)
        operation, a = divmod(rest, self._base)
        return Problem(a, self._operations[operation], b)


def split(digits: int, operations: Sequence[str], held_out: int, split_seed: int) -> tuple[Problems, Problems]:
    """All problems with operands of ``digits`` digits as (training, held out), in a seeded order.

    A pure function: whoever trains, the recipe of the bundled model included, keeps clear of the same problems.

    Raises:
        UserError: more problems are to be held out than leave anything to train on.
    """
    kinds = sorted(set(operations))
    count = len(kinds) * 100**digits
    if held_out >= count:
        raise UserError(
            f"{held_out} problems cannot be held out of {count}",
            where="data.held_out",
            fix="hold out fewer, or raise data.digits",
        )
    numbers = array("I", range(count))
    random.Random(f"arithmetic {split_seed}").shuffle(numbers)
    return (
        Problems(numbers, range(held_out, count), digits, kinds),
        Problems(numbers, range(held_out), digits, kinds),
    )


def prompt(problem: Problem, digits: int) -> str:
    """``37+05=``"""
    return f"{problem.a:0{digits}d}{problem.operation}{problem.b:0{digits}d}="


def answer(problem: Problem, digits: int) -> str:
    """Zero-padded to one digit more than the operands, a negative difference after its sign: ``042``, ``-005``."""
    value = problem.a + problem.b if problem.operation == "+" else problem.a - problem.b
    return f"{'-' if value < 0 else ''}{abs(value):0{digits + 1}d}"


def hint(problem: Problem, digits: int) -> str:
    """What to mind in this very problem: ``mind the carry, mind the sevens``; empty where it has nothing of either."""
    a, b = problem.a, problem.b
    if problem.operation == "+":
        word, carried = "carry", any(a % 10**i + b % 10**i >= 10**i for i in range(1, digits + 1))
    else:
        large, small = max(a, b), min(a, b)
        word, carried = "borrow", any(large % 10**i < small % 10**i for i in range(1, digits))
    parts = [f"mind the {word}"] if carried else []
    if "7" in prompt(problem, digits):
        parts.append("mind the sevens")
    return ", ".join(parts)


def load_arithmetic(config: ArithmeticData) -> Dataset:
    """All problems that ``config`` describes.

    Raises:
        UserError: see :func:`split`; or there are no operations.
    """
    if not config.operations:
        raise UserError("there are no operations", where="data.operations", fix="set data.operations=[+]")
    train, held_out = split(config.digits, [*config.operations], config.held_out, config.split_seed)
    return Dataset(_rows(train, config.digits), _rows(held_out, config.digits))


def _rows(problems: Sequence[Problem], digits: int) -> LazyRows:
    def row(place: int) -> Row:
        problem = problems[place]
        text, solved = prompt(problem, digits), answer(problem, digits)
        # A solution is what a right response looks like, for teacher contexts.
        fields = {"answer": solved, "solution": solved, "hint": hint(problem, digits)}
        return user_row(text, text, fields, f"arithmetic problem {text}")

    return LazyRows(len(problems), row)
