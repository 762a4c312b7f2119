"""Whatever is laid behind what, each scored token is predicted from its own sequence up to it, at its own places."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from training_batches import composed_batch

from rlsys.batch import DataProto, jagged
from rlsys.engines.train.attention import Packing
from rlsys.engines.train.rows import MicroBatch, RankRows

CPU = torch.device("cpu")
KINDS = ("response", "chosen", "rejected")
Seen = dict[str, list[tuple[tuple[int, ...], int]]]  # by kind: what a target is predicted from, and the target


def prefixes(input_ids: torch.Tensor, packing: Packing | None) -> list[tuple[int, ...]]:
    """Of each input, the tokens that it sees, with itself; that their places count up from 0 is checked."""
    if packing is None:
        return [tuple(row[: end + 1]) for row in input_ids.tolist() for end in range(len(row))]
    ids, places = input_ids[0].split(packing.lengths), packing.position_ids[0].split(packing.lengths)
    result = []
    for own, context in enumerate(packing.contexts or [-1] * len(packing.lengths)):
        before = ids[context].tolist() if context >= 0 else []
        assert places[own].tolist() == list(range(len(before), len(before) + len(ids[own])))
        result += [tuple(before + ids[own][: end + 1].tolist()) for end in range(len(ids[own]))]
    return result


def seen(micros: list[MicroBatch]) -> Seen:
    found: Seen = {kind: [] for kind in (*KINDS, "teacher")}
    for micro in micros:
        before = prefixes(micro.input_ids, micro.packing)
        pairs = [(before[p], t) for p, t in zip(micro.positions.tolist(), micro.targets.tolist(), strict=True)]
        for kind in KINDS:
            found[kind] += pairs[micro.scored[kind].where]
        theirs = prefixes(micro.teacher.input_ids, micro.teacher.packing)
        found["teacher"] += [
            (theirs[p], t)
            for p, t in zip(micro.teacher.positions.tolist(), micro.teacher.targets.tolist(), strict=True)
        ]
    return {kind: sorted(values) for kind, values in found.items()}


def repeated_prompts(batch: DataProto, prompts: int) -> DataProto:
    rows = jagged.to_rows(batch.batch["prompt_ids"])
    chosen = [rows[row % prompts] if len(ids) else ids for row, ids in enumerate(rows)]
    return DataProto.from_dict(tensors=dict(batch.batch.items()) | {"prompt_ids": jagged.from_rows(chosen)})


@given(
    st.integers(0, 10_000), st.integers(3, 12), st.integers(1, 3), st.integers(152, 600), st.booleans(),
    st.integers(1, 5),
)  # fmt: skip
def test_targets_are_predicted_from_their_own_sequence(
    seed: int, rows: int, prompts: int, budget: int, share: bool, more: int
) -> None:
    batch = repeated_prompts(composed_batch(seed, rows), prompts)
    made = [
        RankRows(
            batch, (), max_length=999, token_budget=budget, sequences=KINDS, teacher=True,
            packing=packing, share_prompts=share,
        )
        for packing in (False, True)
    ]  # fmt: skip
    padded, packed = (list(each.cut(len(each.plan) + more, CPU)) for each in made)
    assert seen(padded) == seen(packed)
    assert len(packed) == len(made[1].plan) + more
    for micro in packed:
        assert micro.area - micro.tokens in (0, 1, 2)  # the one input of a pass over nothing
        assert micro.area <= budget + 2
