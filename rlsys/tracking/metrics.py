"""``metrics.jsonl``: one strict-JSON line a step, append-only, and how to read it back.

A line is flat: ``step``, ``lineage`` and metrics by name. A value that is not finite is written as ``null`` and its
name is listed under ``nonfinite``; the reader gives NaN.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from rlsys.config.errors import UserError

Line = dict[str, Any]


def to_line(metrics: Mapping[str, Any], *, step: int, lineage: int) -> Line:
    """One line's content.

    Args:
        metrics: numbers: Python's, numpy's, or tensors of one element.

    Raises:
        TypeError: a value that is no number, with its name.
    """
    line: Line = {"step": step, "lineage": lineage}
    nonfinite = []
    for name, value in metrics.items():
        number = _number(name, value)
        if not math.isfinite(number):
            nonfinite.append(name)
        line[name] = number if math.isfinite(number) else None
    if nonfinite:
        line["nonfinite"] = nonfinite
    return line


def _number(name: str, value: Any) -> int | float:
    if not isinstance(value, Real) and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise TypeError(f"metric '{name}' is no number: {value!r}")


def read_lines(path: Path) -> list[Line]:
    """Every line, in the order written, NaN for ``null``. A torn last line (the writer was killed) is left out.

    Raises:
        UserError: the file is missing, or a line before the last is no JSON object.
    """
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise UserError(
            f"metrics cannot be read: {error.strerror}", where=str(path), fix="give a run folder"
        ) from error
    *complete, torn = texts  # what follows the last newline is empty or torn
    lines = []
    for number, text in enumerate(complete, start=1):
        if not text:
            continue
        line = _parse(text)
        if line is None:
            raise UserError("a line of the metrics is damaged", where=f"{path}:{number}", fix="delete that line")
        lines.append(line)
    last = _parse(torn) if torn else None
    return [*lines, last] if last is not None else lines


def read_metrics(path: Path) -> list[Line]:
    """The run's history as it led to the newest weights: one line a step, in order of steps.

    Where a run went on from an earlier checkpoint, a later lineage starts there; what earlier lineages wrote of later
    steps was abandoned and is left out. Lines of one step are merged (an evaluation may come after its step).

    Raises:
        UserError: see :func:`read_lines`.
    """
    return history(read_lines(path))


def history(lines: list[Line]) -> list[Line]:
    """See :func:`read_metrics`."""
    kept: dict[int, Line] = {}
    newest = -1
    for line in lines:
        step, lineage = line["step"], line["lineage"]
        if lineage > newest:
            newest = lineage
            kept = {earlier: content for earlier, content in kept.items() if earlier <= step}
        if lineage == newest:
            kept[step] = kept.get(step, {}) | line
    return [kept[step] for step in sorted(kept)]


def _parse(text: str) -> Line | None:
    """A line's content with NaN for null; None: not a whole line."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    if not isinstance(line, dict) or "step" not in line or "lineage" not in line:
        return None
    return {name: math.nan if value is None else value for name, value in line.items()}
