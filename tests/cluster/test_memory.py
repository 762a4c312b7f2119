"""What a phase needs, and who is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from composing import run_config
from model_folders import make_model_folder

from rlsys.cluster.memory import Device, Sizes, check_phases, phases
from rlsys.cluster.placement import plan
from rlsys.config.errors import UserError

GIB = 2**30
SIZES = Sizes(parameters=GIB, cached=2**16, hidden=0)  # of 1.07 billion weights
GPU = Device(free=20 * GIB, total=24 * GIB)


def needed(*overrides: str, gpus: int, device: Device = GPU) -> dict[str, int]:
    """Whole GiB by phase."""
    config = run_config("rollout.dtype=bfloat16", *overrides)
    found = phases(config, SIZES, plan(config, gpus=gpus, cores=8), device)
    return {phase: sum(parts.values()) // GIB for phase, parts in found.items()}


def test_turns_need_the_most_of_their_phases_and_not_the_sum() -> None:
    shared = needed("cluster.placement=shared", gpus=1)
    turns = needed("cluster.placement=colocated", gpus=1)
    # 16 bytes a weight of the trainer, 2 of the sampler's, half of the GPU for weights and cache of vLLM.
    assert shared == {"every phase": 28}
    assert turns == {"training": 16, "sync": 6, "sampling": 12, "checkpoint": 14}


def test_ranks_and_offload_take_from_a_gpu() -> None:
    assert needed("cluster.placement=colocated", gpus=4)["training"] == 4
    assert needed("cluster.placement=colocated", "trainer.shard_ranks=2", gpus=4)["training"] == 8
    assert needed("cluster.placement=colocated", "trainer.offload=all", gpus=1)["training"] == 0
    assert needed("cluster.placement=disaggregated", gpus=2) == {"training": 16, "sampling": 12}
    assert needed("algorithm.kl.coef=0.1", gpus=1, device=GPU)["every phase"] == 28 + 4


def test_a_full_micro_batch_counts_as_what_its_layers_read() -> None:
    config = run_config("trainer.micro_batch_tokens=1000", "data.prompts_per_step=512", "cluster.placement=colocated")
    found = phases(config, replace(SIZES, hidden=100), plan(config, gpus=1, cores=8), GPU)
    assert found["training"]["layers' inputs until the backward pass"] == 1000 * 100 * 4
    assert not any("backward" in name for phase in ("sync", "sampling", "checkpoint") for name in found[phase])


def test_on_a_cpu_the_trainer_stays() -> None:
    kept = {"training": 16, "sampling": 4 + 8 + 2 + 1}  # without a gradient
    assert needed("cluster.placement=colocated", "rollout.kv_cache_gib=1", gpus=0) == kept
    assert needed("cluster.placement=shared", "rollout.kv_cache_gib=1", gpus=0) == {"every phase": 16 + 2 + 1}
    assert needed("cluster.placement=shared", "trainer.ranks=2", gpus=0)["every phase"] == 16 + 2 + 1


@pytest.mark.parametrize(("placement", "missing"), [("shared", "8.0"), ("colocated", None)])
def test_what_does_not_fit_is_refused_with_what_is_missing(placement: str, missing: str | None) -> None:
    config = run_config("rollout.dtype=bfloat16", f"cluster.placement={placement}")
    found = phases(config, SIZES, plan(config, gpus=1, cores=8), GPU)
    if missing is None:
        check_phases(found, GPU, gpus=True, placement=placement)
        return
    with pytest.raises(UserError, match=rf"{missing} GiB are missing") as error:
        check_phases(found, GPU, gpus=True, placement=placement)
    assert "colocated" in str(error.value)
    assert "the trainer's moments 8.0" in str(error.value)
    with pytest.raises(UserError) as error:
        check_phases(found, GPU, gpus=True, placement=placement, unified=True)
    assert not {"colocated", "trainer.offload"} & set(re.split(r"[=, ]+", str(error.value.fix)))
    check_phases(found, replace(GPU, free=29 * GIB), gpus=True, placement=placement)


def test_sizes_are_read_from_the_folder(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path)
    sizes = Sizes.of(folder, 123)
    assert sizes.parameters == 123
    assert sizes.hidden == 2 * 64
    assert sizes.cached > 0
