"""What to change: single overrides, each planned again to see what it would do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlsys.cluster.planner.plan import Question, RunPlan, plan_run
from rlsys.config.errors import UserError
from rlsys.config.ignored import refuse_ignored
from rlsys.config.schema import RunConfig, VllmRollout

Override = tuple[str, Any]
_WORTH = 0.03  # of the step's time
_MOST = 4  # overrides together, that make a run fit


@dataclass(frozen=True)
class Advice:
    """overrides: what to add to the command line; plan: what it would be then."""

    overrides: tuple[Override, ...]
    plan: RunPlan

    @property
    def text(self) -> str:
        return " ".join(f"{key}={_value(value)}" for key, value in self.overrides)


def faster(asked: Question, plan: RunPlan) -> list[Advice]:
    """Overrides that still fit and make a step shorter, the best first."""
    found = [advice for override in candidates(asked.config, plan) if (advice := _tried(asked, (override,)))]
    better = [a for a in found if a.plan.memory.fits and a.plan.step_s < (1 - _WORTH) * plan.step_s]
    return sorted(better, key=lambda a: a.plan.step_s)


def fitting(asked: Question, plan: RunPlan) -> Advice | None:
    """The first overrides, added one after the other by how much they take off the fullest phase, with which the run
    fits; None: none of these is enough."""
    chosen: tuple[Override, ...] = ()
    best, current = plan, asked
    for _ in range(_MOST):
        keys = {key for key, _ in chosen}
        found = [
            advice
            for override in candidates(current.config, best)
            if override[0] not in keys and (advice := _tried(asked, (*chosen, override)))
        ]
        fits = [advice for advice in found if advice.plan.memory.fits]
        if fits:
            return min(fits, key=lambda a: a.plan.step_s)
        smaller = [advice for advice in found if _excess(advice.plan) < _excess(best)]
        if not smaller:
            return None
        step = min(smaller, key=lambda a: _excess(a.plan))
        chosen, best = step.overrides, step.plan
        current = replace(asked, config=changed(asked.config, chosen))
    return None


def candidates(config: RunConfig, plan: RunPlan) -> Iterator[Override]:
    """Overrides of what a plan depends on, and that change nothing about what is learnt."""
    trainer, rollout, gpus = config.trainer, config.rollout, plan.work.gpus
    for placement in ("shared", "colocated", "disaggregated"):
        yield "cluster.placement", placement
    for activations in ("keep", "recompute", "offload") if gpus else ("keep", "recompute"):
        yield "trainer.activations", activations
    for tokens in (trainer.micro_batch_tokens * 2, trainer.micro_batch_tokens // 2, trainer.micro_batch_tokens // 4):
        if tokens >= config.data.max_prompt_tokens + config.data.max_response_tokens:
            yield "trainer.micro_batch_tokens", tokens
    if config.rollout.samples_per_prompt > 1:
        yield "trainer.rows", "shared"
    yield "trainer.rows", "packed"
    if gpus:
        yield "trainer.offload", "all"
        yield "trainer.shard_ranks", None
        total = plan.work.topology.gpus
        if config.cluster.placement == "disaggregated" or getattr(rollout, "tensor_parallel", 1) > 1:
            yield "trainer.ranks", max(1, total // 2)
            yield "rollout.workers", max(1, total // 2)
        else:
            yield "trainer.ranks", total
            yield "rollout.workers", total
    if isinstance(rollout, VllmRollout) and gpus:
        for fraction in (0.3, 0.4, 0.6, 0.7, 0.8):
            yield "rollout.gpu_memory_fraction", fraction
        for ranks in (1, 2, 4, 8):
            yield "rollout.tensor_parallel", ranks
    elif isinstance(rollout, VllmRollout) and rollout.kv_cache_gib > 0.5:
        yield "rollout.kv_cache_gib", rollout.kv_cache_gib / 2
    if config.model.dtype == "float32" and gpus:
        yield "model.dtype", "bfloat16"


def changed(config: RunConfig, overrides: Sequence[Override]) -> RunConfig:
    for key, value in overrides:
        config = _with(config, key.split("."), value)
    return config


def _with(node: Any, path: Sequence[str], value: Any) -> Any:
    inner = value if len(path) == 1 else _with(getattr(node, path[0]), path[1:], value)
    return replace(node, **{path[0]: inner})


def _tried(asked: Question, overrides: tuple[Override, ...]) -> Advice | None:
    """None: it is as it was already, or the combination is refused."""
    config = changed(asked.config, overrides)
    if config == changed(asked.config, overrides[:-1]):
        return None
    try:
        refuse_ignored(config, [key for key, _ in overrides])
        return Advice(overrides, plan_run(replace(asked, config=config)))
    except UserError:
        return None


def _excess(plan: RunPlan) -> int:
    memory = plan.memory
    return memory.peak[1] - memory.capacity + max(sum(memory.main.values()) - memory.main_capacity, 0)


def _value(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else f"{value}"
