"""Rows of ``{prompt | messages, answer, …}`` from JSONL and parquet files."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from datetime import date, time
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

from rlsys.config.errors import UserError
from rlsys.config.schema import FileData
from rlsys.data.base import Dataset, LazyRows, Message, Row
from rlsys.data.jsonl import JsonlRows
from rlsys.data.manifest import data_path

_JSONL = (".jsonl", ".json", ".ndjson")
_PARQUET = (".parquet", ".pq")
_ROLES = ("system", "user", "assistant", "tool")
_CHECKED_AT_ONCE = 4096  # parquet rows that exist as Python objects while the file is checked


def load_files(config: FileData) -> Dataset:
    """The training file and, where there is one, the held-out file.

    Raises:
        UserError: a file that cannot be read, is empty or of an unknown kind, or a malformed row, with file and line.
    """
    train = _read(config.path, config, "train", "data.path")
    held_out = [] if config.eval_path is None else _read(config.eval_path, config, "eval", "data.eval_path")
    return Dataset(train, held_out)


def make_row(
    fields: dict[str, Any],
    number: int,
    where: str,
    *,
    part: str,
    prompt_key: str = "prompt",
    answer_key: str = "answer",
) -> Row:
    """A row from a file's record.

    Args:
        fields: the record; ``prompt_key`` holds text or a list of messages, and where the default key is missing
            ``messages`` does.
        number: of its line, from 1.
        where: "file:line".
        part: ``train`` or ``eval``, the first half of the row's id.

    Raises:
        UserError: a key is missing, of the wrong type or empty, or a message is malformed.
    """
    use_messages = prompt_key == "prompt" and fields.get("prompt") is None and "messages" in fields
    key = "messages" if use_messages else prompt_key
    _need(fields, key, where, config_key="data.prompt_key")
    _need(fields, answer_key, where, config_key="data.answer_key")
    messages = _messages(fields[key], key, where)
    answer = fields[answer_key]
    if answer is None or (isinstance(answer, float) and not math.isfinite(answer)):
        raise UserError(
            f"'{answer_key}' is {answer}", where=where, fix="give text, a number, or a list or object of them"
        )
    asked = next(message["content"] for message in reversed(messages) if message["role"] == "user")
    return Row(f"{part}-{number}", messages, {**fields, "prompt": asked, "answer": answer}, where)


def _read(path: str, config: FileData, part: str, key: str) -> Sequence[Row]:
    file = data_path(path, where=key)
    if not file.is_file():
        raise UserError(
            f"{'this is a folder, not a file' if file.is_dir() else 'there is no such file'}: {file}",
            where=key,
            fix="give a .jsonl or .parquet file",
        )
    make = partial(make_row, part=part, prompt_key=config.prompt_key, answer_key=config.answer_key)
    kind = file.suffix.lower()
    if kind in _JSONL:
        return JsonlRows(file, make)
    if kind in _PARQUET:
        return ParquetRows(file, make)
    raise UserError(
        f"'{file.name}' is neither JSONL nor parquet",
        where=key,
        fix=f"give a file that ends in {', '.join((*_JSONL, *_PARQUET))}",
    )


class ParquetRows(LazyRows):
    """The rows of a parquet file, kept as Arrow columns; row numbers count from 1.

    Raises:
        UserError: the file cannot be read, has no rows, or has a malformed one; with its number.
    """

    def __init__(self, path: Path, make_row: partial[Row]):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._path, self._make_row = path, make_row
        try:
            self._table = pq.read_table(path, memory_map=True)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            raise UserError(
                f"the file is not parquet: {str(error).splitlines()[0]}", where=str(path), fix="check the file"
            ) from error
        if not self._table.num_rows:
            raise UserError("the file has no rows", where=str(path), fix="give a file with rows")
        first = 1
        for batch in self._table.to_batches(max_chunksize=_CHECKED_AT_ONCE):
            for number, fields in enumerate(batch.to_pylist(), start=first):
                self._row(number, fields)
            first += batch.num_rows
        super().__init__(self._table.num_rows, lambda i: self._row(i + 1, self._table.slice(i, 1).to_pylist()[0]))

    def _row(self, number: int, fields: dict[str, Any]) -> Row:
        where = f"{self._path}:row {number}"
        return self._make_row({name: _json_like(value, name, where) for name, value in fields.items()}, number, where)


def _json_like(value: Any, column: str, where: str) -> Any:
    """A parquet value as JSON content, which is all that rewards and run files take."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case dict():
            return {name: _json_like(item, column, where) for name, item in value.items()}
        case list() | tuple():
            return [_json_like(item, column, where) for item in value]
        case Decimal():
            return str(value)
        case date() | time():
            return value.isoformat()
    raise UserError(
        f"column '{column}' is {_kind(value)}", where=where, fix="leave the column out, or make it text or numbers"
    )


def _messages(value: Any, key: str, where: str) -> list[Message]:
    """A prompt's text, or its list of messages, as messages."""
    if isinstance(value, str):
        if not value.strip():
            raise UserError(f"'{key}' is empty", where=where, fix="every row needs a prompt")
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise UserError(
            f"'{key}' is {_kind(value)}, not text or a list of messages",
            where=where,
            fix="give text, or [{role, content}, …]",
        )
    if not value:
        raise UserError(f"'{key}' has no messages", where=where, fix="every row needs a prompt")
    messages = [_message(message, f"{key}[{i}]", where) for i, message in enumerate(value)]
    if messages[-1]["role"] not in ("user", "tool"):
        raise UserError(
            f"'{key}' ends with a message of the {messages[-1]['role']}, so that there is nothing to answer",
            where=where,
            fix="the last message must be the user's (or a tool's)",
        )
    if all(message["role"] != "user" for message in messages):
        raise UserError(f"'{key}' has no user message", where=where, fix="add one, or leave the row out")
    return messages


def _message(value: Any, name: str, where: str) -> Message:
    if not isinstance(value, dict):
        raise UserError(f"'{name}' is {_kind(value)}, not a message", where=where, fix="give {role, content}")
    # Parquet gives every message of a column the same keys, with None where a message has no such key.
    given = {key: content for key, content in value.items() if content is not None}
    for key in ("role", "content"):
        if not isinstance(given.get(key), str):
            raise UserError(
                f"'{name}.{key}' is {_kind(given.get(key))}, not text", where=where, fix="give {role, content}"
            )
    if given["role"] not in _ROLES:
        raise UserError(f"'{name}.role' is '{given['role']}'", where=where, fix=f"one of: {', '.join(_ROLES)}")
    if not given["content"].strip():
        raise UserError(f"'{name}.content' is empty", where=where, fix="leave the message out")
    if more := given.keys() - {"role", "content"}:
        raise UserError(f"'{name}' has the key '{min(more)}'", where=where, fix="a message is {role, content}")
    return {"role": given["role"], "content": given["content"]}


def _need(fields: dict[str, Any], key: str, where: str, *, config_key: str) -> None:
    if key not in fields:
        raise UserError(
            f"the row has no '{key}'", where=where, fix=f"{_near(key, fields)}set {config_key} to the right column"
        )


def _near(key: str, keys: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(keys), n=1)
    return f"did you mean '{near[0]}'? " if near else f"it has: {', '.join(keys)}; "


def _kind(value: Any) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"
