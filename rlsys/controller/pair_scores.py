"""Preference pairs of files: divided over the trainer's ranks, and with the reference's log-probs."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import ray

from rlsys.algorithms.channels.preference import needs_reference
from rlsys.algorithms.requirements import adapts
from rlsys.batch import DataProto, jagged
from rlsys.batch.balance import balanced_partitions
from rlsys.config.schema import RunConfig
from rlsys.replay.pairs import reference_view, with_reference
from rlsys.workers.dispatch import Dispatch, Unwatched, answers
from rlsys.workers.fleet import Fleets
from rlsys.workers.groups import ReferenceGroup, TrainerGroup
from rlsys.workers.trainer import Slice
from rlsys.workers.waits import Call, StopFlag

Side = Literal["chosen", "rejected"]


def divided(pairs: DataProto, *, ranks: int, updates: int) -> list[list[list[Slice]]]:
    """[rank][update] slices, balanced by tokens."""
    ref = ray.put(pairs)
    tokens = sum(jagged.lengths(pairs.batch[f"{side}_ids"]) for side in ("chosen", "rejected"))
    result: list[list[list[Slice]]] = [[] for _ in range(ranks)]
    for members in np.array_split(np.arange(len(pairs)), updates):
        parts = balanced_partitions([int(tokens[row]) for row in members], ranks)
        for rank, part in enumerate(parts):
            # A rank that is given none still gets their columns, with no rows.
            result[rank].append([Slice((ref,), members[np.asarray(part, dtype=np.int64)])])
    return result


def scored_pairs(
    pairs: DataProto,
    config: RunConfig,
    trainer: TrainerGroup,
    reference: ReferenceGroup | None,
    fleets: Fleets | None,
    stop: StopFlag,
) -> DataProto:
    """Pairs with the columns ``…_ref_logprobs``, unless the loss does without."""
    if not needs_reference(config.algorithm.preference.loss):
        return pairs
    if adapts(config):
        return trainer.pair_reference(pairs)
    if reference is None:
        return pairs
    group = reference

    def refer(index: int, side: Side) -> Call:
        columns, call = group.logprobs([ray.put(reference_view(pairs, side))], index)
        return replace(call, payload=columns)

    fleet = fleets.reference if fleets is not None else None
    sides = Dispatch[Side]("reference", config.deadlines.reference, fleet or Unwatched(len(group)), refer)
    sides.put("chosen")
    sides.put("rejected")
    found = {side: call.payload[0] for _, side, call, _ in answers([sides], fleets, stop, samplers=sides)}
    for side, column in found.items():
        pairs = with_reference(pairs, side, ray.get(column))
    return pairs
