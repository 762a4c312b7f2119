"""The order of prompts, as a pure function of seed and epoch, and the stream of a run's prompt batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from rlsys.batch import DataProto, jagged
from rlsys.config.errors import UserError
from rlsys.data.base import Row
from rlsys.data.permutation import Permutation
from rlsys.data.prompts import PromptEncoder

Place = tuple[int, int]
"""Row and epoch."""


@dataclass(frozen=True)
class DataPosition:
    """The next row: ``index`` into the order of ``epoch``. JSON-able (``dataclasses.asdict``)."""

    epoch: int = 0
    index: int = 0


class PromptOrder:
    """In which order each epoch goes through the rows.

    Args:
        rows: how many there are.
        seed: of the run.
        shuffle: another order each epoch; False: 0, 1, 2, … always.
    """

    def __init__(self, rows: int, seed: int, shuffle: bool = True):
        self.rows = rows
        self._seed, self._shuffle = seed, shuffle

    def take(self, position: DataPosition, count: int) -> tuple[list[Place], DataPosition]:
        """``count`` pairs (row, epoch) from ``position`` on, and the position after them. Where an epoch ends the next
        one begins, within one call too: in every epoch every row comes once."""
        taken: list[Place] = []
        epoch, index = position.epoch, position.index
        while len(taken) < count:
            stop = min(self.rows, index + count - len(taken))
            taken += [(row, epoch) for row in self._rows(epoch, np.arange(index, stop))]
            epoch, index = (epoch + 1, 0) if stop == self.rows else (epoch, stop)
        return taken, DataPosition(epoch, index)

    def _rows(self, epoch: int, places: np.ndarray) -> list[int]:
        if self._shuffle:
            places = Permutation(self.rows, "prompt order", self._seed, epoch)(places)
        return places.tolist()


class PromptStream:
    """A run's prompts, ``prompts_per_step`` at a time, for ever.

    Rows are read and encoded when it is their turn. A prompt that is too long is dropped (where that was asked for) and
    the next one takes its place, so that a batch is always full.

    Raises:
        UserError: there are no rows.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        encoder: PromptEncoder,
        *,
        prompts_per_step: int,
        seed: int,
        shuffle: bool = True,
    ):
        if not len(rows):
            raise UserError("the data set is empty", where="data", fix="give a data set with training rows")
        self._data, self._encoder = rows, encoder
        self._prompts_per_step = prompts_per_step
        self._order = PromptOrder(len(rows), seed, shuffle)
        self.position = DataPosition()

    def next_batch(self, count: int | None = None) -> DataProto:
        """Columns uid (``ROW@EPOCH``), prompt_ids, task and messages of the next prompts.

        Args:
            count: how many; None: those of a step.

        Raises:
            UserError: a prompt is too long, and it was not asked to drop it; or all of them are.
        """
        return self.draw(self._prompts_per_step if count is None else count)[0]

    def draw(self, count: int) -> tuple[DataProto, list[Place]]:
        """The next ``count`` prompts as :meth:`next_batch` has them, and where in the data each one is."""
        drawn: list[tuple[Place, Row, list[int]]] = []
        dropped_in_a_row = 0
        while len(drawn) < count:
            places, self.position = self._order.take(self.position, count - len(drawn))
            for place, row, ids in self._encoded(places):
                if ids is None:
                    dropped_in_a_row += 1
                    continue
                dropped_in_a_row = 0
                drawn.append((place, row, ids))
            if dropped_in_a_row >= 2 * self._order.rows:
                raise _nothing_left("training", self._order.rows)
        return _prompts_at(drawn), [place for place, *_ in drawn]

    def again(self, places: Sequence[Place]) -> DataProto:
        """The prompts at these places, which :meth:`draw` gave out before; the position stays."""
        return _prompts_at([(place, row, ids) for place, row, ids in self._encoded(places) if ids is not None])

    def _encoded(self, places: Sequence[Place]) -> Iterator[tuple[Place, Row, list[int] | None]]:
        rows = [self._data[row] for row, _ in places]
        return zip(places, rows, self._encoder.encode_many(rows), strict=True)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as JSON content."""
        return {**asdict(self.position), "rows": self._order.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where a stream over the same rows stood.

        Raises:
            UserError: the data set has another number of rows than it had.
        """
        if state["rows"] != self._order.rows:
            raise UserError(
                f"the data set has {self._order.rows} rows, and had {state['rows']} when the checkpoint was written",
                where="data",
                fix="resume with the data that the run was started with",
            )
        self.position = DataPosition(state["epoch"], state["index"])


def held_out_batch(rows: Sequence[Row], encoder: PromptEncoder, *, problems: int) -> DataProto:
    """The first ``problems`` held-out rows (those that are dropped for their length left out), always in this order.

    Returns:
        columns uid ('ROW@eval'), prompt_ids, task and messages.

    Raises:
        UserError: a prompt is too long, and it was not asked to drop it; or none is left.
    """
    kept: list[Row] = []
    prompts: list[list[int]] = []
    start = 0
    while len(kept) < problems and start < len(rows):
        chunk = rows[start : start + problems - len(kept)]
        start += len(chunk)
        for row, ids in zip(chunk, encoder.encode_many(chunk), strict=True):
            if ids is not None:
                kept.append(row)
                prompts.append(ids)
    if not kept:
        raise _nothing_left("held-out", len(rows))
    return _batch(kept, prompts, [f"{row.row_id}@eval" for row in kept])


def _prompts_at(drawn: Sequence[tuple[Place, Row, list[int]]]) -> DataProto:
    uids = [f"{row.row_id}@{epoch}" for (_, epoch), row, _ in drawn]
    return _batch([row for _, row, _ in drawn], [ids for *_, ids in drawn], uids)


def _batch(rows: Sequence[Row], prompts: Sequence[list[int]], uids: Sequence[str]) -> DataProto:
    prompt_ids = jagged.from_rows([torch.tensor(ids, dtype=torch.int64) for ids in prompts], dtype=torch.int64)
    return DataProto.from_dict(
        tensors={"prompt_ids": prompt_ids},
        non_tensors={
            "uid": _objects(uids),
            "task": _objects([row.task for row in rows]),
            "messages": _objects([row.messages for row in rows]),
        },
    )


def _objects(values: Sequence[Any]) -> np.ndarray:
    array = np.empty(len(values), dtype=object)
    for place, value in enumerate(values):  # one by one: lists of one length would become a second dimension
        array[place] = value
    return array


def _nothing_left(which: str, rows: int) -> UserError:
    return UserError(
        f"all of the {rows} {which} prompts are longer than data.max_prompt_tokens, and were dropped",
        where="data.max_prompt_tokens",
        fix="set data.max_prompt_tokens higher",
    )
