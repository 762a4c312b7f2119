"""What must hold between a sampler's settings and the rest of a run, before anything is started."""

from __future__ import annotations

from typing import Any

from rlsys.config.errors import UserError
from rlsys.config.schema import LoraConfig, RolloutConfig, RunConfig, VllmRollout

MOST_CONCURRENT = (256, 1024)
"""Sequences that vLLM decodes at once at most, on a CPU and on a GPU: more make a step longer and tokens no faster."""

# Engine arguments of vLLM that make the sampler compute with rounded weights or a rounded cache, and the values that do
# not.
_ROUNDING: dict[str, tuple[Any, ...]] = {
    "quantization": (None,),
    "kv_cache_dtype": ("auto", "bfloat16", "float16"),
    "calculate_kv_scales": (False,),
}


def sampler_ranks(config: RolloutConfig) -> int:
    """Processes, each with a device of its own, that one sampler is spread over."""
    return config.tensor_parallel * config.pipeline_parallel if isinstance(config, VllmRollout) else 1


def rounding(config: RolloutConfig) -> list[str]:
    """Engine arguments that make the sampler's log-probs differ from the trainer's by more than the order of sums."""
    given = config.engine_args if isinstance(config, VllmRollout) else {}
    return [name for name, exact in _ROUNDING.items() if given.get(name, exact[0]) not in exact]


def check_sampler(config: RunConfig) -> None:
    """Refuses a transport that the engine lacks, and a rounding sampler whose samples nothing corrects.

    Raises:
        UserError: naming the key.
    """
    if config.rollout.sync == "nccl" and not isinstance(config.rollout, VllmRollout):
        raise UserError(
            "broadcasts between GPUs are received by vLLM, and the sampler is not vLLM's",
            where="rollout.sync",
            fix="set rollout=vllm, or rollout.sync=auto, shared_memory, object_store or delta",
        )
    if (adapter := sampled_adapter(config)) is not None:
        _check_adapter(config, adapter)
    names = rounding(config.rollout)
    algorithm = config.algorithm
    corrected = algorithm.correction or algorithm.old_logprobs == "sampler"  # then the loss's own ratio is π/μ
    if names and algorithm.weight > 0 and not corrected:
        raise UserError(
            f"with {names[0]} the sampler draws from another distribution than the trainer's, and nothing corrects it",
            where=f"rollout.engine_args.{names[0]}",
            fix="choose a correction of π_old/μ, such as '+algorithm.correction.tis_token={}', or leave it out",
        )


def sampled_adapter(config: RunConfig) -> LoraConfig | None:
    """The adapter that the sampler applies itself; None: there is none, or it is sent merged weights."""
    adapter = config.model.lora
    return adapter if adapter is not None and adapter.sync == "adapter" else None


def _check_adapter(config: RunConfig, adapter: LoraConfig) -> None:
    """An adapter that the sampler applies itself, to weights that it has read itself."""
    fix = "set model.lora.sync=merged"
    if not isinstance(config.rollout, VllmRollout):
        raise UserError("the torch sampler takes whole weights", where="model.lora.sync", fix=f"{fix}, or rollout=vllm")
    if adapter.quantize is not None:
        raise UserError(
            f"the adapter is trained on weights rounded to {adapter.quantize}, and the sampler would add it "
            "to those that were not",
            where="model.lora.sync",
            fix=fix,
        )
    if config.rollout.sync in ("nccl", "cuda_ipc"):
        raise UserError(
            "from GPU to GPU whole weights are sent",
            where="rollout.sync",
            fix=f"{fix}, or rollout.sync=auto, shared_memory, object_store or delta",
        )
