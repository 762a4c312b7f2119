"""``rlsys fixture``: a run of one weight, whole in seconds, the same bits each time.

It goes through the rooms that a real run's files come from (data order, sample seeds, advantages, checkpoints, run
folder) and writes all that a run leaves, with a checksum of every file: a smoke test of an installation, a file system
or a container, without a model, Ray or a GPU. One number is learnt: the policy answers 1 to the number x with
probability σ(w·x), and is right where x is positive.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import yaml
from rich.console import Console

from rlsys.algorithms.advantages import estimate
from rlsys.checkpoint import manifest as manifests
from rlsys.checkpoint.atomic import write_json, writing
from rlsys.checkpoint.controller_state import ControllerState
from rlsys.checkpoint.shards import Shard
from rlsys.checkpoint.store import CheckpointStore
from rlsys.config.errors import UserError
from rlsys.controller.determinism import deterministic, report
from rlsys.data.manifest import NAME as DATA_MANIFEST
from rlsys.data.manifest import differences, read_manifest, write_manifest
from rlsys.data.permutation import Permutation
from rlsys.data.sampler import DataPosition, PromptOrder
from rlsys.engines.rollout.noise import sample_tokens
from rlsys.engines.train import state as trainer_state
from rlsys.environments.play import sample_seed
from rlsys.tracking import summary as summaries
from rlsys.tracking.metrics import read_metrics
from rlsys.tracking.run import RunFolder, resolve_resume

NAME = "fixture"
DETERMINISM = "determinism.json"
_DATA = "train.jsonl"
_JITTER = 0.01  # noise from torch's global generator on what the policy is shown: its state is part of a checkpoint


@dataclass(frozen=True, kw_only=True)
class FixtureConfig:
    """steps: of the whole run; seed: of everything; device: that the weight is on; rows: of the data set."""

    name: str = NAME
    steps: int = 50
    seed: int = 0
    device: Literal["cpu", "cuda"] = "cpu"
    rows: int = 48
    prompts_per_step: int = 8
    samples_per_prompt: int = 4
    lr: float = 0.1
    checkpoint_every: int = 10


@dataclass
class Scalar:
    """The policy: a weight [1, 1], its AdamW, and how many steps they have behind them."""

    weight: torch.nn.Parameter
    optimizer: torch.optim.AdamW
    steps: int = 0

    @classmethod
    def new(cls, config: FixtureConfig) -> Scalar:
        weight = torch.nn.Parameter(torch.zeros(1, 1, device=config.device))
        made = cls(weight, torch.optim.AdamW([weight], lr=config.lr, weight_decay=0.0, foreach=False))
        made.optimizer.state[weight] = {
            "step": torch.tensor(0.0),
            **{name: torch.zeros_like(weight) for name in trainer_state.MOMENTS},
        }
        return made

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """[B] -> [B, 2] of the answers 0 and 1."""
        signed = torch.stack((-x / 2, x / 2), 1).to(self.weight.device)
        return (signed.reshape(-1, 1) @ self.weight).view(-1, 2)

    def shards(self) -> tuple[dict[str, Shard], dict[str, Shard]]:
        """Weights and moments as a checkpoint has them."""
        state = self.optimizer.state[self.weight]
        moments = {f"{name}/weight": Shard(state[name], (1, 1), 0) for name in trainer_state.MOMENTS}
        return {"weight": Shard(self.weight.data, (1, 1), 0)}, moments

    def bits(self) -> str:
        """SHA-256 of weight and moments."""
        tensors = [shard.local for shards in self.shards() for shard in shards.values()]
        return hashlib.sha256(b"".join(t.detach().cpu().numpy().tobytes() for t in tensors)).hexdigest()


@dataclass
class Progress:
    """Where the run stands. stream: SHA-256 over every sample so far, each step's over the one before."""

    policy: Scalar
    position: DataPosition = field(default_factory=DataPosition)
    stream: str = ""


def make_rows(config: FixtureConfig) -> list[dict[str, Any]]:
    """Numbers evenly spread over −1 … 1, in a seeded order, each with its answer."""
    order = Permutation(config.rows, "fixture", config.seed)
    numbers = [(2 * n + 1 - config.rows) / config.rows for n in order(torch.arange(config.rows).numpy()).tolist()]
    return [{"prompt": f"{x:.6f}", "answer": "1" if x > 0 else "0"} for x in numbers]


def step(
    config: FixtureConfig, rows: Sequence[dict[str, Any]], at: Progress
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """One training step on the next prompts: metrics, and the samples as JSON content."""
    began = time.perf_counter()
    taken, at.position = PromptOrder(len(rows), config.seed).take(at.position, config.prompts_per_step)
    drawn = [(rows[row], f"{row}@{epoch}", i) for row, epoch in taken for i in range(config.samples_per_prompt)]
    uids = [uid for _, uid, _ in drawn]
    seeds = [sample_seed(config.seed, uid, index) for _, uid, index in drawn]
    x = torch.tensor([float(row["prompt"]) for row, _, _ in drawn])
    x = x + _JITTER * torch.randn(len(x))
    policy = at.policy
    sampled, logprobs = sample_tokens(
        policy.logits(x).detach().cpu(),
        torch.ones(len(x)),
        torch.tensor(seeds, dtype=torch.int64),
        torch.zeros(len(x), dtype=torch.int64),
    )
    rewards = (sampled == torch.tensor([int(row["answer"]) for row, _, _ in drawn])).to(torch.float32)
    advantages, _ = estimate("grpo", rewards, uids)
    chosen = policy.logits(x).log_softmax(-1).gather(-1, sampled.to(policy.weight.device)[:, None])[:, 0]
    loss = -(advantages.to(chosen.device) * chosen).sum() / len(drawn)
    policy.optimizer.zero_grad()
    loss.backward()
    assert policy.weight.grad is not None
    norm = float(policy.weight.grad.abs())
    policy.optimizer.step()
    policy.steps += 1
    samples = [
        {
            "uid": uid,
            "sample": index,
            "seed": seed,
            "response": int(token),
            "logprob": float(p),
            "reward": float(reward),
        }
        for (_, uid, index), seed, token, p, reward in zip(drawn, seeds, sampled, logprobs, rewards, strict=True)
    ]
    at.stream = hashlib.sha256((at.stream + json.dumps(samples)).encode()).hexdigest()
    metrics = {
        "reward/mean": float(rewards.mean()),
        "loss/total": float(loss.detach()),
        "grad_norm": norm,
        "policy/weight": float(policy.weight.detach()),
        "rollout/tokens": len(drawn),
        "train/tokens": len(drawn),
        "time/step_s": time.perf_counter() - began,
    }
    return metrics, samples


def save(config: FixtureConfig, store: CheckpointStore, at: Progress, reward: float) -> None:
    """A checkpoint of the step that was just done."""
    folder = store.begin(at.policy.steps)
    weights, moments = at.policy.shards()
    place = trainer_state.Place(folder, 0, 1)
    trainer_state.save(place, weights, moments, trainer_state.Progress(at.policy.steps, at.policy.steps))
    extra = {"stream": at.stream}
    ControllerState(step=at.policy.steps, lineage=0, data=asdict(at.position), extra=extra).write(folder)
    store.commit(folder, step=at.policy.steps, metric=reward)


def load(config: FixtureConfig, folder: Path) -> Progress:
    """What :func:`save` wrote; torch's generators are as they were then.

    Raises:
        UserError: it is no checkpoint of a fixture run.
    """
    policy, state = Scalar.new(config), ControllerState.read(folder)
    done = trainer_state.load(trainer_state.Place(folder, 0, 1), *policy.shards(), config.seed)
    policy.steps = done.steps
    policy.optimizer.state[policy.weight]["step"].fill_(done.applied)
    return Progress(policy, DataPosition(**state.data), str(state.extra.get("stream", "")))


def replay(config: FixtureConfig, rows: Sequence[dict[str, Any]], steps: int) -> Progress:
    """The first ``steps`` steps from the beginning, in memory, uninterrupted."""
    with deterministic(config.seed):
        at = Progress(Scalar.new(config))
        for _ in range(steps):
            step(config, rows, at)
    return at


def run(folder: RunFolder, config: FixtureConfig, *, checkpoint: Path | None, stop_after: int | None) -> dict[str, Any]:
    """Trains in ``folder`` from the checkpoint (None: from the beginning) and writes all that a run leaves.

    Args:
        stop_after: steps of this session; None: to the end.

    Returns:
        What ``determinism.json`` holds.

    Raises:
        UserError: the checkpoint is of another run, the data was changed, or nothing can be written.
    """
    rows = _data(folder.path / "data", config)
    store = CheckpointStore(folder.checkpoints, keep_last=2, keep_best=False)
    with deterministic(config.seed):
        at = load(config, checkpoint) if checkpoint is not None else Progress(Scalar.new(config))
        first = at.policy.steps
        last = config.steps if stop_after is None else min(config.steps, first + stop_after)
        folder.log_event("resume" if checkpoint else "start", f"at step {first} of {config.steps}")
        while at.policy.steps < last:
            metrics, samples = step(config, rows, at)
            done = at.policy.steps
            folder.log_metrics(metrics, step=done, lineage=0)
            folder.write_rollouts(done, samples)
            if done == last or not done % config.checkpoint_every:
                save(config, store, at, metrics["reward/mean"])
        said = report(config.seed, torch.device(config.device))
    again = replay(config, rows, at.policy.steps)
    said |= {
        "step": at.policy.steps,
        "weights_sha256": at.policy.bits(),
        "stream_sha256": at.stream,
        "replayed": {"weights": again.policy.bits() == at.policy.bits(), "stream": again.stream == at.stream},
    }
    said["same_bits"] = all(said["replayed"].values()) and said["product_repeated"]
    write_json(folder.path / DETERMINISM, said)
    _seal(folder, config, at, finished=last == config.steps)
    return said


def _data(folder: Path, config: FixtureConfig) -> list[dict[str, Any]]:
    """The run's rows, written with a manifest that marks them as a fixture.

    Raises:
        UserError: they were changed since.
    """
    rows = make_rows(config)
    if (folder / DATA_MANIFEST).is_file():
        found = read_manifest(folder)
        assert found is not None
        if changed := differences(folder, found):
            raise UserError(f"the run's data was changed: {changed[0]}", where=str(folder), fix="begin a new run")
        return rows
    with writing(_DATA, folder):
        folder.mkdir(exist_ok=True)
        (folder / _DATA).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_manifest(folder, {_DATA: len(rows)}, fixture=True)
    return rows


def _seal(folder: RunFolder, config: FixtureConfig, at: Progress, *, finished: bool) -> None:
    """Last words, summary, and a manifest of every file's checksum."""
    status: Literal["finished", "interrupted"] = "finished" if finished else "interrupted"
    folder.log_event("end", f"{status} at step {at.policy.steps} of {config.steps}")
    memory = psutil.Process().memory_info().rss
    summary = summaries.build(folder, name=config.name, seed=config.seed, status=status, peak_memory_bytes=memory)
    folder.write_summary(summary)
    reward = read_metrics(folder.metrics)[-1]["reward/mean"]
    metric = None if math.isnan(reward) else reward
    manifests.seal(folder.path, step=at.policy.steps, lineage=0, metric=metric, extra={"fixture": True})


# --- rlsys fixture ---


def handle(arguments: argparse.Namespace) -> int:
    """``rlsys fixture``: 0: done; 1: other bits when computed again.

    Raises:
        UserError: bad input.
    """
    for name in ("steps", "stop_after"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(
                f"{value} is not positive", where=f"--{name.replace('_', '-')}", fix="give a positive number"
            )
    given = {name: getattr(arguments, name) for name in ("steps", "seed", "device")}
    asked = {name: value for name, value in given.items() if value is not None}
    if asked.get("seed", 0) < 0:
        raise UserError("a seed is not negative", where="--seed", fix="give 0 or more")
    folder, config, checkpoint = _begin(arguments.resume, arguments.run_root, asked)
    with folder:
        said = run(folder, config, checkpoint=checkpoint, stop_after=arguments.stop_after)
    if arguments.json is not None:
        write_json(arguments.json, said)
    _show(Console(highlight=False, soft_wrap=True), folder.path, config, said)
    return 0 if said["same_bits"] else 1


def _begin(resume: str | None, run_root: Path, asked: dict[str, Any]) -> tuple[RunFolder, FixtureConfig, Path | None]:
    """The run's folder, its configuration, and the checkpoint that it goes on from.

    Raises:
        UserError: there is nothing to resume, it is another run, or it is done already.
    """
    if resume is None:
        config = FixtureConfig(**asked)
        _check_device(config)
        return RunFolder.create(run_root, NAME, config), config, None
    point = resolve_resume(resume, run_root, NAME)
    if point is None:
        raise UserError("there is no fixture run to resume", where=str(run_root), fix="leave --resume out")
    content = yaml.safe_load(point.run.config.read_text(encoding="utf-8"))
    if content.get("name") != NAME or set(content) != set(asdict(FixtureConfig())):
        raise UserError("this is no fixture run", where=str(point.run.config), fix="resume it with rlsys.launch")
    before = FixtureConfig(**content)
    for name in ("seed", "device"):
        if asked.get(name, getattr(before, name)) != getattr(before, name):
            fix = f"leave --{name} out, or begin a new run"
            raise UserError(f"the run was made with {name} {getattr(before, name)}", where=f"--{name}", fix=fix)
    config = replace(before, **asked)
    _check_device(config)
    store = CheckpointStore(point.run.checkpoints, keep_last=2, keep_best=False)
    found = store.verify(point.checkpoint) if point.checkpoint is not None else store.latest()
    if found is None:
        raise UserError("the run has no checkpoint", where=str(point.run.path), fix="leave --resume out")
    if found.step >= config.steps:
        raise UserError(
            f"the run has already done its {found.step} steps",
            where=str(point.run.path),
            fix=f"give --steps more than {found.step}, or leave --resume out",
        )
    return point.run, config, found.path


def _check_device(config: FixtureConfig) -> None:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch sees no GPU", where="--device cuda", fix="leave --device out; `rlsys doctor` says why")


def _show(console: Console, folder: Path, config: FixtureConfig, said: dict[str, Any]) -> None:
    console.print(f"fixture: {said['step']} of {config.steps} steps on {said['device']}, seed {said['seeds']['run']}")
    console.print(f"  weights       {said['weights_sha256'][:16]}…")
    console.print(f"  samples       {said['stream_sha256'][:16]}…")
    for name in ("deterministic_algorithms", "cublas_workspace", "python_hash_seed", "float32_matmul_precision"):
        console.print(f"  {name.replace('_', ' '):24} {said[name]}")
    console.print(f"  threads                  {said['threads']['torch']}")
    verdict = "the same bits" if said["same_bits"] else "OTHER BITS: results of this machine cannot be repeated"
    console.print(f"computed again from the beginning: {verdict}")
    console.print(f"{folder}: all files with their checksums in manifest.json", markup=False)
    if said["step"] < config.steps:
        root = [] if folder.parent == Path("runs").absolute() else ["--run-root", str(folder.parent)]
        console.print("go on with: " + shlex.join(["rlsys", "fixture", "--resume", str(folder), *root]), markup=False)
