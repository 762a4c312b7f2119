"""A run's plan: where its actors are, what memory and time they take, what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlsys.cluster.placement import place
from rlsys.cluster.planner import calibration, needs, timing
from rlsys.cluster.planner.needs import Memory
from rlsys.cluster.planner.shape import ModelShape
from rlsys.cluster.planner.timing import Phase
from rlsys.cluster.planner.workload import Tokens, Work, work_of
from rlsys.cluster.topology import Topology
from rlsys.cluster.unified import check_offload
from rlsys.config.errors import UserError
from rlsys.config.schema import RunConfig

STEPS = 1000  # that a price is of


@dataclass(frozen=True)
class RunPlan:
    """work: what was planned; memory, phases: what it takes."""

    work: Work
    memory: Memory
    phases: dict[str, Phase]

    @property
    def step_s(self) -> float:
        return sum(phase.seconds for phase in self.phases.values())

    @property
    def bottleneck(self) -> str:
        """The phase that takes most of a step."""
        return max(self.phases, key=lambda name: self.phases[name].seconds)

    @property
    def mfu(self) -> float:
        """Model FLOPs of the update, by its time and the peak of all trainer ranks."""
        peak = self.work.machine.flops * self.work.ranks
        return timing.batch(self.work).flops / max(self.phases["update"].seconds, 1e-12) / peak

    @property
    def dollars(self) -> float:
        """Of :data:`STEPS` steps, on all nodes of the topology."""
        return self.work.machine.dollars * self.step_s * STEPS / 3600

    @property
    def tokens_per_s(self) -> float:
        """Sampled tokens by the time of a step."""
        return sum(self.work.lengths) / self.step_s


@dataclass(frozen=True)
class Question:
    """What is planned. shape: of the model; topology: of the cluster. prompt_tokens, response_tokens: means; None: half
    of the longest. dollars_per_hour: of a node; None: the table's."""

    config: RunConfig
    shape: ModelShape
    topology: Topology
    prompt_tokens: float | None = None
    response_tokens: float | None = None
    dollars_per_hour: float | None = None
    calibration: calibration.Calibration | None = None


def plan_run(asked: Question) -> RunPlan:
    """Raises:
    UserError: the actors do not go onto the cluster, a sequence is longer than the model's, a mean out of range, or
        something is to be offloaded where there is one memory.
    """
    config, topology = asked.config, asked.topology
    if not topology.nodes:
        raise UserError(
            f"what cluster={topology.name} is made of is only known when it is there",
            where="cluster",
            fix="plan with cluster=gpu_pool, h100_node, gb10, gb10_pair, gb200_nvl72 or local",
        )
    if topology.gpus and not any(node.gpu for node in topology.nodes):
        raise UserError(
            "the GPUs of this machine are in no table",
            where="cluster=local",
            fix="plan with cluster=gpu_pool cluster.gpu=NAME, the nearest that there is",
        )
    longest = config.data.max_prompt_tokens + config.data.max_response_tokens
    if asked.shape.longest is not None and longest > asked.shape.longest:
        raise UserError(
            f"prompt and response may take {longest} tokens, and the model allows {asked.shape.longest}",
            where="data.max_response_tokens",
            fix=f"shorten data.max_prompt_tokens or data.max_response_tokens to {asked.shape.longest} together",
        )
    layout = place(config, topology)
    if topology.unified:
        check_offload(config)
    known = asked.calibration or calibration.load("gpu" if layout.bundles else "cpu")
    tokens = Tokens.of(config, asked.prompt_tokens, asked.response_tokens)
    work = work_of(config, asked.shape, topology, layout, tokens, known, asked.dollars_per_hour)
    return RunPlan(work, needs.memory(work), timing.phases(work))


def report(plan: RunPlan) -> dict[str, Any]:
    """As JSON content: seconds, bytes, dollars."""
    work, memory = plan.work, plan.memory
    return {
        "schema": 1,
        "cluster": {"kind": work.topology.name, "nodes": len(work.topology.nodes), "gpus": work.topology.gpus},
        "model": {"name": work.shape.name, "parameters": work.shape.parameters, "active": work.shape.active},
        "tokens": {"prompt": work.tokens.prompt, "response": work.tokens.response, "stated": work.tokens.stated},
        "actors": {role: len(work.layout.of(role)) for role in ("trainer", "critic", "rollout", "reference", "reward")},
        "memory": {
            "capacity": memory.capacity,
            "phases": memory.phases,
            "main": memory.main,
            "main_capacity": memory.main_capacity,
            "fits": memory.fits,
        },
        "time": {name: {"seconds": phase.seconds, "parts": phase.parts} for name, phase in plan.phases.items()},
        "step_s": plan.step_s,
        "bottleneck": plan.bottleneck,
        "mfu": plan.mfu,
        "tokens_per_s": plan.tokens_per_s,
        "dollars_per_1000_steps": plan.dollars,
        "calibration": {"source": work.calibration.source, "measured": work.calibration.measured},
    }
