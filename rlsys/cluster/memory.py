"""What each phase of a step needs on one device, from the configuration and the model's sizes, and whether there is so
much: asked before anything is loaded. It is the least: what kernels take for themselves is not known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rlsys.algorithms.requirements import needs_critic, needs_reference_worker, needs_teacher
from rlsys.cluster.placement import Plan
from rlsys.config.errors import UserError
from rlsys.config.sampler import sampler_ranks
from rlsys.config.schema import RunConfig, VllmRollout
from rlsys.engines.footprint import gib

_BYTES = {"float32": 4, "bfloat16": 2}
Parts = Mapping[str, int]
"""Bytes by what they are for."""
INPUTS = "layers' inputs until the backward pass"


@dataclass(frozen=True)
class Sizes:
    """Of a model. parameters: elements of its weights; cached: elements that a token has in the KV cache; hidden: of
    all layers' inputs together, elements a token."""

    parameters: int
    cached: int
    hidden: int

    @classmethod
    def of(cls, folder: Path, parameters: int) -> Sizes:
        """From the folder's ``config.json``; what it does not say counts as nothing."""
        said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        layers, hidden = int(said.get("num_hidden_layers") or 0), int(said.get("hidden_size") or 0)
        heads = int(said.get("num_attention_heads") or 1)
        width = int(said.get("head_dim") or hidden // heads)
        return cls(parameters, 2 * layers * width * int(said.get("num_key_value_heads") or heads), layers * hidden)


@dataclass(frozen=True)
class Device:
    """A GPU, or a host without one. free, total: bytes."""

    free: int
    total: int


@dataclass(frozen=True)
class Beyond:
    """What comes on top of the least, where somebody has estimated it (``planner``): bytes while the trainer trains,
    while the sampler is loaded, and in every phase."""

    trainer: Parts = field(default_factory=dict)
    sampler: Parts = field(default_factory=dict)
    always: Parts = field(default_factory=dict)


def phases(
    config: RunConfig, sizes: Sizes, layout: Plan, device: Device, beyond: Beyond | None = None
) -> dict[str, dict[str, int]]:
    """By phase, what lies on the fullest GPU, or, without GPUs, on the host that all actors are on.

    Args:
        beyond: what is needed on top; None: the answer is the least.
    """
    gpus, beyond = bool(layout.bundles), beyond or Beyond()
    trainer = _trainer(config, sizes, len(layout.of("trainer")), gpus=gpus) | dict(beyond.trainer)
    sampler = _sampler(config, sizes, len(layout.of("rollout")), device if gpus else None) | dict(beyond.sampler)
    staying = dict(beyond.always)
    if needs_reference_worker(config):
        staying["the reference's weights"] = sizes.parameters * _BYTES[config.model.dtype]
    everything = sampler | trainer | staying
    if not gpus:  # the trainer's main memory is the device
        if config.cluster.placement != "colocated":
            return {"every phase": everything}
        return {"training": trainer | staying, "sampling": sampler | _kept(trainer) | staying}
    if config.cluster.placement == "disaggregated" or sampler_ranks(config.rollout) > 1:
        return {"training": trainer | staying, "sampling": sampler | dict(beyond.always)}
    if config.cluster.placement == "shared":
        return {"every phase": everything}
    weights = {"the sampler's weights": sampler["the sampler's weights"]}
    loaded = {name: size for name, size in trainer.items() if name.endswith("weights")}
    return {
        "training": trainer | staying,
        "sync": loaded | weights | staying,
        "sampling": sampler | staying,
        "checkpoint": _kept(trainer) | weights | staying,
    }


def check_phases(
    found: Mapping[str, Parts], device: Device, *, gpus: bool, placement: str, unified: bool = False
) -> None:
    """Refuses a run of which a phase does not fit.

    Args:
        unified: CPU and GPU have one memory: nothing is gained by turns or by offloading.

    Raises:
        UserError: which one, what it is made of, and how much is missing.
    """
    phase, parts = max(found.items(), key=lambda item: sum(item[1].values()))
    needed = sum(parts.values())
    if needed <= device.free:
        return
    made = ", ".join(f"{name} {gib(size)}" for name, size in sorted(parts.items(), key=lambda part: -part[1]))
    whose = "a GPU" if gpus else "this machine"
    turns = "cluster.placement=colocated, " if placement == "shared" and not unified else ""
    more = "an adapter (model.lora)" if unified else "more trainer ranks with trainer.offload"
    raise UserError(
        f"{phase} needs at least {gib(needed)} GiB on {whose} ({made}), and {gib(device.free)} GiB are free: "
        f"{gib(needed - device.free)} GiB are missing",
        where="cluster.placement",
        fix=f"{turns}a smaller model, cache (rollout.kv_cache_gib, rollout.gpu_memory_fraction) or "
        f"trainer.micro_batch_tokens, or {more}",
    )


def _trainer(config: RunConfig, sizes: Sizes, ranks: int, *, gpus: bool) -> dict[str, int]:
    """Of one rank on a GPU, or of all on a host; the critic's with it."""
    trainer, lora = config.trainer, config.model.lora
    copies = 1 if gpus else ranks
    here = sizes.parameters * copies // min(trainer.shard_ranks or ranks, ranks)
    offload = trainer.offload if gpus else "none"
    held = _BYTES[config.model.dtype] if lora is not None else 4
    if lora is not None and lora.quantize is not None:
        held = 1
    parts = {"weights": 0 if offload == "all" else here * held}
    if lora is None:
        parts["gradient"] = 0 if offload == "all" else 4 * here
        parts["moments"] = 0 if offload != "none" else 8 * here
    models = {"the trainer's": parts}
    if needs_critic(config):
        models["the critic's"] = parts
    result = {f"{whose} {name}": size for whose, each in models.items() for name, size in each.items() if size}
    second = needs_teacher(config) and config.algorithm.distillation.teacher != "self" and lora is None
    if second and offload != "all":
        result["the teacher's weights"] = here * (_BYTES[config.model.dtype] if trainer.backend == "zero3" else 4)
    if trainer.activations != "offload" or not gpus:
        data = config.data
        rows = data.prompts_per_step * config.rollout.samples_per_prompt / ranks / trainer.updates_per_step
        longest = int(rows * (data.max_prompt_tokens + data.max_response_tokens))
        tokens = min(trainer.micro_batch_tokens, longest)
        result[INPUTS] = tokens * sizes.hidden * _BYTES[config.model.dtype] * copies
    return result


def _sampler(config: RunConfig, sizes: Sizes, workers: int, gpu: Device | None) -> dict[str, int]:
    """Of one sampler's rank on a GPU, or of all samplers on a host."""
    rollout, data = config.rollout, config.data
    each, element = sampler_ranks(rollout), _BYTES[rollout.dtype]
    weights = sizes.parameters * element // each
    sequence = sizes.cached * element * (data.max_prompt_tokens + data.max_response_tokens) // each
    if not isinstance(rollout, VllmRollout):
        cache = sequence  # it grows with what is sampled; at least one sequence must fit
    elif gpu is not None:
        cache = max(int(gpu.total * rollout.gpu_memory_fraction) - weights, sequence)
    else:
        cache = int(rollout.kv_cache_gib * 2**30)
    copies = 1 if gpu is not None else workers * each
    return {"the sampler's weights": weights * copies, "the sampler's cache": cache * copies}


def _kept(trainer: Parts) -> dict[str, int]:
    """Of a trainer that is not training."""
    return {name: size for name, size in trainer.items() if name.endswith(("weights", "moments"))}
