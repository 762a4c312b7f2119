"""Which actors run, and on what: a pure function of the configuration and the machine's resources."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlsys.algorithms.requirements import needs_critic, needs_reference_worker
from rlsys.config.errors import UserError
from rlsys.config.sampler import sampler_ranks
from rlsys.config.schema import RunConfig

# Shares of a GPU that its actors take turns on. Ray books them; memory is bounded by rollout.gpu_memory_fraction on the
# sampler's side.
_GPU_SHARE = {"trainer": 0.4, "critic": 0.1, "rollout": 0.4, "reference": 0.1}


@dataclass(frozen=True)
class ActorSpec:
    """One Ray actor. bundle: index of the placement-group bundle (one a GPU), None on a CPU; env: its environment."""

    role: str
    index: int
    gpus: float = 0.0
    bundle: int | None = None
    threads: int = 1
    env: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.role} worker {self.index}"


@dataclass(frozen=True)
class Plan:
    """All actors of a run, and the bundles (GPUs each) that they are placed into."""

    actors: tuple[ActorSpec, ...]
    bundles: tuple[dict[str, float], ...]

    def of(self, role: str) -> list[ActorSpec]:
        return [actor for actor in self.actors if actor.role == role]


def plan(config: RunConfig, *, gpus: int, cores: int) -> Plan:
    """Assigns actors to GPUs, trainer rank i and rollout worker i on GPU i, so that as many are needed as the more
    numerous of the two; ``disaggregated``, samplers have GPUs of their own. Without GPUs the same with cores. A sampler
    of several GPUs has them to itself in any case: Ray can share one GPU, not several at once.

    Raises:
        UserError: more trainer ranks or rollout workers than GPUs, samplers of several GPUs that should take turns, or
            ranks that do not divide.
    """
    each = sampler_ranks(config.rollout)
    apart = config.cluster.placement == "disaggregated"
    own = each * config.rollout.workers if gpus and (each > 1 or apart) else 0  # GPUs that only samplers use
    ranks = config.trainer.ranks or max(gpus - own, 1)
    _check_room(config, gpus, ranks, own, each)
    if ranks % config.trainer.sequence_ranks:
        raise UserError(
            f"{ranks} trainer ranks cannot be divided into groups of {config.trainer.sequence_ranks} that share a row",
            where="trainer.sequence_ranks",
            fix=f"choose a divisor of {ranks}, or set trainer.ranks",
        )
    split = apart and not gpus
    threads = config.cluster.threads or max(1, cores // (ranks + split * config.rollout.workers))
    actors: list[ActorSpec] = []
    for role, count in (
        ("trainer", ranks),
        ("critic", ranks if needs_critic(config) else 0),
        ("rollout", config.rollout.workers),
        ("reference", int(needs_reference_worker(config))),
    ):
        for index in range(count):
            per_actor = threads if role != "rollout" or split else config.cluster.threads or max(1, cores // count)
            env = {"OMP_NUM_THREADS": str(per_actor)}
            if gpus and role == "rollout" and own:
                actors.append(ActorSpec(role, index, each, ranks + index, per_actor, env))
            elif gpus:
                actors.append(ActorSpec(role, index, _GPU_SHARE[role], index, per_actor, env))
            else:  # Ray would otherwise hide GPUs by a variable that some libraries read as an error
                actors.append(ActorSpec(role, index, 0.0, None, per_actor, env))
    actors.append(ActorSpec("reward", 0, env={"OMP_NUM_THREADS": "1"}))
    if not gpus:
        return Plan(tuple(actors), ())
    shared = ranks if own else max(ranks, config.rollout.workers)
    bundles = [{"GPU": 1.0}] * shared + [{"GPU": float(each)}] * (config.rollout.workers if own else 0)
    return Plan(tuple(actors), tuple(bundles))


def _check_room(config: RunConfig, gpus: int, ranks: int, own: int, each: int) -> None:
    if own and each > 1 and config.cluster.placement == "colocated":
        raise UserError(
            f"a sampler of {each} GPUs has them to itself, and takes no turns with a trainer",
            where="cluster.placement",
            fix="set cluster.placement=disaggregated, or more rollout.workers of one GPU each",
        )
    if own and ranks + own > gpus:
        raise UserError(
            f"{config.rollout.workers} samplers of {each} GPUs and {ranks} trainer ranks need {ranks + own} GPUs, and "
            f"there are {gpus}",
            where="rollout.tensor_parallel" if each > 1 else "cluster.placement",
            fix="lower rollout.tensor_parallel, rollout.pipeline_parallel, rollout.workers or trainer.ranks"
            if each > 1
            else "set cluster.placement=colocated, or lower rollout.workers or trainer.ranks",
        )
    for key, wanted in (("trainer.ranks", ranks), ("rollout.workers", config.rollout.workers)):
        if gpus and wanted > gpus:
            raise UserError(f"{key}={wanted}, but there are {gpus} GPUs", where=key, fix=f"set {key}={gpus} or less")
