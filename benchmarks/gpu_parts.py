"""The parts of ``benchmarks.gpu``. Each measures on the device that training takes here and returns a Part; the
trainer's takes a shape, so that a test runs it on a CPU."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks import logprob as heads
from benchmarks import report
from benchmarks.gpu_models import (
    QWEN3_1_7B,
    SMALL,
    TINY,
    Shape,
    equal_rows,
    ragged_rows,
    training_flops,
    write_model,
)
from benchmarks.grpo_step_sides import Task, Workload, rlsys_overrides
from benchmarks.train_util import one_rank
from rlsys.algorithms.channels import CrossEntropy, PolicyGradient
from rlsys.algorithms.objective import Objective
from rlsys.batch import DataProto, jagged
from rlsys.config.errors import UserError
from rlsys.config.schema import ModelConfig, TrainerConfig, VllmRollout
from rlsys.engines.flops import matmul_peak
from rlsys.engines.rollout import start_engine
from rlsys.engines.train.collectives import training_device
from rlsys.engines.train.fsdp import FsdpEngine
from rlsys.environments.base import SamplingParams
from rlsys.tracking.blocks import count
from rlsys.tracking.metrics import read_metrics

LIMITS = {
    "log-prob error, float32": 1e-4,
    "gradient error, float32": 1e-4,
    "MFU, 4k packed tokens": 0.45,
    "seconds of a colocated sync": 0.2,
    "log-probs, forward / dense": 1.05,
    "log-probs, forward + backward / dense": 1.4,
}
POLICY = Objective({"policy": (PolicyGradient(), 1.0)})
IMITATION = Objective({"imitation": (CrossEntropy(), 1.0)})
ATTENTION = ("flash", "varlen", "flex", "sdpa")
BUDGET, LENGTH = 4096, 512
RUN_S = 420  # longest that a whole run may take


class Unavailable(Exception):
    """A part that cannot run here, and why."""


@dataclass(frozen=True)
class Part:
    """text: a sentence on what was measured. header, rows: its table. ratios: by name; those in LIMITS have a bar."""

    text: str
    header: Sequence[str]
    rows: list[tuple[str, ...]]
    ratios: dict[str, float] = field(default_factory=dict)


def needs(*packages: str) -> None:
    """Raises Unavailable where one of them is not installed."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise Unavailable(f"{name} is not installed")


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def tidy() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load(folder: Path, dtype: str = "bfloat16", attention: Any = "auto", **leaves: Any) -> FsdpEngine:
    trainer = TrainerConfig(**{"micro_batch_tokens": BUDGET, "lr": 1e-6, **leaves})
    model = ModelConfig(path=str(folder), dtype=dtype, attention=attention)  # type: ignore[arg-type]
    return FsdpEngine.load(model, trainer, temperature=1.0, total_steps=100, seed=0)


# --- are loss and gradient right


Found = tuple[torch.Tensor, dict[str, torch.Tensor]]  # log-probs [N], gradient by name


def plain(folder: Path, batch: DataProto, dtype: torch.dtype, device: torch.device) -> Found:
    """Of −Σ A·log π / N by transformers' model and autograd, row after row. Its gradient is that of the policy loss at
    π = π_old."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(device)
    columns = [jagged.to_rows(batch.batch[name]) for name in ("prompt_ids", "response_ids", "advantages")]
    tokens, found = sum(len(row) for row in columns[1]), []
    for prompt, response, advantages in zip(*columns, strict=True):
        ids = torch.cat([prompt, response]).to(device)
        logits = model(ids[None, :-1]).logits[0, len(prompt) - 1 :].float()
        taken = logits.log_softmax(-1).gather(-1, ids[len(prompt) :, None])[:, 0]
        (-(advantages.to(device) * taken).sum() / tokens).backward()
        found.append(taken.detach().cpu())
    return torch.cat(found), {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None}


def ours(folder: Path, batch: DataProto, dtype: str, attention: str) -> Found:
    engine = load(folder, dtype, attention)
    batch.batch["old_logprobs"] = engine.forward(batch).batch["logprobs"]
    engine.forward_backward(batch, POLICY)
    gradient = engine._trained.gradient()  # of one rank: whole
    named = {name: shard.local.float().cpu().view(shard.shape).clone() for name, shard in gradient.items()}
    return jagged.values(batch.batch["old_logprobs"]), named


def error(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """‖found − exact‖ / ‖exact‖ over all tensors together."""
    assert found.keys() == exact.keys()
    away = sum(float((found[name] - exact[name]).double().square().sum()) for name in exact)
    return (away / sum(float(tensor.double().square().sum()) for tensor in exact.values())) ** 0.5


def correctness(quick: bool, shape: Shape = SMALL) -> Part:
    """Log-probs and the gradient of a policy-gradient step against transformers' on the CPU in float32."""
    device = training_device()
    batch = ragged_rows(8 if quick else 32, 64, shape.words)
    rows: list[tuple[str, ...]] = []
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as root, one_rank():
        folder = write_model(Path(root), shape)
        exact = plain(folder, batch, torch.float32, torch.device("cpu"))

        def away(side: str, dtype: str, found: Found) -> float:
            nats, gradient = float((found[0] - exact[0]).abs().mean()), error(found[1], exact[1])
            rows.append((side, dtype, f"{nats:.1e}", f"{gradient:.1e}"))
            if side.startswith("rlsys"):
                for name, value in (("log-prob", nats), ("gradient", gradient)):
                    key = f"{name} error, {dtype}"
                    ratios[key] = max(value, ratios.get(key, 0.0))
            return gradient

        theirs = away("transformers, row by row", "bfloat16", plain(folder, batch, torch.bfloat16, device))
        for dtype in ("float32", "bfloat16"):
            for attention in ATTENTION:
                side = f"rlsys, {attention}"
                try:
                    away(side, dtype, ours(folder, batch, dtype, attention))
                except UserError as refused:
                    rows.append((side, dtype, f"not run: {refused.what}", ""))
    ratios["gradient error in bfloat16, rlsys / transformers"] = ratios["gradient error, bfloat16"] / theirs
    text = (
        f"A policy-gradient step over {len(batch)} packed rows, a Qwen3 with {count(shape.parameters())} parameters on "
        f"{device.type}. Exact: transformers on the CPU, float32, row by row. Log-probs: mean distance in nats. "
        "Gradient: ‖found − exact‖ / ‖exact‖."
    )
    return Part(text, ("side", "forward pass", "log-probs", "gradient"), rows, ratios)


# --- log-probs from hidden states


def logprob(quick: bool) -> Part:
    """Triton kernels against torch operations, the dense computation and peers' heads."""
    device = training_device().type
    tokens, words = (64, 4096) if quick else (heads.TOKENS, heads.WORDS)
    skipped = {name: why for name in heads.SIDES if (why := heads.why_not(name, device))}
    sides = [name for name in heads.SIDES if name not in skipped]
    timings = heads.times(sides, heads.Inputs.draw(tokens, words, device), 3 if quick else 9)
    memory = {(side, which): heads.memory(side, which, tokens, words, device) for which in heads.PASSES[:2]
              for side in sides}  # fmt: skip
    rows, ratios = [], {}
    for which, timed in timings.items():
        for name in timed.seconds:
            extra = memory.get((name, which))
            rows.append(
                (which, name, f"{1e3 * timed.median(name):.2f}", f"{timed.ratio(name, 'dense'):.2f}",
                 "" if extra is None else f"{(extra['extra'] - extra['head_gradient']) / report.MIB:,.0f} MiB")
            )  # fmt: skip
            if name not in ("rlsys", "dense", "products"):
                ratios[f"log-probs, {which}, {name} / rlsys"] = timed.ratio(name, "rlsys")
        ratios[f"log-probs, {which} / dense"] = timed.ratio("rlsys", "dense")
    rows += [("every", name, f"not run: {why}", "", "") for name, why in skipped.items()]
    values, gradients = kernel_differences(min(tokens, 256), words, device)
    text = (
        f"{tokens:,} tokens × {words:,} words from hidden states of width {heads.WIDTH:,}; memory without the gradient "
        f"of the head. Against dense float32 on the same inputs, log-probs and entropy differ by at most {values:.1e} "
        f"nats and gradients by {gradients:.1e} of their norm."
    )
    return Part(text, ("pass", "side", "ms", "× dense", "extra memory"), rows, ratios)


def kernel_differences(tokens: int, words: int, device: str) -> tuple[float, float]:
    """Of what runs here against dense float32: the largest difference of log-probs and entropies in nats, and
    ‖Δgradient‖ / ‖gradient‖ of hidden states and head together."""
    inputs = heads.Inputs.draw(tokens, words, device)
    exact = dataclasses.replace(
        inputs,
        hidden=inputs.hidden.detach().float().requires_grad_(),
        weight=inputs.weight.detach().float().requires_grad_(),
    )
    results = []
    for side, given in ((heads.rlsys, inputs), (heads.dense, exact)):
        both = side(given, True)
        grads = torch.autograd.grad(both, (given.hidden, given.weight), grad_outputs=[given.grad] * 2)
        results.append((both, dict(zip("hw", (g.float() for g in grads), strict=True))))
    (mine, gradient), (theirs, true) = results
    values = max(float((a - b).detach().abs().max()) for a, b in zip(mine, theirs, strict=True))
    return values, error(gradient, true)


# --- training


def timed(call: Callable[[], object], rounds: int) -> float:
    """Median seconds of a call, after two that do not count."""
    found = []
    for number in range(rounds + 2):
        wait()
        began = time.perf_counter()
        call()
        wait()
        if number >= 2:
            found.append(time.perf_counter() - began)
    return statistics.median(found)


def mfu(quick: bool, shape: Shape = QWEN3_1_7B) -> Part:
    """Model FLOPs utilisation of training in bfloat16, by attention back end."""
    length, budget = (64, 256) if shape == TINY else (LENGTH, BUDGET)
    batch = equal_rows((2 if quick else 4) * budget // length, length, shape.words)
    flops, tokens = training_flops(shape, batch)
    rows, best = [], 0.0
    with tempfile.TemporaryDirectory() as root, one_rank():
        folder = write_model(Path(root), shape)
        tidy()
        peak = matmul_peak(torch.bfloat16, training_device(), seconds=0.2 if quick else 1.0)
        sides = [(a, {}) for a in ATTENTION] + [("auto", {"compile": True}), ("auto", {"activations": "recompute"})]
        for attention, more in sides:
            name = ", ".join([attention, *(f"{key}={value}".lower() for key, value in more.items())])
            try:
                engine = load(folder, "bfloat16", attention, micro_batch_tokens=budget, **more)
            except UserError as refused:
                rows.append((name, f"not run: {refused.what}", "", "", ""))
                continue
            backward = timed(lambda e=engine: e.forward_backward(batch, IMITATION), 1 if quick else 5)
            step = optimiser_s(engine, batch)
            share, whole = flops / backward / peak, flops / (backward + step) / peak
            best = max(best, share)
            rows.append((name, f"{tokens / backward:,.0f}", f"{share:.1%}", f"{whole:.1%}", f"{1e3 * step:.0f}"))
            del engine
            tidy()
    text = (
        f"A Qwen3 with {count(shape.parameters())} random weights, float32 weights and AdamW, bfloat16 forward "
        f"and backward pass, {tokens:,} tokens in micro-batches of {budget:,}, {length} a sequence. Peak: "
        f"{peak / 1e12:,.1f} TFLOP/s, measured by products of bfloat16 matrices. MFU of the step counts the optimiser "
        "once for these tokens."
    )
    header = ("attention", "tokens/s", "MFU, forward and backward", "MFU, with the step", "optimiser, ms")
    return Part(text, header, rows, {"MFU, 4k packed tokens": best})


def optimiser_s(engine: FsdpEngine, batch: DataProto) -> float:
    """Seconds of a step of AdamW, clipping included; the first one, which makes its moments, does not count."""
    engine.optim_step()
    engine.forward_backward(batch, IMITATION)
    wait()
    began = time.perf_counter()
    engine.optim_step()
    wait()
    return time.perf_counter() - began


def peak_of(call: Callable[[], object]) -> int:
    """Bytes that the call adds at its peak: the allocator's on a GPU, anonymous memory on a CPU."""
    if not torch.cuda.is_available():
        return heads.anonymous_peak(call)
    wait()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    wait()
    return torch.cuda.max_memory_allocated() - before


def activations(quick: bool, shape: Shape = QWEN3_1_7B) -> Part:
    """Memory and time of what ``trainer.activations`` can be."""
    length = 64 if shape == TINY else 1024
    batch = equal_rows(2 if quick else 8, length, shape.words)
    tokens = len(batch) * length
    rows: list[tuple[str, ...]] = []
    peaks: dict[str, int] = {}
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as root, one_rank():
        folder = write_model(Path(root), shape)
        for kind in ("keep", "recompute", "offload"):
            tidy()
            try:
                engine = load(folder, "bfloat16", activations=kind, micro_batch_tokens=tokens)
            except UserError as refused:
                rows.append((kind, f"not run: {refused.what}", ""))
                continue
            call = lambda e=engine: e.forward_backward(batch, IMITATION)  # noqa: E731
            call()  # afterwards there is a gradient, which is not among what is added
            peaks[kind], seconds[kind] = peak_of(call), timed(call, 1 if quick else 3)
            rows.append((kind, f"{peaks[kind] / report.MIB:,.0f}", f"{seconds[kind] / seconds['keep']:.2f}"))
            del engine, call
    ratios = {f"activations, {k} / keep": peaks[k] / max(peaks["keep"], 1) for k in peaks if k != "keep"}
    text = f"Forward and backward pass over one micro-batch of {tokens:,} tokens, bfloat16."
    return Part(text, ("trainer.activations", "MiB added at the peak", "× time"), rows, ratios)


# --- whole runs


def run_to_its_end(command: Sequence[str], environment: dict[str, str]) -> None:
    """Raises RuntimeError with the run's last words where it fails or takes too long."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        said, _ = process.communicate(timeout=RUN_S)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # it ends its actors itself
        said, _ = process.communicate(timeout=60)
    if process.returncode:
        raise RuntimeError(f"the run ended with {process.returncode}: {' / '.join(said.splitlines()[-12:])}")


def sync(quick: bool, shape: Shape = QWEN3_1_7B, more: Sequence[str] = ("rollout.sync=auto",)) -> Part:
    """Weight updates of a run that has trainer and sampler on one GPU, as its metrics have them."""
    needs("vllm")
    steps = 3 if quick else 8
    with tempfile.TemporaryDirectory() as root:
        folder = write_model(Path(root) / "model", shape)
        tidy()
        (folder / "prompts.jsonl").write_text(
            "".join(json.dumps({"prompt": f"{number:04d}", "answer": "0"}) + "\n" for number in range(64))
        )
        (work := Path(root) / "work").mkdir()
        task = Task(Workload(2, 16, stops=False, samples=4), folder, work, report.cores(), "vllm")
        given = [word for word in rlsys_overrides(task) if not word.startswith(("steps=", "trainer.lr="))]
        given += ["model.dtype=bfloat16", "trainer.lr=1e-5", f"steps={steps}", *more]
        command = [sys.executable, "-m", "rlsys.launch", *given]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        run_to_its_end(command, environment)
        (run,) = work.iterdir()
        lines = [line for line in read_metrics(run / "metrics.jsonl") if "sync/total_s" in line][1:]
    names = sorted({name for line in lines for name in line if name.startswith("sync/") and name.endswith("_s")})
    found = {name: statistics.median(line[name] for line in lines) for name in names}
    rows = [(n.removeprefix("sync/").removesuffix("_s"), f"{1e3 * found[n]:.1f}") for n in names]
    text = (
        f"{lines[-1]['sync/bytes'] / 1e9:.2f} GB of bfloat16 weights ({count(shape.parameters())}), "
        f"`{' '.join(more)}`, checksums of both sides included: medians of {len(lines)} updates of a run. Parts may "
        "overlap."
    )
    return Part(text, ("part", "ms"), rows, {"seconds of a colocated sync": found["sync/total_s"]})


def sampling(quick: bool, shape: Shape = QWEN3_1_7B, **rollout: Any) -> Part:
    """Tokens a second of rlsys's vLLM sampler, groups of eight with one prompt."""
    needs("vllm")
    limit = 16 if quick else 256

    async def sample(folder: Path) -> dict[int, float]:
        config = VllmRollout(engine="vllm", samples_per_prompt=8, dtype="bfloat16", **rollout)
        engine: Any = await start_engine(str(folder), config, max_length=limit + 64, threads=report.cores())
        found = {}
        try:
            for many in (8,) if quick else (8, 64, 256):
                for number in range(2):  # the first warms up
                    began = time.perf_counter()
                    calls = [
                        engine.generate([2 + row // 8] * 32, SamplingParams(1.0, limit, seed=row + 1000 * number))
                        for row in range(many)
                    ]
                    samples = await asyncio.gather(*calls)
                    found[many] = sum(len(s.token_ids) for s in samples) / (time.perf_counter() - began)
        finally:
            await engine.close()
        return found

    with tempfile.TemporaryDirectory() as root:
        folder = write_model(Path(root), shape)
        tidy()
        found = asyncio.run(sample(folder))
    rows = [(str(many), f"{rate:,.0f}", f"{rate / many:,.0f}") for many, rate in found.items()]
    text = f"{count(shape.parameters())} parameters in bfloat16, temperature 1, {limit} tokens each."
    return Part(text, ("sequences at once", "tokens/s", "of each"), rows)


def step(quick: bool) -> Part:
    """Whole GRPO steps against TRL's trainer: ``benchmarks.grpo_step`` with vLLM as rlsys's sampler."""
    needs("vllm", "trl")
    model, load_name = ("3M", "8 × 8, equal") if quick else ("26M", "32 × 8, long tail")
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "figures.json"
        command = [sys.executable, "-m", "benchmarks.grpo_step", "--model", model, "--workload", load_name]
        command += ["--sampler", "vllm", "--windows", "3", "--json", str(path)] + ["--quick"] * quick
        run_to_its_end(command, dict(os.environ))
        figures = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        (name, side, f"{1 / statistics.median(seconds):.2f}")
        for name, sides in figures["seconds"].items()
        for side, seconds in sides.items()
    ]
    ratios = {f"GRPO steps/s, {name}, rlsys / TRL": value for name, value in figures["ratios"].items()}
    text = "As in `benchmarks.grpo_step`, float32; rlsys samples with vLLM, and TRL with its fastest sampler there."
    return Part(text, ("model, prompts × samples", "side", "steps/s"), rows, ratios)


PARTS: dict[str, Callable[[bool], Part]] = {
    "correctness": correctness,
    "logprob": logprob,
    "mfu": mfu,
    "activations": activations,
    "sync": sync,
    "sampling": sampling,
    "grpo_step": step,
}
