"""``rollout.engine_args`` reaches vLLM, with checked names, and cannot bend what training relies on."""

from __future__ import annotations

import pytest

from rlsys.config.errors import UserError
from rlsys.engines.rollout.vllm_args import OWNED, check_engine_args

KNOWN = {*OWNED, "max_num_batched_tokens", "block_size", "quantization", "kv_cache_dtype"}


def test_free_arguments_pass() -> None:
    check_engine_args({"max_num_batched_tokens": 64}, KNOWN)
    check_engine_args({"quantization": "fp8_per_tensor", "kv_cache_dtype": "fp8"}, KNOWN)


def test_weights_that_are_not_made_of_the_trainers_are_refused() -> None:
    with pytest.raises(UserError) as caught:
        check_engine_args({"quantization": "awq"}, KNOWN)
    assert caught.value.where == "rollout.engine_args.quantization"


def test_a_misspelt_name_names_the_nearest() -> None:
    with pytest.raises(UserError) as caught:
        check_engine_args({"max_num_batch_tokens": 64}, KNOWN)
    assert caught.value.where == "rollout.engine_args.max_num_batch_tokens"
    assert "max_num_batched_tokens" in caught.value.fix


@pytest.mark.parametrize("name", sorted(OWNED))
def test_what_rlsys_decides_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(UserError) as caught:
        check_engine_args({name: "anything"}, KNOWN)
    assert caught.value.where == f"rollout.engine_args.{name}"
    assert caught.value.fix == OWNED[name]
