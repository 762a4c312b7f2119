"""Random batches for train engines, and process groups to run them in."""

from __future__ import annotations

import math
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from rlsys.batch import DataProto, jagged
from rlsys.checkpoint.shards import Shard
from rlsys.engines.train import init_process_group


def random_batch(seed: int = 0, rows: int = 10, vocab: int = 72, given_tokens: bool = True, tail: int = 0) -> DataProto:
    """Ragged rows with every column that a policy-gradient channel may read; some response tokens are given. tail: so
    many tokens more in the first response."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(1, 12, (rows,), generator=generator)
    responses = torch.randint(1, 20, (rows,), generator=generator)
    responses[0] += tail
    tokens = int(responses.sum())
    mask = torch.ones(tokens, dtype=torch.bool)
    if given_tokens:
        mask = torch.rand(tokens, generator=generator) < 0.8
    old = -3 * torch.rand(tokens, generator=generator)
    advantages = torch.randn(rows, generator=generator).repeat_interleave(responses)
    response_columns = {
        "response_ids": torch.randint(vocab, (tokens,), generator=generator),
        "response_mask": mask,
        "old_logprobs": old * mask,
        "ref_logprobs": (old + 0.3 * torch.randn(tokens, generator=generator)) * mask,
        "advantages": advantages * mask,
    }
    prompt_ids = torch.randint(vocab, (int(prompts.sum()),), generator=generator)
    return DataProto.from_dict(
        tensors={
            "prompt_ids": jagged.from_values(prompt_ids, prompts),
            **{name: jagged.from_values(values, responses) for name, values in response_columns.items()},
        }
    )


def composed_batch(seed: int = 0, rows: int = 10, vocab: int = 72, tail: int = 0) -> DataProto:
    """random_batch with teachers' contexts on some rows and preference pairs on others; the last two rows are pairs
    alone."""
    batch = random_batch(seed, rows, vocab, tail=tail)
    generator = torch.Generator().manual_seed(seed + 1)
    samples = rows - 2
    columns = {name: jagged.to_rows(column)[:samples] for name, column in batch.batch.items()}
    columns = {name: [*parts, parts[0][:0], parts[0][:0]] for name, parts in columns.items()}

    def tokens(low: int, high: int) -> torch.Tensor:
        return torch.randint(vocab, (int(torch.randint(low, high, (1,), generator=generator)),), generator=generator)

    columns["teacher_prompt_ids"], columns["teacher_mask"] = [], []
    for row in range(rows):
        mask = columns["response_mask"][row].clone()
        if row % 3 == 1:  # one turn of several: from the second token on
            mask[:1] = False
        if row % 3 == 2:
            mask[:] = False
        columns["teacher_mask"].append(mask)
        columns["teacher_prompt_ids"].append(tokens(1, 20) if mask.any() else tokens(1, 2)[:0])
    for side in ("chosen", "rejected"):
        has = [row % 4 == 0 or row >= samples for row in range(rows)]
        ids = [tokens(4, 25) if has[row] else tokens(1, 2)[:0] for row in range(rows)]
        columns[f"{side}_ids"] = ids
        columns[f"{side}_mask"] = [torch.arange(len(part)) >= 2 for part in ids]
        columns[f"{side}_ref_logprobs"] = [
            -3 * torch.rand(len(part), generator=generator) * (torch.arange(len(part)) >= 2) for part in ids
        ]
    slots = torch.tensor([row % 2 == 0 or row >= samples for row in range(rows)])
    dtypes = {"teacher_mask": torch.bool, "chosen_mask": torch.bool, "rejected_mask": torch.bool}
    return DataProto.from_dict(
        tensors={
            **{
                name: jagged.from_rows(parts, dtype=dtypes.get(name, parts[0].dtype)) for name, parts in columns.items()
            },
            "pair_slot": slots,
        }
    )


def rows_of(batch: DataProto, name: str) -> list[list[float]]:
    return [row.tolist() for row in jagged.to_rows(batch.batch[name])]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def process_group(rank: int = 0, world_size: int = 1, port: int | None = None) -> Iterator[None]:
    """The default group, for as long as the context lasts."""
    init_process_group(rank, world_size, "127.0.0.1", port or free_port(), timeout_s=120)
    try:
        yield
    finally:
        deepspeed = sys.modules.get("deepspeed.comm.comm")  # remembers groups, which a later one here must not meet
        owner = dist if deepspeed is None or deepspeed.cdb is None else deepspeed
        owner.destroy_process_group()


def whole(shards: dict[str, Shard]) -> dict[str, torch.Tensor]:
    """What the ranks hold together; a collective."""
    result = {}
    for name, shard in shards.items():
        mine, full = shard.share(), torch.zeros(math.prod(shard.shape))
        full[mine.start : mine.stop] = mine.local.detach().reshape(-1)
        dist.all_reduce(full)
        result[name] = full.view(shard.shape)
    return result
