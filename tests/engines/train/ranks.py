"""The processes of the multi-rank test: the same training on both back ends with 1, 2 and 4 ranks, one group after the
other.

    python ranks.py MODEL_FOLDER OUTPUT_FOLDER

Rank 0 of each group writes what it saw: ``<back end>-<ranks>.json`` (metrics), ``….safetensors`` (gradients, weights);
``<back end>-<ranks>-bfloat16.safetensors``: gradients of a forward and backward pass in bfloat16.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from training_batches import composed_batch, free_port, process_group, random_batch, whole

from rlsys.algorithms.channels import Distillation, PolicyGradient, Preference
from rlsys.algorithms.objective import DivergencePass, Objective
from rlsys.batch import DataProto, jagged
from rlsys.config.schema import DistillationConfig, ModelConfig, TrainerConfig
from rlsys.engines.train import TrainEngine, load_engine
from rlsys.engines.train.engine import ShardedEngine

OBJECTIVE = Objective(
    {
        "policy": (PolicyGradient(kl_coef=0.1, entropy_coef=0.01), 1.0),
        "distillation": (Distillation(DivergencePass("jsd", {"alpha": 0.5})), 0.5),
        "preference": (Preference("dpo"), 0.3),
    }
)
POLICY = Objective({"policy": (PolicyGradient(kl_coef=0.1, entropy_coef=0.01), 1.0)})
TEACHER = DistillationConfig(weight=0.5, teacher="ema", teacher_rate=0.3)
ROWS = 9  # on 4 ranks: 5, 3, 1 and none
SHARES = {1: [9], 2: [7, 2], 4: [5, 3, 1, 0]}
BUDGETS = {1: 4000, 2: 130, 4: 130}
# DeepSpeed numbers the parameters of a process and compares the numbers over ranks: the most ranks come first.
GROUPS = [(backend, ranks) for ranks in (4, 2, 1) for backend in ("fsdp", "zero3")]
JOBS = [
    (backend, ranks, dtype)
    for ranks in (4, 2, 1)
    for dtype in ("float32", "bfloat16")
    for backend in ("fsdp", "zero3")
    if ranks < 4 or dtype == "float32"
]
WRITERS = ("zero3", "fsdp")  # in the order in which their checkpoints are read: the last one is gone on from
# Whatever spares memory changes no number.
OPTIONS: dict[tuple[str, int], dict[str, Any]] = {
    ("fsdp", 4): {"shard_ranks": 2},
    ("zero3", 4): {"offload": "all"},
    ("zero3", 2): {"rows": "padded", "micro_batch_tokens": 260, "activations": "recompute"},
    ("zero3", 1): {"offload": "optimizer"},
}


def share_of(batch: DataProto, rank: int, ranks: int) -> DataProto:
    """This rank's rows: uneven shares, and not in the order of the ranks."""
    order = list(range(ROWS))[::-1] if ranks == 2 else list(range(ROWS))
    start = sum(SHARES[ranks][:rank])
    rows = order[start : start + SHARES[ranks][rank]]
    tensors = {}
    for name, column in batch.batch.items():
        if not jagged.is_jagged(column):
            tensors[name] = column[rows]
            continue
        parts = jagged.to_rows(column)
        tensors[name] = jagged.from_rows([parts[row] for row in rows], dtype=column.dtype)
    return DataProto.from_dict(tensors=tensors)


def weights_of(engine: TrainEngine, label: str) -> dict[str, torch.Tensor]:
    return {f"{label}/{name}": weight.clone() for name, weight in engine.export_weights(torch.float32)}


def state_of(engine: ShardedEngine, label: str) -> dict[str, torch.Tensor]:
    """Weights, moments and the teacher's weights, whole; a collective."""
    assert engine._teacher is not None
    moments = {f"{label}/{name}": tensor for name, tensor in whole(engine._trained.moments()).items()}
    teacher = {f"{label}/teacher/{name}": tensor for name, tensor in whole(engine._teacher.saved).items()}
    return weights_of(engine, label) | moments | teacher


def train(backend: str, rank: int, ranks: int, model: Path, output: Path) -> None:
    trainer = TrainerConfig(
        **{
            "backend": backend,
            "lr": 1e-2,
            "micro_batch_tokens": BUDGETS[ranks],
            **OPTIONS.get((backend, ranks), {}),
        }
    )
    config = ModelConfig(path=str(model))
    engine: Any = load_engine(config, trainer, temperature=0.7, total_steps=10, seed=0, distillation=TEACHER)
    batch = share_of(composed_batch(seed=3, rows=ROWS), rank, ranks)
    metrics: dict[str, float] = {}
    kept: dict[str, torch.Tensor] = {}

    forward = jagged.values(engine.forward(batch).batch["logprobs"]).sum().item()
    metrics["rows"], metrics["logprobs"] = len(batch), forward
    metrics |= engine.forward_backward(batch, OBJECTIVE)
    kept |= {f"grad/{name}": gradient for name, gradient in whole(engine._trained.gradient()).items()}
    metrics |= engine.optim_step()
    kept |= state_of(engine, "first")

    # Checkpoints of four ranks of each back end, read by every number of ranks of each, go on the same way.
    if ranks == 4:
        (output / f"state-{backend}").mkdir(exist_ok=True)
        engine.save_state(output / f"state-{backend}")
    for writer in WRITERS:
        state = output / f"state-{writer}"
        if GROUPS.index((writer, 4)) < GROUPS.index((backend, ranks)):
            engine.forward_backward(batch, OBJECTIVE)
            engine.optim_step()
            engine.load_state(state)
            kept |= state_of(engine, f"from-{writer}")
    # Everyone's second step is the first writer's.
    metrics |= {f"second/{k}": v for k, v in engine.forward_backward(batch, OBJECTIVE).items()}
    metrics |= {f"second/{k}": v for k, v in engine.optim_step().items()}
    kept |= weights_of(engine, "second")
    # Nobody has a row: every rank takes part in the collectives all the same.
    nothing = DataProto.from_dict(tensors={})
    engine.forward(nothing)
    metrics["nothing"] = engine.forward_backward(nothing, OBJECTIVE)["loss"]
    metrics["nothing/grad_norm"] = engine.optim_step()["grad_norm"]
    if rank == 0:
        (output / f"{backend}-{ranks}.json").write_text(json.dumps(metrics))
        save_file(kept, output / f"{backend}-{ranks}.safetensors")


def halves(backend: str, rank: int, ranks: int, model: Path, output: Path) -> None:
    """In bfloat16, of two rows: one on each of two ranks, or on one rank one after the other. What a row adds to a
    gradient is rounded in the same way in both; only how it is added up differs."""
    batch = random_batch(seed=3, rows=2)
    longest = int((jagged.lengths(batch.batch["prompt_ids"]) + jagged.lengths(batch.batch["response_ids"])).max())
    trainer = TrainerConfig(backend=backend, micro_batch_tokens=longest)  # type: ignore[arg-type]
    config = ModelConfig(path=str(model), dtype="bfloat16")
    engine: Any = load_engine(config, trainer, temperature=0.7, total_steps=10, seed=0)
    metrics = engine.forward_backward(batch if ranks == 1 else batch.slice(rank, rank + 1), POLICY)
    assert metrics["micro_batches"] == 2 / ranks
    gradient = whole(engine._trained.gradient())
    if rank == 0:
        save_file(gradient, output / f"{backend}-{ranks}-bfloat16.safetensors")


def run(rank: int, model: Path, output: Path, ports: list[int]) -> None:
    torch.set_num_threads(1)
    for (backend, ranks, dtype), port in zip(JOBS, ports, strict=True):
        if rank < ranks:
            with process_group(rank, ranks, port):
                (train if dtype == "float32" else halves)(backend, rank, ranks, model, output)


def main() -> None:
    # Forked, so that torch and transformers are imported once; nothing here has used a thread before the fork.
    context = multiprocessing.get_context("fork")
    ports = [free_port() for _ in JOBS]
    arguments = (Path(sys.argv[1]), Path(sys.argv[2]), ports)
    processes = [context.Process(target=run, args=(rank, *arguments), daemon=True) for rank in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in processes))


if __name__ == "__main__":
    main()
