"""Samples an hour of the asynchronous controller against the synchronous one, with long-tailed generation times.

    python -m benchmarks.async_speed [--workers 2 8 32 64] [--mean-s 1] [--quick] [--json PATH] [--out docs/results]

The controller, its sources, the worker groups, Ray and the rollout workers are the real ones. Samplers and trainer
take time and compute nothing (``benchmarks/simulated.py``); both modes use the same.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from hydra import compose, initialize_config_dir

from benchmarks import report
from benchmarks.report import MIB
from benchmarks.simulated import ALONE, CAP, InstantReward, Logical, SimulatedHost, SimulatedTrainer, Timing
from benchmarks.simulated import response_tokens as drawn_tokens
from rlsys.checkpoint.controller_state import ControllerState
from rlsys.checkpoint.store import CheckpointStore
from rlsys.cluster.placement import ActorSpec
from rlsys.cluster.session import INLINE_BYTES
from rlsys.config.assets import asset
from rlsys.config.build import build
from rlsys.config.compose import register_schemas, to_plain
from rlsys.config.schema import RunConfig
from rlsys.controller.inputs import check_inputs
from rlsys.controller.job import Groups, Job, Observers
from rlsys.controller.loop import train
from rlsys.tracking.display import Display
from rlsys.tracking.ledger import audit
from rlsys.tracking.memory import MemoryMonitor
from rlsys.tracking.run import RunFolder
from rlsys.tracking.trackers import TrackerSet
from rlsys.workers.actors import Actor
from rlsys.workers.fleet import Fleets
from rlsys.workers.groups import RewardGroup, RolloutGroup, TrainerGroup
from rlsys.workers.waits import StopFlag
from rlsys.workers.weights import SentWeights

WORKERS = (2, 8, 32, 64)
HOSTS = 8  # processes that samplers are divided over, at most
SLOTS, GROUP = 8, 8  # sequences that a sampler decodes at once; samples of a prompt
MEAN_TOKENS = 24
UPDATE_SHARE = 0.05  # an update holds a sampler up for so much of a mean response
AIM, UTILISATION = 2.0, 0.9
_WARM = {"sync": 1, "one_step_off": 2, "async": 5}  # steps before anything is counted: the pipeline fills


@dataclass(frozen=True)
class Setting:
    """workers: samplers. rounds: samples of a step, in slots of all samplers. ratio: seconds of a training step, in
    mean seconds of sampling a step's batch with all slots full."""

    workers: int
    mode: str
    max_staleness: int = 4
    in_flight: str = "keep"
    rounds: int = 4
    ratio: float = 1.0

    @property
    def prompts(self) -> int:
        return self.rounds * self.workers * SLOTS // GROUP

    @property
    def controller(self) -> list[str]:
        if self.mode != "async":
            return [
                f"controller={self.mode}",
                *(["controller.uncorrected=true"] if self.mode == "one_step_off" else []),
            ]
        uncorrected = ["controller.uncorrected=true"] if self.max_staleness else []
        bounds = [f"controller.max_staleness={self.max_staleness}", f"controller.in_flight={self.in_flight}"]
        return ["controller=async", *bounds, *uncorrected]

    @property
    def name(self) -> str:
        return f"async, staleness ≤ {self.max_staleness}, {self.in_flight}" if self.mode == "async" else self.mode


class Steady:
    """A fleet in which nobody dies."""

    def __init__(self, count: int):
        self._all = list(range(count))

    def ready(self) -> list[int]:
        return self._all

    def __getattr__(self, _: str) -> Any:
        return lambda *_, **__: []


def still(samplers: int) -> Fleets:
    fleets: Any = (Steady(samplers), Steady(1))
    return Fleets(*fleets)


class SimulatedJob(Job):
    """Weights are a version and a pause; nothing is saved. marks: after each step, when it was and how busy slots had
    been until then."""

    def __init__(self, hosts: list[Any], **kwargs: Any):
        super().__init__(**kwargs)
        self.hosts, self.lines = hosts, list[dict[str, float]]()
        self.marks = [self._mark()]

    def sync_weights(self) -> None:
        sent = SentWeights("object_store", [], str(self.version.packed()), 0)
        self.groups.rollout.update_weights(sent, self.version, self.source.in_flight)
        self.source.advance(self.version)

    def checkpoint_if_due(self) -> None:
        self.marks.append(self._mark())

    def _log(self, metrics: dict[str, float]) -> None:
        self.lines.append(dict(metrics))
        super()._log(metrics)

    def _mark(self) -> tuple[float, float]:
        return time.monotonic(), sum(ray.get([host.slot_s.remote() for host in self.hosts]))


class Silent:
    def __getattr__(self, _: str) -> Any:
        return lambda *_, **__: None


def run_config(setting: Setting, steps: int) -> RunConfig:
    overrides = [f"steps={steps}", f"data.prompts_per_step={setting.prompts}", f"rollout.samples_per_prompt={GROUP}"]
    overrides += [f"data.max_response_tokens={int(CAP * MEAN_TOKENS)}", *setting.controller]
    overrides += ["eval.every=0", "tracker.rollouts=0", "tracker.use=[]", "cluster.placement=disaggregated"]
    register_schemas()
    with initialize_config_dir(str(asset("configs")), version_base="1.3"):
        return build(to_plain(compose("config", overrides=["+recipe=grpo_qwen", *overrides])))


def mean_tokens() -> float:
    """Of a response, after the cut."""
    return statistics.fmean(drawn_tokens(seed, MEAN_TOKENS) for seed in range(20_000))


def group_of(cls: Any, role: str, handles: list[Any], config: RunConfig, stop: StopFlag) -> Any:
    group = cls.__new__(cls)
    group._deadlines, group._stop = config.deadlines, stop
    group._actors = [Actor(ActorSpec(role, index), handle) for index, handle in enumerate(handles)]
    if cls is RolloutGroup:
        group._sampler_checksum = group._sender_checksum = None
    return group


def measure(setting: Setting, mean_s: float, steps: int, folder: Path) -> dict[str, float]:
    """``steps`` steps after the first ones, with actors of their own."""
    warm = _WARM[setting.mode]
    config = run_config(setting, warm + steps)
    inputs = check_inputs(config)
    timing = Timing(SLOTS, MEAN_TOKENS, mean_s / mean_tokens(), UPDATE_SHARE * mean_s)
    train_s = setting.ratio * setting.rounds * mean_s
    hosts, samplers = start_samplers(setting.workers, config, timing)
    trainer = ray.remote(SimulatedTrainer).options(num_cpus=0.01).remote(train_s)
    reward = ray.remote(InstantReward).options(num_cpus=0.01).remote()
    stop = StopFlag()
    groups = Groups(
        trainer=group_of(TrainerGroup, "trainer", [trainer], config, stop),
        rollout=group_of(RolloutGroup, "rollout", samplers, config, stop),
        reward=group_of(RewardGroup, "reward", [reward], config, stop),
        reference=None,
        fleets=still(setting.workers),
    )
    display: Display = Silent()  # type: ignore[assignment]
    try:
        with RunFolder.create(folder, f"speed-{setting.workers}", config) as run:
            job = SimulatedJob(
                hosts,
                config=config,
                groups=groups,
                prompts=inputs.prompts,
                held_out=None,
                store=CheckpointStore(run.checkpoints, 1, False),
                observers=Observers(run, TrackerSet([], lambda _: None), display, MemoryMonitor(interval_s=3600)),
                stop=stop,
                state=ControllerState(step=0, lineage=0, data=inputs.prompts.state_dict()),
            )
            try:
                train(job)
            finally:
                job.close()
            books = audit(run.path)
            assert books.ok, books.violations
    finally:
        for actor in (*hosts, trainer, reward):
            ray.kill(actor)
    return figures_of(job, setting, warm, train_s, timing)


def start_samplers(count: int, config: RunConfig, timing: Timing) -> tuple[list[Any], list[Logical]]:
    """The processes, and the samplers dealt round over them."""
    hosts = [
        ray.remote(SimulatedHost).options(num_cpus=0.01, max_concurrency=4000).remote()
        for _ in range(min(count, HOSTS))
    ]
    shares = [len(range(i, count, len(hosts))) for i in range(len(hosts))]
    ray.get([host.begin.remote(n, config.rollout, timing) for host, n in zip(hosts, shares, strict=True)])
    return hosts, [Logical(hosts[i % len(hosts)], i // len(hosts)) for i in range(count)]


def figures_of(job: SimulatedJob, setting: Setting, warm: int, train_s: float, timing: Timing) -> dict[str, float]:
    (began, busy_before), (ended, busy_after) = job.marks[warm], job.marks[-1]
    lines, seconds = job.lines[warm:], ended - began
    samples = len(lines) * setting.prompts * GROUP
    tokens = statistics.fmean(line["rollout/length_mean"] for line in lines)
    return {
        "samples_per_hour": 3600 * samples / seconds,
        "step_s": seconds / len(lines),
        "train_s": train_s,
        "utilisation": (busy_after - busy_before) / (seconds * setting.workers * SLOTS),
        "useful": samples * tokens * timing.token_s / (seconds * setting.workers * SLOTS),
        "staleness_mean": statistics.fmean(line.get("async/staleness_mean", 0.0) for line in lines),
        "staleness_max": max(line.get("async/staleness_max", 0.0) for line in lines),
        "reissued_groups": sum(line.get("async/reissued", 0.0) + line.get("async/late", 0.0) for line in lines),
        "groups": float(len(lines) * setting.prompts),
        "response_tokens": tokens,
        "wait_s": statistics.fmean(line.get("async/wait_s", line.get("time/rollout_s", 0.0)) for line in lines),
    }


def settings_of(workers: list[int]) -> list[Setting]:
    """Sync and async for every number of workers; then, for the second one, what else can be set."""
    found = [Setting(count, mode) for count in workers for mode in ("sync", "async")]
    few = workers[min(1, len(workers) - 1)]
    found += [Setting(few, "async", max_staleness=bound) for bound in (0, 1)]
    found += [Setting(few, "one_step_off"), Setting(few, "async", in_flight="finish")]
    return found + [Setting(few, mode, ratio=ratio) for ratio in (0.5, 2.0) for mode in ("sync", "async")]


def seconds_of(workers: int, mean_s: float) -> float:
    """Of a mean response. So many samples a second that the cores of this machine, which all samplers share, are not
    what is measured."""
    return mean_s * max(1.0, workers / 16)


def table(found: list[tuple[Setting, dict[str, float]]]) -> str:
    header = ("workers", "controller", "training / sampling", "batch, slots", "samples an hour", "× sync", "slots busy",
              "usefully", "staleness, mean (max)", "groups sampled again", "tokens of a response")  # fmt: skip
    rows = []
    for setting, f in found:
        against = base_of(setting, found)
        rows.append(
            (
                setting.workers,
                setting.name,
                f"{setting.ratio:g}",
                setting.rounds,
                f"{f['samples_per_hour']:,.0f}",
                "–" if against is None else f"{f['samples_per_hour'] / against['samples_per_hour']:.2f}",
                f"{100 * f['utilisation']:.0f} %",
                f"{100 * f['useful']:.0f} %",
                f"{f['staleness_mean']:.2f} ({f['staleness_max']:.0f})",
                f"{f['reissued_groups']:.0f} of {f['groups']:.0f}",
                f"{f['response_tokens']:.1f}",
            )
        )
    return report.table(header, rows)


def base_of(setting: Setting, found: list[tuple[Setting, dict[str, float]]]) -> dict[str, float] | None:
    """Figures of the synchronous controller in the same place."""
    same = (setting.workers, setting.rounds, setting.ratio)
    return next(
        (f for s, f in found if s.mode == "sync" and (s.workers, s.rounds, s.ratio) == same and s is not setting), None
    )


def page(found: list[tuple[Setting, dict[str, float]]], mean_s: float, steps: int) -> str:
    return f"""# Asynchronous against synchronous

How many samples an hour are trained on, by controller, where generation times have a long tail: lengths of responses
are lognormal (σ = 1) and cut at {CAP:.0f} × their mean.

{table(found)}

The aim, where training takes as long as sampling and staleness ≤ 4: {AIM:.0f} × sync, {100 * UTILISATION:.0f} % of
slots busy.

What is real: the controller's loop, its sources and buffer, worker groups, Ray, the rollout workers with their
environments and tickets, the ledger (whose audit found nothing lost, and nothing trained twice, in any of these runs).
What is simulated: a sampler has {SLOTS} slots and batches continuously; a token takes {ALONE:g} of its time with one
sequence under way and all of it with {SLOTS}. A mean response takes {mean_s:g} s with all slots full, and
proportionally longer with more than 16 samplers, which share this machine's cores. The trainer waits; *training /
sampling* is the time of its step in units of what a step's batch takes to be sampled with all slots full. *Batch,
slots*: samples of a step, in slots of all samplers; groups have {GROUP} samples. An update of the weights holds each
sampler up for {UPDATE_SHARE:g} of a mean response. More than {HOSTS} samplers share {HOSTS} processes.

*Slots busy*: seconds in which a sequence was decoded, over seconds × slots × samplers; pauses for weights, waiting and
empty slots all count against it. *Usefully*: tokens that were trained × seconds of a token with all slots full, over
the same; groups that are sampled again cost the difference. *Groups sampled again*: because they could no longer be
trained within the bound. They get other seeds, so what is trained has shorter responses than what is sampled.
Counted are {steps} steps after {_WARM["async"]} (async) or {_WARM["sync"]} (sync) others, in which the pipeline fills.

{report.measured("benchmarks.async_speed", "ray")}
"""


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--mean-s", type=float, default=1.0, help="seconds of a mean response")
    parser.add_argument("--workers", type=int, nargs="*", default=WORKERS)
    parser.add_argument("--pairs", action="store_true", help="sync and async alone, without what else can be set")
    arguments = parser.parse_args()
    steps, mean_s = (2, 0.5) if arguments.quick else (arguments.steps, arguments.mean_s)
    wanted = [Setting(2, "sync"), Setting(2, "async")] if arguments.quick else settings_of(list(arguments.workers))
    wanted = wanted[: 2 * len(arguments.workers)] if arguments.pairs else wanted
    os.environ.setdefault("RAY_max_direct_call_object_size", str(INLINE_BYTES))  # as a run's own cluster has it
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")  # it ends actors when others fill the machine
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of calls that were cancelled
    ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=400 * MIB, log_to_driver=False)
    found: list[tuple[Setting, dict[str, float]]] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            for setting in wanted:
                found.append((setting, measure(setting, seconds_of(setting.workers, mean_s), steps, Path(folder))))
                report.sys.stderr.write(f"{setting} {found[-1][1]}\n")
    finally:
        ray.shutdown()
    figures: dict[str, Any] = {
        "ratios": {
            f"{s.name}, {s.workers} workers / sync": f["samples_per_hour"] / against["samples_per_hour"]
            for s, f in found
            if (against := base_of(s, found)) is not None and (s.ratio, s.rounds) == (1.0, 4)
        },
        "limits": {"async at staleness 4 / sync": AIM, "slots busy": UTILISATION},
        "settings": [vars(s) | f for s, f in found],
    }
    report.finish(arguments, "async_speed", page=page(found, mean_s, steps), figures=figures, packages=["ray"])


if __name__ == "__main__":
    main()
