"""Trainer ranks as Ray actors: the same verbs, the same numbers, however many there are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from model_folders import make_model_folder

from rlsys.algorithms.channels import PolicyGradient
from rlsys.algorithms.objective import Objective
from rlsys.batch import DataProto, jagged
from rlsys.cluster.placement import ActorSpec, Plan
from rlsys.cluster.session import Placement
from rlsys.config.schema import DeadlineConfig, ModelConfig, TrainerConfig
from rlsys.workers.groups import TrainerGroup
from rlsys.workers.trainer import Slice
from rlsys.workers.waits import StopFlag, gather

pytestmark = pytest.mark.ray


@contextmanager
def trainers(folder: Path, ranks: int, **trainer: object) -> Iterator[TrainerGroup]:
    plan = Plan(tuple(ActorSpec("trainer", i, env={"OMP_NUM_THREADS": "1"}) for i in range(ranks)), ())
    group = TrainerGroup(Placement(plan, seconds=60), DeadlineConfig(), StopFlag())
    try:
        config = TrainerConfig(lr=1e-2, **trainer)  # type: ignore[arg-type]
        calls = group.starting(ModelConfig(path=str(folder)), config, temperature=0.7, total_steps=4, seed=0)
        gather(calls, phase="start", seconds=300)
        group.set_objective(Objective({"policy": (PolicyGradient(old_logprobs="self", mismatch=True), 1.0)}))
        yield group
    finally:
        group.close()


def rollouts(rows: int = 6) -> DataProto:
    generator = torch.Generator().manual_seed(1)
    lengths = [3 + 2 * (i % 3) for i in range(rows)]
    responses = [torch.randint(3, 40, (n,), generator=generator) for n in lengths]
    return DataProto.from_dict(
        tensors={
            "prompt_ids": jagged.from_rows(
                [torch.randint(3, 40, (4 + i % 2,), generator=generator) for i in range(rows)]
            ),
            "response_ids": jagged.from_rows(responses),
            "response_mask": jagged.from_rows([torch.ones(n, dtype=torch.bool) for n in lengths]),
            "rollout_logprobs": jagged.from_rows([-torch.rand(n, generator=generator) for n in lengths]),
        },
        non_tensors={"uid": np.array([f"{i // 2}@0" for i in range(rows)], dtype=object)},
    )


def one_step(group: TrainerGroup, assignment: list[list[int]]) -> tuple[dict[str, float], str]:
    """One optimiser step on the same rows, dealt out as given; metrics and the checksum of the weights after it."""
    ref = ray.put(rollouts())
    group.load_batch([[[Slice((ref,), np.array(rows))] if rows else []] for rows in assignment])
    advantages = np.array([1.0, -1.0, 0.5, -0.5, 2.0, -2.0])
    metrics = group.forward_backward(0, [{"advantages": advantages[rows]} for rows in assignment])
    metrics |= group.optim_step()
    return metrics, group.export_weights("float32").checksum


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_two_ranks_do_what_one_does_and_read_what_it_wrote(ray_cluster: None, tmp_path: Path) -> None:
    """Also when one of them has no rows."""
    folder = make_model_folder(tmp_path / "model")
    before, after = _made(tmp_path / "before"), _made(tmp_path / "after")
    with trainers(folder, 1) as group:
        group.save_state(str(before))
        alone, checksum = one_step(group, [[0, 1, 2, 3, 4, 5]])
        group.save_state(str(after))
    with trainers(folder, 2, micro_batch_tokens=24) as group:
        shared, _ = one_step(group, [[0, 1, 4, 5], [2, 3]])
        group.load_state(str(before))
        fresh = group.export_weights("float32").checksum
        idle, _ = one_step(group, [[0, 1, 2, 3, 4, 5], []])
        nothing, _ = one_step(group, [[], []])
        group.load_state(str(after))
        assert group.export_weights("float32").checksum == checksum != fresh
    assert nothing.keys() == idle.keys()
    assert (nothing["policy/loss"], nothing["train/grad_norm"], nothing["train/tokens"]) == (0, 0, 0)
    for other in (shared, idle):
        assert other["policy/loss"] == pytest.approx(alone["policy/loss"], abs=1e-5)
        assert other["train/grad_norm"] == pytest.approx(alone["train/grad_norm"], rel=1e-5)
        assert other["policy/mismatch_abs_mean"] == pytest.approx(alone["policy/mismatch_abs_mean"], rel=1e-5)
        assert other["train/tokens"] == alone["train/tokens"]
