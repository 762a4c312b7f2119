"""One run from a checked configuration to its summary: check the inputs, start the actors, train, stop cleanly."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from rlsys.algorithms.requirements import (
    adapts,
    critic_objective,
    needs_critic,
    needs_reference_worker,
    needs_teacher,
    objective,
)
from rlsys.checkpoint.controller_state import ControllerState
from rlsys.checkpoint.store import CheckpointStore
from rlsys.cluster.departures import NOTICE_S, departed, present
from rlsys.cluster.memory import Device, Sizes, check_phases, phases
from rlsys.cluster.placement import Plan, assign, place
from rlsys.cluster.session import Placement, Session, connect
from rlsys.cluster.unified import check_unified
from rlsys.config.assets import bundled_model
from rlsys.config.compose import overridden_keys
from rlsys.config.errors import UserError
from rlsys.config.ignored import refuse_ignored_on
from rlsys.config.schema import RunConfig
from rlsys.controller.doctor import check_cluster, preflight
from rlsys.controller.heap import settled_heap
from rlsys.controller.inputs import Inputs, check_inputs
from rlsys.controller.job import Groups, GuardStop, Job, Observers
from rlsys.controller.loop import train
from rlsys.controller.profile import Profile
from rlsys.controller.recovery import Ending, Restarts
from rlsys.controller.resume import Origin, find_origin, last_origin
from rlsys.engines.sync.verify import SyncError
from rlsys.rewards.budget import RewardBudgetExceeded
from rlsys.tracking import summary as summaries
from rlsys.tracking.blocks import count, header_rows
from rlsys.tracking.collapse import CollapseMonitor
from rlsys.tracking.display import make_display
from rlsys.tracking.memory import MemoryMonitor
from rlsys.tracking.plots import plot_run
from rlsys.tracking.run import RunFolder
from rlsys.tracking.secrets import mask
from rlsys.tracking.trackers import TrackerSet
from rlsys.workers.groups import CriticGroup, ReferenceGroup, RewardGroup, RolloutGroup, TrainerGroup
from rlsys.workers.waits import ActorFailed, ActorLost, DeadlineExceeded, StopFlag, StopRequested, gather

FINISHED, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

# What ends a run without being a bug: said in words, after a checkpoint where one can still be written.
_EXPECTED = (DeadlineExceeded, ActorFailed, SyncError, RewardBudgetExceeded, GuardStop, UserError)


def run_job(config: RunConfig, overrides: Sequence[str] = (), *, profile: bool = False) -> int:
    """Trains as ``config`` says.

    Args:
        overrides: the command line that composed it, for the commands that the user is offered at the end.
        profile: also write ``trace.json`` and print where the time went.

    Returns:
        0: finished; 1: failed; 2: failed on bad input; 130: stopped by Ctrl-C or SIGTERM, its checkpoint written.

    Raises:
        UserError: bad input, found before training began.
    """
    checked = preflight(config)
    origin = find_origin(config)
    if origin is not None and origin.state.step >= config.steps:
        raise UserError(
            f"the run has already done its {origin.state.step} steps",
            where=str(origin.folder.path),
            fix=f"set steps to more than {origin.state.step} to train on, or leave resume out for a new run",
        )
    folder = origin.folder if origin else RunFolder.create(Path(config.run_root), config.name, config)
    try:
        checked.report.write(folder.path)
        return _run_in(folder, config, checked.inputs, origin, overrides, profile)
    except UserError:
        if origin is None and not folder.metrics.exists():  # refused before it began: nothing is left behind
            shutil.rmtree(folder.path)
        raise


def _run_in(
    folder: RunFolder,
    config: RunConfig,
    inputs: Inputs,
    origin: Origin | None,
    overrides: Sequence[str],
    profile: bool,
) -> int:
    """The run in its folder, observed. Returns the exit code."""
    first = origin.state.step if origin else 0
    display = make_display(config.tracker.display, title=f"rlsys · {config.name}", steps=config.steps, first_step=first)
    with ExitStack() as stack:
        stack.enter_context(folder)

        def report(text: str) -> None:
            folder.log_event("tracker", text)
            display.note(text)

        trackers = TrackerSet(config.tracker.use, report)
        observers = Observers(folder, trackers, display, stack.enter_context(MemoryMonitor()))
        stop = stack.enter_context(_signals())
        stack.callback(display.close)
        folder.log_event("resume" if origin else "start", f"at step {first} of {config.steps}")
        trackers.start(mask(asdict(config)), folder.path)
        ending = _supervise(config, inputs, origin, observers, stop, overrides, profile)
        restarts = Restarts(first)
        while restarts.allow(ending):
            ending = _again(ending, config, observers, stop, overrides, profile)
        _finish(config, observers, ending.status, ending.reason, overrides)
        if ending.profile is not None:
            ending.profile.finish(folder.path, Console(highlight=False))
        return ending.status


def _again(
    before: Ending, config: RunConfig, observers: Observers, stop: StopFlag, overrides: Sequence[str], profile: bool
) -> Ending:
    """The job from its last checkpoint, on the hosts that remain."""
    inputs = check_inputs(config)
    origin = last_origin(observers.folder, config, _beginning(inputs))
    text = f"{before.reason}\ngoing on from step {origin.state.step} with the hosts that remain"
    observers.folder.log_event("restart", text, step=origin.state.step, lost=list(before.lost))
    observers.display.note(text, alert=True)
    try:
        return _supervise(config, inputs, origin, observers, stop, overrides, profile)
    except UserError as error:  # with fewer hosts the configuration may no longer fit
        return Ending(FAILED, f"{before.reason}\nwhat remains cannot go on: {error}", step=origin.state.step)


def _supervise(
    config: RunConfig,
    inputs: Inputs,
    origin: Origin | None,
    observers: Observers,
    stop: StopFlag,
    overrides: Sequence[str],
    profile: bool,
) -> Ending:
    """Runs the job inside its cluster.

    Raises:
        UserError: the cluster is not there, too small, or would ignore an override.
    """
    status, reason, lost = FINISHED, "", list[str]()
    traced: Profile | None = None
    resumed = origin.state.step if origin else None
    step = resumed or 0
    try:
        with ExitStack() as stack:
            session = stack.enter_context(connect(config.cluster, weights_bytes=_sampler_bytes(config, inputs)))
            _heed_signals(stop)  # Ray has put a handler of SIGTERM in place that ends the process at once
            refuse_ignored_on(session.gpus, overridden_keys(overrides))
            observers.folder.log_event("cluster", f"Ray with {session.said}", logs=session.logs)
            if session.nodes > 1:
                check_cluster(config, session, observers.folder.path, stop)
            hosts = present() if session.nodes > 1 else {}
            try:
                groups = stack.enter_context(_groups(config, session, inputs, stop, observers, resumed))
                job = _job(config, inputs, origin, observers, stop, groups)
            except (DeadlineExceeded, ActorFailed) as error:
                lost = _lost(error, hosts, stop)
                raise
            if profile:
                job.profile = traced = Profile(groups, sampler_ops=config.rollout.engine == "torch")
            try:
                with settled_heap():
                    train(job)
                if config.checkpoint.export:
                    with job.turns.visiting(optimizer=False):
                        _export(config, groups.trainer, observers.folder, inputs.model_folder)
            except StopRequested:
                status, reason = INTERRUPTED, "stopped on request"
                _last_checkpoint(job)
            except _EXPECTED as error:
                status, reason, lost = _failure(error), str(error), _lost(error, hosts, stop)
                for row in getattr(error, "rows", []):  # of a reward budget: what failed, with its sample
                    observers.folder.log_failure({"step": job.state.step + 1, **row})
                _last_checkpoint(job)
            step = job.state.step
    except StopRequested:
        status, reason = INTERRUPTED, "stopped on request, before the first step"
    except (DeadlineExceeded, ActorFailed) as error:
        status, reason = FAILED, str(error)
    if lost:
        reason = f"{reason}\nleft the cluster: {'; '.join(lost)}"
    return Ending(status, reason, lost, step, traced)


def _lost(error: Exception, hosts: Mapping[str, str], stop: StopFlag) -> list[str]:
    """Hosts that left, where that may be why. Who was connected to a lost host notices before Ray does."""
    if not isinstance(error, ActorFailed | DeadlineExceeded):
        return []
    wait_s = NOTICE_S if isinstance(error, ActorLost) else 0.0
    return departed(hosts, within_s=wait_s, give_up=lambda: stop.requested_at is not None)


def _sampler_bytes(config: RunConfig, inputs: Inputs) -> int:
    return inputs.parameters * (2 if config.rollout.dtype == "bfloat16" else 4)


def _export(config: RunConfig, trainer: TrainerGroup, folder: RunFolder, source: Path) -> None:
    """The final weights as a Hugging Face folder, in the dtype that the model came in; an adapter merged, and by
    itself, in float32 as it was trained."""
    trainer.export_hf(str(folder.path / "model"), str(source), _export_dtype(source))
    if adapts(config):
        local = Path(bundled_model(config.model.path)).expanduser().is_dir()
        base = str(source) if local else config.model.path  # a name of the hub means the same elsewhere
        trainer.save_adapter(str(folder.path / "adapter"), base, "float32")


def _failure(error: Exception) -> int:
    """Bad input that only showed during training is still bad input."""
    return BAD_INPUT if isinstance(error, UserError) and not isinstance(error, RewardBudgetExceeded) else FAILED


def _last_checkpoint(job: Job) -> None:
    """Saves the last whole step of a run that ends early; where that cannot be done, the one before it stands."""
    job.stop.grace_s = float("inf")  # asked to stop already; this is the stopping
    job.end_step()
    if not job.whole:
        newest = max(job.store.versions(), default=None)
        stands = f"the checkpoint of step {newest.step} stands" if newest else "there is no checkpoint yet"
        job.observers.display.note(f"the weights were between two steps and are not saved: {stands}")
        return
    try:
        job.checkpoint()
    except _EXPECTED as error:
        job.observers.folder.log_event("checkpoint failed", str(error))
        job.observers.display.note(f"no last checkpoint could be written ({error}); the one before it stands")


def _job(
    config: RunConfig, inputs: Inputs, origin: Origin | None, observers: Observers, stop: StopFlag, groups: Groups
) -> Job:
    store = CheckpointStore(observers.folder.checkpoints, config.checkpoint.keep_last, config.checkpoint.keep_best)
    state = origin.state if origin else _beginning(inputs)
    job = Job(
        config=config,
        groups=groups,
        prompts=inputs.prompts,
        held_out=inputs.held_out,
        store=store,
        observers=observers,
        stop=stop,
        state=state,
        pairs=inputs.pairs,
        held_out_pairs=inputs.held_out_pairs,
        collapse=CollapseMonitor(config.guards.limits, config.guards.every),
    )
    job.peak_flops = groups.trainer.measure_peak()
    groups.trainer.set_objective(objective(config))
    if groups.critic is not None:
        groups.critic.set_objective(critic_objective(config))
    if origin is not None and origin.checkpoint is not None:
        job.restore(origin.checkpoint)
    return job


def _beginning(inputs: Inputs) -> ControllerState:
    return ControllerState(step=0, lineage=0, data=inputs.prompts.state_dict())


def _placed(config: RunConfig, session: Session, layout: Plan, stop: StopFlag, observers: Observers) -> Placement:
    """The plan's bundles, booked; where there are several hosts, ranks go by where the bundles have landed."""

    def settle(landed: Sequence[str]) -> Plan:
        return assign(config, session.topology, layout.booking, landed, env=session.env)

    several = session.nodes > 1
    placement = Placement(layout, seconds=config.deadlines.start, check=stop.check, settle=settle if several else None)
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


@contextmanager
def _groups(
    config: RunConfig,
    session: Session,
    inputs: Inputs,
    stop: StopFlag,
    observers: Observers,
    resumed_step: int | None,
) -> Iterator[Groups]:
    """Starts every actor, all at once, and ends them all on the way out."""
    deadlines, resolved = config.deadlines, inputs.config
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

        def group(cls: type[Any]) -> Any:
            made = cls(placement, deadlines, stop)
            stack.callback(made.close)
            return made

        groups = Groups(
            trainer=group(TrainerGroup),
            rollout=group(RolloutGroup),
            reward=group(RewardGroup),
            reference=group(ReferenceGroup) if needs_reference_worker(config) else None,
            critic=group(CriticGroup) if needs_critic(config) else None,
        )
        if session.nodes == 1 or session.gpus:  # else actors are on hosts that are not known yet
            _check_memory(config, session, inputs, layout, groups, observers)
        samplers = groups.rollout.starting(resolved, inputs.max_length)
        if session.gpus:  # vLLM measures the GPU while it starts, and takes what others load meanwhile for its own
            gather(samplers, phase="start", seconds=deadlines.start, stop=stop)
            samplers = []
        warmup = config.trainer.critic.warmup_steps if groups.critic is not None else 0
        trainers = groups.trainer.starting(
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
            trainers += groups.critic.starting(
                replace(resolved.model, path=inputs.critic_folder),
                replace(resolved.trainer, lr=critic.lr),
                temperature=config.rollout.temperature,
                total_steps=config.steps * config.trainer.updates_per_step,
                seed=config.seed,
                longest=inputs.max_length,
            )
        others = [*groups.reward.starting(resolved), *(groups.reference.starting(resolved) if groups.reference else [])]
        answers = gather([*samplers, *trainers, *others], phase="start", seconds=deadlines.start, stop=stop)
        if adapts(config):
            total, trained = answers[len(samplers)]
            observers.display.note(f"of {count(total)} weights the adapter's {count(trained)} are trained")
        if session.nodes > 1:
            groups.trainer.require_shared(observers.folder.path)
        yield groups


@contextmanager
def _signals() -> Iterator[StopFlag]:
    """Ctrl-C and SIGTERM ask the run to stop; a second Ctrl-C does not wait for it."""
    flag = StopFlag()
    before = _heed_signals(flag)
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _heed_signals(flag: StopFlag) -> dict[signal.Signals, Any]:
    """Returns the handlers that there were before."""

    def handle(number: int, _frame: object) -> None:
        if flag.requested_at is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        flag.request()

    return {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}


def _finish(config: RunConfig, observers: Observers, status: int, reason: str, overrides: Sequence[str]) -> None:
    """Summary, picture and last words; none of them can change how the run ended."""
    word = {FINISHED: "finished", INTERRUPTED: "interrupted"}.get(status, "failed")
    folder = observers.folder
    folder.log_event("end", reason or word)
    summary = summaries.build(
        folder,
        name=config.name,
        seed=config.seed,
        status=word,  # type: ignore[arg-type]
        peak_memory_bytes=observers.memory.stop(),
    )
    folder.write_summary(summary)
    observers.trackers.finish(summary)
    picture = plot_run(folder.path) if folder.metrics.exists() else None
    if reason:
        observers.display.note(reason, alert=word == "failed")
    observers.display.finish(summary, plot=picture, next_command=_next_command(status, overrides))


def _next_command(status: int, overrides: Sequence[str]) -> str:
    """What a user would type next: the same recipe on a real model and GPU, or the way to go on."""
    if status != FINISHED:
        kept = [override for override in overrides if not override.startswith("resume=")]
        return shlex.join(["python", "-m", "rlsys.launch", *kept, "resume=auto"])
    recipe = next((override for override in overrides if override.startswith("+recipe=")), "+recipe=grpo_qwen")
    return (
        f"python -m rlsys.launch {recipe} model=hub model.path=Qwen/Qwen3-0.6B data=gsm8k data.path=openai/gsm8k "
        "trainer.lr=1e-6 steps=200"
    )


def _export_dtype(folder: Path) -> str:
    """What the model came in: an export is as large as its source."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return name if name in ("float32", "bfloat16", "float16") else "float32"
