"""The run itself: name, steps, seed, rollout.*, reward.*, eval.*, checkpoint.*."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from experiences import make_experience

from knobs.table import Actors, Bench, entry
from rlsys.batch import DataProto, jagged
from rlsys.checkpoint.controller_state import ControllerState
from rlsys.checkpoint.store import CheckpointStore
from rlsys.cluster.placement import plan
from rlsys.config.schema import RewardPart, TorchRollout, VllmRollout
from rlsys.controller import collecting, run
from rlsys.controller import job as jobs
from rlsys.controller.loop import train
from rlsys.controller.resume import find_origin
from rlsys.data.prompts import load_tokenizer
from rlsys.engines.rollout import start_engine
from rlsys.engines.rollout.torch import TorchEngine
from rlsys.evals import heldout
from rlsys.rewards.base import Failure
from rlsys.rewards.budget import RewardBudgetExceeded
from rlsys.rewards.compose import ScoredSample
from rlsys.rewards.pool import RewardPool
from rlsys.workers.experience import Experience
from rlsys.workers.rollout import RolloutWorker, SampleRequest
from rlsys.workers.waits import StopFlag
from rlsys.workers.weights import Host, SendRequest, SentWeights, TakenWeights

# --- the run ---


@entry("name", "run_root")
def folder(bench: Bench) -> None:
    path = bench.started("name=mine", f"run_root={bench.tmp / 'here'}").folder.path
    assert path.parent == bench.tmp / "here"
    assert path.name.endswith("-mine")


@entry("resume")
def resume(bench: Bench) -> None:
    path = bench.started().folder
    store = CheckpointStore(path.checkpoints, keep_last=1, keep_best=False)
    partial = store.begin(3)
    ControllerState(step=3, lineage=0).write(partial)
    store.commit(partial, step=3)
    config = bench.inputs().config
    saved = bench.config("eval.problems=4")
    assert find_origin(saved) is None
    origin = find_origin(replace(saved, resume="auto")) or find_origin(replace(config, resume="auto"))
    assert origin is not None
    assert origin.state.step == 3


@entry("steps")
def steps(bench: Bench) -> None:
    def counted(total: int) -> int:
        actors = Actors(size=0)
        state = SimpleNamespace(step=0)
        actors.answers["begin_step"] = lambda: setattr(state, "step", state.step + 1)
        vars(actors).update(state=state, config=bench.config(f"steps={total}"))
        train(actors)  # type: ignore[arg-type]
        return len(actors.given("update"))

    assert [counted(n) for n in (2, 5)] == [2, 5]


def requested(bench: Bench, *overrides: str, result: Experience | None = None) -> tuple[SampleRequest, dict[str, Any]]:
    """What a step asks the samplers for, and how it is collected."""
    seen: list[tuple[SampleRequest, dict[str, Any]]] = []

    def record(_prompts: Any, request: SampleRequest, *_: Any, **options: Any) -> Experience:
        seen.append((request, options))
        return result or make_experience([[2, 2]])

    bench.monkeypatch.setattr(collecting, "collect", record)
    with bench.job(*overrides) as job:
        job.experience()
    return seen[0]


@entry("seed")
def seed(bench: Bench) -> None:
    uids = [bench.inputs(f"seed={n}").prompts.next_batch().non_tensor_batch["uid"].tolist() for n in (0, 7)]
    assert uids[0] != uids[1]
    assert [requested(bench, f"seed={n}")[0].run_seed for n in (0, 7)] == [0, 7]


# --- rollout.* ---


@entry("rollout.samples_per_prompt", "rollout.temperature")
def request(bench: Bench) -> None:
    asked, _ = requested(bench, "rollout.samples_per_prompt=3", "rollout.temperature=0.7")
    assert (asked.samples, asked.temperature) == (3, 0.7)


@entry("rollout.workers")
def rollout_workers(bench: Bench) -> None:
    assert [len(plan(bench.config(f"rollout.workers={n}"), gpus=0, cores=4).of("rollout")) for n in (1, 2)] == [1, 2]


def answer(bench: Bench, **changes: Any) -> str:
    """The bundled model's greedy answer through a real worker and the torch engine."""
    inputs = bench.inputs("rollout=torch")
    config = replace(inputs.config.rollout, **changes)
    tokenizer = load_tokenizer(str(inputs.model_folder))
    assert inputs.held_out is not None
    prompts = inputs.held_out.select_idxs(np.array([0]))

    async def sample() -> torch.Tensor:
        worker = RolloutWorker()
        await worker.start(str(inputs.model_folder), config, max_length=24, seed=0, threads=1)
        batch, _ = await worker.generate(prompts, 0, 1, SampleRequest(1, 0.0, 8, run_seed=0))
        await worker.close()
        return jagged.values(batch.batch["response_ids"])

    return str(tokenizer.decode(asyncio.run(sample()), skip_special_tokens=True))


@entry("rollout.stop", "rollout.stop_token_ids", "rollout.environment")
def stopping(bench: Bench) -> None:
    whole = answer(bench)
    assert len(whole) == 3
    token = load_tokenizer(str(bench.inputs().model_folder)).get_vocab()[whole[0]]
    assert answer(bench, stop=[whole[0]]) == whole[0]
    assert answer(bench, stop_token_ids=[token]) == whole[0]
    assert answer(bench, environment="knobs.plugins.OneToken") == whole[0]


def vllm_arguments(bench: Bench, **changes: Any) -> dict[str, Any]:
    pytest.importorskip("vllm")
    from rlsys.engines.rollout.vllm import engine_arguments

    config = VllmRollout(engine="vllm", samples_per_prompt=2, **changes)
    return engine_arguments(str(bench.model), config, max_length=32, seed=0)


@entry("rollout.dtype", "rollout.max_concurrent")
def both_engines(bench: Bench) -> None:
    config = TorchRollout(engine="torch", samples_per_prompt=2, dtype="bfloat16", max_concurrent=3)
    engine = TorchEngine(str(bench.model), config, max_length=32)
    assert (engine._model.dtype, engine._max_concurrent) == (torch.bfloat16, 3)
    arguments = vllm_arguments(bench, dtype="bfloat16", max_concurrent=3)
    assert (arguments["dtype"], arguments["max_num_seqs"]) == ("bfloat16", 3)
    assert synced(bench, "rollout.dtype=bfloat16")[0] == "bfloat16"


def synced(bench: Bench, *overrides: str) -> tuple[str, SendRequest]:
    """What the trainer is asked to export for a sampler on its host."""
    here = Host("this one", gpu=False)
    trainer = Actors({"hosts": lambda: [here], "export_weights": lambda *_: SentWeights("object_store", [], "sum", 0)})
    with bench.job(*overrides, trainer=trainer) as job:
        taken = [TakenWeights("sum", {})]
        job.groups.rollout = Actors({"hosts": lambda: [here], "update_weights": lambda *_, **__: taken})  # type: ignore[assignment]
        job.sync_weights()
    ((asked, _),) = trainer.given("export_weights")
    return asked


@entry("rollout.sync")
def sync(bench: Bench) -> None:
    wanted = {
        "auto": "shared_memory",
        "shared_memory": "shared_memory",
        "object_store": "object_store",
        "delta": "delta",
    }
    assert {name: synced(bench, f"rollout.sync={name}")[1].transport for name in wanted} == wanted


@entry("rollout.tensor_parallel", "rollout.pipeline_parallel")
def several_gpus_a_sampler(bench: Bench) -> None:
    arguments = vllm_arguments(bench, tensor_parallel=2, pipeline_parallel=3)
    assert (arguments["tensor_parallel_size"], arguments["pipeline_parallel_size"]) == (2, 3)
    for key in ("tensor_parallel", "pipeline_parallel"):
        (sampler,) = plan(bench.config(f"rollout.{key}=2"), gpus=4, cores=8).of("rollout")
        assert sampler.gpus == 2


@entry("rollout.engine")
def engine_kind(bench: Bench) -> None:
    pytest.importorskip("vllm")
    from rlsys.engines.rollout.vllm import VllmEngine

    async def started(*_: Any, **__: Any) -> str:
        return "vLLM"

    bench.monkeypatch.setattr(VllmEngine, "start", started)
    vllm = VllmRollout(engine="vllm", samples_per_prompt=1)
    torch_rollout = TorchRollout(engine="torch", samples_per_prompt=1)
    assert asyncio.run(start_engine(str(bench.model), vllm, max_length=32)) == "vLLM"
    assert isinstance(asyncio.run(start_engine(str(bench.model), torch_rollout, max_length=32)), TorchEngine)


@entry("rollout.kv_cache_gib", "rollout.gpu_memory_fraction", "rollout.engine_args")
def vllm_only(bench: Bench) -> None:
    pytest.importorskip("vllm")
    from rlsys.engines.rollout import vllm

    for on_cpu, key, value in ((True, "kv_cache_memory_bytes", 2 << 30), (False, "gpu_memory_utilization", 0.3)):
        bench.monkeypatch.setattr(vllm, "current_platform", SimpleNamespace(is_cpu=lambda on_cpu=on_cpu: on_cpu))
        assert vllm_arguments(bench, kv_cache_gib=2.0, gpu_memory_fraction=0.3)[key] == value
    assert vllm_arguments(bench, engine_args={"block_size": 32})["block_size"] == 32


# --- reward.* ---


def scored(bench: Bench, parts: dict[str, RewardPart], **changes: Any) -> ScoredSample:
    with RewardPool.from_config(replace(bench.config().reward, parts=parts, **changes)) as pool:
        return pool.score([("0042", {"answer": "0042"})])[0]


@entry("reward.parts")
def parts(bench: Bench) -> None:
    length = RewardPart(use="knobs.rewards.length_of")
    sample = scored(
        bench,
        {
            "a": RewardPart(use="exact_match", weight=3.0),
            "b": length,
            "c": replace(length, args={"times": 2.0}),
            "d": replace(length, when="a < 1"),
        },
    )
    assert sample.scores == {"a": 1, "b": 4, "c": 8, "d": None}
    assert sample.reward == 3 * 1 + 4 + 8


@entry("reward.workers", "reward.timeout_s")
def reward_pool(bench: Bench) -> None:
    config = replace(bench.config().reward, workers=2)
    with RewardPool.from_config(config) as pool:
        assert len(pool._processes) == 2
    failure = scored(bench, {"a": RewardPart(use="knobs.rewards.hang")}, timeout_s=0.25).failure
    assert failure is not None
    assert "no result within 0.25 s" in failure.message


@entry("reward.max_failure_rate")
def max_failure_rate(bench: Bench) -> None:
    failed = make_experience([[2, 2], [2, 2]])
    failed.shards[0].reward.failures.append(
        {
            "row": 0,
            "part": "correct",
            "error": "raised",
            "message": "no",
            "response": "",
            **vars(Failure("raised", "", "")),
        }
    )
    with pytest.raises(RewardBudgetExceeded):
        requested(bench, result=failed)
    requested(bench, "reward.max_failure_rate=0.25", result=failed)


# --- eval.*, checkpoint.* ---


@entry("eval.every")
def eval_every(bench: Bench) -> None:
    bench.monkeypatch.setattr(jobs, "evaluate", lambda *_: ({"eval/accuracy": 0.5}, [], 1))

    def evaluated(every: int) -> list[int]:
        found = []
        with bench.job(f"eval.every={every}", "steps=7") as job:
            for step in range(8):
                job.state = replace(job.state, step=step, extra={})
                job.evaluate_if_due()
                found += [step] if "evaluated" in job.state.extra else []
        return found

    assert evaluated(3) == [0, 3, 6, 7]
    assert evaluated(5) == [0, 5, 7]
    assert evaluated(0) == []


@entry("eval.problems")
def eval_problems(bench: Bench) -> None:
    assert [len(bench.inputs(f"eval.problems={n}").held_out or ()) for n in (3, 6)] == [3, 6]


@entry("eval.samples", "eval.pass_k", "eval.metric")
def eval_figures(bench: Bench) -> None:
    def answers(_problems: Any, request: SampleRequest, *_: Any, **__: Any) -> Experience:
        rewards = [float(i % 2) for i in range(2 * request.samples)]
        experience = make_experience([[2] * request.samples] * 2, rewards=rewards)
        experience.shards[0].reward.scores["other"] = np.ones(len(rewards))
        return experience

    bench.monkeypatch.setattr(heldout, "collect", answers)

    def figures(*overrides: str) -> dict[str, float]:
        options = ["+reward.parts.other={use: exact_match, weight: 1.0, args: {}, when: null}", *overrides]
        config = bench.config(*options)
        return heldout.evaluate(config, DataProto(), Actors(), Actors(), StopFlag())[0]  # type: ignore[arg-type]

    assert not any("pass@" in name for name in figures())
    assert any("pass@2" in name for name in figures("eval.samples=4", "eval.pass_k=2"))
    assert figures("eval.metric=other")["eval/accuracy"] == 1
    assert figures()["eval/accuracy"] < 1


@entry("checkpoint.every", "checkpoint.keep_last", "checkpoint.keep_best")
def checkpoints(bench: Bench) -> None:
    def kept(*overrides: str) -> list[int]:
        """After nine steps, of which the second was the best."""
        with bench.job("steps=9", *overrides) as job:
            for step in range(1, 10):
                extra = {"evaluated": step, "accuracy": 1.0 if step == 2 else 0.1}
                job.state = replace(job.state, step=step, extra=extra)
                job.checkpoint_if_due()
            return sorted(int(path.name[5:]) for path in job.store.folder.iterdir())

    assert kept("checkpoint.every=2") == [2, 8, 9]
    assert kept("checkpoint.every=3") == [6, 9], "the best of 3, 6 and 9 is the newest of equals"
    assert kept("checkpoint.every=2", "checkpoint.keep_last=3") == [2, 6, 8, 9]
    assert kept("checkpoint.every=2", "checkpoint.keep_best=false") == [8, 9]


@entry("checkpoint.export")
def export(bench: Bench) -> None:
    @contextmanager
    def given(value: Any) -> Any:
        yield value

    def exported(value: str) -> int:
        trainer = Actors()
        groups = jobs.Groups(trainer, Actors(), Actors(), None)  # type: ignore[arg-type]
        bench.monkeypatch.setattr(
            run,
            "connect",
            lambda *_, **__: given(SimpleNamespace(gpus=0, cores=1, nodes=1, local=True, logs="", said="")),
        )
        bench.monkeypatch.setattr(run, "started", lambda *_: given(SimpleNamespace(groups=groups)))
        dog = SimpleNamespace(start=lambda: None, close=lambda: None, stalled_actors=[])
        bench.monkeypatch.setattr(run, "_watchdog", lambda *_, **__: dog)
        bench.monkeypatch.setattr(run, "train", lambda _: None)
        run.run_job(bench.config("eval.problems=4", f"checkpoint.export={value}"))
        return len(trainer.given("export_hf"))

    assert [exported(value) for value in ("true", "false")] == [1, 0]


@entry("tracker.rollouts")
def tracker_rollouts(bench: Bench) -> None:
    rows = [requested(bench, f"tracker.rollouts={n}")[1]["record_rows"] for n in (0, 8, 9)]
    assert rows == [0, 8, 16], "whole groups of eight"
