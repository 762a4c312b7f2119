"""Around the run: deadlines.*, cluster.*, tracker.*."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from experiences import make_experience

from knobs.table import Actors, Bench, entry
from rlsys import launch as command_line
from rlsys.cluster import session, submission
from rlsys.cluster.placement import ActorSpec, plan
from rlsys.cluster.topology import expected
from rlsys.cluster.unified import sampler_share
from rlsys.config.clusters import LocalCluster, RayCluster
from rlsys.config.schema import DeadlineConfig
from rlsys.engines.rollout.base import Rest
from rlsys.tracking.display import PlainDisplay
from rlsys.tracking.live import LiveDisplay
from rlsys.workers.actors import Actor
from rlsys.workers.experience import collect
from rlsys.workers.groups import TrainerGroup
from rlsys.workers.rollout import SampleRequest
from rlsys.workers.waits import Call, DeadlineExceeded, StopFlag

# --- deadlines.* ---


def silent(bench: Bench) -> ray.ObjectRef:
    """The reference of an answer that never comes."""
    bench.request.getfixturevalue("ray_cluster")

    @ray.remote(num_cpus=0, max_retries=0)
    def hang() -> None:
        import threading

        threading.Event().wait()

    ref = hang.remote()
    bench.request.addfinalizer(lambda: ray.cancel(ref, force=True))
    return ref


def too_late(phase: str, wait: Callable[[DeadlineConfig], Any]) -> None:
    with pytest.raises(DeadlineExceeded, match=f"within 0.125 s in phase '{phase}'"):
        wait(replace(DeadlineConfig(), **{phase: 0.125}))


@entry("deadlines.start", "deadlines.train", "deadlines.sync", "deadlines.checkpoint")
def trainer_deadlines(bench: Bench) -> None:
    ref = silent(bench)

    class Silent:
        def __getattr__(self, method: str) -> Any:
            return SimpleNamespace(remote=lambda *_, **__: ref)

    def group(deadlines: DeadlineConfig) -> TrainerGroup:
        made = TrainerGroup.__new__(TrainerGroup)
        made._deadlines, made._stop = deadlines, StopFlag()
        made._actors = [Actor(ActorSpec("trainer", 0), Silent())]
        return made

    config = bench.config()
    options: dict[str, Any] = {"temperature": 1.0, "total_steps": 1, "seed": 0}
    too_late("start", lambda d: group(d).starting(config.model, config.trainer, **options))
    too_late("train", lambda d: group(d).optim_step())
    too_late("sync", lambda d: group(d).export_weights("float32"))
    too_late("checkpoint", lambda d: group(d).save_state("nowhere"))


@entry("deadlines.rollout", "deadlines.reward", "deadlines.reference")
def experience_deadlines(bench: Bench) -> None:
    never = silent(bench)
    shard = make_experience([[2, 2]]).shards[0]
    prompts = bench.inputs("data.prompts_per_step=1").prompts.next_batch()

    def collecting(phase: str) -> Callable[[DeadlineConfig], Any]:
        def answered(summary: Any, late: str) -> ray.ObjectRef:
            return never if phase == late else ray.put(summary)

        rollout = Actors({"generate": lambda *_: Call(answered(shard.rollout, "rollout"), "sampler", "responses")})

        def score(*_: Any, payload: Any, **__: Any) -> tuple[list[None], Call]:
            return [None], Call(answered([shard.reward], "reward"), "reward", "rewards", payload)

        reference = Actors({"logprobs": lambda *_: ([None], Call(answered(4, "reference"), "reference", "log-probs"))})
        request = SampleRequest(2, 1.0, 8, run_seed=0)
        return lambda d: collect(prompts, request, rollout, Actors({"score": score}), reference, d, StopFlag())  # type: ignore[arg-type]

    for phase in ("rollout", "reward", "reference"):
        too_late(phase, collecting(phase))


# --- cluster.*, tracker.* ---


@entry("cluster.address")
def connection(bench: Bench) -> None:
    asked: list[dict[str, Any]] = []

    def init(**arguments: Any) -> Any:
        asked.append(arguments)
        return SimpleNamespace(address_info={})

    node = {"Alive": True, "Resources": {}}
    for name, fake in {"init": init, "nodes": lambda: [node], "shutdown": lambda: None}.items():
        bench.monkeypatch.setattr(session.ray, name, fake)
    for config in (LocalCluster(kind="local"), RayCluster(kind="ray", address="10.0.0.1:6379")):
        with session.connect(config):
            pass
    assert [arguments["address"] for arguments in asked] == ["local", "10.0.0.1:6379"]
    assert [arguments["object_store_memory"] for arguments in asked] == [1 << 29, None]


@entry("cluster.kind", "cluster.nodes", "cluster.gpus_per_node", "cluster.gpu", "cluster.racks", "cluster.trays")
def shape(bench: Bench) -> None:
    def there(*overrides: str) -> tuple[int, int, str]:
        nodes = expected(bench.config(*overrides).cluster).nodes
        assert nodes[0].gpu is not None
        return len(nodes), nodes[0].gpus, nodes[0].gpu.name

    assert there("cluster=gpu_pool", "cluster.nodes=3") == (3, 8, "H100")
    assert there("cluster=gpu_pool", "cluster.nodes=2", "cluster.gpus_per_node=4", "cluster.gpu=B200") == (2, 4, "B200")
    assert there("cluster=gb200_nvl72") == (18, 4, "GB200")
    assert there("cluster=gb200_nvl72", "cluster.racks=2", "cluster.trays=16") == (32, 4, "GB200")


@entry("cluster.page_cache_gib")
def page_cache(bench: Bench) -> None:
    largest = [
        sampler_share(bench.config("cluster=gb10", f"cluster.page_cache_gib={size}"), {"weights": 20 << 30}, 120 << 30)
        for size in (16.0, 40.0)
    ]
    assert largest == [pytest.approx(0.85 - 20 / 120), pytest.approx((120 - 40 - 20) / 120)]


@entry("cluster.threads")
def threads(bench: Bench) -> None:
    actors = plan(bench.config("cluster.threads=3"), gpus=0, cores=8).actors
    assert {a.env["OMP_NUM_THREADS"] for a in actors if a.role != "reward"} == {"3"}


@entry("cluster.placement")
def placement(bench: Bench) -> None:
    def asked(name: str) -> list[str]:
        """Of samplers and trainer, in an update of weights."""
        with bench.job(f"cluster.placement={name}") as job:
            order: list[str] = []
            for actors in (job.groups.trainer, job.groups.rollout):
                for verb in ("offload", "wake"):
                    actors.answers[verb] = lambda *_, verb=verb, **__: order.append(verb) or [Rest()]  # type: ignore[union-attr]
            with job.turns.syncing():
                order.append("weights")
            return order

    assert asked("shared") == asked("disaggregated") == ["weights"]
    assert asked("colocated") == ["offload", "weights", "offload", "wake"]

    def common(name: str) -> int:
        """GPUs that trainer and sampler have in common."""
        layout = plan(bench.config(f"cluster.placement={name}"), gpus=2, cores=8)
        return len({a.bundle for a in layout.of("trainer")} & {a.bundle for a in layout.of("rollout")})

    assert [common(name) for name in ("shared", "colocated", "disaggregated")] == [1, 1, 0]


@entry("tracker.use")
def tracker_use(bench: Bench) -> None:
    used = bench.started("tracker.use=[knobs.plugins.FileTracker]").folder.path
    assert (used / "tracked").exists()
    assert not (bench.started().folder.path / "tracked").exists()


@entry("tracker.display")
def tracker_display(bench: Bench) -> None:
    shown = [type(bench.started(f"tracker.display={mode}").display) for mode in ("plain", "live")]
    assert shown == [PlainDisplay, LiveDisplay]


# --- submit ---


@entry("submit")
def handed_to_a_cluster(bench: Bench) -> None:
    (bench.tmp / "env.yaml").write_text("env_vars: {NAME: value}\n")
    sent: list[dict[str, Any]] = []

    class Client:
        def submit_job(self, *, runtime_env: dict[str, Any], **_: Any) -> str:
            sent.append(runtime_env["env_vars"])
            return "job"

    def ended(*_: Any) -> Any:
        return SimpleNamespace(status=SimpleNamespace(value="SUCCEEDED"), driver_exit_code=0)

    bench.monkeypatch.setattr(submission.jobs, "client_of", lambda _: Client())
    bench.monkeypatch.setattr(submission.jobs, "follow", ended)
    bench.monkeypatch.chdir(bench.tmp)
    for value in ("true", "env.yaml"):
        overrides = ("+recipe=grpo_qwen", f"submit={value}", f"run_root={bench.tmp / 'runs'}")
        assert command_line.main(list(overrides)) == 0
    assert [env.get("NAME") for env in sent] == [None, "value"]
    assert not (bench.tmp / "runs").exists(), "nothing runs here"
