"""Five AdamW steps of the composed loss on one batch of chat prompts: does it go down, is every gradient finite?

    python recipes/composer_quickstart/run.py
    python recipes/composer_quickstart/run.py --model Qwen/Qwen2.5-0.5B-Instruct

Prints the loss and its three terms before the first step and after each one, and a verdict. Exit code 0: the loss fell
by half or more; 1: it did not, or something was not finite; 2: bad input.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from sys import maxsize

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlsys import compose_loss
from rlsys.batch import DataProto, jagged
from rlsys.config.assets import BUNDLED
from rlsys.config.errors import UserError
from rlsys.config.schema import HintsConfig, ModelConfig, TrainerConfig
from rlsys.controller.inputs import count_parameters, find_model
from rlsys.data.arithmetic import Problem, answer, prompt, split
from rlsys.data.base import user_row
from rlsys.data.prompts import PromptEncoder, load_tokenizer
from rlsys.engines.train.collectives import training_device
from rlsys.engines.train.model import load_causal_lm
from rlsys.engines.train.reference import ReferenceEngine
from rlsys.launch import EXIT_BAD_INPUT, show_error
from rlsys.replay.hints import TeacherContexts
from rlsys.replay.pair_columns import SIDES, reference_view, side_columns, side_row, with_reference

ROWS = 8
DIGITS = 2
WANTED = 0.5  # share of the loss that the steps have to take away
WEIGHTS = {"cross_entropy": 1.0, "distillation": 0.1, "preference": 0.05}
# Learning rate of a model with fewer parameters than this; the last one of all that are larger.
LEARNING_RATES = {500_000: 3e-3, 10_000_000: 2e-4, 100_000_000: 5e-5, maxsize: 1e-5}
# What the bundled model has seen in its training (configs/hints/bundled.yaml); any other reads plain English.
BUNDLED_HINTS = HintsConfig(source=["reference"], solution_template="\nsolution: {solution}", instruction="")
HINTS = HintsConfig(source=["reference"])


@dataclass(frozen=True)
class Look:
    """loss: with all channels; channels: their values without weights; grad_norm: over all parameters."""

    loss: float
    channels: dict[str, float]
    grad_norm: float

    @property
    def finite(self) -> bool:
        return all(math.isfinite(value) for value in (self.loss, self.grad_norm, *self.channels.values()))


def learning_rate(parameters: int) -> float:
    """What five steps can take: the larger the model, the smaller."""
    return next(lr for size, lr in LEARNING_RATES.items() if parameters < size)


def wrong(problem: Problem, draw: random.Random) -> str:
    """The right answer with another last digit."""
    right = answer(problem, DIGITS)
    return right[:-1] + str((int(right[-1]) + draw.randrange(1, 10)) % 10)


def chat_batch(tokenizer: PreTrainedTokenizerBase, hints: HintsConfig, seed: int) -> DataProto:
    """[ROWS] problems as the trainer would have them: right answers as responses, a teacher that is shown the solution,
    and pairs of the right and a wrong answer; without reference log-probs."""
    draw = random.Random(seed)
    training, _ = split(DIGITS, ["+"], 1000, 0)
    problems = [training[place] for place in draw.sample(range(len(training)), ROWS)]
    right, slips = [answer(p, DIGITS) for p in problems], [wrong(p, draw) for p in problems]
    texts = [prompt(p, DIGITS) for p in problems]
    rows = [user_row(text, text, {"solution": solved}, text) for text, solved in zip(texts, right, strict=True)]
    encoded = PromptEncoder(tokenizer, max_prompt_tokens=maxsize).encode_many(rows)
    prompts = [torch.tensor(ids, dtype=torch.int64) for ids in encoded]
    said = {"chosen": _responses(tokenizer, right), "rejected": _responses(tokenizer, slips)}
    masks = {side: [torch.ones(len(ids), dtype=torch.bool) for ids in said[side]] for side in SIDES}
    columns = {
        "prompt_ids": jagged.from_rows(prompts),
        "response_ids": jagged.from_rows(said["chosen"]),
        "response_mask": jagged.from_rows(masks["chosen"]),
        "sample_index": torch.zeros(ROWS, dtype=torch.int64),
        "pair_slot": torch.ones(ROWS, dtype=torch.bool),
    }
    for side in SIDES:
        sides = [side_row(*parts) for parts in zip(prompts, said[side], masks[side], strict=True)]
        columns |= side_columns(side, sides, reference=False)
    objects = {
        "uid": [row.row_id for row in rows],
        "task": [row.task for row in rows],
        "messages": [row.messages for row in rows],
        "environment": [{}] * ROWS,
    }
    batch = DataProto.from_dict(columns, {name: _cells(values) for name, values in objects.items()})
    teacher, _ = TeacherContexts(tokenizer, hints).build(batch, right, np.ones(ROWS), [None] * ROWS)
    return batch.union(teacher)


def with_reference_logprobs(batch: DataProto, folder: str) -> DataProto:
    """The batch with the pairs' log-probs under the model in the folder."""
    engine = ReferenceEngine.load(ModelConfig(path=folder), TrainerConfig(), temperature=1.0)
    for side in SIDES:
        batch = with_reference(batch, side, engine.forward(reference_view(batch, side)))
    return batch


def looks(model: PreTrainedModel, batch: DataProto, steps: int, lr: float) -> Iterator[Look]:
    """The loss and its gradient, before the first step and after each one; ends early at one that is not finite."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    weights = {"alpha_sdpo": WEIGHTS["distillation"], "beta_replay": WEIGHTS["preference"]}
    for step in range(steps + 1):
        if step:
            optimizer.step()
        optimizer.zero_grad()
        composed = compose_loss(model, batch, **weights)
        composed.loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        look = Look(composed.loss.item(), composed.channels, norm.item())
        yield look
        if not look.finite:
            return


def table(found: Sequence[Look]) -> Table:
    shown = Table()
    for title in ("step", "loss", *(name.replace("_", "-") for name in WEIGHTS), "gradient norm"):
        shown.add_column(title, justify="right")
    for step, look in enumerate(found):
        values = (look.loss, *(look.channels[name] for name in WEIGHTS), look.grad_norm)
        shown.add_row(str(step), *(f"{value:.4g}" for value in values))
    return shown


def verdict(found: Sequence[Look]) -> tuple[bool, str]:
    """Whether the loss fell by :data:`WANTED`, in words too."""
    first, last, steps = found[0].loss, found[-1].loss, len(found) - 1
    if not found[-1].finite:
        return False, f"not finite at step {steps}: loss {last:.4g}, gradient norm {found[-1].grad_norm:.4g}"
    fallen = 1 - last / first if first else 0.0
    plural = "" if steps == 1 else "s"
    what = f"down by {100 * fallen:.1f} %" if fallen >= 0 else f"up by {-100 * fallen:.1f} %"
    return (
        fallen >= WANTED,
        f"loss {first:.4g} -> {last:.4g}, {what} in {steps} step{plural}, wanted: {100 * WANTED:.0f} %; "
        "all gradients finite",
    )


def run(model: str, steps: int, lr: float | None, seed: int) -> int:
    """Prints it all. Returns the exit code, 0 or 1.

    Raises:
        UserError: the model cannot be used, or a number is not what it may be.
    """
    if steps < 1:
        raise UserError(f"there is nothing to see in {steps} steps", where="--steps", fix="give 1 or more")
    if lr is not None and not (math.isfinite(lr) and lr >= 0):
        raise UserError(f"a learning rate is a number of at least 0, not {lr}", where="--lr")
    folder = find_model(model)
    console, parameters = Console(), count_parameters(folder)
    rate = learning_rate(parameters) if lr is None else lr
    whence = "for a model of this size" if lr is None else "as given"
    console.print(f"{model}: {parameters:,} parameters; learning rate {rate:g} ({whence}); seed {seed}", soft_wrap=True)
    batch = chat_batch(load_tokenizer(str(folder)), BUNDLED_HINTS if model.startswith(BUNDLED) else HINTS, seed)
    batch = with_reference_logprobs(batch, str(folder))
    lm = load_causal_lm(ModelConfig(path=str(folder)), torch.float32).to(training_device())
    found = list(looks(lm, batch, steps, rate))
    passed, words = verdict(found)
    console.print(table(found))
    word = "[bold green]PASSED[/]" if passed else "[bold red]FAILED[/]"
    console.print(f"{word}: {words}", soft_wrap=True)
    return 0 if passed else 1


def _responses(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[torch.Tensor]:
    """Tokens of each text and the end token."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [torch.tensor([*tokens, *end], dtype=torch.int64) for tokens in ids]


def _cells(values: Sequence[object]) -> np.ndarray:
    cells = np.empty(len(values), dtype=object)
    cells[:] = values
    return cells


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled:arithmetic", help="folder, hub id, or bundled:NAME")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--lr", type=float, help="of AdamW; default: by the model's size")
    parser.add_argument("--seed", type=int, default=0, help="of the problems and the wrong answers")
    arguments = parser.parse_args(argv)
    try:
        return run(arguments.model, arguments.steps, arguments.lr, arguments.seed)
    except UserError as error:
        show_error(error)
        return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
