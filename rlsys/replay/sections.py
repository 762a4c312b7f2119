"""The words of a teacher's prompt: solution, hint and feedback in their templates, and what is cut of long ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlsys.config.errors import UserError

_CLOSED = re.compile(r"<think>.*?</think>", re.DOTALL)
_END = "</think>"


@dataclass(frozen=True)
class Section:
    """``text`` in its template, at the place of ``placeholder``; source: where the text comes from."""

    source: str
    template: str
    placeholder: str
    text: str

    def render(self, text: str) -> str:
        # Only the placeholder is replaced, once: braces in the text and elsewhere in the template are plain characters.
        return self.template.replace(self.placeholder, text)


def check_template(template: str, placeholder: str, *, where: str) -> None:
    """Raises:
    UserError: the template has no such placeholder.
    """
    if placeholder not in template:
        raise UserError(
            f"the template has no {placeholder}", where=where, fix=f"write {placeholder} where the text is to stand"
        )


def without_thinking(text: str) -> str:
    """A response without ``<think>…</think>``. One half of the pair may be missing: a chat template can have opened the
    thought already, and a response that reached its limit may never have closed it."""
    text = _CLOSED.sub("", text)
    if _END in text:
        text = text[text.rindex(_END) + len(_END) :]
    return text.partition("<think>")[0].strip()


def task_text(task: Mapping[str, Any], key: str, *, where: str) -> str | None:
    """A field of a task as text; None: there is none, or it is blank.

    Raises:
        UserError: it is neither text nor a number.
    """
    value = task.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(
            f"the task's field '{key}' is of type {type(value).__name__}, and the teacher is to read it",
            where=where,
            fix="make it text or a number, or name another field (hints.reference_key, hints.hint_key)",
        )
    return str(value) if str(value).strip() else None


def shortened(texts: Sequence[str], fits: Callable[[Sequence[str]], bool]) -> list[str] | None:
    """Texts that fit: the longest loses its beginning, as little as will do; where all of it is not enough the next
    longest does too.

    Args:
        texts: that do not fit as they are.
        fits: whether these do; what fits is assumed to fit with less of the text.

    Returns:
        None: they do not fit before nothing is left of any.
    """
    kept = list(texts)
    # Of texts of one length the later one goes first: feedback before solution.
    for place in sorted(range(len(kept)), key=lambda i: (-len(kept[i]), -i)):
        text = kept[place]

        def cut(count: int, place: int = place, text: str = text) -> list[str]:
            return [*kept[:place], text[count:], *kept[place + 1 :]]

        if not fits(cut(len(text))):
            kept[place] = ""
            continue
        low, high = 0, len(text)  # cut(low) does not fit, cut(high) does
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(cut(middle)) else (middle, high)
        fitting = cut(high)
        return fitting if any(fitting) else None
    return None
