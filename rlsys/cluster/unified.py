"""Memory that CPU and GPU have together (GB10): one budget, divided between trainer, sampler and the rest of the host.

vLLM takes its share of all of it, weights and cache; nothing that anybody else gives back goes to it.
"""

from __future__ import annotations

from collections.abc import Mapping

from rlsys.cluster.hardware import GB10_SAMPLER_CEILING
from rlsys.cluster.memory import Parts
from rlsys.config.clusters import Gb10, Gb10Pair
from rlsys.config.errors import UserError
from rlsys.config.schema import RunConfig, VllmRollout
from rlsys.engines.footprint import gib

_GIB = 2**30


def page_cache_bytes(config: RunConfig) -> int:
    """What trainer and sampler leave to the operating system, to files and to Ray's object store."""
    cluster = config.cluster
    return int(cluster.page_cache_gib * _GIB) if isinstance(cluster, Gb10 | Gb10Pair) else 0


def usable_bytes(config: RunConfig, total: int) -> int:
    """What trainer and sampler may have together: .85 of all, or less where the page cache is given more.

    Args:
        total: bytes of the host's memory.
    """
    return max(min(int(GB10_SAMPLER_CEILING * total), total - page_cache_bytes(config)), 0)


def sampler_share(config: RunConfig, trainer: Parts, total: int) -> float:
    """The most that ``rollout.gpu_memory_fraction`` may be: .85 less the trainer's share, and what the page cache
    leaves.

    Args:
        trainer: bytes of what the trainer has on the sampler's host, reference and critic with it.
        total: bytes of the host's memory.
    """
    return max(usable_bytes(config, total) - sum(trainer.values()), 0) / total


def check_unified(config: RunConfig, found: Mapping[str, Parts], total: int) -> None:
    """Refuses a sampler's share that leaves too little to the others.

    Args:
        found: by phase, what lies on one host (``memory.phases``).
        total: bytes of its memory.

    Raises:
        UserError: how much the sampler may have, and what has the rest.
    """
    rollout = config.rollout
    check_offload(config)
    if not isinstance(rollout, VllmRollout):
        return
    for parts in found.values():
        if not any(name.startswith("the sampler's") for name in parts):
            continue
        others = {name: size for name, size in parts.items() if not name.startswith("the sampler's")}
        most = sampler_share(config, others, total)
        if rollout.gpu_memory_fraction > most:
            cache = page_cache_bytes(config)
            raise UserError(
                f"CPU and GPU have {gib(total)} GiB together: beside the trainer's {gib(sum(others.values()))} GiB and "
                f"{gib(cache)} GiB for the operating system the sampler may have {most:.2f} of it, not "
                f"{rollout.gpu_memory_fraction:g}",
                where="rollout.gpu_memory_fraction",
                fix=f"set rollout.gpu_memory_fraction={int(most * 100) / 100:g}"
                if most >= 0.05
                else "a smaller model, model.lora, or cluster=gb10_pair",
            )


def check_offload(config: RunConfig) -> None:
    """Raises:
    UserError: something is to be moved to where it is already.
    """
    fix = "an adapter (model.lora) or trainer.activations=recompute makes the trainer smaller"
    if config.trainer.offload != "none":
        raise UserError(
            f"trainer.offload={config.trainer.offload} moves nothing where CPU and GPU have one memory",
            where="trainer.offload",
            fix=f"leave it out; {fix}",
        )
    if config.trainer.activations == "offload":
        raise UserError(
            "trainer.activations=offload moves nothing where CPU and GPU have one memory",
            where="trainer.activations",
            fix=fix,
        )
