"""JSONL files: checked once from end to end, then read row by row.

What stays in memory is where each row begins. A row that cannot be used is found before the run starts, not when its
turn comes.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlsys.config.errors import UserError
from rlsys.data.base import LazyRows, Row

_BOM = b"\xef\xbb\xbf"
MakeRow = Callable[[dict[str, Any], int, str], Row]


class JsonlRows(LazyRows):
    """The rows of a JSONL file in UTF-8; blank lines are skipped.

    Args:
        path: of the file.
        make_row: (object, line number from 1, "file:line") -> row; raises UserError for a row that it cannot use.

    Raises:
        UserError: the file cannot be read, has no rows, or has a malformed one; with its line.
    """

    def __init__(self, path: Path, make_row: MakeRow):
        self._path, self._make_row = path, make_row
        # 8 bytes a row each: where it begins, and its line number.
        self._offsets, self._lines = array("Q"), array("Q")
        try:
            self._stamp = _stamp(path)
            for offset, number, line in _lines(path):
                self._parse(line, number)
                self._offsets.append(offset)
                self._lines.append(number)
        except OSError as error:
            raise _unreadable(path, error) from error
        if not self._offsets:
            raise UserError("the file has no rows", where=str(path), fix="one JSON object a line")
        super().__init__(len(self._offsets), self._read)

    def _read(self, index: int) -> Row:
        try:
            with self._path.open("rb") as file:
                if _stamp(self._path) != self._stamp:
                    raise UserError(
                        "the file has changed since the run began",
                        where=str(self._path),
                        fix="start again with the new file",
                    )
                file.seek(self._offsets[index])
                return self._parse(file.readline(), self._lines[index])
        except OSError as error:
            raise _unreadable(self._path, error) from error

    def _parse(self, line: bytes, number: int) -> Row:
        where = f"{self._path}:{number}"
        try:
            value = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"the line is not UTF-8: {error}", where=where, fix="save the file as UTF-8") from None
        except json.JSONDecodeError as error:
            raise UserError(
                f"the line is not JSON: {error.msg} at character {error.pos + 1}",
                where=where,
                fix="one JSON object a line",
            ) from None
        except (RecursionError, ValueError):  # ValueError: a number of thousands of digits
            raise UserError(
                "the line's JSON is nested too deeply, or has too long a number", where=where, fix="simplify the row"
            ) from None
        if not isinstance(value, dict):
            raise UserError(
                f"the line holds {type(value).__name__}, not an object", where=where, fix='write rows as {"prompt": …}'
            )
        return self._make_row(value, number, where)


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(byte offset, line number, line) of the lines that are not blank."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            begin = len(_BOM) if number == 1 and line.startswith(_BOM) else 0
            if line[begin:].strip():
                yield offset + begin, number, line[begin:]
            offset += len(line)


def _stamp(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"the file cannot be read: {error.strerror or error}", where=str(path), fix="check the path and its permissions"
    )
