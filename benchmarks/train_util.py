"""How much of a processor's matrix-multiply rate training reaches: forward and backward pass of a 26M-parameter Qwen3.

    python -m benchmarks.train_util [--quick] [--threads N] [--cpu-time] [--json PATH] [--out docs/results]

Useful FLOPs are those of ``rlsys.engines.flops``: of tokens that are not padding, the backward pass twice the forward
pass. With shared prompts those are counted that are computed; tokens per second count a prompt for every response.
All sides are timed in turn, matrix products among them. With ``--cpu-time`` it is the process's CPU time that counts
(one thread only): what to use beside other work.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Qwen3Config

from benchmarks import report
from rlsys.algorithms.channels import CrossEntropy
from rlsys.algorithms.objective import Objective
from rlsys.batch import DataProto, jagged
from rlsys.config.schema import ModelConfig, TrainerConfig
from rlsys.engines.flops import ModelFlops
from rlsys.engines.train import init_process_group
from rlsys.engines.train.fsdp import FsdpEngine

SHARE_LIMIT, BF16_LIMIT = 0.65, 1.4
BUDGET, PEAK_SIDE, ROWS_OF_A_USER = 4096, 2048, 16
OBJECTIVE = Objective({"imitation": (CrossEntropy(), 1.0)})


@dataclass(frozen=True)
class Lengths:
    """Responses have geometric lengths of this mean, cut at four times it; prompts 16 to 48 tokens."""

    name: str
    mean: int
    rows: int


WORKLOADS = (Lengths("short", 32, 32), Lengths("long", 256, 8))


@dataclass(frozen=True)
class Work:
    """A side: what it runs, the useful FLOPs of a call and its tokens."""

    call: Callable[[], object]
    flops: float
    tokens: int


def small_model(folder: Path, quick: bool) -> Qwen3Config:
    width, layers = (128, 2) if quick else (512, 8)
    config = Qwen3Config(
        vocab_size=512, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, head_dim=width // 8, max_position_embeddings=4096,
        tie_word_embeddings=True, pad_token_id=0, dtype="float32",
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return config


def draw(lengths: Lengths, group: int = 8) -> DataProto:
    """Rows in groups of ``group`` with the same prompt."""
    generator = torch.Generator().manual_seed(1)
    uniform = torch.rand(lengths.rows, generator=generator).clamp(min=1e-9)
    responses = (uniform.log() / torch.log1p(torch.tensor(-1.0 / lengths.mean))).long() + 1
    responses = responses.clamp(max=4 * lengths.mean)
    prompts = [torch.randint(512, (int(torch.randint(16, 49, (1,), generator=generator)),), generator=generator)
               for _ in range(lengths.rows // group)]  # fmt: skip
    total = int(responses.sum())
    return DataProto.from_dict(
        tensors={
            "prompt_ids": jagged.from_rows([prompts[row // group] for row in range(lengths.rows)]),
            "response_ids": jagged.from_values(torch.randint(512, (total,), generator=generator), responses),
            "response_mask": jagged.from_values(torch.ones(total, dtype=torch.bool), responses),
        }
    )


def engine(folder: Path, dtype: str, **leaves: Any) -> FsdpEngine:
    trainer = TrainerConfig(micro_batch_tokens=BUDGET, **leaves)
    return FsdpEngine.load(ModelConfig(path=str(folder), dtype=dtype), trainer, temperature=1.0, total_steps=1, seed=0)


def plain_padded(lm: torch.nn.Module, batch: DataProto) -> Callable[[], None]:
    """As most scripts do it: so many rows in the order they come, padded to the longest, logits of every token."""
    prompts, responses = (jagged.to_rows(batch.batch[name]) for name in ("prompt_ids", "response_ids"))

    def call() -> None:
        for start in range(0, len(prompts), ROWS_OF_A_USER):
            rows = [torch.cat([p, r]) for p, r in zip(prompts, responses, strict=True)][start : start + ROWS_OF_A_USER]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            logits = lm(input_ids=ids, attention_mask=mask, use_cache=False).logits
            labels = ids.masked_fill(mask == 0, -100)[:, 1:]
            cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100).backward()

    return call


def plain_equal(lm: torch.nn.Module, rows: int, length: int) -> Callable[[], None]:
    ids = torch.randint(512, (rows, length), generator=torch.Generator().manual_seed(2))

    def call() -> None:
        logits = lm(input_ids=ids, use_cache=False).logits
        cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()

    return call


def computed(of: FsdpEngine, batch: DataProto, formula: ModelFlops) -> float:
    """FLOPs of what goes through the model in a pass."""
    works = [micro.work for micro in of._rows(batch, OBJECTIVE).cut(1, torch.device("cpu"))]
    return sum(formula.training(work.lengths, work.scored, work.contexts) for work in works)


def product(dtype: torch.dtype) -> Work:
    left = torch.ones(PEAK_SIDE, PEAK_SIDE, dtype=dtype)
    out = torch.empty_like(left)
    return Work(lambda: torch.mm(left, left, out=out), 2.0 * PEAK_SIDE**3, 0)


def sides_of(folder: Path, config: Qwen3Config, lengths: Lengths) -> dict[str, Work]:
    batch = draw(lengths)
    prompts, responses = (jagged.lengths(batch.batch[name]) for name in ("prompt_ids", "response_ids"))
    inputs, scored = prompts + responses - 1, int(responses.sum())
    lm = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    formula = ModelFlops.of(config, sum(p.numel() for p in lm.parameters()))
    useful, tokens = formula.training(inputs, scored), int(inputs.sum())
    length = int((prompts + responses).double().mean())
    equal = torch.full((tokens // length,), length)
    exact, mixed = engine(folder, "float32"), engine(folder, "bfloat16")
    bare = exact._model  # with FSDP's hooks, without the engine
    micros = list(exact._rows(batch, OBJECTIVE).cut(1, torch.device("cpu")))

    def body() -> None:
        for micro in micros:
            output = bare(micro.input_ids, micro.positions, micro.targets, packing=micro.packing)
            output.logprobs.sum().backward()

    sharing = engine(folder, "float32", rows="shared")
    padding = engine(folder, "float32", rows="padded")
    return {
        "float32 product": product(torch.float32),
        "bfloat16 product": product(torch.bfloat16),
        "engine, packed": Work(lambda: exact.forward_backward(batch, OBJECTIVE), useful, tokens),
        "model alone, packed": Work(body, useful, tokens),
        "engine, shared prompts": Work(
            lambda: sharing.forward_backward(batch, OBJECTIVE), computed(sharing, batch, formula), tokens
        ),
        "engine, padded rows": Work(lambda: padding.forward_backward(batch, OBJECTIVE), useful, tokens),
        "engine, packed, bfloat16": Work(lambda: mixed.forward_backward(batch, OBJECTIVE), useful, tokens),
        "transformers, padded rows": Work(plain_padded(lm, batch), useful, tokens),
        "transformers, equal rows": Work(
            plain_equal(lm, len(equal), length), formula.training(equal, int(equal.sum())), int(equal.sum())
        ),
    }


def measure(works: dict[str, Work], rounds: int, clock: Callable[[], float]) -> report.Timings:
    return report.alternate({name: work.call for name, work in works.items()}, rounds, clock=clock)


def shares(works: dict[str, Work], timed: report.Timings) -> dict[str, float]:
    """By side, the useful FLOP/s as a share of the float32 products of the same round, the median over rounds."""
    peak = works["float32 product"].flops
    return {
        name: timed.ratio("float32 product", name) * work.flops / peak for name, work in works.items() if work.tokens
    }


@contextmanager
def one_rank() -> Iterator[None]:
    init_process_group(0, 1, "127.0.0.1", 0, timeout_s=60)
    try:
        yield
    finally:
        dist.destroy_process_group()


def section(lengths: Lengths, works: dict[str, Work], timed: report.Timings) -> str:
    found, peak = shares(works, timed), works["float32 product"]
    rate = {name: w.flops / timed.median(name) / 1e9 for name, w in works.items()}
    rows = [
        (name, f"{work.tokens / timed.median(name):,.0f}", f"{found[name]:.0%}")
        for name, work in works.items()
        if work.tokens
    ]
    head = (
        f"## Responses of mean {lengths.mean}, at most {4 * lengths.mean} tokens ({lengths.rows} rows, "
        f"{works['engine, packed'].tokens:,} tokens)\n\nProducts of {PEAK_SIDE} × {PEAK_SIDE} matrices: "
        f"{peak.flops / timed.median('float32 product') / 1e9:,.0f} GFLOP/s in float32, "
        f"{rate['bfloat16 product']:,.0f} in bfloat16.\n\n"
    )
    return head + report.table(("forward and backward pass", "useful tokens/s", "of the float32 peak"), rows)


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--threads", type=int, default=report.cores())
    parser.add_argument("--cpu-time", action="store_true", help="count CPU time (with one thread)")
    parser.add_argument("--rounds", type=int, default=5)
    arguments: argparse.Namespace = parser.parse_args()
    if arguments.cpu_time and arguments.threads != 1:
        parser.error("--cpu-time adds up threads: use it with --threads 1")
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    sections, ratios, seconds = [], {}, {}
    with tempfile.TemporaryDirectory() as root, one_rank():
        config = small_model(Path(root), arguments.quick)
        for lengths in WORKLOADS[: 1 if arguments.quick else None]:
            works = sides_of(Path(root), config, lengths)
            timed = measure(works, 1 if arguments.quick else arguments.rounds, clock)
            ratios |= {f"{name}, {lengths.name}: share of float32 peak": v for name, v in shares(works, timed).items()}
            ratios[f"bfloat16 to float32 tokens/s, {lengths.name}"] = timed.ratio(
                "engine, packed", "engine, packed, bfloat16"
            )
            ratios[f"bfloat16 to float32 products, {lengths.name}"] = timed.ratio("float32 product", "bfloat16 product")
            seconds[lengths.name] = timed.seconds
            sections.append(section(lengths, works, timed))
    limits = {
        f"{side}, {lengths.name}{what}": limit
        for lengths in WORKLOADS
        for side, what, limit in (
            ("engine, packed", ": share of float32 peak", SHARE_LIMIT),
            ("bfloat16 to float32 tokens/s", "", BF16_LIMIT),
        )
    }
    report.finish(
        arguments,
        "train_util",
        page=page(arguments, sections, ratios),
        figures={"ratios": ratios, "limits": limits, "seconds": seconds},
        packages=["transformers"],
    )


def page(arguments: argparse.Namespace, sections: list[str], ratios: dict[str, float]) -> str:
    kinds = [lengths.name for lengths in WORKLOADS[: len(sections)]]
    bf16 = ", ".join(f"{ratios[f'bfloat16 to float32 tokens/s, {kind}']:.2f} ({kind})" for kind in kinds)
    products = ", ".join(f"{ratios[f'bfloat16 to float32 products, {kind}']:.2f} ({kind})" for kind in kinds)
    command = (
        "benchmarks.train_util"
        + f" --threads {arguments.threads}"
        + " --cpu-time" * arguments.cpu_time
        + f" --rounds {arguments.rounds}"
    )
    kind = "its CPU time" if arguments.cpu_time else "wall time"
    text = "\n\n".join(sections)
    return f"""# How much of the processor training uses

Forward and backward pass of a Qwen3 with 8 layers of width 512 (8 heads, 4 of keys and values, 25.4M parameters,
vocabulary 512), prompts of 16 to 48 tokens in groups of 8, responses of geometric length. FLOPs count tokens that are
not padding; recomputation and softmax count nothing. A share is the median over rounds of the side's useful FLOP/s by
those of float32 matrix products in the same round; {arguments.threads} thread(s), {kind}.

*Engine* is `forward_backward` of the FSDP engine on one rank, {BUDGET:,} tokens a micro-batch; *model alone* is its
sharded model on the same micro-batches. *transformers* has the same model with `sdpa`: {ROWS_OF_A_USER} rows at a time
in the order they come, padded to the longest; or rows that are all equal, which need no padding.

{text}

With bfloat16 (float32 weights and gradients) the engine does {bf16} × the tokens/s of float32;
products of matrices are {products} × faster. Bars: {SHARE_LIMIT:.0%} of the float32 peak packed,
{BF16_LIMIT} × with bfloat16.

With shared prompts, tokens per second count a prompt for each of its responses; the share of the peak counts it once
where it is computed once.

{report.measured(command, "transformers")}
"""


if __name__ == "__main__":
    main()
