"""GSM8K: grade-school word problems, whose answers end in ``#### 72`` (Cobbe et al., arXiv:2110.14168)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rlsys.config.errors import UserError
from rlsys.config.schema import GSM8KData
from rlsys.data.base import Dataset, LazyRows, Row
from rlsys.data.jsonl import JsonlRows
from rlsys.data.manifest import data_path

_MARK = "####"
_NUMBER = re.compile(r"-?\d+(\.\d+)?")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HUB_CONFIG = "main"  # the hub's other one, "socratic", has sub-questions in its solutions


def load_gsm8k(config: GSM8KData) -> Dataset:
    """Training rows from ``train``, held-out rows from ``test``.

    Raises:
        UserError: neither a folder with the two files nor a data set of the hub, or a malformed row.
    """
    folder = data_path(config.path, where="data.path")
    if folder.is_dir():
        parts = [_from_folder(folder, part, config.instruction) for part in ("train", "test")]
    elif _HUB_ID.fullmatch(config.path):
        parts = _from_hub(config.path, config.instruction)
    else:
        raise UserError(f"there is no folder {folder}", where="data.path", fix="give a folder, or openai/gsm8k")
    return Dataset(*parts)


def make_row(fields: dict[str, Any], number: int, where: str, *, part: str, instruction: str) -> Row:
    """A row from ``{question, answer}``: ``task.answer`` is the final number, ``task.solution`` all of the answer.

    Raises:
        UserError: a key is missing, or the answer does not end in a number after ``####``.
    """
    for key in ("question", "answer"):
        if not isinstance(fields.get(key), str) or not fields[key].strip():
            raise UserError(f"'{key}' is missing, empty or no text", where=where, fix="rows are {question, answer}")
    question, solution = fields["question"], fields["answer"]
    _, mark, final = solution.rpartition(_MARK)
    final = final.strip().replace(",", "").removeprefix("$")
    if not mark or not _NUMBER.fullmatch(final):
        raise UserError(f"the answer does not end in a number after '{_MARK}'", where=where, fix="… #### 72")
    prompt = f"{question}\n{instruction}" if instruction else question
    task = {"prompt": prompt, "answer": final, "question": question, "solution": solution}
    return Row(f"{part}-{number}", [{"role": "user", "content": prompt}], task, where)


def _from_folder(folder: Path, part: str, instruction: str) -> Sequence[Row]:
    file = folder / f"{part}.jsonl"
    if not file.is_file():
        raise UserError(
            f"the folder has no {file.name}", where=str(folder), fix="data.path needs train.jsonl and test.jsonl"
        )
    return JsonlRows(file, partial(make_row, part=part, instruction=instruction))


def _from_hub(name: str, instruction: str) -> list[Sequence[Row]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        parts = load_dataset(name, _HUB_CONFIG)
        return [_hub_rows(parts[part], f"{name}:{part}", part, instruction) for part in ("train", "test")]
    except (DatasetsError, OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"'{name}' is no folder here, and the hub does not give it: {reason}",
            where="data.path",
            fix="give a folder with train.jsonl and test.jsonl, or openai/gsm8k",
        ) from error


def _hub_rows(records: Any, name: str, part: str, instruction: str) -> Sequence[Row]:
    """The rows of a ``datasets.Dataset``, which keeps them in a file; every one is checked."""

    def make(index: int) -> Row:
        return make_row(records[index], index + 1, f"{name}:{index + 1}", part=part, instruction=instruction)

    rows = LazyRows(len(records), make)
    for _ in rows:
        pass
    return rows
