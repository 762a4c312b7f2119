"""A step's batch of ragged samples: bytes, and the time of its operations, against verl's DataProto.

    python -m benchmarks.batch [--rows 4096] [--rounds 15] [--quick] [--json PATH] [--out docs/results]

Both hold the same samples with the columns of a GRPO update: rlsys as jagged columns, verl's as columns padded to the
batch's longest prompt and response. verl's is measured twice: *as trained on*, with the columns that its trainer has
by then (whole sequences and their positions beside prompts and responses, rewards by token, returns), and *lean*,
without every column that repeats another one. A limit counts for both.
"""

from __future__ import annotations

import os
import pickle
import random
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks import report
from benchmarks.report import MIB, Timings, alternate, geometric_mean
from rlsys.batch import DataProto, jagged

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from verl import DataProto as VerlDataProto

VARIATION = 0.6  # standard deviation / mean of lengths
PROMPT, RESPONSE = 64, 256  # mean tokens
SHARDS = 8
LIMITS = {"bytes, rlsys / verl": 0.5, "geometric mean": 3.0, "each": 1.0, "chunk, ms": 1.0}
_TIMED = ("concat", "reorder", "select rows", "select columns", "serialise + deserialise")
_VERL_NAMES = {"rollout_logprobs": "rollout_log_probs", "old_logprobs": "old_log_probs", "advantages": "advantages"}
_PICKED = ("responses", "response_mask", "old_log_probs", "advantages")  # what a loss reads
_PICKED_HERE = ("response_ids", "response_mask", "old_logprobs", "advantages")


def lengths(rows: int, mean: float, generator: np.random.Generator) -> torch.Tensor:
    """[rows] gamma-distributed around ``mean``, at least 1."""
    shape = 1 / VARIATION**2
    return torch.from_numpy(np.maximum(generator.gamma(shape, mean / shape, rows).round(), 1).astype(np.int64))


def ours(rows: int) -> DataProto:
    """A batch as it is before the loss."""
    generator = np.random.default_rng(0)
    torch.manual_seed(0)
    prompts, responses = lengths(rows, PROMPT, generator), lengths(rows, RESPONSE, generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), responses.cumsum(0)])

    def response(values: torch.Tensor) -> torch.Tensor:
        return jagged.from_values(values, offsets=offsets)

    tokens = int(responses.sum())
    tensors = {
        "prompt_ids": jagged.from_values(torch.randint(151_936, (int(prompts.sum()),)), prompts),
        "response_ids": response(torch.randint(151_936, (tokens,))),
        "response_mask": response(torch.ones(tokens, dtype=torch.bool)),
        "weight_version": response(torch.full((tokens,), 17)),
        **{name: response(torch.randn(tokens)) for name in _VERL_NAMES},
        "rewards": torch.randint(2, (rows,)).float(),
        "sample_index": torch.arange(rows) % 8,
    }
    numbers = random.Random(0)
    objects = {
        "uid": [f"{row // 8}@0" for row in range(rows)],
        "task": [{"prompt": "What is the sum?", "answer": str(numbers.randrange(10**6))} for _ in range(rows)],
        "finish_reason": ["stop"] * rows,
    }
    return DataProto.from_dict(tensors=tensors, non_tensors=objects)


def verls(data: DataProto, *, lean: bool) -> VerlDataProto:
    """The same samples in verl's form: prompts padded at the left, responses at the right, integers and masks int64."""
    columns = data.batch
    prompts, responses = columns["prompt_ids"], columns["response_ids"]
    mask = jagged.pad(columns["response_mask"], 0).long()
    prompt_mask = jagged.pad(jagged.from_values(torch.ones_like(jagged.values(prompts)), jagged.lengths(prompts)), 0,
                             side="left")  # fmt: skip
    tensors = {
        "prompts": jagged.pad(prompts, 0, side="left"),
        "responses": jagged.pad(responses, 0),
        "attention_mask": torch.cat([prompt_mask, mask], dim=1),
        "response_mask": mask,
        **{theirs: jagged.pad(columns[name], 0.0) for name, theirs in _VERL_NAMES.items()},
    }
    rewards, ends = columns["rewards"], jagged.lengths(responses) - 1
    if lean:
        tensors["rewards"] = rewards
    else:
        by_token = torch.zeros(mask.shape).scatter_(1, ends[:, None], rewards[:, None])
        whole = tensors["attention_mask"]
        tensors |= {
            "input_ids": torch.cat([tensors["prompts"], tensors["responses"]], dim=1),
            "position_ids": (whole.cumsum(1) - 1).clamp(min=0),
            "token_level_scores": by_token,
            "token_level_rewards": by_token.clone(),
            "returns": tensors["advantages"].clone(),
        }
    return VerlDataProto.from_dict(tensors=tensors, non_tensors=dict(data.non_tensor_batch))


def sent(data: Any) -> Any:
    """To another process and back, as Ray does it: pickled with buffers out of band, these copied into shared memory
    (here: one buffer), read from there."""
    buffers: list[pickle.PickleBuffer] = []
    message = pickle.dumps(data, protocol=5, buffer_callback=buffers.append)
    store = np.empty(sum(memoryview(b).nbytes for b in buffers), dtype=np.uint8)  # not filled with zeros first
    start, parts = 0, []
    for buffer in buffers:
        part = np.frombuffer(buffer.raw(), dtype=np.uint8)
        store[start : start + len(part)] = part
        parts.append(store[start : start + len(part)])
        start += len(part)
    return pickle.loads(message, buffers=parts)  # noqa: S301 (what this function wrote)


def _verl_sent(method: str, data: VerlDataProto) -> VerlDataProto:
    """By one of its two ways: ``torch`` is its default."""
    os.environ["VERL_DATAPROTO_SERIALIZATION_METHOD"] = method
    return sent(data)


def _faster_way(data: VerlDataProto, rounds: int) -> str:
    ways = {way: (lambda way=way: _verl_sent(way, data)) for way in ("torch", "numpy")}
    timed = alternate(ways, rounds)
    return min(ways, key=timed.median)


def operations(data: Any, names: tuple[str, ...], order: np.ndarray, send: Callable[[Any], Any]) -> dict[str, Any]:
    """Name of each timed operation → a call that does it. verl's methods and ours have the same names."""
    shards = data.chunk(SHARDS)
    shards = [shard.select_idxs(np.arange(len(shard))) for shard in shards]  # as workers send them: memory of their own
    moved = data.select_idxs(np.arange(len(data)))
    half = order[: len(order) // 2]
    return {
        "concat": lambda: type(data).concat(shards),
        "reorder": lambda: moved.reorder(torch.from_numpy(order)),
        "select rows": lambda: data.select_idxs(half),
        "select columns": lambda: data.select(list(names), ["uid"]),
        "serialise + deserialise": lambda: send(data),
        "chunk": lambda: data.chunk(SHARDS),
    }


def verify(here: DataProto, peer: VerlDataProto, send: Callable[[Any], Any]) -> None:
    """That both sides did the same.

    Raises:
        AssertionError: a sample differs.
    """
    order = np.random.default_rng(1).permutation(len(here))[: len(here) // 3]
    left, right = sent(here.select_idxs(order)), send(peer.select_idxs(order))
    width = peer.batch["responses"].shape[1]
    for name, theirs in (("response_ids", "responses"), *_VERL_NAMES.items()):
        assert torch.equal(jagged.pad(left.batch[name], 0, length=width), right.batch[theirs]), name
    assert list(left.non_tensor_batch["uid"]) == list(right.non_tensor_batch["uid"])


def compare(here: DataProto, peer: VerlDataProto, rounds: int) -> dict[str, Any]:
    """Bytes, seconds (medians) and ratios of one pair of batches."""
    way = _faster_way(peer, max(rounds // 3, 1))
    order = np.random.default_rng(2).permutation(len(here))

    def send(data: VerlDataProto) -> VerlDataProto:
        return _verl_sent(way, data)

    verify(here, peer, send)
    mine, theirs = operations(here, _PICKED_HERE, order, sent), operations(peer, _PICKED, order, send)
    times: dict[str, Timings] = {
        name: alternate({"verl": theirs[name], "rlsys": mine[name]}, rounds, warmup=2, repeats=_repeats(name))
        for name in mine
    }
    size = sum(c.numel() * c.element_size() for c in peer.batch.values()) + sum(
        a.nbytes for a in peer.non_tensor_batch.values()
    )
    faster = {name: timed.ratio("verl", "rlsys") for name, timed in times.items()}
    return {
        "bytes": {"rlsys": here.nbytes, "verl": size},
        "seconds": {name: {side: timed.median(side) for side in timed.seconds} for name, timed in times.items()},
        "verl serialises by": way,
        "ratios": {
            "bytes, rlsys / verl": here.nbytes / size,
            **{f"{name}, verl / rlsys": ratio for name, ratio in faster.items()},
            "geometric mean, verl / rlsys": geometric_mean(faster[name] for name in _TIMED),
        },
    }


def _repeats(name: str) -> int:
    return 20 if name in ("chunk", "select columns") else 1


def page(here: DataProto, found: dict[str, dict[str, Any]], rounds: int, command: str) -> str:
    sizes = {name: jagged.lengths(here.batch[name]).double() for name in ("prompt_ids", "response_ids")}
    shape = " and ".join(
        f"{name.removesuffix('_ids')}s of {s.mean():.0f} tokens (coefficient of variation {s.std() / s.mean():.2f}, "
        f"longest {s.max():.0f})"
        for name, s in sizes.items()
    )
    header = ["operation", "rlsys, ms"]
    header += [text for kind in found for text in (f"verl {kind}, ms", "ratio")]
    any_seconds = next(iter(found.values()))["seconds"]
    lines = []
    for name in any_seconds:
        line = [name, f"{1e3 * statistics.median(f['seconds'][name]['rlsys'] for f in found.values()):.3g}"]
        for f in found.values():
            line += [f"{1e3 * f['seconds'][name]['verl']:.3g}", f"{f['ratios'][f'{name}, verl / rlsys']:.1f} ×"]
        lines.append(line)
    mean = ["geometric mean without chunk", ""]
    mean += [text for f in found.values() for text in ("", f"{f['ratios']['geometric mean, verl / rlsys']:.1f} ×")]
    mib = ["bytes, MiB", f"{here.nbytes / MIB:.0f}"]
    for f in found.values():
        mib += [f"{f['bytes']['verl'] / MIB:.0f}", f"{1 / f['ratios']['bytes, rlsys / verl']:.1f} ×"]
    way = ", ".join(f"{f['verl serialises by']} ({kind})" for kind, f in found.items())
    return f"""# The batch, against verl's DataProto

{len(here):,} samples as they are before a policy update of GRPO:
{shape}.
rlsys holds {len(list(here.batch.keys()))} columns beside ids and texts, the variable-length ones jagged.

verl's are padded to the longest prompt and response of this batch, not to a configured limit, which may be larger. *As
trained on*: every column that its trainer has by then. *Lean*: without those that repeat another one
(`input_ids`, `position_ids`, rewards by token, returns).

{report.table(header, [*lines, mean, mib])}

- concat: {SHARDS} shards of equal numbers of rows. reorder: all rows into a random order. select rows: half of them, in
  random order (`select_idxs`). select columns: 4 of the columns and the ids. chunk: into {SHARDS}, views on both sides.
- serialise + deserialise: pickle protocol 5 with buffers out of band, which are copied once into a buffer and read from
  there, as through Ray's object store. verl has two ways (`VERL_DATAPROTO_SERIALIZATION_METHOD`); the faster one here
  counts: {way}. What rlsys reads lies in the store's memory and is not copied again.
- The limits: half of verl's bytes; {LIMITS["geometric mean"]:.0f} times as fast in the geometric mean and never slower;
  chunk within {LIMITS["chunk, ms"]:.0f} ms.
- One thread on each side. Medians over {rounds} rounds in which the two sides alternate; the ratio is the median of the
  rounds' ratios. Before the clock starts, samples that went through selection and serialisation on both sides are
  compared value by value.

{report.measured(command, "verl", "tensordict", "numpy")}
"""


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--rows", type=int, default=4096, help="a multiple of 8")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    rows, rounds = (256, 3) if arguments.quick else (arguments.rows, arguments.rounds)
    torch.set_num_threads(1)  # of both sides: two threads of a copy wait for each other where the cores are shared
    here = ours(rows)
    found = {kind: compare(here, verls(here, lean=kind == "lean"), rounds) for kind in ("as trained on", "lean")}
    ratios = {f"{name} ({kind})": value for kind, f in found.items() for name, value in f["ratios"].items()}
    chunk_ms = max(1e3 * f["seconds"]["chunk"]["rlsys"] for f in found.values())
    figures = {"ratios": ratios, "chunk_ms": chunk_ms, "limits": LIMITS, "rows": rows, "rounds": rounds, **found}
    command = "benchmarks.batch" + ("" if rows == 4096 else f" --rows {rows}")
    report.finish(
        arguments, "batch", page=page(here, found, rounds, command), figures=figures, packages=["verl", "tensordict"]
    )


if __name__ == "__main__":
    main()
