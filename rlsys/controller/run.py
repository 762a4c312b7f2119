"""One run from a checked configuration to its summary: check the inputs, start the actors, train, stop cleanly."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from rlsys.algorithms.requirements import adapts, critic_objective, objective
from rlsys.checkpoint.controller_state import ControllerState
from rlsys.checkpoint.store import CheckpointStore
from rlsys.cluster import orphans
from rlsys.cluster.departures import NOTICE_S, departed, present
from rlsys.cluster.processes import Process
from rlsys.cluster.session import connect
from rlsys.config.assets import bundled_model
from rlsys.config.compose import overridden_keys
from rlsys.config.errors import UserError
from rlsys.config.ignored import refuse_ignored_on
from rlsys.config.schema import RunConfig
from rlsys.controller.clock import RunClock
from rlsys.controller.doctor import check_cluster, preflight
from rlsys.controller.heap import settled_heap
from rlsys.controller.inputs import Inputs, check_inputs
from rlsys.controller.job import Groups, GuardStop, Job, Observers
from rlsys.controller.loop import train
from rlsys.controller.profile import Profile
from rlsys.controller.recovery import Ending, Restarts, lost_trainers
from rlsys.controller.resume import Origin, find_origin, folders_left, last_origin
from rlsys.controller.starting import Started, started
from rlsys.controller.watchdog import Watchdog
from rlsys.engines.sync.verify import SyncError
from rlsys.rewards.budget import RewardBudgetExceeded
from rlsys.tracking import summary as summaries
from rlsys.tracking.collapse import CollapseMonitor
from rlsys.tracking.display import make_display
from rlsys.tracking.memory import MemoryMonitor
from rlsys.tracking.plots import plot_run
from rlsys.tracking.run import RunFolder
from rlsys.tracking.secrets import mask
from rlsys.tracking.trackers import TrackerSet
from rlsys.workers.failures import backoff_s
from rlsys.workers.groups import TrainerGroup
from rlsys.workers.waits import ActorFailed, ActorLost, DeadlineExceeded, StopFlag, StopRequested

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


@dataclass(frozen=True)
class _Watch:
    """What may end a run before its last step: a request, a stall, the clock."""

    stop: StopFlag
    clock: RunClock

    def ending(self, dog: Watchdog | None, step: int) -> Ending:
        """How a run ends that was stopped."""
        if dog is not None and dog.stalled:
            return Ending(FAILED, dog.stalled, step=step)
        if self.clock.up:
            return Ending(INTERRUPTED, "stopped before the time limit (time_limit_minutes)", step=step)
        return Ending(
            INTERRUPTED, "stopped on request" if step else "stopped on request, before the first step", step=step
        )


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
        watch = _Watch(stack.enter_context(_signals()), _clock(config))
        stack.callback(display.close)
        folder.log_event("resume" if origin else "start", f"at step {first} of {config.steps}")
        trackers.start(mask(asdict(config)), folder.path)
        for left in folders_left(config, folder.path):
            _say_orphans(observers, orphans.end_here(left))
        ending = _supervise(config, inputs, origin, observers, watch, overrides, profile)
        restarts = Restarts(first)
        while ending.lost and watch.stop.requested_at is None and restarts.allow(ending.step):
            ending = _again(ending, config, observers, watch, overrides, profile)
        _finish(config, observers, ending.status, ending.reason, overrides)
        if ending.profile is not None:
            ending.profile.finish(folder.path, Console(highlight=False))
        return ending.status


def _clock(config: RunConfig) -> RunClock:
    """The limit counts from the start of this process: what started it, and waits for it, counts so too."""
    limit, every = config.time_limit_minutes, config.checkpoint.every_minutes
    return RunClock(
        None if limit is None else 60 * limit,
        None if every is None else 60 * every,
        began=psutil.Process().create_time(),
    )


def _say_orphans(observers: Observers, found: Sequence[Process]) -> None:
    if found:
        who = ", ".join(f"{process.role} (process {process.pid} on {process.host})" for process in found)
        text = f"ended what an earlier process of this run had left: {who}"
        observers.folder.log_event("orphans", text, processes=[asdict(process) for process in found])
        observers.display.note(text, alert=True)


def _again(
    before: Ending, config: RunConfig, observers: Observers, watch: _Watch, overrides: Sequence[str], profile: bool
) -> Ending:
    """The job from its last checkpoint, on the hosts that remain."""
    inputs = check_inputs(config)
    origin = last_origin(observers.folder, config, _beginning(inputs))
    text = f"{before.reason}\ngoing on from step {origin.state.step} with the hosts that remain"
    observers.folder.log_event("restart", text, step=origin.state.step, lost=list(before.lost))
    observers.display.note(text, alert=True)
    try:
        return _supervise(config, inputs, origin, observers, watch, overrides, profile)
    except UserError as error:  # with fewer hosts the configuration may no longer fit
        return Ending(FAILED, f"{before.reason}\nwhat remains cannot go on: {error}", step=origin.state.step)


def _supervise(
    config: RunConfig,
    inputs: Inputs,
    origin: Origin | None,
    observers: Observers,
    watch: _Watch,
    overrides: Sequence[str],
    profile: bool,
) -> Ending:
    """Runs the job inside its cluster.

    Raises:
        UserError: the cluster is not there, too small, or would ignore an override.
    """
    resumed = origin.state.step if origin else None
    hosts: Mapping[str, str] = {}
    ending = Ending(FAILED, step=resumed or 0)
    try:
        with ExitStack() as stack:
            session = stack.enter_context(connect(config.cluster, weights_bytes=_sampler_bytes(config, inputs)))
            _heed_signals(watch.stop)  # Ray has put a handler of SIGTERM in place that ends the process at once
            refuse_ignored_on(session.gpus, overridden_keys(overrides))
            observers.folder.log_event("cluster", f"Ray with {session.said}", logs=session.logs)
            if session.nodes > 1:
                check_cluster(config, session, observers.folder.path, watch.stop)
                for left in folders_left(config, observers.folder.path):
                    _say_orphans(observers, orphans.end_elsewhere(left))
            hosts = present() if session.nodes > 1 else {}
            try:
                actors = stack.enter_context(started(config, session, inputs, watch.stop, observers, resumed))
                dog = _watchdog(config, observers, watch, actors, local=session.local)
                stack.callback(dog.close)
                dog.start()
            except (DeadlineExceeded, ActorFailed) as error:
                ending = replace(ending, lost=_lost(error, hosts, watch.stop))
                raise
            ending = _with_these_samplers(config, inputs, origin, observers, watch, dog, actors, hosts, profile)
    except StopRequested:
        ending = watch.ending(None, ending.step)
    except (DeadlineExceeded, ActorFailed) as error:
        ending = replace(ending, reason=str(error))
    if ending.lost:
        ending = replace(ending, reason=f"{ending.reason}\nleft the cluster: {'; '.join(ending.lost)}")
    return ending


def _watchdog(config: RunConfig, observers: Observers, watch: _Watch, actors: Started, *, local: bool) -> Watchdog:
    def say(text: str, **fields: Any) -> None:
        observers.folder.log_event("stall", text, **fields)
        observers.display.note(text, alert=True)

    def handles() -> dict[str, Any]:
        return {name: handle for group in actors.groups.present() for name, handle in group.handles().items()}

    def look_at_the_clock() -> None:
        if watch.clock.over():
            watch.stop.request()

    return Watchdog(observers.folder.path, config.health, say, watch.stop, handles, local=local, also=look_at_the_clock)


def _with_these_samplers(
    config: RunConfig,
    inputs: Inputs,
    origin: Origin | None,
    observers: Observers,
    watch: _Watch,
    dog: Watchdog,
    actors: Started,
    hosts: Mapping[str, str],
    profile: bool,
) -> Ending:
    """One job after the other, as long as only trainers are lost: all others go on, and are given the weights of the
    new lineage by the next job's first sync."""
    restarts = Restarts(origin.state.step if origin else 0, config.health.restarts)
    while True:
        ending = _one_job(config, inputs, origin, observers, watch, dog, actors, hosts, profile)
        if not ending.trainers or not restarts.allow(ending.step):
            return ending
        began = time.monotonic()
        who = ", ".join(ending.trainers)
        observers.folder.log_event("trainer lost", f"{who}: {ending.reason}", step=ending.step)
        observers.display.note(f"{who} died; starting again from the last checkpoint", alert=True)
        inputs = check_inputs(config)
        origin = last_origin(observers.folder, config, _beginning(inputs))
        try:
            _pause(backoff_s(restarts.used), watch.stop)
            while True:
                try:
                    actors.replace_trainers()
                    break
                except ActorLost as error:  # counts as another loss
                    observers.folder.log_event("trainer lost", f"while starting again: {error}", step=origin.state.step)
                    if not restarts.allow(ending.step):
                        return replace(ending, reason=str(error))
        except StopRequested:  # the checkpoint that trainers were to go on from stands
            return watch.ending(dog, origin.state.step)
        dog.look_who_runs()
        seconds = time.monotonic() - began
        text = f"trainers started again in {seconds:.1f} s; going on from step {origin.state.step}"
        fields = {"step": origin.state.step, "lineage": origin.state.lineage, "seconds": round(seconds, 3)}
        observers.folder.log_event("trainer restarted", text, **fields)
        observers.display.note(text)


def _pause(seconds: float, stop: StopFlag) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        stop.check()
        time.sleep(0.1)


def _one_job(
    config: RunConfig,
    inputs: Inputs,
    origin: Origin | None,
    observers: Observers,
    watch: _Watch,
    dog: Watchdog,
    actors: Started,
    hosts: Mapping[str, str],
    profile: bool,
) -> Ending:
    """Trains with these actors until the last step, or until something ends it."""
    groups, step = actors.groups, origin.state.step if origin else 0
    watch.stop.grace_s = 0.0  # whatever phase the job before this one was in
    traced: Profile | None = None
    with ExitStack() as stack:
        job: Job | None = None
        try:
            job = _job(config, inputs, origin, observers, watch.stop, groups, watch.clock)
            stack.callback(job.close)
            if profile:
                job.profile = traced = Profile(groups, sampler_ops=config.rollout.engine == "torch")
            with settled_heap():
                train(job)
            if config.checkpoint.export:
                with job.turns.visiting(optimizer=False):
                    _export(config, groups.trainer, observers.folder, inputs.model_folder)
            return Ending(FINISHED, step=job.state.step, profile=traced)
        except StopRequested:
            if job is None:
                return watch.ending(dog, step)
            if not _waits_for_trainer(dog):
                _last_checkpoint(job)
            return replace(watch.ending(dog, job.state.step), profile=traced)
        except _EXPECTED as error:
            lost = _lost(error, hosts, watch.stop)
            trainers = lost_trainers(groups) if isinstance(error, ActorLost) and not lost else []
            if job is not None:
                _keep(job, error, trainers)
                step = job.state.step
            elif isinstance(error, UserError):
                raise
            return Ending(_failure(error), str(error), lost, step, traced, trainers)


def _waits_for_trainer(dog: Watchdog) -> bool:
    """Whether who hangs is who would have to write a checkpoint."""
    return any(actor.startswith(("trainer", "critic")) for actor in dog.stalled_actors)


def _keep(job: Job, error: Exception, trainers: Sequence[str]) -> None:
    """What can be kept of a job that ``error`` ends."""
    for row in getattr(error, "rows", []):  # of a reward budget: what failed, with its sample
        job.observers.folder.log_failure({"step": job.state.step + 1, **row})
    if not trainers:
        _last_checkpoint(job)
        return
    with suppress(*_EXPECTED):  # the step's line: its weights may have been seen, and its number is of this lineage
        job.end_step()


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
    try:
        job.end_step()
        if not job.whole:
            newest = max(job.store.versions(), default=None)
            stands = f"the checkpoint of step {newest.step} stands" if newest else "there is no checkpoint yet"
            job.observers.display.note(f"the weights were between two steps and are not saved: {stands}")
            return
        job.checkpoint()
    except _EXPECTED as error:
        job.observers.folder.log_event("checkpoint failed", str(error))
        job.observers.display.note(f"no last checkpoint could be written ({error}); the one before it stands")
    finally:
        job.stop.grace_s = 0.0


def _job(
    config: RunConfig,
    inputs: Inputs,
    origin: Origin | None,
    observers: Observers,
    stop: StopFlag,
    groups: Groups,
    clock: RunClock | None = None,
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
        clock=clock or _clock(config),
    )
    job.clock.job_begins()
    job.peak_flops = groups.trainer.measure_peak()
    groups.trainer.set_objective(objective(config))
    if groups.critic is not None:
        groups.critic.set_objective(critic_objective(config))
    if origin is not None and origin.checkpoint is not None:
        job.restore(origin.checkpoint)
    return job


def _beginning(inputs: Inputs) -> ControllerState:
    return ControllerState(step=0, lineage=0, data=inputs.prompts.state_dict())


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
