"""Samplers that another setting rules out are refused before anything starts."""

from __future__ import annotations

import pytest
from composing import run_config

from rlsys.config.errors import UserError

ROUNDING = ["+rollout.engine_args.kv_cache_dtype=fp8", "+rollout.engine_args.quantization=fp8_per_tensor"]


@pytest.mark.parametrize("rounding", ROUNDING)
def test_a_rounding_sampler_needs_a_correction(rounding: str) -> None:
    with pytest.raises(UserError, match="nothing corrects it") as error:
        run_config(rounding)
    assert error.value.where == rounding[1:].partition("=")[0]
    run_config(rounding, "+algorithm.correction.tis_token={}")
    run_config(rounding, "algorithm.old_logprobs=sampler")


def test_a_cache_in_the_samplers_own_dtype_rounds_nothing() -> None:
    run_config("+rollout.engine_args.kv_cache_dtype=auto")


def test_only_vllm_receives_broadcasts() -> None:
    run_config("rollout.sync=nccl")
    with pytest.raises(UserError) as error:
        run_config("rollout=torch", "rollout.sync=nccl")
    assert error.value.where == "rollout.sync"
