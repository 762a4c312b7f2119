"""Pages of the documentation as tests read them: code, commands, tables."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from rlsys.config.assets import asset

DOCS = asset("configs").parent / "docs"

_LAUNCH = ["python", "-m", "rlsys.launch"]


def text_of(page: str) -> str:
    """``how-to/NAME.md``"""
    return (DOCS / page).read_text(encoding="utf-8")


def python_block(page: str) -> str:
    """The page's only block of Python, letter for letter."""
    (block,) = blocks(page, "python")
    return block


def write_python_block(page: str, folder: Path, module: str) -> Path:
    """The page's block as a module in ``folder``, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{module}.py"
    path.write_text(python_block(page), encoding="utf-8")
    return path


def commands(page: str) -> list[list[str]]:
    """The overrides of each ``python -m rlsys.launch`` on the page, as the shell would hand them over."""
    joined = re.sub(r"\\\n\s*", "", text_of(page))
    lines = (line.strip().removeprefix("$ ") for line in joined.splitlines() if line.startswith("    "))
    words = (shlex.split(line) for line in lines if line.startswith((" ".join(_LAUNCH), "$ " + " ".join(_LAUNCH))))
    return [found[len(_LAUNCH) :] for found in words]


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a language, letter for letter."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL)


def tables(page: str, heading: str) -> list[list[list[str]]]:
    """The cells of each table below ``## heading``, without its first two lines."""
    section = text_of(page).split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    found = re.findall(r"(?:^\|.*\|$\n?)+", section, re.MULTILINE)
    return [[[cell.strip() for cell in row.split("|")[1:-1]] for row in rows.splitlines()[2:]] for rows in found]
