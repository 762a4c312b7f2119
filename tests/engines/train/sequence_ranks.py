"""The processes of the test of sequence parallelism: the same training on ranks that hold rows together and on one that
holds them alone, one group after the other.

    python sequence_ranks.py MODEL_FOLDER OUTPUT_FOLDER

Rank 0 of each group writes what it saw: ``<group>.json`` (metrics), ``<group>.safetensors`` (gradients, weights).
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.autograd.graph import saved_tensors_hooks
from training_batches import composed_batch, free_port, process_group, whole

from rlsys.algorithms.channels import CrossEntropy, Distillation, PolicyGradient, Preference, ValueLoss
from rlsys.algorithms.objective import DivergencePass, Objective
from rlsys.batch import DataProto, jagged
from rlsys.config.schema import DistillationConfig, ModelConfig, TrainerConfig
from rlsys.engines.train import load_engine

OBJECTIVE = Objective(
    {
        "policy": (PolicyGradient(kl_coef=0.1, entropy_coef=0.01), 1.0),
        "distillation": (Distillation(DivergencePass("jsd", {"alpha": 0.5})), 0.5),
        "preference": (Preference("dpo"), 0.3),
    }
)
CRITIC = Objective({"critic": (ValueLoss(), 1.0)})
TEACHER = DistillationConfig(weight=0.5, teacher="trust_region", teacher_mix=0.4)
ROWS, TAIL = 9, 150
LONG = 401  # tokens of the row whose activations are weighed; not a multiple of any number of ranks


@dataclass(frozen=True)
class Group:
    """rows: of each rank, from the first on."""

    name: str
    rows: tuple[int, ...]
    sequence_ranks: int = 1
    options: dict[str, Any] = field(default_factory=dict)


GROUPS = [
    Group("zero3", (7, 2), 2, {"backend": "zero3"}),
    Group("copies", (5, 3, 1, 0), 2, {"shard_ranks": 2, "micro_batch_tokens": 180}),
    Group("four", (0, 4, 3, 2), 4, {"rows": "shared", "micro_batch_tokens": 100}),  # of 2 key heads
    Group("recomputed", (2, 7), 2, {"activations": "recompute", "micro_batch_tokens": 200}),
    Group("two", (7, 2), 2),
    Group("one", (9,)),
]


def rows_of(batch: DataProto, start: int, count: int) -> DataProto:
    tensors = {}
    for name, column in batch.batch.items():
        if not jagged.is_jagged(column):
            tensors[name] = column[start : start + count]
            continue
        parts = jagged.to_rows(column)[start : start + count]
        tensors[name] = jagged.from_rows(parts, dtype=column.dtype)
    return DataProto.from_dict(tensors=tensors) if count else DataProto.from_dict(tensors={})


def given() -> DataProto:
    batch = composed_batch(seed=3, rows=ROWS, tail=TAIL)
    old = jagged.values(batch.batch["old_logprobs"])
    lengths = jagged.lengths(batch.batch["old_logprobs"])
    batch.batch["values"] = jagged.from_values(0.1 * old, lengths)
    batch.batch["returns"] = jagged.from_values(old.sin(), lengths)
    prompts = jagged.to_rows(batch.batch["prompt_ids"])
    prompts[4] = prompts[3].clone()  # on one rank of every group: where prompts are shared, they are computed once
    batch.batch["prompt_ids"] = jagged.from_rows(prompts, dtype=torch.int64)
    return batch


def weights_of(engine: Any, label: str) -> dict[str, torch.Tensor]:
    return {f"{label}/{name}": weight.clone() for name, weight in engine.export_weights(torch.float32)}


def kept_bytes(engine: Any, rank: int) -> int:
    """What the forward pass over one long row, which the first rank has, keeps for the backward pass: each storage
    once, and no weights."""
    tokens = torch.arange(LONG) % 70
    lengths = torch.tensor([LONG - 1])
    row = DataProto.from_dict(
        tensors={
            "prompt_ids": jagged.from_values(tokens[:1], torch.tensor([1])),
            "response_ids": jagged.from_values(tokens[1:], lengths),
            "response_mask": jagged.from_values(torch.ones(LONG - 1, dtype=torch.bool), lengths),
        }
    )
    shapes = {tuple(weight.shape) for _, weight in engine.export_weights(torch.float32)}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not {tuple(tensor.shape), tuple(tensor.shape[::-1])} & shapes:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = row if rank == 0 else DataProto.from_dict(tensors={})
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        engine.forward_backward(batch, Objective({"imitation": (CrossEntropy(), 1.0)}))
    engine.optim_step()
    return sum(storages.values())


def train(group: Group, rank: int, model: Path, output: Path) -> None:
    settings = {"lr": 1e-2, "micro_batch_tokens": 4000, **group.options, "sequence_ranks": group.sequence_ranks}
    config, trainer = ModelConfig(path=str(model)), TrainerConfig(**settings)
    engine: Any = load_engine(config, trainer, temperature=0.7, total_steps=10, seed=0, distillation=TEACHER)
    batch = rows_of(given(), sum(group.rows[:rank]), group.rows[rank])
    metrics: dict[str, float] = {}
    kept: dict[str, torch.Tensor] = {}

    columns = engine.forward(batch)
    for name in ("logprobs", "entropy") if len(batch) else ():
        kept[f"column/{name}"] = jagged.values(columns.batch[name])
    metrics |= engine.forward_backward(batch, OBJECTIVE)
    kept |= {f"grad/{name}": gradient for name, gradient in whole(engine._trained.gradient()).items()}
    metrics |= engine.optim_step()
    kept |= weights_of(engine, "first")
    if group.name == "two":
        (output / "state").mkdir(exist_ok=True)
        engine.save_state(output / "state")
    if group.name == "one":
        engine.load_state(output / "state")
        kept |= weights_of(engine, "resumed")
    metrics |= {f"second/{name}": value for name, value in engine.forward_backward(batch, OBJECTIVE).items()}
    engine.optim_step()
    kept |= weights_of(engine, "second")
    metrics["nothing"] = engine.forward_backward(DataProto.from_dict(tensors={}), OBJECTIVE)["loss"]
    engine.optim_step()
    if group.name in ("one", "two"):
        metrics["kept_bytes"] = kept_bytes(engine, rank)
    if group.options.get("backend") != "zero3":
        critic: Any = load_engine(config, trainer, temperature=0.7, total_steps=10, seed=0, critic=True)
        critic.forward(batch)
        metrics |= {f"value/{name}": value for name, value in critic.forward_backward(batch, CRITIC).items()}
        kept |= {f"grad/critic/{name}": gradient for name, gradient in whole(critic._trained.gradient()).items()}
    if rank == 0:
        (output / f"{group.name}.json").write_text(json.dumps(metrics))
        save_file(kept, output / f"{group.name}.safetensors")


def run(rank: int, model: Path, output: Path, ports: list[int]) -> None:
    torch.set_num_threads(1)
    for group, port in zip(GROUPS, ports, strict=True):
        if rank < len(group.rows):
            with process_group(rank, len(group.rows), port):
                train(group, rank, model, output)


def main() -> None:
    # Forked, so that torch and transformers are imported once; nothing here has used a thread before the fork.
    context = multiprocessing.get_context("fork")
    arguments = (Path(sys.argv[1]), Path(sys.argv[2]), [free_port() for _ in GROUPS])
    processes = [context.Process(target=run, args=(rank, *arguments), daemon=True) for rank in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in processes))


if __name__ == "__main__":
    main()
