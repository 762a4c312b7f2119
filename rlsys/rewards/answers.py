"""Finding the final answer in a response, and reading numbers the way people write them."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any, Literal

Mode = Literal["strict", "boxed", "last_number", "flexible"]

# One number: sign, currency, thousands commas, decimals, exponent, fraction, mixed number. It may not begin or end in
# the middle of something longer: neither "1.2.3" nor "12,34" is a number, and the minus of "10-12" is no sign.
_NUMBER = re.compile(
    r"""
    (?<!\d)(?<!\d[.,/])
    (?P<sign>(?<![\w)])[-+])?
    (?:[$€£¥]\ ?(?P<inner_sign>[-+])?)?
    (?:(?P<whole>\d+)\ (?=\d+/\d))?
    (?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)? | \d+(?:\.\d+)? | \.\d+)
    (?P<exponent>[eE][-+]?\d{1,2}(?!\d))?
    (?:\ ?/\ ?(?P<denominator>\d+(?:\.\d+)?))?
    (?!\d|[.,/]\d)
    """,
    re.VERBOSE,
)
_LONGEST_NUMBER = 64  # characters; what is longer is no answer, and exact arithmetic on it would take long
_LATEX = [
    (re.compile(r"(?<=\d)\s*(?=\\[dt]?frac)"), " "),
    (re.compile(r"\\[dt]?frac\s*\{\s*([^{}]{1,64}?)\s*\}\s*\{\s*([^{}]{1,64}?)\s*\}"), r"\1/\2"),
    (re.compile(r"(?<=\d)(?:\{,\}|\\[,!;:])(?=\d)"), ","),
    (re.compile(r"\\\$"), "$"),
    (re.compile(r"[−–](?=[\d.$€£¥])"), "-"),
]
_OPENING = " \t\n*_`({[\\:$"  # what may stand between a marker and its number
_DIGIT = re.compile(r"\d")
_OPERATOR = re.compile(r"\s?(?:\^|(?:\*{1,2}|[-+×·])\s?\d|\\(?:sqrt|pi|cdot|times|div)\b)")
_BRACE = re.compile(r"[{}]")
_BOXED = re.compile(r"\\boxed\s*\{")


def _plain(text: str) -> str:
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return text


def _value(match: re.Match[str]) -> Fraction | None:
    if len(match.group()) > _LONGEST_NUMBER:
        return None
    value = Fraction(match["number"].replace(",", "") + (match["exponent"] or ""))
    if match["denominator"]:
        denominator = Fraction(match["denominator"])
        if not denominator:
            return None
        value /= denominator
    value += int(match["whole"] or 0)
    negative = "-" in ((match["sign"] or "") + (match["inner_sign"] or ""))
    return -value if negative else value


def parse_number(text: str) -> Fraction | None:
    """The number that ``text`` states, exactly; None where it does not begin with one.

    Tolerates currency signs, thousands commas, leading and trailing zeros, a trailing dot or percent sign, units and
    words after the number, emphasis and LaTeX around it, and a left-hand side (``x = 5``, ``20 - 2 = 18``). An
    expression that is not worked out (``2 * 9``) is no number.
    """
    plain = _plain(text)
    _, equals, right = plain.rpartition("=")
    if equals:
        value, rest = _leading_number(right)
        if value is not None and not _DIGIT.search(rest):
            return value
    value, rest = _leading_number(plain)
    return None if _OPERATOR.match(rest) else value


def _leading_number(plain: str) -> tuple[Fraction | None, str]:
    match = _NUMBER.match(plain, len(plain) - len(plain.lstrip(_OPENING)))
    return (None, "") if match is None else (_value(match), plain[match.end() :])


def last_number(text: str) -> Fraction | None:
    """The last number anywhere in ``text``; None where there is none."""
    matches = list(_NUMBER.finditer(_plain(text)))
    return _value(matches[-1]) if matches else None


def after_hashes(text: str) -> str | None:
    """The rest of the line after the last ``####`` (GSM8K's marker); None where there is no marker."""
    _, marker, rest = text.rpartition("####")
    return rest.lstrip().partition("\n")[0].strip() if marker else None


def last_boxed(text: str) -> str | None:
    r"""What the last ``\boxed{…}`` holds, braces balanced; None where there is none or it is not closed."""
    openings = list(_BOXED.finditer(text))
    if not openings:
        return None
    start, depth = openings[-1].end(), 1
    for brace in _BRACE.finditer(text, start):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return text[start : brace.start()].strip()
    return None


def between_tags(text: str, tag: str) -> str | None:
    """What stands between the last ``<tag>`` and the ``</tag>`` after it, stripped; None without such a pair."""
    body, closing, _ = text.rpartition(f"</{tag}>")
    _, opening, inside = body.rpartition(f"<{tag}>")
    return inside.strip() if closing and opening else None


def _number_in(text: str | None) -> Fraction | None:
    return None if text is None else parse_number(text)


def find_number(response: str, mode: Mode) -> Fraction | None:
    """The final number of a response.

    Args:
        mode: ``strict``: after ``####``; ``boxed``: in the last ``\\boxed{}``; ``last_number``: the last one anywhere;
            ``flexible``: the first of these three that gives one.
    """
    if mode == "strict":
        return _number_in(after_hashes(response))
    if mode == "boxed":
        return _number_in(last_boxed(response))
    if mode == "last_number":
        return last_number(response)
    for single in ("strict", "boxed", "last_number"):
        found = find_number(response, single)
        if found is not None:
            return found
    return None


def gold_number(answer: Any) -> Fraction:
    """The right answer of a row: a number, its text, or a GSM8K solution that ends in ``#### number``.

    Raises:
        ValueError: it holds no number, so that no response to this row could be right.
    """
    text = str(answer)
    marked = after_hashes(text)
    value = None if isinstance(answer, bool) else parse_number(text if marked is None else marked)
    if value is None:
        raise ValueError(f"the row's answer {answer!r:.120} is not a number")
    return value
