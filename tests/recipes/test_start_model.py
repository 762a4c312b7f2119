"""The bundled start is what its README says, and its recipe makes it again."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from rlsys.config.assets import asset, bundled_model

RECIPE = asset("recipes") / "start_model"


@pytest.fixture(scope="module")
def evaluate() -> Iterator[Callable[..., dict[str, dict[str, float]]]]:
    sys.path.insert(0, str(RECIPE))
    try:
        yield importlib.import_module("evaluate").evaluate
    finally:
        sys.path.remove(str(RECIPE))


def is_such_a_start(figures: dict[str, dict[str, float]]) -> None:
    plain = figures["plain"]
    assert 0.45 <= plain["greedy"] <= 0.6, "wrong often enough that reinforcement has something to do"
    assert plain["pass@8"] >= 0.9, "right often enough that it has something to reward"
    for context, least in (("feedback", 0.85), ("hint", 0.85), ("solution", 0.97)):
        told = figures[context]
        assert told["greedy"] >= least, f"a teacher with {context} has something to teach"
        assert min(told["greedy"] - told["greedy without"], told["sampled"] - told["sampled without"]) > 0.25


@pytest.mark.slow
def test_the_bundled_start_is_small_and_has_something_to_learn(evaluate) -> None:
    folder = Path(bundled_model("bundled:arithmetic"))
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2 << 20
    is_such_a_start(evaluate(str(folder), problems=400))


def test_the_readme_states_what_was_measured() -> None:
    stated = json.loads((Path(bundled_model("bundled:arithmetic")) / "accuracy.json").read_text())
    is_such_a_start(stated)
    readme = (RECIPE / "README.md").read_text()
    for context in ("feedback", "hint", "solution"):
        told = stated[context]
        shown = [
            f"{100 * told[f'{how}{without}']:.1f} %" for how in ("greedy", "sampled") for without in (" without", "")
        ]
        assert f"| {' | '.join(shown)} |" in readme
    plain = stated["plain"]
    assert all(f"{100 * plain[name]:.1f} %" in readme for name in ("greedy", "sampled", "pass@8"))


def make(out: Path, *arguments: str) -> None:
    command = [sys.executable, str(RECIPE / "make.py"), "--out", str(out), *arguments]
    subprocess.run(command, check=True, timeout=3000, capture_output=True)


@pytest.mark.slow
@pytest.mark.ray
def test_the_recipe_is_deterministic(tmp_path: Path) -> None:
    for name in ("first", "second"):
        make(tmp_path / name, "--steps", "3")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second
    AutoModelForCausalLM.from_pretrained(tmp_path / "first")


@pytest.mark.slow
@pytest.mark.ray
def test_the_recipe_makes_such_a_start_again(tmp_path: Path, evaluate) -> None:
    make(tmp_path / "model")
    is_such_a_start(evaluate(str(tmp_path / "model")))
