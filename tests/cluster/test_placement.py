"""Who runs where, as a pure function."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from composing import run_config
from hypothesis import given
from hypothesis import strategies as st

from rlsys.cluster.placement import plan
from rlsys.config.errors import UserError
from rlsys.config.schema import KLConfig, RunConfig

composed = cache(run_config)


def config(
    ranks: int | None = None, samplers: int = 1, kl: float = 0.0, tensor_parallel: int = 1, placement: str = "shared"
) -> RunConfig:
    base = composed(f"rollout.tensor_parallel={tensor_parallel}", f"cluster.placement={placement}")
    return replace(
        base,
        trainer=replace(base.trainer, ranks=ranks),
        rollout=replace(base.rollout, workers=samplers),
        algorithm=replace(base.algorithm, kl=KLConfig(coef=kl)),
    )


def test_a_laptop_gets_one_of_each_and_no_reference_that_nobody_reads() -> None:
    roles = [actor.role for actor in plan(config(), gpus=0, cores=2).actors]
    assert sorted(roles) == ["reward", "rollout", "trainer"]
    assert "reference" in [a.role for a in plan(config(kl=0.1), gpus=0, cores=2).actors]


def test_cores_are_divided_over_the_trainer_ranks() -> None:
    layout = plan(config(ranks=4), gpus=0, cores=8)
    assert [a.threads for a in layout.of("trainer")] == [2, 2, 2, 2]
    assert layout.of("rollout")[0].threads == 8, "trainer and sampler take turns"


@given(gpus=st.integers(1, 16), samplers=st.integers(1, 16))
def test_no_gpu_is_booked_twice_over(gpus: int, samplers: int) -> None:
    if samplers > gpus:
        with pytest.raises(UserError, match=r"rollout\.workers"):
            plan(config(samplers=samplers), gpus=gpus, cores=32)
        return
    layout = plan(config(samplers=samplers, kl=0.1), gpus=gpus, cores=32)
    assert len(layout.bundles) == gpus
    for bundle in range(gpus):
        assert sum(a.gpus for a in layout.actors if a.bundle == bundle) <= 1.0
    assert len({a.bundle for a in layout.of("trainer")}) == gpus, "NCCL wants each rank on a GPU of its own"


@given(gpus=st.integers(1, 16), samplers=st.integers(1, 4), each=st.integers(2, 4))
def test_a_sampler_of_several_gpus_has_them_to_itself(gpus: int, samplers: int, each: int) -> None:
    settings = config(samplers=samplers, tensor_parallel=each)
    if samplers * each >= gpus:
        with pytest.raises(UserError, match="samplers of"):
            plan(settings, gpus=gpus, cores=32)
        return
    layout = plan(settings, gpus=gpus, cores=32)
    assert len(layout.of("trainer")) == gpus - samplers * each, "the trainer has the others"
    assert sum(bundle["GPU"] for bundle in layout.bundles) == gpus
    assert all(a.gpus == each == layout.bundles[a.bundle]["GPU"] for a in layout.of("rollout"))
    assert not {a.bundle for a in layout.of("trainer")} & {a.bundle for a in layout.of("rollout")}


@given(ranks=st.integers(1, 6), samplers=st.integers(1, 6), gpus=st.integers(1, 12))
def test_taking_turns_needs_as_many_gpus_as_the_larger_group_and_apart_both(
    ranks: int, samplers: int, gpus: int
) -> None:
    for placement, needed in (("colocated", max(ranks, samplers)), ("disaggregated", ranks + samplers)):
        settings = config(ranks, samplers, placement=placement)
        if needed > gpus:
            with pytest.raises(UserError):
                plan(settings, gpus=gpus, cores=8)
            continue
        layout = plan(settings, gpus=gpus, cores=8)
        assert sum(bundle["GPU"] for bundle in layout.bundles) == needed
        shared = {a.bundle for a in layout.of("trainer")} & {a.bundle for a in layout.of("rollout")}
        assert len(shared) == (min(ranks, samplers) if placement == "colocated" else 0)


def test_without_gpus_cores_are_shared_or_divided() -> None:
    together = plan(config(placement="colocated"), gpus=0, cores=8)
    assert {a.threads for role in ("trainer", "rollout") for a in together.of(role)} == {8}
    apart = plan(config(samplers=3, placement="disaggregated"), gpus=0, cores=8)
    assert {a.threads for role in ("trainer", "rollout") for a in apart.of(role)} == {2}


def test_a_sampler_of_several_gpus_takes_no_turns() -> None:
    with pytest.raises(UserError, match="takes no turns") as error:
        plan(config(tensor_parallel=2, placement="colocated"), gpus=4, cores=8)
    assert error.value.where == "cluster.placement"


def test_without_gpus_a_sampler_of_several_processes_is_one_actor() -> None:
    (sampler,) = plan(config(tensor_parallel=2), gpus=0, cores=8).of("rollout")
    assert (sampler.gpus, sampler.threads) == (0, 8)
