"""Memory by part: the least that every run needs (``rlsys/cluster/memory.py``), and what is estimated on top of it."""

from __future__ import annotations

from dataclasses import dataclass

from rlsys.algorithms.requirements import needs_critic, needs_reference_worker
from rlsys.cluster.memory import INPUTS, Beyond, Device, Parts, phases
from rlsys.cluster.planner.workload import BYTES, Work
from rlsys.cluster.unified import usable_bytes
from rlsys.config.sampler import sampler_ranks
from rlsys.config.schema import VllmRollout

_MIB, _GIB = 2**20, 2**30
_TILE = {False: 1 << 22, True: 1 << 25}  # elements of a tile of logits, on a CPU and a GPU
_ZERO_BUCKET = 50_000_000  # elements that ZeRO-3 gathers ahead, or reduces, at once
_SYNC_BUCKET = 512 * _MIB


@dataclass(frozen=True)
class Memory:
    """phases: by phase, bytes by part on the fullest GPU, or on the host; capacity: of it, or what a run
    may have of it. main: bytes by part in the
    main memory of a host of GPUs, empty where host and GPU have one memory or the host is the device; main_capacity: of
    that."""

    phases: dict[str, dict[str, int]]
    capacity: int
    main: dict[str, int]
    main_capacity: int

    @property
    def peak(self) -> tuple[str, int]:
        """The phase that needs most, and how much."""
        return max(((name, sum(parts.values())) for name, parts in self.phases.items()), key=lambda found: found[1])

    @property
    def fits(self) -> bool:
        return self.peak[1] <= self.capacity and sum(self.main.values()) <= max(self.main_capacity, 0)


def memory(work: Work) -> Memory:
    device = Device(work.machine.total, work.machine.total)
    found = phases(work.config, work.shape.sizes, work.layout, device, beyond(work))
    unified = work.machine.gpu is not None and work.machine.gpu.unified
    aside = {} if not work.gpus or unified else _main_memory(work)
    capacity = usable_bytes(work.config, work.machine.total) if unified else work.machine.total
    return Memory({name: dict(parts) for name, parts in found.items()}, capacity, aside, work.machine.main)


def beyond(work: Work) -> Beyond:
    """On a GPU of one trainer rank, one sampler's rank; on a host of all of them."""
    copies = 1 if work.gpus else work.ranks
    trainer = {name: size * copies for name, size in _training(work).items()}
    return Beyond(trainer=trainer, sampler=_sampling(work), always=_always(work))


def _training(work: Work) -> dict[str, int]:
    """Of one rank."""
    config, shape, known = work.config, work.shape, work.coefficients
    trainer, element, tokens = config.trainer, BYTES[config.model.dtype], work.micro_tokens
    inputs = tokens * shape.hidden * shape.layers * element
    saved = known.activation_factor * tokens * shape.saved_bytes(element, gpu=work.gpus)
    match trainer.activations:
        case "keep":  # while a layer goes backward, gradients as large as what it kept are there too
            activations = saved * (shape.layers + 1)
        case "recompute":
            activations = inputs + 2 * saved
        case _:
            inputs, activations = 0, 2 * saved
    tile = min(_TILE[work.gpus], tokens * shape.vocabulary)
    parts = {
        INPUTS: inputs,
        "activations beside them": int(max(activations - inputs, 0)),
        "tiles of logits": 4 * tile * (1 if work.gpus else 2) + tokens * shape.hidden * (4 + element),
        "gathered weights and gradients": _gathered(work, element),
        "the trainer's own": int(known.trainer_mib * _MIB),
    }
    if config.model.lora is not None:
        parts["the adapter with gradient and moments"] = 16 * shape.adapter(config.model.lora.rank) // work.shard
    elif trainer.backend == "zero3" and element != 4:
        parts["rounded weights"] = element * shape.parameters // work.shard
    if work.gpus:
        parts["buffers of the weights' sync"] = min(_SYNC_BUCKET, shape.parameters * BYTES[config.rollout.dtype])
    return parts


def _gathered(work: Work, element: int) -> int:
    """What a rank holds of weights that are spread, and of their gradients, while it uses them."""
    shape = work.shape
    if work.config.trainer.backend == "zero3":
        return min(_ZERO_BUCKET, shape.parameters) * (element + 4)
    return (shape.root + 2 * shape.layer) * element + (shape.root + shape.layer) * 4


def _sampling(work: Work) -> dict[str, int]:
    """Of one sampler's rank on a GPU, of all on a host. vLLM keeps what it needs within its share of a GPU."""
    config, shape, known = work.config, work.shape, work.coefficients
    if work.gpus and isinstance(config.rollout, VllmRollout):
        return {}
    rollout, data = config.rollout, config.data
    rows, element = _rows_ever(work), BYTES[rollout.dtype]
    copies = 1 if work.gpus else rollout.workers * sampler_ranks(rollout)
    parts = {
        "the sampler's logits": 3 * 4 * rows * shape.vocabulary * copies,
        "the sampler's own": int(known.sampler_mib * _MIB) * copies,
    }
    if not isinstance(rollout, VllmRollout):
        longest = data.max_prompt_tokens + data.max_response_tokens
        parts["the sampler's cache"] = rows * longest * shape.sizes.cached * element * copies
    return parts


def _rows_ever(work: Work) -> int:
    """At once in a sampler, evaluations included."""
    config = work.config
    problems = config.eval.problems * max(config.eval.samples, 1) if config.eval.every else 0
    each = max(work.sampler_rows, -(-problems // config.rollout.workers))
    return min(each, config.rollout.max_concurrent or each)


def _always(work: Work) -> dict[str, int]:
    config, known = work.config, work.coefficients
    baseline = int(known.baseline_mib * _MIB)
    if work.gpus:
        inside = 1 + needs_critic(config) + needs_reference_worker(config)
        return {"CUDA's own": baseline * inside}
    processes = len(work.layout.actors) + 1  # and the driver
    weights = work.shape.parameters * BYTES[config.rollout.dtype]
    return {"the processes' own": baseline * processes, "weights on their way to samplers": weights}


def _main_memory(work: Work) -> dict[str, int]:
    """Of the host that has most ranks."""
    config, shape = work.config, work.shape
    here = min(max(node.gpus for node in work.topology.nodes), work.ranks)
    part = shape.parameters // work.shard
    held = 4 if config.model.lora is None else BYTES[config.model.dtype]
    waiting = 0
    if config.trainer.offload == "all" or config.cluster.placement == "colocated":
        waiting = part * (held + (12 if config.model.lora is None else 0))
    elif config.trainer.offload == "optimizer":
        waiting = 12 * part
    parts = {
        "the processes' own": 2 * _GIB * (2 * here + 2),
        "weights on their way to samplers": shape.parameters * BYTES[config.rollout.dtype],
    }
    if waiting:
        parts["weights, moments and gradient that wait"] = waiting * here
    if config.trainer.activations == "offload":
        element = BYTES[config.model.dtype]
        kept = shape.saved_bytes(element, gpu=True) * shape.layers * work.micro_tokens
        parts["activations that wait"] = kept * here
    return parts


def total(parts: Parts) -> int:
    return sum(parts.values())
