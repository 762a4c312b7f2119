"""Seconds of each phase of a step, each with what bounds it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlsys.algorithms.requirements import (
    adapts,
    needs_critic,
    needs_old_logprobs,
    needs_reference,
    needs_reference_worker,
    needs_teacher,
)
from rlsys.cluster.planner.lengths import Stretch, decoding
from rlsys.cluster.planner.workload import BYTES, Work
from rlsys.config.sampler import MOST_CONCURRENT, sampler_ranks
from rlsys.config.schema import VllmRollout

_GIB = 2**30
# Bytes of a weight that AdamW reads and writes: weight, gradient, two moments; weight and moments.
_ADAMW = 28


@dataclass(frozen=True)
class Phase:
    """seconds: of the step. parts: seconds by what they are spent on; they add up."""

    parts: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def bound(self) -> str:
        """What most of it is spent on."""
        return max(self.parts, key=lambda part: self.parts[part]) if self.seconds else "nothing"


def phases(work: Work) -> dict[str, Phase]:
    """In the order of a step; those that a run does not have are left out."""
    found = {
        "rollout": rollout(work),
        "reference": reference(work),
        "old_logprobs": old_logprobs(work),
        "update": update(work),
        "sync": sync(work),
        "turns": turns(work),
        "driver": Phase({"driver": work.coefficients.driver_s + work.coefficients.driver_sample_s * work.samples}),
    }
    return {name: phase for name, phase in found.items() if phase.parts}


# --- training


@dataclass(frozen=True)
class Batch:
    """What a step trains on, all ranks together. tokens: through the layers; flops: model FLOPs of forward and
    backward; places: tokens with padding."""

    tokens: float
    flops: float
    places: float


def batch(work: Work) -> Batch:
    """The samples, and what further channels add to them."""
    config, prompt = work.config, work.tokens.prompt
    responses = torch.tensor(work.lengths, dtype=torch.float64)
    lengths = responses + prompt
    scored = int(responses.sum())
    flops = work.shape.flops.training(lengths, scored)
    tokens = float(lengths.sum())
    if config.trainer.rows == "shared":  # a prompt once for its group
        spared = prompt * (config.rollout.samples_per_prompt - 1) * config.data.prompts_per_step
        flops -= 6.0 * work.shape.flops.weights * spared
        tokens -= spared
    if config.algorithm.preference.weight > 0:  # two more sequences a group, or the file's
        pairs = config.data.prompts_per_step if config.replay.source == "groups" else config.replay.pairs_per_step
        more = 2 * pairs * float(lengths.mean())
        flops, tokens = flops * (1 + more / tokens), tokens + more
    if config.model.lora is not None:  # of frozen weights there is no gradient
        flops *= 2 / 3
    padded = float(lengths.max()) * len(lengths) if config.trainer.rows == "padded" else tokens
    return Batch(tokens, flops, max(padded, tokens))


def update(work: Work) -> Phase:
    """Forward and backward pass over all micro-batches, communication that they do not hide, AdamW."""
    config, known, machine = work.config, work.coefficients, work.machine
    load = batch(work)
    again = 1 / 3 if config.trainer.activations == "recompute" else 0.0
    parts = _passes(work, load, 1.0 + again)
    if config.trainer.activations == "offload":
        element = BYTES[config.model.dtype]
        moved = 2 * work.shape.saved_bytes(element, gpu=True) * work.shape.layers * load.places / work.ranks
        hidden = sum(parts.values())
        parts["activations to main memory"] = max(moved / (known.host_link_gbs * 1e9) - hidden, 0.0)
    parts["communication"] = max(_communication(work, load) - sum(parts.values()), 0.0)
    trained = work.shape.parameters
    if config.model.lora is not None:
        trained = work.shape.adapter(config.model.lora.rank)
    rate = known.host_link_gbs * 1e9 if config.trainer.offload != "none" else machine.bandwidth
    parts["optimiser"] = _ADAMW * trained / work.shard / rate * config.trainer.updates_per_step
    if needs_teacher(config):
        context = config.hints.max_tokens + work.tokens.response
        seen = Batch(context * work.samples, load.flops * context * work.samples / load.tokens, context * work.samples)
        parts["the teacher's pass"] = sum(_passes(work, seen, 1 / 3).values())
    if needs_critic(config):
        parts = {name: 2 * seconds for name, seconds in parts.items()}
    return Phase(parts)


def old_logprobs(work: Work) -> Phase:
    """A forward pass, where the update cannot compute them on the way."""
    if not needs_old_logprobs(work.config):
        return Phase({})
    return Phase(_passes(work, batch(work), 1 / 3))


def reference(work: Work) -> Phase:
    """A forward pass of one worker over all samples, or, with an adapter, of the trainer's ranks."""
    if not needs_reference(work.config):
        return Phase({})
    parts = _passes(work, batch(work), 1 / 3)
    alone = work.ranks if needs_reference_worker(work.config) else 1
    return Phase({name: seconds * alone for name, seconds in parts.items()})


def _passes(work: Work, load: Batch, share: float) -> dict[str, float]:
    """Seconds of a rank. share: of forward and backward pass; a forward pass is a third."""
    known, machine, config = work.coefficients, work.machine, work.config
    padding = load.places / load.tokens
    element = BYTES[config.model.dtype]
    saved = work.shape.saved_bytes(element, gpu=work.gpus) * work.shape.layers * load.places / work.ranks
    return {
        "matrix products": share * load.flops * padding / work.ranks / (machine.flops * known.matmul_fraction),
        "memory": share * known.activation_passes * saved / machine.bandwidth,
        "starting layers": share * known.layer_s * work.shape.layers * _micro_batches(work, load),
    }


def _micro_batches(work: Work, load: Batch) -> float:
    """Of a rank in a step."""
    updates = work.config.trainer.updates_per_step
    each = load.places / work.ranks / updates / work.config.trainer.micro_batch_tokens
    return updates * max(1, -int(-each // 1))


def _communication(work: Work, load: Batch) -> float:
    """Seconds to gather weights twice and to add up gradients, for each micro-batch."""
    config, machine, known = work.config, work.machine, work.coefficients
    if work.ranks == 1:
        return 0.0
    element, weights = BYTES[config.model.dtype], work.shape.parameters
    gradient = 4 * weights if config.model.lora is None else 0
    domain = max(sum(n.gpus for n in nodes) for nodes in work.topology.domains().values()) if work.gpus else work.ranks
    inside = machine.link if work.shard <= max(domain, 1) else machine.network
    moved = (2 * element * weights + gradient) * (work.shard - 1) / work.shard
    seconds = moved / (inside * known.network_fraction)
    if work.shard < work.ranks:
        seconds += 2 * gradient / work.shard / (machine.network * known.network_fraction)
    return seconds * _micro_batches(work, load)


# --- sampling


def rollout(work: Work) -> Phase:
    """Prompts once a group, then steps of one token for every row that is under way. The sampler that is given most
    decides."""
    config, shape, known, machine = work.config, work.shape, work.coefficients, work.machine
    ranks, workers = sampler_ranks(config.rollout), config.rollout.workers
    element = BYTES[config.rollout.dtype]
    rate = machine.bandwidth * known.decode_bandwidth_fraction
    flops = machine.sampling_flops * known.decode_matmul_fraction
    parts = dict.fromkeys(("matrix products", "weights from memory", "cache from memory", "starting layers"), 0.0)
    for stretch in stretches(work):
        read = min(shape.active * stretch.rows, shape.parameters) if shape.experts else shape.parameters
        parts["matrix products"] += stretch.steps * 2 * shape.active * stretch.rows / ranks / flops
        parts["weights from memory"] += stretch.steps * read * element / ranks / rate
        parts["cache from memory"] += stretch.steps * stretch.context * shape.sizes.cached * element / ranks / rate
        parts["starting layers"] += stretch.steps * shape.layers * known.decode_layer_s
    if ranks > 1:  # two sums over the ranks a layer, of a row each
        steps = sum(stretch.steps for stretch in stretches(work))
        parts["communication"] = 2 * steps * shape.layers * 2e-5
    prompts = config.data.prompts_per_step / workers
    prefill = 2 * shape.flops.weights * prompts * work.tokens.prompt / ranks
    parts["prompts"] = prefill / (machine.sampling_flops * known.matmul_fraction)
    return Phase(parts)


def stretches(work: Work) -> list[Stretch]:
    """Of the sampler with most samples, which stand for all quantiles of the lengths."""
    each = -(-work.samples // work.config.rollout.workers)
    lengths = work.lengths[:: max(1, len(work.lengths) // each)][:each]
    if len(lengths) > 1:
        lengths[-1] = work.lengths[-1]  # somebody has the longest, and everybody waits for it
    return decoding(lengths, slots(work), work.tokens.prompt)


def slots(work: Work) -> int:
    """Sequences that a sampler decodes at once: what it is asked to, and what its cache has room for."""
    rollout, data = work.config.rollout, work.config.data
    if not isinstance(rollout, VllmRollout):
        return rollout.max_concurrent
    room = cache_bytes(work)
    each = work.shape.sizes.cached * BYTES[rollout.dtype] / sampler_ranks(rollout)
    longest = each * (data.max_prompt_tokens + data.max_response_tokens)
    asked = rollout.max_concurrent or min(MOST_CONCURRENT[work.gpus], int(4 * room // longest))
    return max(1, min(asked, int(room // (each * (work.tokens.prompt + work.tokens.response / 2)))))


def cache_bytes(work: Work) -> int:
    """Of vLLM's KV cache on a rank."""
    rollout = work.config.rollout
    assert isinstance(rollout, VllmRollout)
    if not work.gpus:
        return int(rollout.kv_cache_gib * _GIB)
    weights = work.shape.parameters * BYTES[rollout.dtype] // sampler_ranks(rollout)
    return max(int(work.machine.total * rollout.gpu_memory_fraction) - weights, 1)


# --- between them


def sync(work: Work) -> Phase:
    """The sampler's weights: inside a GPU or a host at the measured rate, else over the network."""
    config, known, shape = work.config, work.coefficients, work.shape
    sent = shape.parameters
    if config.model.lora is not None and config.model.lora.sync == "adapter":
        sent = shape.adapter(config.model.lora.rank)
    apart = config.cluster.placement == "disaggregated" or sampler_ranks(config.rollout) > 1
    across = work.gpus and apart and len(work.topology.nodes) > 1
    rate = work.machine.network * known.network_fraction if across else known.sync_gbs * 1e9
    return Phase({"weights": sent * BYTES[config.rollout.dtype] / rate, "agreeing": known.sync_s})


def turns(work: Work) -> Phase:
    """Trainer to main memory and back."""
    gpu = work.machine.gpu
    if work.config.cluster.placement != "colocated" or gpu is None or gpu.unified:
        return Phase({})
    if sampler_ranks(work.config.rollout) > 1:
        return Phase({})
    held = 4 if not adapts(work.config) else BYTES[work.config.model.dtype]
    moved = work.shape.parameters / work.shard * (held + (8 if not adapts(work.config) else 0))
    return Phase({"to main memory and back": 2 * moved / (work.coefficients.host_link_gbs * 1e9)})
