"""Starts the actors of a job, and replaces trainers that were lost while all others go on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from rlsys.algorithms.requirements import adapts, needs_critic, needs_reference_worker, needs_teacher
from rlsys.cluster.memory import Device, Sizes, check_phases, phases
from rlsys.cluster.placement import Plan, assign, place
from rlsys.cluster.session import Placement, Session
from rlsys.cluster.unified import check_unified
from rlsys.config.schema import RunConfig
from rlsys.controller.inputs import Inputs
from rlsys.controller.job import Groups, Observers
from rlsys.tracking.blocks import count, header_rows
from rlsys.workers.fleet import Fleets
from rlsys.workers.groups import CriticGroup, ReferenceGroup, RewardGroup, RolloutGroup, TrainerGroup
from rlsys.workers.waits import Call, StopFlag, gather


@dataclass
class Started:
    """The actors of a job. groups: its trainer and critic are others after :meth:`replace_trainers`."""

    groups: Groups
    placement: Placement
    _config: RunConfig
    _inputs: Inputs
    _stop: StopFlag

    def replace_trainers(self) -> None:
        """Ends what is left of trainer and critic, and starts them again where they were; nobody else is touched.

        Raises:
            DeadlineExceeded, ActorFailed: they did not come up.
        """
        groups, deadlines = self.groups, self._config.deadlines
        for group in (groups.trainer, groups.critic):
            if group is not None:
                group.close()
        if self._config.cluster.placement == "colocated":
            groups.rollout.sleep(weights=True)  # as at the start: the trainer is loaded where samplers were
        groups.rollout.forget_sender()
        self.groups = groups = replace(
            groups,
            trainer=TrainerGroup(self.placement, deadlines, self._stop),
            critic=CriticGroup(self.placement, deadlines, self._stop) if groups.critic is not None else None,
        )
        calls = _trainers_starting(self._config, self._inputs, groups)
        gather(calls, phase="start", seconds=deadlines.start, stop=self._stop)

    def close(self) -> None:
        for group in self.groups.present():
            group.close()


@contextmanager
def started(
    config: RunConfig,
    session: Session,
    inputs: Inputs,
    stop: StopFlag,
    observers: Observers,
    resumed_step: int | None,
) -> Iterator[Started]:
    """Starts every actor, all at once, and ends them all on the way out."""
    deadlines = config.deadlines
    layout = place(config, session.topology, env=session.env, free=session.free())
    observers.display.start(
        header_rows(
            config,
            parameters=inputs.parameters,
            training_problems=inputs.train_rows,
            held_out_problems=len(inputs.held_out) if inputs.held_out is not None else 0,
            ranks=len(layout.of("trainer")),
            cluster=session.said,
            run_folder=observers.folder.path,
            resumed_step=resumed_step,
        )
    )
    observers.display.phase("start")
    with ExitStack() as stack:
        placement = _placed(config, session, layout, stop, observers)
        stack.callback(placement.release)
        groups = Groups(
            trainer=TrainerGroup(placement, deadlines, stop),
            rollout=RolloutGroup(placement, deadlines, stop),
            reward=RewardGroup(placement, deadlines, stop),
            reference=ReferenceGroup(placement, deadlines, stop) if needs_reference_worker(config) else None,
            critic=CriticGroup(placement, deadlines, stop) if needs_critic(config) else None,
        )
        made = Started(groups, placement, config, inputs, stop)
        stack.callback(made.close)
        if session.nodes == 1 or session.gpus:  # else actors are on hosts that are not known yet
            _check_memory(config, session, inputs, layout, groups, observers)
        samplers = groups.rollout.starting(inputs.config, inputs.max_length)
        if session.gpus:  # vLLM measures the GPU while it starts, and takes what others load meanwhile for its own
            gather(samplers, phase="start", seconds=deadlines.start, stop=stop)
            samplers = []
        trainers = _trainers_starting(config, inputs, groups)
        others = groups.reward.starting(inputs.config)
        others += groups.reference.starting(inputs.config) if groups.reference is not None else []
        answers = gather([*samplers, *trainers, *others], phase="start", seconds=deadlines.start, stop=stop)
        if adapts(config):
            total, trained = answers[len(samplers)]
            observers.display.note(f"of {count(total)} weights the adapter's {count(trained)} are trained")
        if session.nodes > 1:
            groups.trainer.require_shared(observers.folder.path)
        made.groups.fleets = _watched(config, groups, observers)
        yield made


def _watched(config: RunConfig, groups: Groups, observers: Observers) -> Fleets:
    """Who keeps samplers, reward and reference alive from here on, and says so."""

    def report(kind: str, text: str, **fields: str | float) -> None:
        observers.folder.log_event(kind, text, **fields)
        observers.display.note(text, alert=kind == "lost")

    start_s = config.deadlines.start
    fleets = Fleets.watch(groups.rollout, groups.reward, groups.reference, config.health, report, start_s=start_s)
    fleets.alone = config.cluster.placement == "colocated"
    return fleets


def _trainers_starting(config: RunConfig, inputs: Inputs, groups: Groups) -> list[Call]:
    """Ranks of the trainer and, where there is one, of the critic meet and load."""
    resolved = inputs.config
    warmup = config.trainer.critic.warmup_steps if groups.critic is not None else 0
    calls = groups.trainer.starting(
        resolved.model,
        resolved.trainer,
        temperature=config.rollout.temperature,
        total_steps=max(config.steps - warmup, 1) * config.trainer.updates_per_step,
        seed=config.seed,
        distillation=resolved.algorithm.distillation if needs_teacher(config) else None,
        longest=inputs.max_length,
    )
    if groups.critic is not None:
        critic = config.trainer.critic
        calls += groups.critic.starting(
            replace(resolved.model, path=inputs.critic_folder),
            replace(resolved.trainer, lr=critic.lr),
            temperature=config.rollout.temperature,
            total_steps=config.steps * config.trainer.updates_per_step,
            seed=config.seed,
            longest=inputs.max_length,
        )
    return calls


def _placed(config: RunConfig, session: Session, layout: Plan, stop: StopFlag, observers: Observers) -> Placement:
    """The plan's bundles, booked; where there are several hosts, ranks go by where the bundles have landed."""

    def settle(landed: Sequence[str]) -> Plan:
        return assign(config, session.topology, layout.booking, landed, env=session.env)

    several = session.nodes > 1
    placement = Placement(
        layout,
        seconds=config.deadlines.start,
        check=stop.check,
        settle=settle if several else None,
        hosts=[node.id for node in session.topology.nodes],
    )
    if several:
        bound = [actor for actor in placement.plan.actors if actor.node is not None]
        where = {actor.name: session.topology.node(str(actor.node)).address for actor in bound}
        observers.folder.log_event("placement", f"on {len(set(where.values()))} hosts", **where)
    return placement


def _check_memory(
    config: RunConfig, session: Session, inputs: Inputs, layout: Plan, groups: Groups, observers: Observers
) -> None:
    """Raises UserError where a phase needs more memory than there is, before a model is loaded."""
    device, unified = Device(*groups.trainer.free_and_total()), session.topology.unified
    found = phases(config, Sizes.of(inputs.model_folder, inputs.parameters), layout, device)
    if unified:
        check_unified(config, found, device.total)
    check_phases(found, device, gpus=bool(session.gpus), placement=config.cluster.placement, unified=unified)
    observers.folder.log_event("memory plan", "bytes at least", free=device.free, **found)
