"""How much memory a full-vocabulary divergence takes: by chunks of tokens, and as one [tokens, vocabulary] computation.

    python -m benchmarks.divergence_memory [--json PATH] [--out docs/results] [--quick]

Each measurement is a process of its own on the CPU: it makes hidden states and two heads in float32, writes down the
resident memory, runs one forward and backward pass of the JSD (gradients of hidden states and of the head included),
and takes the peak of its resident memory less what was written down.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import psutil
import torch

from benchmarks import report
from benchmarks.report import MIB, peak_rss
from rlsys.algorithms.divergences.chunked import Head, TeacherPart, token_divergence
from rlsys.algorithms.divergences.jsd import jsd

WORDS, WIDTH = 151_936, 256
LIMIT = 0.1
_SECONDS = "Two threads. Other work ran on the same cores: the seconds are upper bounds, the CPU seconds closer."


def measure(kind: str, tokens: int, words: int) -> dict[str, Any]:
    """One pass in this process, which must not have used more memory before."""
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    hidden, other = torch.randn(2, tokens, WIDTH, generator=generator)
    weight, teacher_weight = (torch.randn(words, WIDTH, generator=generator).div_(WIDTH**0.5) for _ in range(2))
    hidden.requires_grad_()
    weight.requires_grad_()
    run = chunked if kind == "chunked" else dense
    run(hidden[:1], weight[:64], other[:1], teacher_weight[:64])  # loads what is loaded on the first use
    hidden.grad = weight.grad = None
    before, peak_before = psutil.Process().memory_info().rss, peak_rss()
    began, cpu_began = time.monotonic(), time.process_time()
    loss = run(hidden, weight, other, teacher_weight)
    return {
        "kind": kind,
        "tokens": tokens,
        "words": words,
        "extra_bytes": max(peak_rss(), peak_before) - before,
        "inputs_bytes": before,
        "head_gradient_bytes": weight.grad.nbytes,
        "seconds": time.monotonic() - began,
        "cpu_seconds": time.process_time() - cpu_began,
        "loss": loss / tokens,
        "gradient_norm": float(weight.grad.norm()),
    }


def chunked(hidden: torch.Tensor, weight: torch.Tensor, other: torch.Tensor, teacher_weight: torch.Tensor) -> float:
    teacher = [TeacherPart(1.0, other, Head(teacher_weight, None))]
    loss = token_divergence(hidden, Head(weight, None), teacher, "jsd", {}).loss.sum()
    loss.backward()
    return loss.item()


def dense(hidden: torch.Tensor, weight: torch.Tensor, other: torch.Tensor, teacher_weight: torch.Tensor) -> float:
    """The same formula on all tokens at once; nothing is kept that autograd does not need."""
    with torch.no_grad():
        teacher = torch.log_softmax(other @ teacher_weight.T, dim=-1)
    loss = jsd(torch.log_softmax(hidden @ weight.T, dim=-1), teacher).sum()
    loss.backward()
    return loss.item()


def measured(kind: str, tokens: int, words: int) -> dict[str, Any]:
    """In a process of its own."""
    command = [sys.executable, "-m", "benchmarks.divergence_memory", "--measure", kind, str(tokens), str(words)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def table(results: list[dict[str, Any]]) -> str:
    header = (
        "computation",
        "tokens × words",
        "extra at the peak",
        "of it the head's gradient",
        "seconds",
        "CPU seconds",
    )
    return report.table(
        header,
        (
            (
                r["kind"],
                f"{r['tokens']:,} × {r['words']:,}",
                f"{r['extra_bytes'] / MIB:,.0f} MiB",
                f"{r['head_gradient_bytes'] / MIB:,.0f} MiB",
                f"{r['seconds']:.1f}",
                f"{r['cpu_seconds']:.1f}",
            )
            for r in results
        ),
    )


def page(figures: dict[str, Any]) -> str:
    dense_, chunked_, long = figures["measurements"]
    parts_time = chunked_["cpu_seconds"] / dense_["cpu_seconds"]
    agreement = max(figures["loss_difference"], figures["gradient_difference"], 2**-24)
    size = 4 * long["tokens"] * long["words"] / MIB
    return f"""# Memory of a full-vocabulary divergence

JSD of student and teacher over the whole vocabulary, forward and backward, hidden size {WIDTH}, float32. *Dense*
computes the [tokens, words] log-probs of both at once and lets autograd differentiate; *chunked* is
`rlsys.algorithms.divergences.chunked.token_divergence` with its default chunk.

{table(figures["measurements"])}

At {chunked_["tokens"]:,} tokens the chunked computation needs **{figures["ratio"]:.1%}** of the dense one's extra
memory (the limit is {LIMIT:.0%}); without the gradient of the head [words, {WIDTH}], which both must hold,
{figures["ratio_without_head_gradient"]:.1%}. It grows with the tokens only by their hidden states' gradient and a few
numbers each. In CPU seconds it takes {parts_time:.2f} times the dense one's: every logit is computed twice, and in
exchange nothing but logits is ever larger than the cache. One [{long["tokens"]:,}, {long["words"]:,}] tensor would take
{size:,.0f} MiB, and the dense computation several. Loss and norm of the head's gradient differ by at most
{agreement:.0e} of their size (float32 resolves 6e-08).

Extra memory: the peak of the process's resident memory (`ru_maxrss`) less its resident memory just before the forward
pass, when interpreter, libraries, hidden states and both heads are there already. Each row is a process of its own.
Nothing is subtracted from it: the gradients that the pass leaves behind are part of it.

{report.measured("benchmarks.divergence_memory", note=_SECONDS)}
"""


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--measure", nargs=3, metavar=("KIND", "TOKENS", "WORDS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        kind, tokens, words = arguments.measure
        print(json.dumps(measure(kind, int(tokens), int(words))))
        return
    words = WORDS // 10 if arguments.quick else WORDS
    runs = [measured("dense", 1024, words), measured("chunked", 1024, words), measured("chunked", 8192, words)]
    whole, parts = runs[:2]
    figures = {
        "limit": LIMIT,
        "ratios": {
            "extra memory, chunked / dense": parts["extra_bytes"] / whole["extra_bytes"],
            "CPU seconds, chunked / dense": parts["cpu_seconds"] / whole["cpu_seconds"],
        },
        "ratio": parts["extra_bytes"] / whole["extra_bytes"],
        "ratio_without_head_gradient": (parts["extra_bytes"] - parts["head_gradient_bytes"])
        / (whole["extra_bytes"] - whole["head_gradient_bytes"]),
        "loss_difference": abs(parts["loss"] / whole["loss"] - 1),
        "gradient_difference": abs(parts["gradient_norm"] / whole["gradient_norm"] - 1),
        "measurements": runs,
    }
    report.finish(arguments, "divergence_memory", page=page(figures), figures=figures)


if __name__ == "__main__":
    main()
