"""When a reward part is computed: a tiny language over the scores of the parts before it. Never evaluated as Python.

condition  := comparison | "not" condition | condition "and" condition | condition "or" condition | "(" condition ")"
comparison := value (("<" | "<=" | ">" | ">=" | "==" | "!=") value)+
value      := part name | number
"""

from __future__ import annotations

import ast
import difflib
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rlsys.config.errors import UserError

Scores = Mapping[str, float | None]
_COMPARE: dict[type[ast.cmpop], Callable[[float, float], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_FIX = "write comparisons of part names and numbers, joined by and, or, not: correct > 0.5 and format == 1"


@dataclass(frozen=True)
class Condition:
    """A parsed condition. ``holds`` takes the scores so far; a part that was not computed counts 0."""

    text: str
    holds: Callable[[Scores], bool]


def parse_condition(text: str, earlier: Sequence[str], later: Sequence[str], *, where: str) -> Condition:
    """Parses a part's ``when``.

    Args:
        earlier: names of the parts before this one, which it may speak of.
        later: names of this part and those after it, which it may not.
        where: config key, for the error message.

    Raises:
        UserError: a syntax that is not of the language, or a part that is unknown or comes too late.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError) as error:
        message = error.msg if isinstance(error, SyntaxError) else str(error)
        raise UserError(f"'{text}' is not a condition: {message}", where=where, fix=_FIX) from None
    return Condition(text, _Parser(text, earlier, later, where).condition(tree.body))


@dataclass(frozen=True)
class _Parser:
    text: str
    earlier: Sequence[str]
    later: Sequence[str]
    where: str

    def condition(self, node: ast.expr) -> Callable[[Scores], bool]:
        if isinstance(node, ast.BoolOp):
            terms = [self.condition(value) for value in node.values]
            join = all if isinstance(node.op, ast.And) else any
            return lambda scores: join(term(scores) for term in terms)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            inner = self.condition(node.operand)
            return lambda scores: not inner(scores)
        if isinstance(node, ast.Compare) and all(type(op) in _COMPARE for op in node.ops):
            values = [self.value(v) for v in (node.left, *node.comparators)]
            operators = [_COMPARE[type(op)] for op in node.ops]
            return lambda scores: all(
                compare(left(scores), right(scores))
                for left, compare, right in zip(values, operators, values[1:], strict=False)
            )
        raise self.error(node, "is no comparison")

    def value(self, node: ast.expr) -> Callable[[Scores], float]:
        if isinstance(node, ast.Name):
            return self.score(node.id)
        sign = 1
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            sign = -1 if isinstance(node.op, ast.USub) else 1
            node = node.operand
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            number = sign * float(node.value)  # type: ignore[arg-type]
            return lambda scores: number
        raise self.error(node, "is neither a part nor a number")

    def score(self, name: str) -> Callable[[Scores], float]:
        if name in self.earlier:
            return lambda scores: scores.get(name) or 0.0
        if name in self.later:
            raise UserError(
                f"'{self.text}' speaks of '{name}', which is not computed yet",
                where=self.where,
                fix=f"list '{name}' before this part",
            )
        near = difflib.get_close_matches(name, self.earlier, n=1)
        known = ", ".join(self.earlier) or "none, this is the first"
        fix = (f"did you mean '{near[0]}'? " if near else "") + f"parts before this one: {known}"
        raise UserError(f"'{self.text}' speaks of '{name}', which is no part", where=self.where, fix=fix)

    def error(self, node: ast.expr, what: str) -> UserError:
        return UserError(f"'{self.text}' is not a condition: '{ast.unparse(node)}' {what}", where=self.where, fix=_FIX)
