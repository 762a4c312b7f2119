"""The engine's door: jagged rows in, right-padded micro-batches of a bounded number of tokens out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from rlsys.algorithms.objective import ResponseBatch
from rlsys.batch import DataProto, jagged
from rlsys.batch.balance import micro_batches
from rlsys.batch.columns import COLUMNS
from rlsys.config.errors import UserError


@dataclass(frozen=True)
class MicroBatch:
    """Some of a rank's rows, on the device.

    input_ids: [b, T], right-padded. positions, targets: [K] of the sampled tokens, as PolicyModel takes them.
    sampled: [K] which of the N response tokens those are; None: all of them.
    response: the rows' response tokens and columns; token_index: [N] where they lie in the rank's response columns.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    sampled: torch.Tensor | None
    response: ResponseBatch
    token_index: torch.Tensor

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """[K] values of sampled tokens as [N] values of response tokens, 0 on the others. Keeps the gradient."""
        if self.sampled is None:
            return values
        return values.new_zeros(len(self.token_index)).index_copy(0, self.sampled, values)


class RankRows:
    """A rank's rows of a batch, ready to be cut.

    Args:
        batch: rows with prompt_ids, response_ids, response_mask and the columns ``reads``; may have no rows (and then
            needs no columns).
        reads: further columns that the micro-batches carry.
        max_length: longest prompt and response together.
        token_budget: most tokens in a micro-batch, padding included.

    Raises:
        UserError: a column is missing, a prompt is empty, or a row does not fit into the model or the budget.
    """

    def __init__(self, batch: DataProto, reads: Sequence[str], *, max_length: int, token_budget: int):
        self.num_rows = len(batch)
        self._flat: dict[str, torch.Tensor] = {}
        lengths: dict[str, torch.Tensor] = {}
        for name in ("prompt_ids", "response_ids", "response_mask", *reads):
            self._flat[name], per_row = _column(batch, name)
            if per_row is not None:
                lengths[name] = per_row
        self.prompt_lengths, self.response_lengths = lengths["prompt_ids"], lengths["response_ids"]
        for name in lengths.keys() - {"prompt_ids"}:
            if not torch.equal(lengths[name], self.response_lengths):
                raise UserError(f"column '{name}' does not have one value a response token", where=name)
        self._per_token = lengths.keys()
        self._prompt_starts = self.prompt_lengths.cumsum(0) - self.prompt_lengths
        self._response_starts = self.response_lengths.cumsum(0) - self.response_lengths
        self._reads = tuple(dict.fromkeys(("response_ids", "response_mask", *reads)))
        self.lengths = self.prompt_lengths + self.response_lengths
        self._check_lengths(max_length, token_budget)
        self.plan = micro_batches(self.lengths.tolist(), token_budget) if self.num_rows else []

    @property
    def num_tokens(self) -> int:
        """Response tokens of all rows."""
        return len(self._flat["response_ids"])

    @property
    def num_inputs(self) -> int:
        """Tokens that a forward pass is about: all but the last of each row."""
        return int(self.lengths.sum()) - self.num_rows

    def whole(self) -> ResponseBatch:
        """All rows, on the CPU."""
        rows = torch.repeat_interleave(torch.arange(self.num_rows), self.response_lengths)
        return ResponseBatch({name: self._flat[name] for name in self._reads}, rows, self.num_rows)

    def cut(self, count: int, device: torch.device) -> Iterator[MicroBatch]:
        """The micro-batches, padded with empty ones to ``count``: every rank runs as many as the busiest."""
        for rows in [*self.plan, *[[]] * (count - len(self.plan))]:
            yield self._micro_batch(torch.tensor(rows, dtype=torch.int64), device)

    def _micro_batch(self, rows: torch.Tensor, device: torch.device) -> MicroBatch:
        prompts, responses = self.prompt_lengths[rows], self.response_lengths[rows]
        # A row's last token is predicted and predicts nothing, so it need not be an input. An empty micro-batch still
        # has one input token: its forward and backward passes take part in the collectives.
        width = max(int((prompts + responses).max()) - 1, 1) if len(rows) else 1
        input_ids = torch.zeros(max(len(rows), 1), width + 1, dtype=torch.int64)
        row, column, index = _ranges(prompts, self._prompt_starts[rows])
        input_ids[row, column] = self._flat["prompt_ids"][index]
        row, column, index = _ranges(responses, self._response_starts[rows])
        column = column + prompts[row]
        targets = self._flat["response_ids"][index]
        input_ids[row, column] = targets
        positions = row * width + column - 1
        mask = self._flat["response_mask"][index]
        sampled = None if bool(mask.all()) else torch.nonzero(mask).flatten()
        if sampled is not None:
            positions, targets = positions[sampled], targets[sampled]
        columns = {
            name: self._flat[name][index if name in self._per_token else rows].to(device) for name in self._reads
        }
        return MicroBatch(
            input_ids[:, :width].to(device),
            positions.to(device),
            targets.to(device),
            None if sampled is None else sampled.to(device),
            ResponseBatch(columns, row.to(device), len(rows)),
            index.to(device),
        )

    def _check_lengths(self, max_length: int, token_budget: int) -> None:
        if not self.num_rows:
            return
        if int(self.prompt_lengths.min()) == 0:
            raise UserError(f"row {int(self.prompt_lengths.argmin())} has no prompt token to predict its response from")
        row, longest = int(self.lengths.argmax()), int(self.lengths.max())
        if longest > max_length:
            raise UserError(
                f"row {row} has {longest} tokens, the model takes {max_length}",
                where="data.max_response_tokens",
                fix="shorten data.max_prompt_tokens or data.max_response_tokens",
            )
        if longest > token_budget:
            raise UserError(
                f"row {row} has {longest} tokens, a micro-batch may have {token_budget}",
                where="trainer.micro_batch_tokens",
                fix=f"set trainer.micro_batch_tokens={longest} or more",
            )


def _column(batch: DataProto, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Values of a column and, where it is jagged, the rows' lengths [B] int64."""
    declared = COLUMNS.get(name)
    if not len(batch):
        empty = torch.empty(0, dtype=declared.dtype if declared is not None else torch.float32)
        return empty, torch.empty(0, dtype=torch.int64) if declared is None or "j:" in declared.shape else None
    if batch.batch is None or name not in batch.batch.keys():  # noqa: SIM118 (a TensorDict iterates over rows)
        writer = f", which the stage '{declared.writer}' writes" if declared is not None else ""
        raise UserError(f"the trainer needs the column '{name}'{writer}, and the batch does not have it", where=name)
    column = batch.batch[name]
    if not column.is_nested:
        return column, None
    return jagged.values(column), jagged.lengths(column).to(torch.int64)


def _ranges(lengths: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row, place in the row and place in the buffer of each element of the rows, which have ``lengths`` and start at
    ``starts`` of a flat buffer."""
    row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    place = torch.arange(len(row)) - (lengths.cumsum(0) - lengths)[row]
    return row, place, starts[row] + place
