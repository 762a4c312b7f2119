"""Sequences of a micro-batch as the matrix that a model takes: end to end in one row, or padded below each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlsys.engines.flops import Work
from rlsys.engines.train.attention import Packing


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
class Laid:
    """Sequences in their places. A sequence's last token is predicted and predicts nothing, so it is no input.

    input_ids: [s, T]; at least one token, so that passes over nothing take part in the collectives.
    packing: of a packed row; None: the rows are padded on the right.
    tokens: inputs that are not padding.
    starts: for each piece, where the first token of each of its rows would be in the s·T inputs if all of the row's
        lay together, which those after its shared prompt do.
    ends: for each piece, where the last token of each row's lead is.
    work: the segments; nothing is scored yet.
    """

    input_ids: torch.Tensor
    packing: Packing | None
    tokens: int
    starts: list[torch.Tensor]
    ends: list[torch.Tensor]
    work: Work

    def before(self, piece: int, row: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Where the input is after which the token comes that is ``place`` tokens behind its row's lead."""
        return torch.where(place > 0, self.starts[piece][row] + place - 1, self.ends[piece][row])


Piece = tuple[Sequences, torch.Tensor]  # the sequences of these rows


def padded(pieces: Sequence[Piece], device: torch.device) -> Laid:
    """One below the other."""
    lengths = [(s.lengths[rows] - 1).clamp(min=0) for s, rows in pieces]
    width = max(max((int(n.max()) for n in lengths if len(n)), default=0), 1)
    count = sum(int((s.lengths[rows] > 0).sum()) for s, rows in pieces)
    input_ids = torch.zeros(max(count, 1), width, dtype=torch.int64)
    starts, ends, below = [], [], 0
    for (s, rows), n in zip(pieces, lengths, strict=True):
        live = (s.lengths[rows] > 0).to(torch.int64)
        matrix_row = below + live.cumsum(0) - live
        below += int(live.sum())
        row, place, index = ranges(n, (s.lengths.cumsum(0) - s.lengths)[rows])
        input_ids[matrix_row[row], place] = s.ids[index]
        starts.append(matrix_row * width + s.lead[rows])
        ends.append(starts[-1] - 1)
    inputs = torch.cat([n[n > 0] for n in lengths])
    work = Work(inputs, torch.zeros_like(inputs), 0)
    return Laid(input_ids.to(device), None, int(inputs.sum()), starts, ends, work)


def packed(pieces: Sequence[Piece], device: torch.device, same: torch.Tensor | None = None) -> Laid:
    """End to end, the shorter ones first: neighbours of equal length are one call of the attention kernel.

    Args:
        same: [rows of the first piece] rows with an equal number have the same lead, which is an input once; None:
            none is shared.
    """
    sizes = [s.lengths[rows] for s, rows in pieces]
    leads = [s.lead[rows] for s, rows in pieces]
    pools = torch.tensor([0, *(len(s.ids) for s, _ in pieces)]).cumsum(0)
    origin = torch.cat([pool + (s.lengths.cumsum(0) - s.lengths)[rows] for pool, (s, rows) in zip(pools, pieces)])  # noqa: B905
    inputs = (torch.cat(sizes) - 1).clamp(min=0)
    skip = torch.zeros_like(inputs)  # tokens of each segment's sequence that lie in another segment
    context = torch.full_like(inputs, -1)
    if same is not None and len(same):
        _, group, members = torch.unique(same, return_inverse=True, return_counts=True)
        live = torch.nonzero((members[group] > 1) & (leads[0] > 0)).flatten()
        first = torch.full((len(members),), len(same)).scatter_reduce(0, group[live], live, "amin")
        shared = torch.nonzero(first < len(same)).flatten()
        number = torch.zeros_like(members)
        number[shared] = torch.arange(len(shared))
        context[live] = len(inputs) + number[group[live]]
        skip[live] = leads[0][live]
        inputs[live] -= leads[0][live]
        owner = first[shared]
        origin = torch.cat([origin, origin[owner]])
        inputs = torch.cat([inputs.clamp(min=0), leads[0][owner]])
        skip = torch.cat([skip, torch.zeros_like(owner)])
        context = torch.cat([context, torch.full_like(owner, -1)])
    order = torch.argsort(inputs + (context >= 0) * (1 << 40), stable=True)
    begins = torch.zeros_like(inputs)
    begins[order] = inputs[order].cumsum(0) - inputs[order]
    kept = order[inputs[order] > 0]
    row, place, index = ranges(inputs[kept], (origin + skip)[kept])
    ids = torch.cat([s.ids for s, _ in pieces])[index]
    places = place + skip[kept][row]
    count = len(ids)
    if not count:
        ids = places = torch.zeros(1, dtype=torch.int64)
    contexts = None
    if bool((context[kept] >= 0).any()):
        new = torch.full((len(inputs) + 1,), -1)
        new[kept] = torch.arange(len(kept))
        contexts = tuple(new[context[kept]].tolist())  # −1 looks at the last, which is −1
    packing = Packing(tuple(inputs[kept].tolist()) or (1,), places[None].to(device), contexts)
    starts, ends = _scored_from(begins, skip, context, leads, inputs)
    seen = torch.where(context[kept] >= 0, inputs[context[kept]], 0)
    return Laid(ids[None].to(device), packing, count, starts, ends, Work(inputs[kept], seen, 0))


def _scored_from(
    begins: torch.Tensor, skip: torch.Tensor, context: torch.Tensor, leads: list[torch.Tensor], inputs: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """``starts`` and ``ends`` of Laid, from the segments of which the first ones are the pieces' rows."""
    starts, ends, at = [], [], 0
    for lead in leads:
        mine = slice(at, at + len(lead))
        starts.append(begins[mine] - skip[mine] + lead)
        shared = context[mine] >= 0
        elsewhere = context[mine].clamp(min=0)
        ends.append(torch.where(shared, begins[elsewhere] + inputs[elsewhere] - 1, starts[-1] - 1))
        at += len(lead)
    return starts, ends


def ranges(lengths: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row, place in the row and place in the buffer of each element of the rows, which have ``lengths`` and start at
    ``starts`` of a flat buffer."""
    row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    place = torch.arange(len(row)) - (lengths.cumsum(0) - lengths)[row]
    return row, place, starts[row] + place
