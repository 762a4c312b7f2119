"""A data set as the loop sees it: rows to train on, and rows that are only evaluated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

from rlsys.config.schema import ArithmeticData, DataConfig, FileData, GSM8KData, ReasoningGymData

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One problem.

    row_id: the same whenever the data set is loaded, and of no other row in it.
    messages: ``{role, content}``, the conversation that the model goes on from.
    task: prompt (text), answer and the row's other fields, for rewards; JSON content.
    where: file and line, or the like, for error messages.
    """

    row_id: str
    messages: list[Message]
    task: dict[str, Any]
    where: str


@dataclass(frozen=True)
class Dataset:
    """held_out: never trained on; empty where there is no evaluation."""

    train: Sequence[Row]
    held_out: Sequence[Row]


class LazyRows(Sequence[Row]):
    """Rows that are made when they are asked for, from what takes less room than they do.

    Args:
        count: how many there are.
        make: the row at 0 … count-1; a pure function.
    """

    def __init__(self, count: int, make: Callable[[int], Row]):
        self._places = range(count)
        self._make = make

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self._make(place) for place in self._places[index]]
        return self._make(self._places[index])


def user_row(row_id: str, text: str, fields: dict[str, Any], where: str) -> Row:
    """A row whose conversation is one user message. ``fields``: of the task, besides the prompt."""
    return Row(row_id, [{"role": "user", "content": text}], {**fields, "prompt": text}, where)


def load_dataset(config: DataConfig) -> Dataset:
    """The rows that ``config`` names.

    Raises:
        UserError: a file is missing, empty or malformed, or a generator does not exist or refuses its options.
    """
    # A source is imported where it is used: datasets and reasoning-gym take seconds.
    match config:
        case ArithmeticData():
            from rlsys.data.arithmetic import load_arithmetic

            return load_arithmetic(config)
        case GSM8KData():
            from rlsys.data.gsm8k import load_gsm8k

            return load_gsm8k(config)
        case FileData():
            from rlsys.data.files import load_files

            return load_files(config)
        case ReasoningGymData():
            from rlsys.data.reasoning import load_reasoning_gym

            return load_reasoning_gym(config)
