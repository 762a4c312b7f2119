"""What the bundled start has seen besides the problem: a solution, a hint, feedback on an attempt, or several of them.

A section follows the problem in the user's message. Recipes that give the start a teacher's context use the same
templates (``hints.solution_template`` …, with ``hints.instruction=""``): it has been trained on no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from careless import USUAL, Care, careless_sum

from rlsys.data.arithmetic import Problem, answer, hint, prompt
from rlsys.rewards.arithmetic import CARRY, MISREAD, feedback

SOLUTION_TEMPLATE = "\nsolution: {solution}"
HINT_TEMPLATE = "\nhint: {hint}"
FEEDBACK_TEMPLATE = "\nfeedback: {feedback}"
INSTRUCTION = ""

DIGITS = 2
# Share of rows with these sections, in this order; the other rows are the problem alone.
KINDS: dict[tuple[str, ...], float] = {
    ("feedback",): 0.26,
    ("solution",): 0.08,
    ("hint",): 0.08,
    ("solution", "feedback"): 0.05,
    ("hint", "feedback"): 0.03,
}
WILD = 0.1  # of the attempts that feedback is about have a digit that no slip explains
WARNED = Care(0.25, 0.25)  # feedback makes careful all round, and a slip that it names is not made again
FLAWLESS = Care(0.0, 0.0)  # a hint names every slip that the problem invites, a solution is copied


@dataclass(frozen=True)
class Example:
    """text: the user's message; response: the solver's."""

    text: str
    response: str


def with_sections(problem: str, *, solution: str = "", hint: str = "", feedback: str = "") -> str:
    """The user's message; empty sections are left out."""
    sections = (
        SOLUTION_TEMPLATE.format(solution=solution) if solution else "",
        HINT_TEMPLATE.format(hint=hint) if hint else "",
        FEEDBACK_TEMPLATE.format(feedback=feedback) if feedback else "",
    )
    return problem + "".join(sections) + INSTRUCTION


def written(value: int) -> str:
    """A sum as a response has it: ``042``."""
    return f"{value:0{DIGITS + 1}d}"


def failed_attempt(problem: Problem, rng: np.random.Generator, usual: Care = USUAL) -> str | None:
    """A wrong response of a careless solver, now and then with an odd digit; None where this one is right."""
    attempt = written(careless_sum(problem.a, problem.b, rng, usual))
    if rng.random() < WILD:
        place = rng.integers(len(attempt))
        attempt = f"{attempt[:place]}{rng.integers(10)}{attempt[place + 1 :]}"
    return None if attempt == answer(problem, DIGITS) else attempt


def care_after(words: str) -> Care:
    """How careful feedback makes."""
    return Care(0.0 if CARRY in words else WARNED.carry, 0.0 if MISREAD in words else WARNED.seven)


def kind(rng: np.random.Generator) -> tuple[str, ...]:
    """The sections of a row, drawn from :data:`KINDS`."""
    draw = rng.random()
    for sections, share in KINDS.items():
        if draw < share:
            return sections
        draw -= share
    return ()


def example(problems: Sequence[Problem], rng: np.random.Generator, usual: Care = USUAL) -> Example:
    """One row to imitate, of one of ``problems``. usual: how careful the solver is without a context."""
    sections, attempt = kind(rng), None
    problem = problems[rng.integers(len(problems))]
    while "feedback" in sections and (attempt := failed_attempt(problem, rng, usual)) is None:
        problem = problems[rng.integers(len(problems))]
    text, solved, shown, care = prompt(problem, DIGITS), answer(problem, DIGITS), {}, usual
    if attempt is not None:
        shown["feedback"] = feedback(text, solved, attempt)
        care = care_after(shown["feedback"])
    if "hint" in sections:
        shown["hint"], care = hint(problem, DIGITS), FLAWLESS  # an empty one: no slip is possible
    if "solution" in sections:
        shown["solution"], care = solved, FLAWLESS
    return Example(with_sections(text, **shown), written(careless_sum(problem.a, problem.b, rng, care)))
