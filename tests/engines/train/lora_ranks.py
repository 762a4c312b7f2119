"""The processes of the multi-rank test of adapters: the same training on both back ends with 2 ranks and with 1.

    python lora_ranks.py MODEL_FOLDER OUTPUT_FOLDER

Rank 0 of each group writes what it saw to ``<back end>-<ranks>.safetensors``.
"""

from __future__ import annotations

import math
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import torch
from ranks import ROWS, share_of
from safetensors.torch import save_file
from training_batches import composed_batch, free_port, process_group, whole

from rlsys.algorithms.channels import Distillation, PolicyGradient, Preference
from rlsys.algorithms.objective import DivergencePass, Objective
from rlsys.batch import jagged
from rlsys.config.schema import DistillationConfig, LoraConfig, ModelConfig, TrainerConfig
from rlsys.engines.train import load_engine

OBJECTIVE = Objective(
    {
        "policy": (PolicyGradient(kl_coef=0.1), 1.0),
        "distillation": (Distillation(DivergencePass("jsd", {"alpha": 0.5})), 0.5),
        "preference": (Preference("dpo"), 0.3),
    }
)
TEACHER = DistillationConfig(weight=0.5, teacher="frozen")
# The most ranks come first: DeepSpeed numbers the parameters of a process and compares the numbers over ranks.
GROUPS = [(backend, ranks) for ranks in (2, 1) for backend in ("fsdp", "zero3")]
WRITERS = ("fsdp", "zero3")


def engine_of(backend: str, model: Path, quantize: Any = None) -> Any:
    lora = LoraConfig(rank=3, alpha=6.0, quantize=quantize)
    trainer = TrainerConfig(**{"backend": backend, "lr": 1e-2, "micro_batch_tokens": 130})
    config = ModelConfig(path=str(model), lora=lora)
    return load_engine(config, trainer, temperature=0.7, total_steps=10, seed=0, distillation=TEACHER)


def fill(engine: Any) -> None:
    """B is 0 at the start, and A has no gradient: the same random values everywhere."""
    for number, (name, shard) in enumerate(sorted(engine._trained.weights().items())):
        if name.endswith(".lora_B.weight"):
            drawn = 0.1 * torch.randn(math.prod(shard.shape), generator=torch.Generator().manual_seed(number))
            shard.fill(drawn[shard.start : shard.stop])
    engine._trained.moved()


def train(backend: str, rank: int, ranks: int, model: Path, output: Path) -> None:
    engine = engine_of(backend, model)
    batch = share_of(composed_batch(seed=3, rows=ROWS), rank, ranks)
    kept: dict[str, torch.Tensor] = {}

    def keep(label: str, named: Any) -> None:
        kept.update({f"{label}/{name}": tensor.clone() for name, tensor in named})

    def step() -> None:
        engine.forward_backward(batch, OBJECTIVE)
        engine.optim_step()

    reference = engine.forward(batch, adapter=False).batch["logprobs"]
    fill(engine)
    engine.forward_backward(batch, OBJECTIVE)
    keep("grad", whole(engine._trained.gradient()).items())
    engine.optim_step()
    keep("merged", engine.export_weights(torch.float32))
    keep("base", engine.export_weights(torch.float32, adapter=False))
    keep("adapter", engine.export_adapter(torch.float32))
    keep("moments", whole(engine._trained.moments()).items())
    unmoved = torch.equal(
        jagged.values(engine.forward(batch, adapter=False).batch["logprobs"]), jagged.values(reference)
    )
    kept["unmoved"] = torch.tensor(unmoved)

    if ranks == 2:
        (output / f"state-{backend}").mkdir(exist_ok=True)
        engine.save_state(output / f"state-{backend}")
    for writer in WRITERS:
        if GROUPS.index((writer, 2)) < GROUPS.index((backend, ranks)):
            step()
            engine.load_state(output / f"state-{writer}")
            keep(f"from-{writer}/adapter", engine.export_adapter(torch.float32))
            keep(f"from-{writer}/moments", whole(engine._trained.moments()).items())
            step()
            keep(f"from-{writer}/next", engine.export_adapter(torch.float32))
    engine = engine_of(backend, model, "nf4")
    fill(engine)
    engine.forward_backward(batch, OBJECTIVE)
    keep("nf4", whole(engine._trained.gradient()).items())
    if rank == 0:
        save_file(kept, output / f"{backend}-{ranks}.safetensors")


def run(rank: int, model: Path, output: Path, ports: list[int]) -> None:
    torch.set_num_threads(1)
    for (backend, ranks), port in zip(GROUPS, ports, strict=True):
        if rank < ranks:
            with process_group(rank, ranks, port):
                train(backend, rank, ranks, model, output)


def main() -> None:
    # Forked, so that torch and transformers are imported once; nothing here has used a thread before the fork.
    context = multiprocessing.get_context("fork")
    arguments = (Path(sys.argv[1]), Path(sys.argv[2]), [free_port() for _ in GROUPS])
    processes = [context.Process(target=run, args=(rank, *arguments), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in processes))


if __name__ == "__main__":
    main()
