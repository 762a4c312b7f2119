"""Makes the bundled start: a 0.8M-parameter Qwen3 that imitates careless solvers of two-digit additions, who answer
better with a solution, a hint or feedback in the context.

    python recipes/start_model/make.py --out recipes/start_model/checkpoints/arithmetic

Trains on the same TrainerWorker as reinforcement learning, with a cross-entropy channel. Problems that are held out of
training there are held out here too. The same machine makes the same bytes again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import ray
import torch
from rich.progress import Progress
from transformers import Qwen3Config, Qwen3ForCausalLM

from rlsys.algorithms.channels import CrossEntropy
from rlsys.algorithms.objective import Objective
from rlsys.batch import DataProto, jagged
from rlsys.cluster.placement import ActorSpec, Plan
from rlsys.cluster.session import Placement, connect
from rlsys.config.schema import ArithmeticData, DeadlineConfig, LocalCluster, ModelConfig, TrainerConfig
from rlsys.data.arithmetic import Problem, split
from rlsys.workers.groups import TrainerGroup
from rlsys.workers.trainer import Slice
from rlsys.workers.waits import StopFlag, gather

sys.path.insert(0, str(Path(__file__).parent))
from careless import FORGETS_CARRY, MISREADS_SEVEN, USUAL, Care
from contexts import DIGITS, example
from tokenizer import END, VOCABULARY, make_tokenizer

ROWS = 256  # answers a step
STEPS = 1000
SEED = 0
# Micro-batches this small are of similar rows: problems alone are not padded to the length of those with a context.
TRAINER = TrainerConfig(lr=2e-3, schedule="wsd", warmup_steps=20, weight_decay=0.01, micro_batch_tokens=4096)
DATA = ArithmeticData(
    kind="arithmetic", digits=DIGITS, prompts_per_step=ROWS, max_prompt_tokens=16, max_response_tokens=8
)


def fresh_model(folder: Path) -> None:
    """Writes the untrained model and its tokenizer."""
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer()
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Solvers:
    """Rows of problems, alone or with something in the context, and solvers' answers; drawn anew each step."""

    def __init__(self, problems: Sequence[Problem], usual: Care = USUAL):
        self._problems, self._usual = problems, usual
        self._tokenizer = make_tokenizer()
        self._ids: dict[str, int] = self._tokenizer.get_vocab()

    def draw(self, step: int) -> DataProto:
        """[ROWS] rows for one training step; a pure function of ``step``."""
        rng = np.random.default_rng([SEED, step])
        examples = [example(self._problems, rng, self._usual) for _ in range(ROWS)]
        prompts = [self._encode(row.text) for row in examples]
        responses = [torch.tensor([*(self._ids[c] for c in row.response), self._ids[END]]) for row in examples]
        return DataProto.from_dict(
            tensors={
                "prompt_ids": jagged.from_rows(prompts),
                "response_ids": jagged.from_rows(responses),
                "response_mask": jagged.from_rows([torch.ones(len(r), dtype=torch.bool) for r in responses]),
            }
        )

    def _encode(self, text: str) -> torch.Tensor:
        messages = [{"role": "user", "content": text}]
        return torch.tensor(
            self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        )


def stubborn(share: float) -> Care:
    """Solvers who make every slip that a problem invites with this probability."""
    return Care(share / FORGETS_CARRY, share / MISREADS_SEVEN)


def train(out: Path, steps: int, threads: int, usual: Care = USUAL, origin: Path | None = None) -> list[float]:
    """Trains for ``steps`` and writes ``out``: from scratch, or from the model in ``origin`` with half the learning
    rate. Returns the loss of every step."""
    training, _ = split(DATA.digits, DATA.operations, DATA.held_out, DATA.split_seed)
    solvers, losses = Solvers(training, usual), []
    trainer = TRAINER if origin is None else replace(TRAINER, lr=TRAINER.lr / 2)
    with ExitStack() as stack:
        start = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if origin is None:
            fresh_model(start)
        else:
            shutil.copytree(origin, start, dirs_exist_ok=True)
        stack.enter_context(connect(LocalCluster(kind="local")))
        plan = Plan((ActorSpec("trainer", 0, threads=threads, env={"OMP_NUM_THREADS": str(threads)}),), ())
        group = TrainerGroup(Placement(plan, seconds=60), DeadlineConfig(), StopFlag())
        stack.callback(group.close)
        calls = group.starting(ModelConfig(path=str(start)), trainer, temperature=1.0, total_steps=steps, seed=SEED)
        gather(calls, phase="start", seconds=300)
        group.set_objective(Objective({"cross_entropy": (CrossEntropy(), 1.0)}))
        progress = stack.enter_context(Progress())
        task = progress.add_task("imitating careless solvers", total=steps)
        for step in range(steps):
            rows = ray.put(solvers.draw(step))
            group.load_batch([[[Slice((rows,), np.arange(ROWS))]]])
            losses.append(group.forward_backward(0, [{}])["cross_entropy/loss"])
            group.optim_step()
            progress.update(task, advance=1, description=f"loss {losses[-1]:.3f}")
        group.export_hf(str(out.absolute()), str(start), "bfloat16")
    (out / "recipe.json").write_text(
        json.dumps({"steps": steps, "seed": SEED, "final_loss": losses[-1]}, indent=2) + "\n"
    )
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model into")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--slips", type=float, help="probability of every slip; without it those of careless.py")
    parser.add_argument("--origin", type=Path, help="a model folder to go on from; without it from random weights")
    arguments = parser.parse_args()
    usual = USUAL if arguments.slips is None else stubborn(arguments.slips)
    train(arguments.out, arguments.steps, arguments.threads, usual, arguments.origin)
