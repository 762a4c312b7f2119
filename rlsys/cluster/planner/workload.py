"""What a run computes in a step, in tokens, and where: everything else of the planner is arithmetic on these."""

from __future__ import annotations

from dataclasses import dataclass

from rlsys.cluster.hardware import Gpu
from rlsys.cluster.placement import Plan
from rlsys.cluster.planner.calibration import Calibration, Coefficients
from rlsys.cluster.planner.lengths import response_lengths
from rlsys.cluster.planner.shape import ModelShape
from rlsys.cluster.topology import Node, Topology
from rlsys.config.errors import UserError
from rlsys.config.schema import RunConfig

BYTES = {"float32": 4, "bfloat16": 2}
_GIB = 2**30


@dataclass(frozen=True)
class Tokens:
    """Of a sample. prompt, response: on average; stated: whether somebody said so. Otherwise half of the longest are
    assumed for times, and the longest for memory."""

    prompt: float
    response: float
    stated: bool

    @classmethod
    def of(cls, config: RunConfig, prompt: float | None, response: float | None) -> Tokens:
        """Raises UserError for a mean outside of what the configuration allows."""
        data = config.data
        for said, limit, where in (
            (prompt, data.max_prompt_tokens, "--prompt-tokens"),
            (response, data.max_response_tokens, "--response-tokens"),
        ):
            if said is not None and not 1 <= said <= limit:
                raise UserError(
                    f"a mean of {said:g} tokens, and the configuration allows 1 to {limit}",
                    where=where,
                    fix="give a mean in that range, or raise the limit in the group data",
                )
        return cls(
            prompt or max(data.max_prompt_tokens / 2, 1),
            response or max(data.max_response_tokens / 2, 1),
            response is not None,
        )


@dataclass(frozen=True)
class Machine:
    """What one device can do.

    flops, sampling_flops: a second, in the trainer's and the sampler's dtype. bandwidth, total: of its memory, bytes a
    second and bytes. link, network: bytes a second between devices of a domain, and of a device's share between
    domains. main: bytes of a host's main memory. dollars: an hour of all nodes.
    """

    gpu: Gpu | None
    flops: float
    sampling_flops: float
    bandwidth: float
    total: int
    link: float
    network: float
    main: int
    dollars: float


@dataclass(frozen=True)
class Work:
    """config, shape, topology, layout, tokens, calibration, machine: of the run. lengths: of a step's responses."""

    config: RunConfig
    shape: ModelShape
    topology: Topology
    layout: Plan
    tokens: Tokens
    calibration: Calibration
    machine: Machine
    lengths: list[int]

    @property
    def coefficients(self) -> Coefficients:
        return self.calibration.coefficients

    @property
    def gpus(self) -> bool:
        return bool(self.layout.bundles)

    @property
    def ranks(self) -> int:
        return len(self.layout.of("trainer"))

    @property
    def samples(self) -> int:
        """Of a step."""
        return len(self.lengths)

    @property
    def shard(self) -> int:
        """Ranks that one copy of the weights is spread over."""
        return min(self.config.trainer.shard_ranks or self.ranks, self.ranks)

    @property
    def micro_tokens(self) -> int:
        """Of the largest micro-batch of a rank, on average where the mean is known."""
        data, trainer = self.config.data, self.config.trainer
        longest = data.max_prompt_tokens + data.max_response_tokens
        each = self.tokens.prompt + self.tokens.response if self.tokens.stated else longest
        rows = self.samples / self.ranks / trainer.updates_per_step
        return max(1, min(trainer.micro_batch_tokens, round(rows * each)))

    @property
    def sampler_rows(self) -> int:
        """Sequences that a sampler decodes at once."""
        each = -(-self.samples // self.config.rollout.workers)
        return min(each, self.config.rollout.max_concurrent or each)


def work_of(
    config: RunConfig, shape: ModelShape, topology: Topology, layout: Plan, tokens: Tokens, calibration: Calibration,
    dollars_per_hour: float | None = None,
) -> Work:  # fmt: skip
    """See Work. dollars_per_hour: of one node; None: the table's."""
    samples = config.data.prompts_per_step * config.rollout.samples_per_prompt
    lengths = response_lengths(samples, tokens.response, config.data.max_response_tokens)
    machine = _machine(config, topology, layout, calibration.coefficients, dollars_per_hour)
    return Work(config, shape, topology, layout, tokens, calibration, machine, lengths)


def _machine(
    config: RunConfig, topology: Topology, layout: Plan, known: Coefficients, dollars: float | None
) -> Machine:
    kinds = [node.type for node in topology.nodes]
    hourly = sum(dollars if dollars is not None else _hourly(node) for node in topology.nodes)
    main = int(min(node.memory_gib for node in topology.nodes) * _GIB)
    if not layout.bundles:
        flops, sampling = (
            known.peak_gflops[dtype] * 1e9 * layout.of(role)[0].threads
            for role, dtype in (("trainer", config.model.dtype), ("rollout", config.rollout.dtype))
        )
        rate = known.bandwidth_gbs * 1e9
        return Machine(None, flops, sampling, rate, main, rate / 4, 1.25e9, main, hourly)
    kind = next(kind for kind in kinds if kind is not None and kind.gpu is not None)
    gpu = kind.gpu
    assert gpu is not None
    return Machine(
        gpu,
        _tflops(gpu, config.model.dtype) * 1e12,
        _tflops(gpu, config.rollout.dtype) * 1e12,
        gpu.bandwidth_gbs * 1e9,
        int(gpu.memory_gib * _GIB),
        (kind.link_gbs or kind.network_gbs) * 1e9,
        kind.network_gbs / kind.gpus * 1e9,
        main,
        hourly,
    )


def _tflops(gpu: Gpu, dtype: str) -> float:
    return gpu.tflops.get(dtype) or gpu.tflops["bfloat16"] / 2


def _hourly(node: Node) -> float:
    """Of a node that has fewer GPUs than its kind, that share of the price: others have the rest."""
    kind = node.type
    if kind is None:
        return 0.0
    return kind.dollars_per_hour * (min(node.gpus / kind.gpus, 1.0) if kind.gpus else 1.0)
