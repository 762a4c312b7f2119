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

_PAIR_SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Sequences:
    """One sequence a row, laid end to end; empty in rows that have none.

    ids: [Σ lengths]. lengths, lead: [B]; the tokens that have columns come after the ``lead`` ones of a sequence.
    scored: [M] bool, which of the M tokens with columns get a log-prob.
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    lead: torch.Tensor
    scored: torch.Tensor

    @property
    def tokens(self) -> torch.Tensor:
        """[B] tokens with columns."""
        return self.lengths - self.lead


@dataclass(frozen=True)
class Scored:
    """Tokens of one kind in a micro-batch.

    where: the slice of the K scored tokens that are of this kind. index: [k] which of the kind's M tokens those are;
    None: all of them. count: M.
    """

    where: slice
    index: torch.Tensor | None
    count: int

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """The kind's part of [K] values as [M] values of its tokens, 0 on the others. Keeps the gradient."""
        part = values[self.where]
        return part if self.index is None else part.new_zeros(self.count).index_copy(0, self.index, part)


@dataclass(frozen=True)
class TeacherRows:
    """The teacher's sequences of a micro-batch.

    input_ids: [s, T'], right-padded. positions: [n] of the tokens that the divergence is about.
    student: [n] which of the K scored tokens those are; targets: [n] the tokens; place: [n] which response tokens.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    student: torch.Tensor
    targets: torch.Tensor
    place: torch.Tensor


@dataclass(frozen=True)
class MicroBatch:
    """Some of a rank's rows, on the device.

    input_ids: [s, T], right-padded. positions, targets: [K] of the scored tokens, as PolicyModel takes them.
    scored: by kind of sequence, which of them are its.
    response: the rows' tokens and columns; token_index: [N] where the response tokens lie in the rank's columns.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    scored: dict[str, Scored]
    response: ResponseBatch
    token_index: torch.Tensor
    teacher: TeacherRows | None

    def spread(self, values: torch.Tensor, kind: str = "response") -> torch.Tensor:
        """[K] values of scored tokens as [M] values of the kind's tokens, 0 on the others. Keeps the gradient."""
        return self.scored[kind].spread(values) if kind in self.scored else values.new_zeros(0)


class RankRows:
    """A rank's rows of a batch, ready to be cut.

    Args:
        batch: rows with the columns of the sequences and ``reads``; may have no rows (and then needs no columns).
        reads: further columns that the micro-batches carry.
        max_length: longest sequence.
        token_budget: most tokens in a micro-batch, padding included.
        sequences: which of ``response`` (prompt_ids, response_ids, response_mask), ``chosen`` and ``rejected``
            (``…_ids``, ``…_mask``) are scored.
        teacher: whether the responses are scored behind ``teacher_prompt_ids`` too, where ``teacher_mask`` says so.

    Raises:
        UserError: a column is missing, a prompt is empty, or a row does not fit into the model or the budget.
    """

    def __init__(
        self,
        batch: DataProto,
        reads: Sequence[str],
        *,
        max_length: int,
        token_budget: int,
        sequences: Sequence[str] = ("response",),
        teacher: bool = False,
    ):
        self.num_rows = len(batch)
        self._kinds, self._teacher = tuple(sequences), teacher
        self._flat: dict[str, torch.Tensor] = {}
        self._lengths: dict[str, torch.Tensor] = {}
        response = ("prompt_ids", "response_ids", "response_mask") if "response" in sequences else ()
        pairs = tuple(f"{side}_{part}" for side in _PAIR_SIDES if side in sequences for part in ("ids", "mask"))
        extra = ("teacher_prompt_ids", "teacher_mask") if teacher else ()
        for name in dict.fromkeys((*response, *pairs, *extra, *reads)):
            self._flat[name], per_row = _column(batch, name)
            if per_row is not None:
                self._lengths[name] = per_row
        self._reads = tuple(name for name in self._flat if name not in ("prompt_ids", "teacher_prompt_ids"))
        self._check_alignment()
        none = torch.zeros(self.num_rows, dtype=torch.int64)
        self.response_lengths = self._lengths.get("response_ids", none)
        self._sequences = {kind: self._sequence(kind) for kind in (*sequences, *(("teacher",) if teacher else ()))}
        self._starts = {
            kind: self._lengths[f"{kind}_ids"].cumsum(0) - self._lengths[f"{kind}_ids"] for kind in sequences
        }
        every = [s.lengths for s in self._sequences.values()]
        longest = torch.stack(every).amax(0) if self.num_rows else none
        self._check_lengths(longest, max_length)
        counts = torch.stack([lengths > 0 for lengths in every]).sum(0) if self.num_rows else none
        self.plan = micro_batches(longest.tolist(), token_budget, counts.tolist()) if self.num_rows else []

    @property
    def num_tokens(self) -> int:
        """Response tokens of all rows."""
        return int(self.response_lengths.sum())

    @property
    def total(self) -> int:
        """Tokens of all the policy's sequences."""
        return sum(int(self._sequences[kind].lengths.sum()) for kind in self._kinds)

    @property
    def num_inputs(self) -> int:
        """Tokens that the forward passes are about: all but the last of each sequence."""
        return sum(int((s.lengths - 1).clamp(min=0).sum()) for s in self._sequences.values())

    def whole(self) -> ResponseBatch:
        """All rows, on the CPU."""
        everywhere = torch.arange(self.num_rows)
        rows = torch.repeat_interleave(everywhere, self.response_lengths)
        pairs = {
            side: torch.repeat_interleave(everywhere, self._lengths[f"{side}_ids"])
            for side in self._kinds
            if side in _PAIR_SIDES
        }
        return ResponseBatch({name: self._flat[name] for name in self._reads}, rows, self.num_rows, pairs)

    def cut(self, count: int, device: torch.device) -> Iterator[MicroBatch]:
        """The micro-batches, padded with empty ones to ``count``: every rank runs as many as the busiest."""
        for rows in [*self.plan, *[[]] * (count - len(self.plan))]:
            yield self._micro_batch(torch.tensor(rows, dtype=torch.int64), device)

    def _sequence(self, kind: str) -> Sequences:
        if kind == "response":
            ids = _interleave(
                (self._flat["prompt_ids"], self._lengths["prompt_ids"]),
                (self._flat["response_ids"], self.response_lengths),
            )
            lead = self._lengths["prompt_ids"]
            return Sequences(ids, lead + self.response_lengths, lead, self._flat["response_mask"])
        if kind == "teacher":
            return self._teacher_sequence()
        lengths, mask = self._lengths[f"{kind}_ids"], self._flat[f"{kind}_mask"]
        return Sequences(self._flat[f"{kind}_ids"], lengths, torch.zeros_like(lengths), mask)

    def _teacher_sequence(self) -> Sequences:
        """The teacher's prompt and the response from the first to the last token that the divergence is about."""
        mask, lengths = self._flat["teacher_mask"], self.response_lengths
        rows = torch.repeat_interleave(torch.arange(self.num_rows), lengths)
        place = torch.arange(len(rows)) - (lengths.cumsum(0) - lengths)[rows]
        first = torch.full((self.num_rows,), len(rows) + 1).scatter_reduce(0, rows[mask], place[mask], "amin")
        last = torch.full((self.num_rows,), -1).scatter_reduce(0, rows[mask], place[mask], "amax")
        inside = (place >= first[rows]) & (place <= last[rows])
        count = torch.zeros(self.num_rows, dtype=torch.int64).index_add(0, rows, inside.to(torch.int64))
        lead = torch.where(count > 0, self._lengths["teacher_prompt_ids"], 0)
        starts = self._lengths["teacher_prompt_ids"].cumsum(0) - self._lengths["teacher_prompt_ids"]
        prompts = self._flat["teacher_prompt_ids"][_ranges(lead, starts)[2]]
        self._teacher_tokens = torch.nonzero(inside).flatten()  # response tokens in the teacher's sequences
        ids = _interleave((prompts, lead), (self._flat["response_ids"][inside], count))
        return Sequences(ids, lead + count, lead, mask[inside])

    def _micro_batch(self, rows: torch.Tensor, device: torch.device) -> MicroBatch:
        indices = {kind: _ranges(self._lengths[f"{kind}_ids"][rows], self._starts[kind]
            [rows]) for kind in self._kinds}  # fmt: skip
        input_ids, bases = _lay([(self._sequences[kind], rows) for kind in self._kinds])
        width = input_ids.shape[1] - 1
        positions, targets, scored, start = [], [], {}, 0
        for kind, base in zip(self._kinds, bases, strict=True):
            row, place, index = indices[kind]
            column = place + self._sequences[kind].lead[rows][row]
            mask = self._flat[f"{kind}_mask"][index]
            chosen = None if bool(mask.all()) else torch.nonzero(mask).flatten()
            where = base[row] * width + column - 1
            ids = self._flat[f"{kind}_ids"][index]
            positions.append(where if chosen is None else where[chosen])
            targets.append(ids if chosen is None else ids[chosen])
            stop = start + len(positions[-1])
            scored[kind] = Scored(slice(start, stop), None if chosen is None else chosen.to(device), len(index))
            start = stop
        columns = {name: self._pick(name, indices, rows).to(device) for name in self._reads}
        none = torch.zeros(0, dtype=torch.int64)
        row, _, index = indices.get("response", (none, none, none))
        pairs = {side: indices[side][0].to(device) for side in self._kinds if side in _PAIR_SIDES}
        return MicroBatch(
            input_ids[:, :width].to(device),
            torch.cat(positions).to(device),
            torch.cat(targets).to(device),
            scored,
            ResponseBatch(columns, row.to(device), len(rows), pairs),
            index.to(device),
            self._teacher_rows(rows, index, device) if self._teacher else None,
        )

    def _pick(
        self,
        name: str,
        indices: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
        rows: torch.Tensor,
    ) -> torch.Tensor:
        """A column's values in these rows."""
        if name not in self._lengths:
            return self._flat[name][rows]
        kind = _kind_of(name)
        if kind in indices:
            return self._flat[name][indices[kind][2]]
        lengths = self._lengths[name]
        return self._flat[name][_ranges(lengths[rows], (lengths.cumsum(0) - lengths)[rows])[2]]

    def _teacher_rows(self, rows: torch.Tensor, tokens: torch.Tensor, device: torch.device) -> TeacherRows:
        """tokens: [N] the micro-batch's response tokens among the rank's."""
        sequences = self._sequences["teacher"]
        input_ids, (base,) = _lay([(sequences, rows)])
        width = input_ids.shape[1] - 1
        counts = sequences.tokens
        row, place, index = _ranges(counts[rows], (counts.cumsum(0) - counts)[rows])
        live = sequences.scored[index]
        row, place, index = row[live], place[live], index[live]
        positions = base[row] * width + place + sequences.lead[rows][row] - 1
        # from the rank's response tokens to the micro-batch's, and from those to the scored ones
        here = torch.full((self.num_tokens + 1,), -1)
        here[tokens] = torch.arange(len(tokens))
        spot = here[self._teacher_tokens[index]]
        mask = self._flat["response_mask"][tokens]
        student = (mask.to(torch.int64).cumsum(0) - 1)[spot]
        targets = self._flat["response_ids"][tokens][spot]
        return TeacherRows(
            input_ids[:, :width].to(device),
            positions.to(device),
            student.to(device),
            targets.to(device),
            spot.to(device),
        )

    def _check_alignment(self) -> None:
        """Columns of one kind have one value a token of the kind."""
        for name, lengths in self._lengths.items():
            like = f"{_kind_of(name)}_ids"
            if name.endswith("prompt_ids") or like not in self._lengths:
                continue
            if not torch.equal(lengths, self._lengths[like]):
                raise UserError(f"column '{name}' does not have one value a token of '{like}'", where=name)
        if self._teacher and self.num_rows and (self._flat["teacher_mask"] & ~self._flat["response_mask"]).any():
            raise UserError("'teacher_mask' is set on tokens that were not sampled", where="teacher_mask")

    def _check_lengths(self, longest: torch.Tensor, max_length: int) -> None:
        if not self.num_rows:
            return
        for kind, s in self._sequences.items():
            starts = s.tokens.cumsum(0) - s.tokens
            begins = (s.tokens > 0) & (s.lead == 0)
            if begins.any() and (s.scored[starts[begins]]).any():
                row = int(torch.nonzero(begins)[0])
                what = "prompt" if kind == "response" else f"'{kind}' context"
                raise UserError(f"row {row} has no {what} token to predict its response from")
        row = int(longest.argmax())
        if int(longest[row]) > max_length:
            raise UserError(
                f"row {row} has {int(longest[row])} tokens, the model takes {max_length}",
                where="data.max_response_tokens",
                fix="shorten data.max_prompt_tokens, data.max_response_tokens or hints.max_tokens",
            )


def _kind_of(name: str) -> str:
    """The kind of sequence that a jagged column belongs to."""
    return next((side for side in _PAIR_SIDES if name.startswith(f"{side}_")), "response")


def _lay(pieces: Sequence[tuple[Sequences, torch.Tensor]]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """These rows' sequences, one below the other: [s, width + 1] right-padded, and for each piece the matrix row of
    each of its rows (meaningless where the row has no sequence)."""
    lengths = [s.lengths[rows] for s, rows in pieces]
    # A sequence's last token is predicted and predicts nothing, so it need not be an input. An empty micro-batch still
    # has one input token: its forward and backward passes take part in the collectives.
    width = max(max((int(n.max()) for n in lengths if len(n)), default=0) - 1, 1)
    bases, count = [], 0
    for n in lengths:
        live = (n > 0).to(torch.int64)
        bases.append(count + live.cumsum(0) - live)
        count += int(live.sum())
    input_ids = torch.zeros(max(count, 1), width + 1, dtype=torch.int64)
    for (s, rows), n, base in zip(pieces, lengths, bases, strict=True):
        row, place, index = _ranges(n, (s.lengths.cumsum(0) - s.lengths)[rows])
        input_ids[base[row], place] = s.ids[index]
    return input_ids, bases


def _interleave(first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Each row's first values, then its second: (flat values, lengths [B]) twice → flat values."""
    (a, a_lengths), (b, b_lengths) = first, second
    lengths = a_lengths + b_lengths
    starts = lengths.cumsum(0) - lengths
    result = torch.empty(len(a) + len(b), dtype=a.dtype)
    row, place, _ = _ranges(a_lengths, starts)
    result[starts[row] + place] = a
    row, place, _ = _ranges(b_lengths, starts)
    result[starts[row] + a_lengths[row] + place] = b
    return result


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
