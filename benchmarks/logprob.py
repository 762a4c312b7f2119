"""Log-probs and entropy from hidden states: rlsys against the dense computation and against peers' fused heads.

    python -m benchmarks.logprob [--rounds 5] [--threads 2] [--json PATH] [--out docs/results] [--quick]

Times: all sides in alternation in one process. With one thread they are CPU seconds, which other work on the same cores
disturbs little; with more, where threads wait for each other, seconds. Memory: on a CPU each side in a process of its
own, the peak of its anonymous memory less what it had before the pass; on a GPU the allocator's peak less what was
allocated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.report import MIB, Timings, alternate
from rlsys.algorithms.kernels.tiles import Tiles
from rlsys.algorithms.logprobs import token_logprobs

WIDTH, WORDS, TEMPERATURE = 1024, 151_936, 0.9
TOKENS, MANY_TOKENS = 1024, 8192
PASSES = ("forward", "forward + backward", "forward + backward, entropy too")
LIMITS = {"forward": 1.05, "forward + backward": 1.4, "forward + backward, entropy too": 1.4, "memory": 0.1}


@dataclass(frozen=True)
class Inputs:
    """hidden [N, H] and weight [V, H] with gradient, targets [N], grad [N]: of the log-probs."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    grad: torch.Tensor

    @classmethod
    def draw(cls, tokens: int, words: int, device: str) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        hidden = normal(tokens, WIDTH).to(dtype).requires_grad_()
        weight = normal(words, WIDTH).div_(WIDTH**0.5).to(dtype).requires_grad_()
        return cls(hidden, weight, torch.randint(words, (tokens,), generator=generator, device=device), normal(tokens))


Both = tuple[torch.Tensor, torch.Tensor]
Side = Callable[[Inputs, bool], Both]  # (inputs, whether the entropy has a gradient) -> log-probs and entropy [N]


def dense(inputs: Inputs, entropy_gradient: bool) -> Both:
    """In place wherever autograd allows it."""
    logits = inputs.hidden @ inputs.weight.T
    log_p = torch.log_softmax(logits.float().div_(TEMPERATURE), dim=-1)
    del logits
    logprobs = log_p.gather(1, inputs.targets[:, None])[:, 0]
    if entropy_gradient:
        return logprobs, -(log_p.exp() * log_p).sum(-1)
    with torch.no_grad():
        return logprobs, -log_p.exp().mul_(log_p).sum(-1)


def rlsys(inputs: Inputs, entropy_gradient: bool, kernels: bool | None = None) -> Both:
    return token_logprobs(
        inputs.hidden,
        inputs.weight,
        None,
        inputs.targets,
        temperature=TEMPERATURE,
        entropy_gradient=entropy_gradient,
        kernels=kernels,
    )


def rlsys_torch(inputs: Inputs, entropy_gradient: bool) -> Both:
    """On a GPU: without the Triton kernels."""
    return rlsys(inputs, entropy_gradient, kernels=False)


def trl(inputs: Inputs, entropy_gradient: bool) -> Both:
    """The function behind TRL's fused head, at the tile width that its trainers give it."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    logprobs, entropy, *_ = ChunkedLogProbFunction.apply(
        inputs.hidden,
        inputs.weight,
        None,
        inputs.targets,
        TEMPERATURE,
        _CHUNKED_LOGPROB_CHUNK_SIZE,
        None,
        1.0,
        ("entropy",),
    )
    return logprobs, entropy if entropy_gradient else entropy.detach()


def liger(inputs: Inputs, entropy_gradient: bool) -> Both:
    """Liger's linear cross-entropy: the sum of negative log-probs, no entropy, every token with the same weight."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")(inputs.weight, inputs.hidden / TEMPERATURE, inputs.targets)
    return -loss[None].expand(len(inputs.targets)) / len(inputs.targets), torch.zeros_like(inputs.grad)


def products(inputs: Inputs, entropy_gradient: bool) -> Both:
    """What the forward pass would take if everything but its matrix product were free."""
    tiles = Tiles.of(inputs.hidden, inputs.weight, None)
    memory = inputs.hidden.new_empty(tiles.elements)
    for words in tiles.words:
        for part in tiles.tokens:
            hidden, weight = inputs.hidden[part], inputs.weight[words]
            torch.mm(hidden, weight.T, out=memory[: len(hidden) * len(weight)].view(len(hidden), len(weight)))
    return inputs.grad, inputs.grad


TORCH = "rlsys, torch operations"
SIDES: dict[str, Side] = {"dense": dense, "rlsys": rlsys, TORCH: rlsys_torch, "TRL": trl, "Liger": liger}


def once(side: Side, inputs: Inputs, which: str) -> None:
    if which == "forward":
        with torch.no_grad():
            side(inputs, False)
        _wait(inputs)
        return
    with_entropy = which.endswith("entropy too")
    logprobs, entropy = side(inputs, with_entropy)
    outputs, grads = ([logprobs, entropy], [inputs.grad] * 2) if with_entropy else ([logprobs], [inputs.grad])
    torch.autograd.backward(outputs, grads)
    inputs.hidden.grad = inputs.weight.grad = None
    _wait(inputs)


def _wait(inputs: Inputs) -> None:
    if inputs.hidden.is_cuda:
        torch.cuda.synchronize()


def memory_here(name: str, which: str, tokens: int, words: int, device: str) -> dict[str, Any]:
    """In this process, which on a CPU must not have used more memory before."""
    inputs = Inputs.draw(tokens, words, device)
    small = Inputs.draw(8, 64, device)
    once(SIDES[name], small, which)  # loads what is loaded on the first use
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once(SIDES[name], inputs, which)
        extra = torch.cuda.max_memory_allocated() - before
    else:
        extra = anonymous_peak(lambda: once(SIDES[name], inputs, which))
    head = 0 if which == "forward" else inputs.weight.nbytes
    return {"side": name, "pass": which, "tokens": tokens, "words": words, "extra": extra, "head_gradient": head}


def anonymous_peak(call: Callable[[], object]) -> int:
    """Bytes of anonymous memory that the call adds at its peak, looked at every few milliseconds.

    Not the whole resident set: where memory is scarce, the kernel takes pages of libraries out of that meanwhile.
    """

    def now() -> int:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("RssAnon:", 1)[1].split(maxsplit=1)[0]) * 1024

    before = peak = now()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, now())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return max(peak, now()) - before


def memory(name: str, which: str, tokens: int, words: int, device: str) -> dict[str, Any]:
    if device == "cuda":
        return memory_here(name, which, tokens, words, device)
    command = [sys.executable, "-m", "benchmarks.logprob", "--memory", name, which, str(tokens), str(words)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def why_not(name: str, device: str) -> str | None:
    """Why a side cannot run here."""
    if name == TORCH and device != "cuda":
        return "without a GPU it is what rlsys does"
    if name == "Liger" and device != "cuda":
        return "its kernels need a GPU, and there is none here"
    package = {"TRL": "trl", "Liger": "liger_kernel"}.get(name)
    try:
        if package:
            __import__(package)
    except ImportError:
        return f"{package} is not installed"
    return None


def agreement(tokens: int, words: int, device: str) -> float:
    """Largest difference of log-probs and entropy between rlsys and dense, in nats."""
    inputs = Inputs.draw(tokens, words, device)
    with torch.no_grad():
        pairs = zip(rlsys(inputs, False), dense(inputs, False), strict=True)
        return max(float((ours - theirs).abs().max()) for ours, theirs in pairs)


def times(sides: list[str], inputs: Inputs, rounds: int, passes: Sequence[str] = PASSES) -> dict[str, Timings]:
    found = {}
    for which in passes:
        chosen: dict[str, Side] = {name: SIDES[name] for name in sides if (name, which) != ("Liger", PASSES[2])}
        if which == "forward":
            chosen["products"] = products
        calls = {name: lambda side=side, which=which: once(side, inputs, which) for name, side in chosen.items()}
        # A first round that does not count would warm up nothing: inputs exist, and each pass takes seconds.
        clock = time.process_time if inputs.hidden.device.type == "cpu" and torch.get_num_threads() == 1 else None
        found[which] = alternate(calls, rounds, warmup=int(inputs.hidden.is_cuda), clock=clock or time.perf_counter)
    return found


def page(figures: Mapping[str, Any]) -> str:
    timings: dict[str, Timings] = figures["timings"]
    shape = f"{figures['tokens']:,} tokens × {figures['words']:,} words"
    rows = [
        (
            which,
            name,
            f"{timed.median(name):.2f}",
            f"{timed.ratio(name, 'dense'):.2f}",
            f"{LIMITS[which]:.2f}" if name == "rlsys" else "",
        )
        for which, timed in timings.items()
        for name in timed.seconds
    ]
    rows += [("every", name, "", f"not run: {why}", "") for name, why in figures["skipped"].items()]
    memories = [
        (
            f"{m['tokens']:,} × {m['words']:,}",
            m["pass"],
            m["side"],
            f"{m['extra'] / MIB:,.0f} MiB",
            f"{(m['extra'] - m['head_gradient']) / MIB:,.0f} MiB",
        )
        for m in figures["memory"]
    ]
    ratios = figures["ratios"]
    forward = timings["forward"]
    return f"""# Log-probs and entropy from hidden states

`rlsys.algorithms.logprobs.token_logprobs` gives the log-prob of each token and the entropy of its distribution from
hidden states [N, {WIDTH:,}] and the head [V, {WIDTH:,}], {figures["dtype"]}, temperature {TEMPERATURE}. *Dense* is
`hidden @ weight.T`, a temperature, `log_softmax`, `gather` and the entropy, in place where autograd allows it. *TRL* is
the function behind its fused head, at its trainers' settings. *Products* is one matrix product over the same tiles and
nothing else.

## Time, {shape}

{report.table(("pass", "side", figures["clock"], "× dense", "bound"), rows)}

Times are medians; a ratio is the median over rounds of two times of one round. "Entropy too": the entropy has a
gradient. rlsys and dense differ by at most {figures["difference"]:.0e} nats.

What limits them: the forward pass takes {forward.ratio("rlsys", "products"):.2f} × its matrix product's own time. The
backward pass makes the logits again, so forward and backward are four matrix products where dense has three: 1.33 if
everything else were free on both sides. Dense pays for memory instead: each of its [N, V] tensors is fresh and goes to
main memory and back, while a tile is still in the cache when it is read again.

## Memory at the peak, beyond inputs

{report.table(("tokens × words", "pass", "side", "extra", "without the head's gradient"), memories)}

rlsys / dense: {ratios["memory: forward"]:.1%} forward; {ratios["memory: forward + backward"]:.1%} forward and backward
without the gradient of the head, which every side returns (bound {LIMITS["memory"]:.0%}), and
{ratios["memory: forward + backward, with the head's gradient"]:.1%} with it. What rlsys adds are two tiles, the hidden
states' gradient and a few numbers a token, whatever the vocabulary.
{figures["how_memory"]}

{report.measured(figures["command"], "trl", "liger-kernel", "triton", note=figures["note"])}
"""


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="on a CPU; 1: CPU seconds are measured")
    parser.add_argument("--memory", nargs=4, metavar=("SIDE", "PASS", "TOKENS", "WORDS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        name, which, tokens, words = arguments.memory
        torch.set_num_threads(arguments.threads)
        print(json.dumps(memory_here(name, which, int(tokens), int(words), "cpu")))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(arguments.threads)
    tokens, many, words = (64, 512, WORDS // 10) if arguments.quick else (TOKENS, MANY_TOKENS, WORDS)
    skipped = {name: why for name in SIDES if (why := why_not(name, device))}
    sides = [name for name in SIDES if name not in skipped]
    memories = [memory(name, which, tokens, words, device) for which in PASSES[:2] for name in sides]
    memories += [memory("rlsys", which, many, words, device) for which in PASSES[:2]]
    timings = times(sides, Inputs.draw(tokens, words, device), 1 if arguments.quick else arguments.rounds)
    extra = {(m["side"], m["pass"]): m for m in memories if m["tokens"] == tokens}

    def less_head(side: str, which: str) -> int:
        return extra[side, which]["extra"] - extra[side, which]["head_gradient"]

    ratios = {which: timed.ratio("rlsys", "dense") for which, timed in timings.items()}
    ratios |= {f"memory: {w}": less_head("rlsys", w) / less_head("dense", w) for w in PASSES[:2]}
    both = PASSES[1]
    ratios["memory: forward + backward, with the head's gradient"] = (
        extra["rlsys", both]["extra"] / extra["dense", both]["extra"]
    )
    if "TRL" in sides:
        ratios |= {f"{which}, TRL / rlsys": timed.ratio("TRL", "rlsys") for which, timed in timings.items()}
    figures = {
        "ratios": ratios,
        "limits": LIMITS,
        "tokens": tokens,
        "words": words,
        "memory": memories,
        "skipped": skipped,
        "difference": agreement(min(tokens, 256), words, device),
        "dtype": "float32" if device == "cpu" else "bfloat16",
        "how_memory": (
            "Each row is a process of its own: peak of its anonymous memory less what it had before the pass."
            if device == "cpu"
            else "Peak of the allocator less what was allocated before the pass."
        ),
    }
    words_of_page = {
        "timings": timings,
        "command": f"benchmarks.logprob --rounds {arguments.rounds} --threads {arguments.threads}",
        "note": "Other work ran on the same cores: ratios are what counts." if device == "cpu" else "",
        "clock": "CPU seconds of one thread" if device == "cpu" and arguments.threads == 1 else "seconds",
    }
    seconds = {which: timed.seconds for which, timed in timings.items()}
    report.finish(
        arguments,
        "logprob",
        page=page(figures | words_of_page),
        figures=figures | {"seconds": seconds},
        packages=["trl", "liger-kernel", "triton"],
    )


if __name__ == "__main__":
    main()
