"""How well a start adds, alone and with something in the context, on problems that it never saw.

    python recipes/start_model/evaluate.py --model recipes/start_model/checkpoints/arithmetic

Writes the figures to ``accuracy.json`` beside the weights and shows them.

Feedback is what the reward function says of the model's own sampled failures. ``with`` and ``without`` are measured on
the same problems: for feedback, those of which a sample failed; for a hint, those that have something to mind.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import print_json
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlsys.data.arithmetic import Problem, answer, hint, prompt, split
from rlsys.rewards.arithmetic import feedback

sys.path.insert(0, str(Path(__file__).parent))
from contexts import DIGITS, with_sections

SAMPLES = 8  # responses a problem at temperature 1
HELD_OUT = 1000


class Solver:
    """A model that answers users' messages."""

    def __init__(self, folder: str):
        self._tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def respond(self, texts: Sequence[str], samples: int = 0) -> list[list[str]]:
        """The responses to each text: ``samples`` at temperature 1, or the one greedy response."""
        chats = [[{"role": "user", "content": text}] for text in texts]
        inputs = self._tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        options: dict[str, Any] = {"do_sample": False}
        if samples:
            options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_return_sequences": samples}
        out = self._model.generate(**inputs, max_new_tokens=DIGITS + 2, **options)
        said = self._tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        count = max(samples, 1)
        return [said[i : i + count] for i in range(0, len(said), count)]


def evaluate(folder: str, problems: int = HELD_OUT, seed: int = 0) -> dict[str, dict[str, float]]:
    """Accuracies on the first held-out problems, by what is in the context.

    Returns:
        Of ``plain``: ``greedy``, ``sampled``, ``pass@8``. Of ``feedback``, ``hint`` and ``solution``: ``problems``,
        and ``greedy`` and ``sampled`` accuracy, each also ``… without`` on the same problems.
    """
    solver = Solver(folder)
    chosen = split(DIGITS, ["+"], HELD_OUT, 0)[1][:problems]
    golds = {problem: answer(problem, DIGITS) for problem in chosen}
    torch.manual_seed(seed)
    alone = [prompt(problem, DIGITS) for problem in chosen]
    greedy = dict(zip(chosen, solver.respond(alone), strict=True))
    sampled = dict(zip(chosen, solver.respond(alone, SAMPLES), strict=True))

    def right(responses: dict[Problem, list[str]], of: Sequence[Problem]) -> float:
        """Share of all responses to these problems."""
        hits = [response == golds[problem] for problem in of for response in responses[problem]]
        return sum(hits) / len(hits)

    def compare(texts: dict[Problem, str]) -> dict[str, float]:
        those = list(texts)
        told = dict(zip(those, solver.respond([*texts.values()]), strict=True))
        told_sampled = dict(zip(those, solver.respond([*texts.values()], SAMPLES), strict=True))
        return {
            "problems": len(those),
            "greedy": right(told, those),
            "greedy without": right(greedy, those),
            "sampled": right(told_sampled, those),
            "sampled without": right(sampled, those),
        }

    failures = {p: [said for said in sampled[p] if said != golds[p]] for p in chosen}
    words = {p: feedback(prompt(p, DIGITS), golds[p], failed[0]) for p, failed in failures.items() if failed}
    hints = {p: hint(p, DIGITS) for p in chosen if hint(p, DIGITS)}
    return {
        "plain": {
            "problems": len(chosen),
            "greedy": right(greedy, chosen),
            "sampled": right(sampled, chosen),
            f"pass@{SAMPLES}": sum(golds[p] in sampled[p] for p in chosen) / len(chosen),
        },
        "feedback": compare({p: with_sections(prompt(p, DIGITS), feedback=said) for p, said in words.items()}),
        "hint": compare({p: with_sections(prompt(p, DIGITS), hint=said) for p, said in hints.items()}),
        "solution": compare({p: with_sections(prompt(p, DIGITS), solution=golds[p]) for p in chosen}),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--problems", type=int, default=HELD_OUT)
    arguments = parser.parse_args()
    figures = json.dumps(evaluate(str(arguments.model), arguments.problems), indent=2)
    (arguments.model / "accuracy.json").write_text(figures + "\n")
    print_json(figures)
