"""The engine's door: jagged rows in, packed or right-padded micro-batches of a bounded number of tokens out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from rlsys.algorithms.objective import ResponseBatch
from rlsys.batch import DataProto, jagged
from rlsys.batch.balance import micro_batches, packed_batches
from rlsys.batch.columns import COLUMNS
from rlsys.config.errors import UserError
from rlsys.engines.flops import Work
from rlsys.engines.train import layout
from rlsys.engines.train.attention import Packing
from rlsys.engines.train.layout import Laid, Sequences, ranges

if TYPE_CHECKING:
    from rlsys.engines.train.ulysses import Part

_PAIR_SIDES = ("chosen", "rejected")


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

    input_ids: [s, T'], right-padded, or with ``packing`` [1, T'].
    positions: [n] of the tokens that the divergence is about. targets: [n] the tokens.
    student: [n] which of the K scored tokens those are; place: [n] which response tokens.
    exchange: [n, H] hidden states at ``positions`` → those that ``student`` is about, which ranks that share a row
        have from each other; None: they are the same.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    student: torch.Tensor
    targets: torch.Tensor
    place: torch.Tensor
    packing: Packing | None
    exchange: Callable[[torch.Tensor], torch.Tensor] | None = None


@dataclass(frozen=True)
class MicroBatch:
    """Some of a rank's rows, on the device.

    input_ids: [s, T], right-padded, or with ``packing`` [1, T]. positions, targets: [K] of the scored tokens, as
    PolicyModel takes them.
    scored: by kind of sequence, which of them are its.
    response: the rows' tokens and columns; token_index: [N] where the response tokens lie in the rank's columns.
    tokens: inputs that are not padding, the teacher's too.
    work: the policy's inputs, of these rows alone.
    part: the micro-batch is a slice of what several ranks hold together; None: they hold none together.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    scored: dict[str, Scored]
    response: ResponseBatch
    token_index: torch.Tensor
    teacher: TeacherRows | None
    packing: Packing | None
    tokens: int
    work: Work
    part: Part | None = None

    @property
    def area(self) -> int:
        """Inputs, padding included, the teacher's too."""
        return self.input_ids.numel() + (self.teacher.input_ids.numel() if self.teacher is not None else 0)

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
        packing: sequences of a micro-batch lie end to end in one row; false: below each other, padded on the right.
        pack_teacher: the teacher's sequences too; None: as ``packing`` says.
        share_prompts: rows with the same prompt that are in one micro-batch have it as an input once (packed only).
        sequences: which of ``response`` (prompt_ids, response_ids, response_mask), ``chosen`` and ``rejected``
            (``…_ids``, ``…_mask``) are scored.
        divide: cuts packed rows by their tokens, as ``packed_batches`` does; of ranks that share a row, all their rows.
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
        packing: bool = False,
        share_prompts: bool = False,
        pack_teacher: bool | None = None,
        divide: Callable[[Sequence[int], int, int | None], list[list[int]]] = packed_batches,
    ):
        self._packing, self._budget, self._divide = packing, token_budget, divide
        self._pack_teacher = packing if pack_teacher is None else pack_teacher
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
        self._same = self._same_prompts() if share_prompts and "response" in sequences else None
        self._lengths_of_all = torch.stack(every) if self.num_rows else none[None]
        self.plan = self._plan()

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
        """The micro-batches. Every rank runs as many as the busiest: packed rows are divided anew over ``count``; where
        there are too few, empty micro-batches follow."""
        plan = self.plan
        if self._packing and count > len(plan):
            divided = self._plan(count)
            plan = divided if len(divided) <= count else plan
        for rows in [*plan, *[[]] * (count - len(plan))]:
            yield self._micro_batch(torch.tensor(rows, dtype=torch.int64), device)

    def _plan(self, parts: int | None = None) -> list[list[int]]:
        """Rows of each micro-batch; packed, in at least ``parts`` of them."""
        longest, counts = self._lengths_of_all.amax(0), (self._lengths_of_all > 0).sum(0)
        if not self._packing:
            return micro_batches(longest.tolist(), self._budget, counts.tolist())
        costs = self._lengths_of_all.sum(0)
        if self._same is None:
            return self._divide(costs.tolist(), self._budget, parts)
        prompts = self._lengths["prompt_ids"]
        items = _bundles(self._same.tolist(), prompts.tolist(), costs.tolist(), self._budget)
        bundled = [int(costs[rows].sum() - (len(rows) - 1) * prompts[rows[0]]) for rows in items]
        batches = self._divide(bundled, self._budget, parts)
        return [sorted(row for item in batch for row in items[item]) for batch in batches]

    def _same_prompts(self) -> torch.Tensor:
        """[B] equal numbers for rows with the same prompt."""
        numbers: dict[bytes, int] = {}
        parts = self._flat["prompt_ids"].split(self._lengths["prompt_ids"].tolist())
        return torch.tensor([numbers.setdefault(p.numpy().tobytes(), len(numbers)) for p in parts], dtype=torch.int64)

    def _lay(self, kinds: Sequence[str], rows: torch.Tensor, device: torch.device) -> Laid:
        pieces = [(self._sequences[kind], rows) for kind in kinds]
        if not (self._pack_teacher if kinds[0] == "teacher" else self._packing):
            return layout.padded(pieces, device)
        same = self._same[rows] if self._same is not None and kinds[0] == "response" else None
        return layout.packed(pieces, device, same)

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
        prompts = self._flat["teacher_prompt_ids"][ranges(lead, starts)[2]]
        self._teacher_tokens = torch.nonzero(inside).flatten()  # response tokens in the teacher's sequences
        ids = _interleave((prompts, lead), (self._flat["response_ids"][inside], count))
        return Sequences(ids, lead + count, lead, mask[inside])

    def _micro_batch(self, rows: torch.Tensor, device: torch.device) -> MicroBatch:
        indices = {kind: ranges(self._lengths[f"{kind}_ids"][rows], self._starts[kind]
            [rows]) for kind in self._kinds}  # fmt: skip
        laid = self._lay(self._kinds, rows, device)
        positions, targets, scored, start = [], [], {}, 0
        for piece, kind in enumerate(self._kinds):
            row, place, index = indices[kind]
            mask = self._flat[f"{kind}_mask"][index]
            chosen = None if bool(mask.all()) else torch.nonzero(mask).flatten()
            where = laid.before(piece, row, place)
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
        teacher = self._teacher_rows(rows, index, device) if self._teacher else None
        return MicroBatch(
            laid.input_ids,
            torch.cat(positions).to(device),
            torch.cat(targets).to(device),
            scored,
            ResponseBatch(columns, row.to(device), len(rows), pairs),
            index.to(device),
            teacher[0] if teacher is not None else None,
            laid.packing,
            laid.tokens + (teacher[1] if teacher is not None else 0),
            replace(laid.work, scored=start),
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
        return self._flat[name][ranges(lengths[rows], (lengths.cumsum(0) - lengths)[rows])[2]]

    def _teacher_rows(self, rows: torch.Tensor, tokens: torch.Tensor, device: torch.device) -> tuple[TeacherRows, int]:
        """And how many of their inputs are not padding. tokens: [N] the micro-batch's response tokens in the rank's."""
        sequences = self._sequences["teacher"]
        laid = self._lay(("teacher",), rows, device)
        counts = sequences.tokens
        row, place, index = ranges(counts[rows], (counts.cumsum(0) - counts)[rows])
        live = sequences.scored[index]
        row, place, index = row[live], place[live], index[live]
        positions = laid.before(0, row, place)
        # from the rank's response tokens to the micro-batch's, and from those to the scored ones
        here = torch.full((self.num_tokens + 1,), -1)
        here[tokens] = torch.arange(len(tokens))
        spot = here[self._teacher_tokens[index]]
        mask = self._flat["response_mask"][tokens]
        student = (mask.to(torch.int64).cumsum(0) - 1)[spot]
        targets = self._flat["response_ids"][tokens][spot]
        found = TeacherRows(
            laid.input_ids,
            positions.to(device),
            student.to(device),
            targets.to(device),
            spot.to(device),
            laid.packing,
        )
        return found, laid.tokens

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


def _bundles(same: list[int], prompts: list[int], costs: list[int], budget: int) -> list[list[int]]:
    """Rows with the same prompt together, as many as a micro-batch takes when their prompt counts once."""
    items: list[list[int]] = []
    open_item: dict[int, tuple[int, int]] = {}  # number of a prompt → which item, how many tokens it has
    for row, number in enumerate(same):
        item, size = open_item.get(number, (-1, budget))
        more = costs[row] - prompts[row]
        if item < 0 or size + more > budget:
            open_item[number] = (len(items), costs[row])
            items.append([row])
        else:
            open_item[number] = (item, size + more)
            items[item].append(row)
    return items


def _interleave(first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Each row's first values, then its second: (flat values, lengths [B]) twice → flat values."""
    (a, a_lengths), (b, b_lengths) = first, second
    lengths = a_lengths + b_lengths
    starts = lengths.cumsum(0) - lengths
    result = torch.empty(len(a) + len(b), dtype=a.dtype)
    row, place, _ = ranges(a_lengths, starts)
    result[starts[row] + place] = a
    row, place, _ = ranges(b_lengths, starts)
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
