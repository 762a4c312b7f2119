"""Generated arithmetic problems, and which of them no model is ever trained on."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import NamedTuple

from rlsys.config.errors import UserError
from rlsys.config.schema import ArithmeticData
from rlsys.data.base import Dataset, LazyRows, Row, user_row


class Problem(NamedTuple):
    """Two operands and ``+`` or ``-``."""

    a: int
    operation: str
    b: int


def split(digits: int, operations: list[str], held_out: int, split_seed: int) -> tuple[list[Problem], list[Problem]]:
    """All problems with operands of ``digits`` digits as (training, held out), in a seeded order.

    A pure function: whoever trains, the recipe of the bundled model included, keeps clear of the same problems.

    Raises:
        UserError: more problems are to be held out than leave anything to train on.
    """
    numbers = range(10**digits)
    problems = [Problem(a, op, b) for op, a, b in itertools.product(sorted(set(operations)), numbers, numbers)]
    if held_out >= len(problems):
        raise UserError(
            f"{held_out} problems cannot be held out of {len(problems)}",
            where="data.held_out",
            fix="hold out fewer, or raise data.digits",
        )
    random.Random(f"arithmetic {split_seed}").shuffle(problems)
    return problems[held_out:], problems[:held_out]


def prompt(problem: Problem, digits: int) -> str:
    """``37+05=``"""
    return f"{problem.a:0{digits}d}{problem.operation}{problem.b:0{digits}d}="


def answer(problem: Problem, digits: int) -> str:
    """Zero-padded to one digit more than the operands, a negative difference after its sign: ``042``, ``-005``."""
    value = problem.a + problem.b if problem.operation == "+" else problem.a - problem.b
    return f"{'-' if value < 0 else ''}{abs(value):0{digits + 1}d}"


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
        text = prompt(problems[place], digits)
        return user_row(text, text, {"answer": answer(problems[place], digits)}, f"arithmetic problem {text}")

    return LazyRows(len(problems), row)
