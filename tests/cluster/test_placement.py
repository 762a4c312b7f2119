"""Who runs where, as a pure function."""

from __future__ import annotations

from dataclasses import replace

import pytest
from composing import run_config
from hypothesis import given
from hypothesis import strategies as st

from rlsys.cluster.placement import plan
from rlsys.config.errors import UserError
from rlsys.config.schema import KLConfig, RunConfig


def config(ranks: int | None = None, samplers: int = 1, kl: float = 0.0, tensor_parallel: int = 1) -> RunConfig:
    base = run_config(f"rollout.tensor_parallel={tensor_parallel}")
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


def test_without_gpus_a_sampler_of_several_processes_is_one_actor() -> None:
    (sampler,) = plan(config(tensor_parallel=2), gpus=0, cores=8).of("rollout")
    assert (sampler.gpus, sampler.threads) == (0, 8)
