"""What a step costs the driver, by the number of sampling workers.

    python -m benchmarks.controller_scale [--steps 5] [--quick] [--json PATH] [--out docs/results]

The controller is the real one, from the prompts to the step's line of metrics: ``rlsys.controller.job.Job`` with its
collector, its worker groups, waits and trackers, over a Ray cluster of this machine. What it calls are actors that
answer at once with columns of the sizes that sampling would have given. Many logical workers share one actor: each has
its own entry in the worker group and is called for its own shards. Weights are not synchronised.
"""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch
from hydra import compose, initialize_config_dir

from benchmarks import report
from benchmarks.report import MIB
from rlsys.batch import DataProto, jagged
from rlsys.checkpoint.controller_state import ControllerState
from rlsys.checkpoint.store import CheckpointStore
from rlsys.cluster.placement import ActorSpec
from rlsys.cluster.session import INLINE_BYTES
from rlsys.config.assets import asset
from rlsys.config.build import build
from rlsys.config.compose import register_schemas, to_plain
from rlsys.config.schema import RunConfig
from rlsys.controller.heap import settled_heap
from rlsys.controller.inputs import Inputs, check_inputs
from rlsys.controller.job import Groups, Job, Observers
from rlsys.controller.loop import train
from rlsys.tracking.display import Display
from rlsys.tracking.memory import MemoryMonitor
from rlsys.tracking.meter import Metered, peak_resident
from rlsys.tracking.run import RunFolder
from rlsys.tracking.trackers import TrackerSet
from rlsys.workers.actors import Actor
from rlsys.workers.experience import Experience
from rlsys.workers.groups import RewardGroup, RolloutGroup, TrainerGroup
from rlsys.workers.reward import RewardSummary
from rlsys.workers.rollout import SampleRequest, summarize
from rlsys.workers.waits import StopFlag

WORKERS = (8, 32, 128, 512, 1024)
SAMPLES, LARGE, GROUP = 16_384, 100_000, 8  # samples a step, and of a prompt
ACTORS, RANKS = 4, 8  # real actors; trainer ranks, whatever the number of samplers
RESPONSE = 128  # mean tokens
LIMIT = 2.0  # times the driver's time from 8 to 512 workers
_ROLES = (("trainer", TrainerGroup), ("rollout", RolloutGroup), ("reward", RewardGroup))


class SyntheticWorker(Metered, verbs=("generate", "score", "load_batch", "forward_backward", "optim_step")):
    """Answers like every kind of worker, without a model."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._calls: Counter[str] = Counter()

    def generate(self, prompts: DataProto, first: int, last: int, request: SampleRequest) -> tuple[DataProto, Any]:
        self._calls["generate"] += 1
        prompts = prompts.slice(first, last)
        rows = len(prompts) * request.samples
        generator = np.random.default_rng(rows)
        lengths = torch.from_numpy(np.maximum(generator.gamma(2.8, RESPONSE / 2.8, rows).astype(np.int64), 1))
        batch = prompts.repeat(request.samples)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        tokens = int(offsets[-1])
        columns = {
            "response_ids": torch.randint(512, (tokens,)),
            "response_mask": torch.ones(tokens, dtype=torch.bool),
            "rollout_logprobs": torch.randn(tokens),
            "weight_version": torch.full((tokens,), 0),
        }
        for name, values in columns.items():
            batch.batch[name] = jagged.from_values(values, offsets=offsets)
        batch.batch["sample_index"] = torch.arange(rows) % request.samples
        batch.non_tensor_batch["finish_reason"] = np.array(["stop"] * rows, dtype=object)
        return batch, summarize(batch)

    def score(self, record_rows: list[int], step_rows: int, train: bool, *shards: DataProto) -> tuple[Any, ...]:
        self._calls["score"] += 1
        rewards = [(torch.arange(len(shard)) % 3 == 0).float() for shard in shards]
        columns = [DataProto.from_dict(tensors={"rewards": values}) for values in rewards]
        return *columns, [RewardSummary(v.numpy(), {"correct": v.double().numpy()}, [], []) for v in rewards]

    def load_batch(self, *_: Any, **__: Any) -> None:
        self._calls["load_batch"] += 1

    def forward_backward(self, *_: Any, **__: Any) -> dict[str, float]:
        self._calls["forward_backward"] += 1
        return {"train/loss": 0.0, "train/tokens": 1.0, "policy/loss": 0.0}

    def optim_step(self) -> dict[str, float]:
        self._calls["optim_step"] += 1
        return {"train/grad_norm": 1.0, "train/lr": 1e-6, "train/skipped": 0.0}

    def take_reading(self) -> Any:
        self._calls["take_reading"] += 1
        return super().take_reading()

    def calls(self) -> dict[str, int]:
        """So many of each since the last time."""
        made, self._calls = dict(self._calls), Counter()
        return made


class StepsOnly(Job):
    """Neither weights nor checkpoints; every step's cost to this process is noted."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.costs: list[dict[str, float]] = []
        self._since: tuple[float, float] = (0.0, 0.0)

    def begin_step(self) -> None:
        self._since = (time.process_time(), time.thread_time())
        super().begin_step()

    def end_step(self) -> None:
        super().end_step()
        process, thread = self._since
        self.costs.append({"cpu_s": time.process_time() - process, "loop_cpu_s": time.thread_time() - thread})

    def sync_weights(self) -> None:
        """Nobody has weights."""

    def checkpoint_if_due(self) -> None:
        """Nothing to save."""

    def _require_fresh(self, experience: Experience) -> None:
        """Versions stand still without weights."""


class Silent:
    """A display that shows nothing."""

    def __getattr__(self, _: str) -> Any:
        return lambda *_, **__: None


def run_config(samples: int, steps: int) -> RunConfig:
    overrides = [f"steps={steps}", f"data.prompts_per_step={samples // GROUP}", f"rollout.samples_per_prompt={GROUP}"]
    overrides += ["eval.every=0", "tracker.rollouts=0", "tracker.use=[]"]
    register_schemas()
    with initialize_config_dir(str(asset("configs")), version_base="1.3"):
        return build(to_plain(compose("config", overrides=["+recipe=grpo_qwen", *overrides])))


def multiplexed(cls: type, role: str, actors: list[Any], count: int, config: RunConfig, stop: StopFlag) -> Any:
    """A worker group of ``count`` logical workers over the actors."""
    group = cls.__new__(cls)
    group._deadlines, group._stop = config.deadlines, stop
    group._actors = [Actor(ActorSpec(role, index), actors[index % len(actors)]) for index in range(count)]
    return group


def measure(
    actors: list[Any], inputs: Inputs, config: RunConfig, workers: int, samples: int, folder: Path
) -> dict[str, float]:
    """Cost of a step to the driver, medians over the steps but the first."""
    stop, counts = StopFlag(), {"trainer": RANKS, "rollout": workers, "reward": 1}
    groups = {role: multiplexed(cls, role, actors, counts[role], config, stop) for role, cls in _ROLES}
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    with RunFolder.create(folder, f"scale-{workers}", config) as run:
        display: Display = Silent()  # type: ignore[assignment]
        job = StepsOnly(
            config=config,
            groups=Groups(reference=None, **groups),
            prompts=inputs.prompts,
            held_out=None,
            store=CheckpointStore(run.checkpoints, 1, 1),
            observers=Observers(run, TrackerSet([], lambda _: None), display, MemoryMonitor(interval_s=3600)),
            stop=stop,
            state=ControllerState(step=0, lineage=0, data=inputs.prompts.state_dict()),
        )
        with closing(job), settled_heap():
            train(job)
    made: Counter[str] = Counter()
    for answer in ray.get([actor.calls.remote() for actor in actors]):
        made.update(answer)
    return figures_of(job.costs, made, samples)


def figures_of(costs: list[dict[str, float]], made: Counter[str], samples: int) -> dict[str, float]:
    steady = costs[1:]
    cpu = statistics.median(cost["cpu_s"] for cost in steady)
    calls = sum(made.values()) / len(costs)
    return {
        "cpu_s": cpu,
        "loop_cpu_s": statistics.median(cost["loop_cpu_s"] for cost in steady),
        "calls": calls,
        "cpu_us_per_call": 1e6 * cpu / calls,
        "cpu_us_per_sample": 1e6 * cpu / samples,
        "peak_rss": float(peak_resident()),
        "rss": float(psutil.Process().memory_info().rss),
    }


def table(found: dict[str, dict[str, float]]) -> str:
    header = (
        "workers × samples", "calls a step", "driver CPU a step, s", "of it the loop's thread", "µs a call",
        "µs a sample", "driver memory (peak), MiB",
    )  # fmt: skip
    return report.table(
        header,
        (
            (
                name,
                f"{f['calls']:,.0f}",
                f"{f['cpu_s']:.2f}",
                f"{f['loop_cpu_s']:.2f}",
                f"{f['cpu_us_per_call']:,.0f}",
                f"{f['cpu_us_per_sample']:.0f}",
                f"{f['peak_rss'] / MIB:,.0f}",
            )
            for name, f in found.items()
        ),
    )


def page(found: dict[str, dict[str, float]], ratios: dict[str, float], steps: int) -> str:
    said = "\n".join(f"- {name}: {ratio:.2f}" for name, ratio in ratios.items())
    return f"""# The controller with many workers

One training step of {SAMPLES:,} samples (groups of {GROUP}, {RESPONSE} tokens on average) as the driver sees it, and
one of {LARGE:,}: it hands prompts to the sampling workers, each shard's reference to the reward worker, reads every
row's summary, computes group advantages, deals rows out to {RANKS} trainer ranks, and writes the step's line of
metrics, with every actor's own figures. The controller's code is the real one; {ACTORS} real Ray actors answer in the
place of all workers, with columns of realistic size and without a model. Weights are not synchronised: that is a
matter of bytes, not of rows.

{table(found)}

{said}

The limit for the driver's time from 8 to 512 workers is {LIMIT:.0f} times. CPU: of the driver's process, its Ray
threads included (`process_time`); of the loop's thread: `thread_time`. Medians over {steps - 1} steps, a first one
does not count. Calls: of all verbs, answers of actors about themselves included. Memory: the largest resident set
while it ran. What grows with the workers is one call of each of them: 0.2 ms of the loop's thread, and 0.6 ms in the
threads of Ray's core worker, which is Ray's own code. That is why the time grows by more than the limit: what does not
depend on the workers has become so little. Beyond 64 workers there is one shard a worker, rewards are asked for by 64
calls, and 64 workers are asked for their figures in a step.

{report.measured("benchmarks.controller_scale", "ray", "numpy")}
"""


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="*", default=WORKERS)
    arguments = parser.parse_args()
    steps = 2 if arguments.quick else arguments.steps
    settings = (
        [(8, 512), (32, 512)] if arguments.quick else [*((w, SAMPLES) for w in arguments.workers), (WORKERS[-1], LARGE)]
    )
    os.environ.setdefault("RAY_max_direct_call_object_size", str(INLINE_BYTES))  # as a run's own cluster has it
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")  # it ends actors when others fill the machine
    ray.init(
        address="local", num_cpus=ACTORS, include_dashboard=False, object_store_memory=800 * MIB, log_to_driver=False
    )
    actors = [ray.remote(SyntheticWorker).options(num_cpus=1).remote() for _ in range(ACTORS)]
    found: dict[str, dict[str, float]] = {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            for workers, samples in settings:
                config = run_config(samples, steps)
                name = f"{workers:,} × {samples:,}"
                found[name] = measure(actors, check_inputs(config), config, workers, samples, Path(folder))
    finally:
        ray.shutdown()
    few, many = (f"{workers:,} × {settings[0][1]:,}" for workers in (settings[0][0], 32 if arguments.quick else 512))
    ratios = {
        f"driver {what}, {many.split()[0]} / {few.split()[0]} workers": found[many][key] / found[few][key]
        for what, key in (("CPU", "cpu_s"), ("memory", "peak_rss"))
    }
    figures = {"ratios": ratios, "limits": {"driver CPU, 512 / 8 workers": LIMIT}, "settings": found, "steps": steps}
    report.finish(
        arguments, "controller_scale", page=page(found, ratios, steps), figures=figures, packages=["ray", "numpy"]
    )


if __name__ == "__main__":
    main()
