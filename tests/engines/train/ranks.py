"""The processes of the multi-rank test: the same training with 1, 2 and 4 ranks, one group after the other.

    python ranks.py MODEL_FOLDER OUTPUT_FOLDER

Rank 0 of each group writes what it saw: ``<ranks>.json`` (metrics) and ``<ranks>.safetensors`` (gradients, weights).
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from training_batches import composed_batch, free_port, process_group

from rlsys.algorithms.channels import Distillation, PolicyGradient, Preference
from rlsys.algorithms.objective import DivergencePass, Objective
from rlsys.batch import DataProto, jagged
from rlsys.config.schema import DistillationConfig, ModelConfig, TrainerConfig
from rlsys.engines.train import load_engine
from rlsys.engines.train.fsdp import FsdpEngine

OBJECTIVE = Objective(
    {
        "policy": (PolicyGradient(kl_coef=0.1, entropy_coef=0.01), 1.0),
        "distillation": (Distillation(DivergencePass("jsd", {"alpha": 0.5})), 0.5),
        "preference": (Preference("dpo"), 0.3),
    }
)
TEACHER = DistillationConfig(weight=0.5, teacher="ema", teacher_rate=0.3)
ROWS = 9  # on 4 ranks: 5, 3, 1 and none
SHARES = {1: [9], 2: [7, 2], 4: [5, 3, 1, 0]}
BUDGETS = {1: 4000, 2: 200, 4: 260}


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


def tensors_of(engine: FsdpEngine, what: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole gradients or moments; a collective."""
    for name, parameter in engine._trained.parameters.items():
        held = parameter.grad if what == "grad" else engine._trained.optimizer.state[parameter][what]
        yield f"{what}/{name}", held.full_tensor().clone()


def train(rank: int, ranks: int, model: Path, output: Path) -> None:
    trainer = TrainerConfig(lr=1e-2, micro_batch_tokens=BUDGETS[ranks], logprob_chunk_tokens=17)
    config = ModelConfig(path=str(model))
    engine = load_engine(config, trainer, temperature=0.7, total_steps=10, seed=0, distillation=TEACHER)
    batch = share_of(composed_batch(seed=3, rows=ROWS), rank, ranks)
    metrics: dict[str, float] = {}
    kept: dict[str, torch.Tensor] = {}

    forward = jagged.values(engine.forward(batch).batch["logprobs"]).sum().item()
    metrics["rows"], metrics["logprobs"] = len(batch), forward
    metrics |= engine.forward_backward(batch, OBJECTIVE)
    kept |= dict(tensors_of(engine, "grad"))
    metrics |= engine.optim_step()
    kept |= {f"weight/{name}": w.clone() for name, w in engine.export_weights(torch.float32)}
    kept |= dict(tensors_of(engine, "exp_avg"))

    # A checkpoint of two ranks, read by every number of ranks, goes on the same way.
    state = output / "state"
    if ranks == 2:
        state.mkdir(exist_ok=True)
        engine.save_state(state)
    else:
        engine.forward_backward(batch, OBJECTIVE)
        engine.optim_step()
        engine.load_state(state)
    kept |= {f"loaded/{name}": w.clone() for name, w in engine.export_weights(torch.float32)}
    kept |= {f"loaded/{name}": t for what in ("exp_avg", "exp_avg_sq") for name, t in tensors_of(engine, what)}
    metrics |= {f"second/{k}": v for k, v in engine.forward_backward(batch, OBJECTIVE).items()}
    metrics |= {f"second/{k}": v for k, v in engine.optim_step().items()}
    kept |= {f"second/{name}": w.clone() for name, w in engine.export_weights(torch.float32)}
    if rank == 0:
        (output / f"{ranks}.json").write_text(json.dumps(metrics))
        save_file(kept, output / f"{ranks}.safetensors")


def run(rank: int, model: Path, output: Path, ports: dict[int, int]) -> None:
    torch.set_num_threads(1)
    for ranks, port in ports.items():
        if rank < ranks:
            with process_group(rank, ranks, port):
                train(rank, ranks, model, output)


def main() -> None:
    # Forked, so that torch and transformers are imported once; nothing here has used a thread before the fork.
    context = multiprocessing.get_context("fork")
    ports = {ranks: free_port() for ranks in (2, 4, 1)}
    arguments = (Path(sys.argv[1]), Path(sys.argv[2]), ports)
    processes = [context.Process(target=run, args=(rank, *arguments), daemon=True) for rank in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in processes))


if __name__ == "__main__":
    main()
