"""The pass-through ``rollout.engine_args``: names that vLLM has, none that rlsys decides itself. Imports no vLLM."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from rlsys.config.errors import UserError

_ELSEWHERE = {
    "model": "set model.path",
    "tokenizer": "the tokenizer is the one in model.path",
    "dtype": "set rollout.dtype",
    "seed": "set seed",
    "max_model_len": "set data.max_prompt_tokens and data.max_response_tokens, which it is the sum of",
    "max_num_seqs": "set rollout.max_concurrent",
    "gpu_memory_utilization": "set rollout.gpu_memory_fraction",
    "kv_cache_memory_bytes": "set rollout.kv_cache_gib (CPU) or rollout.gpu_memory_fraction",
}
_CONTRACT = dict.fromkeys(
    ("logprobs_mode", "generation_config", "override_generation_config", "logits_processors", "max_logprobs"),
    "training needs the log-probs of the untruncated, tempered distribution that tokens were sampled from",
)
_SPECULATION = dict.fromkeys(
    ("speculative_config", "spec_method", "spec_model", "spec_tokens"),
    "with drafts, vLLM 0.32 gives some tokens a log-prob that is not theirs, and training needs the right one",
)
_WEIGHTS = dict.fromkeys(
    ("quantization_config", "load_format", "hf_overrides", "model_weights", "model_impl",
     "skip_tokenizer_init", "runner", "convert", "tokens_only"),
    "the sampler must hold the trainer's weights as they are",
)  # fmt: skip
_ADAPTER = dict.fromkeys(
    ("enable_lora", "max_loras", "max_lora_rank", "max_cpu_loras", "lora_dtype", "lora_target_modules",
     "fully_sharded_loras", "default_mm_loras"),
    "set model.lora.rank, and model.lora.sync=adapter",
)  # fmt: skip
_PARALLEL = {
    "tensor_parallel_size": "set rollout.tensor_parallel",
    "pipeline_parallel_size": "set rollout.pipeline_parallel",
    "weight_transfer_config": "set rollout.sync",
    **dict.fromkeys(
        ("data_parallel_size", "prefill_context_parallel_size", "decode_context_parallel_size",
         "nnodes", "distributed_executor_backend", "worker_cls", "worker_extension_cls"),
        "one RolloutWorker is one vLLM engine on one node: set rollout.workers for more of them",
    ),
}  # fmt: skip
_SAFETY = {
    "trust_remote_code": "code from a model folder is never run",
    "enable_log_requests": "rollouts are written to the run folder",
    "enable_sleep_mode": "set cluster.placement=colocated",
    "watermark": "a watermark changes the distribution that is sampled from",
    "watermark_config": "a watermark changes the distribution that is sampled from",
}
# Weights that vLLM rounds itself while it loads, from the trainer's own: what arrives can be checked before it is
# rounded.
ONLINE_QUANTIZATION = ("fp8_per_tensor", "fp8_per_block", "fp8_per_channel")
OWNED: dict[str, str] = _ELSEWHERE | _CONTRACT | _SPECULATION | _WEIGHTS | _ADAPTER | _PARALLEL | _SAFETY


def check_engine_args(engine_args: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuses names that vLLM does not have and names that rlsys owns.

    Args:
        engine_args: the config's ``rollout.engine_args``.
        known: field names of vLLM's engine arguments.

    Raises:
        UserError: at ``rollout.engine_args.NAME``, with the nearest name or the key to set instead.
    """
    for name in engine_args:
        where = f"rollout.engine_args.{name}"
        if name in OWNED:
            raise UserError(f"'{name}' is not free to choose for a training sampler", where=where, fix=OWNED[name])
        if name not in known:
            near = difflib.get_close_matches(name, [k for k in known if k not in OWNED], n=1)
            raise UserError(
                f"vLLM has no engine argument '{name}'",
                where=where,
                fix=f"did you mean '{near[0]}'?" if near else "see the fields of vllm.AsyncEngineArgs",
            )
    quantization = engine_args.get("quantization")
    if quantization is not None and quantization not in ONLINE_QUANTIZATION:
        raise UserError(
            f"weights of quantization={quantization} are not made of the trainer's while they are loaded",
            where="rollout.engine_args.quantization",
            fix=f"one of: {', '.join(ONLINE_QUANTIZATION)}",
        )
