"""The bundled start is what its README says, and its recipe makes it again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlsys.config.assets import asset, bundled_model
from rlsys.data.arithmetic import answer, prompt, split

RECIPE = asset("recipes") / "start_model"


@torch.no_grad()
def accuracies(folder: str, problems: int = 1000, samples: int = 8) -> tuple[float, float]:
    """Greedy accuracy, and the share of problems that one of ``samples`` responses at temperature 1 gets right."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    _, held_out = split(2, ["+"], 1000, 0)
    chosen = held_out[:problems]
    chats = [[{"role": "user", "content": prompt(p, 2)}] for p in chosen]
    ids = torch.tensor(tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False))
    golds = [answer(p, 2) for p in chosen]

    def right(**options: object) -> torch.Tensor:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, **options)
        texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        count = len(texts) // len(golds)
        return torch.tensor([text == golds[i // count] for i, text in enumerate(texts)]).view(len(golds), count)

    torch.manual_seed(0)
    greedy = right(do_sample=False).float().mean().item()
    sampled = right(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=samples)
    return greedy, sampled.any(1).float().mean().item()


def test_the_bundled_start_is_small_and_has_something_to_learn() -> None:
    folder = Path(bundled_model("bundled:arithmetic"))
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2 << 20
    greedy, pass_at_8 = accuracies(str(folder))
    assert 0.3 <= greedy <= 0.55, "wrong often enough that reinforcement has something to do"
    assert pass_at_8 >= 0.9, "right often enough that it has something to reward"


def make(out: Path, *arguments: str) -> None:
    command = [sys.executable, str(RECIPE / "make.py"), "--out", str(out), *arguments]
    subprocess.run(command, check=True, timeout=3000, capture_output=True)


@pytest.mark.ray
def test_the_recipe_is_deterministic(tmp_path: Path) -> None:
    for name in ("first", "second"):
        make(tmp_path / name, "--steps", "3")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second
    AutoModelForCausalLM.from_pretrained(tmp_path / "first")


@pytest.mark.slow
@pytest.mark.ray
def test_the_recipe_makes_such_a_start_again(tmp_path: Path) -> None:
    make(tmp_path / "model")
    greedy, pass_at_8 = accuracies(str(tmp_path / "model"))
    assert 0.3 <= greedy <= 0.55
    assert pass_at_8 >= 0.9
