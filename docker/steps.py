"""Prints the instructions of a Dockerfile, one a line: the word, a tab, the rest with continued lines joined.

steps.py DOCKERFILE. Comments and continuations are all that it understands of the syntax; who executes the lines
refuses the words that it does not know.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path


def steps(text: str) -> Iterator[tuple[str, str]]:
    """Instructions in their order."""
    joined = ""
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        joined += line.removesuffix("\\").strip() + " "
        if not line.endswith("\\"):
            word, _, rest = joined.strip().partition(" ")
            yield word.upper(), rest.strip()
            joined = ""
    if joined:
        raise ValueError(f"the file ends inside an instruction: {joined}")


if __name__ == "__main__":
    for word, rest in steps(Path(sys.argv[1]).read_text(encoding="utf-8")):
        sys.stdout.write(f"{word}\t{rest}\n")
