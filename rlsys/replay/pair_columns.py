"""Preference pairs as columns: made of prompt groups, joined to samples, and scored by the reference.

A pair's two sides are whole sequences, prompt and response, in one row; rows without a pair are empty there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rlsys.batch import DataProto, jagged
from rlsys.batch.columns import COLUMNS, check_columns

Side = Literal["chosen", "rejected"]
SIDES: tuple[Side, ...] = ("chosen", "rejected")
_NO_ROWS = torch.zeros(0, dtype=torch.int64)
_GROUP_READS = ("uid", "sample_index", "prompt_ids", "response_ids", "response_mask")


@dataclass(frozen=True)
class SideRow:
    """One side of one row's pair. ids, mask, ref_logprobs: [T]; nothing of the kind: None."""

    ids: Tensor
    mask: Tensor
    ref_logprobs: Tensor | None = None


def side_row(prompt: Tensor, response: Tensor, mask: Tensor, ref_logprobs: Tensor | None = None) -> SideRow:
    """A side from prompt tokens [P] and a response's tokens, mask and log-probs [R]."""
    nothing = torch.zeros(len(prompt), dtype=torch.bool)
    return SideRow(
        torch.cat([prompt, response]),
        torch.cat([nothing, mask]),
        None if ref_logprobs is None else torch.cat([nothing.to(ref_logprobs.dtype), ref_logprobs]),
    )


def side_columns(side: Side, rows: Sequence[SideRow | None], *, reference: bool) -> dict[str, Tensor]:
    """``{side}_ids``, ``{side}_mask`` and, with ``reference``, ``{side}_ref_logprobs``; None is an empty row."""
    lengths = torch.tensor([0 if row is None else len(row.ids) for row in rows], dtype=torch.int64)
    kept = [row for row in rows if row is not None]
    ids = torch.cat([torch.zeros(0, dtype=torch.int64), *(row.ids for row in kept)])
    columns = {f"{side}_ids": jagged.from_values(ids, lengths)}
    offsets = jagged.offsets(columns[f"{side}_ids"])
    mask = torch.cat([torch.zeros(0, dtype=torch.bool), *(row.mask for row in kept)])
    columns[f"{side}_mask"] = jagged.from_values(mask, offsets=offsets)
    if reference:
        logprobs = torch.cat([torch.zeros(0), *(row.ref_logprobs for row in kept if row.ref_logprobs is not None)])
        columns[f"{side}_ref_logprobs"] = jagged.from_values(logprobs, offsets=offsets)
    return columns


def pairs_from_groups(batch: DataProto, rewards: np.ndarray, *, min_gap: float) -> DataProto:
    """The batch, with the best response of every prompt group paired against the worst, in the best one's row.

    Of equal rewards the lowest sample_index counts. A group gives no pair where the two rewards differ by less than
    ``min_gap``, where their tokens are the same, or where fewer than two responses have a sampled token.

    Args:
        batch: B rows of whole groups: uid, sample_index, prompt_ids, response_ids, response_mask, and ref_logprobs
            where the loss will read ``chosen_ref_logprobs``.
        rewards: [B]

    Returns:
        A new batch that shares its columns and has the declared ones of pairs; ``pair_slot`` is 1 in one row of every
        group, ``pair_id`` says ``UID:BEST>WORST``.

    Raises:
        ValueError: there is not one reward a row.
    """
    check_columns(batch, _GROUP_READS, "pairs")
    if rewards.shape != (len(batch),):
        raise ValueError(f"a batch of {len(batch)} rows came with rewards of shape {rewards.shape}")
    if not _has_columns(batch):
        return batch
    columns = batch.batch
    reference = "ref_logprobs" in columns.keys()  # noqa: SIM118 (a TensorDict iterates over rows)
    tokens = [jagged.to_rows(columns[name]) for name in ("prompt_ids", "response_ids", "response_mask")]
    logprobs = jagged.to_rows(columns["ref_logprobs"]) if reference else [None] * len(batch)
    rows = [side_row(*parts) for parts in zip(*tokens, logprobs, strict=True)]
    uids, order = batch.non_tensor_batch["uid"].tolist(), columns["sample_index"].tolist()
    chosen: list[SideRow | None] = [None] * len(batch)
    rejected: list[SideRow | None] = [None] * len(batch)
    slots = torch.zeros(len(batch), dtype=torch.bool)
    names = np.full(len(batch), None, dtype=object)
    for members in _groups(uids, order):
        sampled = [row for row in members if bool(rows[row].mask.any())]
        # max and min give the first of equals
        best, worst = (pick(sampled or members, key=lambda row: float(rewards[row])) for pick in (max, min))
        slots[best] = True
        gap = float(rewards[best]) - float(rewards[worst])
        if sampled and gap >= min_gap and not torch.equal(rows[best].ids, rows[worst].ids):
            chosen[best], rejected[best] = rows[best], rows[worst]
            names[best] = f"{uids[best]}:{order[best]}>{order[worst]}"
    pairs = {
        **side_columns("chosen", chosen, reference=reference),
        **side_columns("rejected", rejected, reference=reference),
        "pair_slot": slots,
    }
    joined = DataProto(columns.copy(), dict(batch.non_tensor_batch), dict(batch.meta_info))
    return joined.union(DataProto.from_dict(pairs, {"pair_id": names}))


def _groups(uids: Sequence[str], order: Sequence[int]) -> Iterable[list[int]]:
    """Rows of each group, by sample index."""
    groups: dict[str, list[int]] = {}
    for row in sorted(range(len(uids)), key=lambda i: order[i]):
        groups.setdefault(uids[row], []).append(row)
    return groups.values()


def join_pairs(samples: DataProto, pairs: DataProto) -> DataProto:
    """The rows of both, pairs after samples. Where a side has no such column its rows are empty, 0, False or None.

    Either may have no rows. Pairs without samples (a rank that was given none) get every column that is declared for
    samples, so that what reads them finds them, with nothing in them. Facts are those of the samples before the pairs'.

    Raises:
        ValueError: a column is of one type or shape here and of another there.
    """
    if not _has_columns(pairs):
        return samples
    sides = [part for part in (samples, pairs) if _has_columns(part)]
    empty = {} if _has_columns(samples) else dict(_EMPTY_SAMPLES)
    objects = {name for part in sides for name in part.non_tensor_batch}
    for part in sides:
        for name, column in part.batch.items():
            none = _no_rows(column)
            if _kind(known := empty.setdefault(name, none)) != _kind(none):
                raise ValueError(f"column '{name}' is {_kind(known)} here and {_kind(none)} there")
    joined = DataProto.concat([_completed(part, empty, objects) for part in sides])
    joined.meta_info = {**pairs.meta_info, **samples.meta_info}
    return joined


def reference_view(pairs: DataProto, side: Side) -> DataProto:
    """What ``ReferenceEngine.forward`` scores: prompt_ids, response_ids and response_mask of the rows with a pair, in
    their order. The response begins with the first token that counts."""
    check_columns(pairs, (f"{side}_ids", f"{side}_mask"), "reference")
    if not _has_columns(pairs):
        return DataProto()
    flat = jagged.values(pairs.batch[f"{side}_ids"])
    prompt, response = _prompt_and_response(pairs, side)
    live = response > 0
    behind = _behind(prompt, response)
    return DataProto.from_dict(
        {
            "prompt_ids": jagged.from_values(flat[~behind & live.repeat_interleave(prompt + response)], prompt[live]),
            "response_ids": jagged.from_values(flat[behind], response[live]),
            "response_mask": jagged.from_values(jagged.values(pairs.batch[f"{side}_mask"])[behind], response[live]),
        }
    )


def with_reference(pairs: DataProto, side: Side, ref: DataProto) -> DataProto:
    """The pairs with ``{side}_ref_logprobs``; a new batch that shares the other columns.

    Args:
        ref: ``ref_logprobs`` of :func:`reference_view`'s rows.

    Raises:
        ValueError: they are not one a token of its responses.
    """
    if not _has_columns(pairs):
        return pairs
    prompt, response = _prompt_and_response(pairs, side)
    given = jagged.lengths(ref.batch["ref_logprobs"]) if len(ref) else torch.zeros(0, dtype=torch.int64)
    if not torch.equal(given, response[response > 0]):
        raise ValueError(f"responses of {response[response > 0].tolist()} tokens got log-probs of {given.tolist()}")
    logprobs = torch.zeros(int((prompt + response).sum()))
    if len(ref):
        logprobs[_behind(prompt, response)] = jagged.values(ref.batch["ref_logprobs"])
    column = jagged.from_values(logprobs, offsets=jagged.offsets(pairs.batch[f"{side}_ids"]))
    joined = DataProto(pairs.batch.copy(), dict(pairs.non_tensor_batch), dict(pairs.meta_info))
    joined.batch[f"{side}_ref_logprobs"] = column
    return joined


def _prompt_and_response(pairs: DataProto, side: Side) -> tuple[Tensor, Tensor]:
    """[B] tokens of a side before the first that counts, and from it on (none counts: all, and 0)."""
    mask = pairs.batch[f"{side}_mask"]
    lengths, flat = jagged.lengths(mask), jagged.values(mask)
    rows = torch.arange(len(lengths)).repeat_interleave(lengths)
    place = torch.arange(len(flat)) - (lengths.cumsum(0) - lengths)[rows]
    first = lengths.scatter_reduce(0, rows[flat], place[flat], "amin")
    return first, lengths - first


def _behind(prompt: Tensor, response: Tensor) -> Tensor:
    """[T] bool: which tokens of rows laid end to end are their responses'."""
    counts = torch.stack([prompt, response], dim=1).flatten()
    return (torch.arange(len(counts)) % 2 == 1).repeat_interleave(counts)


def _has_columns(data: DataProto) -> bool:
    return data.batch is not None or bool(data.non_tensor_batch)


def _no_rows(column: Tensor) -> Tensor:
    """A column of this type without rows."""
    if jagged.is_jagged(column):
        return jagged.from_values(jagged.values(column)[:0], _NO_ROWS)
    return column[:0]


def _kind(column: Tensor) -> str:
    """Type and shape but for the rows, in words."""
    if jagged.is_jagged(column):
        return f"jagged {tuple(jagged.values(column).shape[1:])} of {column.dtype}"
    return f"dense {tuple(column.shape[1:])} of {column.dtype}"


def _completed(part: DataProto, empty: dict[str, Tensor], objects: Iterable[str]) -> DataProto:
    """The rows with every column of ``empty`` (which have no rows) and of ``objects``; those that are new, blank."""
    count, there = len(part), dict(part.batch.items())
    columns = {name: there[name] if name in there else _blank(none, count) for name, none in empty.items()}
    cells = {name: part.non_tensor_batch.get(name, np.full(count, None, dtype=object)) for name in sorted(objects)}
    return DataProto.from_dict(columns, cells, dict(part.meta_info))


def _blank(none: Tensor, count: int) -> Tensor:
    if jagged.is_jagged(none):
        return jagged.from_values(jagged.values(none), torch.zeros(count, dtype=torch.int64))
    return none.new_zeros(count, *none.shape[1:])


# What an idle rank's samples would have: every tensor column that some stage declares, but for those of pairs.
_EMPTY_SAMPLES = {
    column.name: jagged.from_values(torch.zeros(0, dtype=column.dtype), _NO_ROWS)
    if "j:" in column.shape
    else torch.zeros(0, dtype=column.dtype)
    for column in COLUMNS.values()
    if column.dtype is not None and column.writer != "pairs"
}
