"""The quick start of the composed loss passes on models that learn, and fails and says so where nothing is learnt."""

from __future__ import annotations

import importlib.util
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from model_folders import make_model_folder

from rlsys.batch import jagged
from rlsys.config.assets import asset, bundled_model
from rlsys.engines.train.model import load_causal_lm

SCRIPT = asset("recipes") / "composer_quickstart" / "run.py"
Seen = tuple[int, list[list[float]], str]


def read(status: int, output: str) -> Seen:
    """Exit code, the table's rows, and the verdict's line."""
    cells = [line.split("│")[1:-1] for line in output.splitlines() if line.startswith("│")]
    return status, [[float(cell) for cell in row] for row in cells], output.splitlines()[-1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for family in ("llama", "qwen2"):
        make_model_folder(root / family, family)
    return root


@pytest.fixture(scope="module")
def launched() -> dict[str, Seen]:
    """Two runs of the script, side by side."""
    arguments = {"bundled": [], "broken": ["--lr", "0"]}
    running = {
        name: subprocess.Popen([sys.executable, str(SCRIPT), *more], stdout=subprocess.PIPE, text=True)
        for name, more in arguments.items()
    }
    return {name: read(process.wait(), process.communicate()[0]) for name, process in running.items()}


@pytest.fixture(scope="module")
def quickstart() -> ModuleType:
    spec = importlib.util.spec_from_file_location("composer_quickstart", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(quickstart: ModuleType, capsys: pytest.CaptureFixture[str]) -> Callable[..., Seen]:
    return lambda *arguments: read(quickstart.main(arguments), capsys.readouterr().out)


def is_a_pass(seen: Seen, steps: int) -> None:
    status, rows, verdict = seen
    assert status == 0
    assert [row[0] for row in rows] == [*range(steps + 1)]
    assert all(math.isfinite(value) for row in rows for value in row)
    assert all(row[-1] > 0 for row in rows)
    assert rows[-1][1] <= 0.5 * rows[0][1]
    assert re.match(rf"PASSED: loss .* down by [\d.]+ % in {steps} steps", verdict)


def test_the_loss_falls_by_half_and_every_gradient_is_finite(launched: dict[str, Seen]) -> None:
    is_a_pass(launched["bundled"], 5)


def test_the_terms_add_up_and_begin_at_the_reference(launched: dict[str, Seen]) -> None:
    _, rows, _ = launched["bundled"]
    for _, loss, cross_entropy, distillation, preference, _ in rows:
        assert loss == pytest.approx(cross_entropy + 0.1 * distillation + 0.05 * preference, rel=1e-3)
    assert rows[0][4] == pytest.approx(math.log(2), abs=1e-4)  # a margin of 0: the reference is the model itself


def test_a_model_that_does_not_move_fails(launched: dict[str, Seen]) -> None:
    status, rows, verdict = launched["broken"]
    assert status == 1
    assert rows[0][1:] == rows[-1][1:]
    assert verdict.startswith("FAILED: ")


@pytest.mark.parametrize("seed", ["1", "2"])
def test_other_problems_pass_with_room_to_spare(run: Callable[..., Seen], seed: str) -> None:
    status, rows, _ = run("--seed", seed)
    assert status == 0
    assert rows[-1][1] <= 0.4 * rows[0][1]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_other_families_pass(run: Callable[..., Seen], tiny: Path, family: str) -> None:
    is_a_pass(run("--model", str(tiny / family), "--steps", "6"), 6)


def test_what_is_not_finite_fails_in_words(run: Callable[..., Seen]) -> None:
    status, rows, verdict = run("--lr", "1e30")
    assert status == 1
    assert len(rows) == 2
    assert verdict.startswith("FAILED: not finite at step 1")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--model", "bundled:nothing"], "known: arithmetic"),
        (["--steps", "0"], "--steps"),
        (["--lr", "nan"], "--lr"),
    ],
)
def test_bad_input_is_named(
    quickstart: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    assert quickstart.main(arguments) == 2
    assert named in capsys.readouterr().err


def test_the_batch_is_made_of_chat_prompts(quickstart: ModuleType) -> None:
    tokenizer = quickstart.load_tokenizer(bundled_model("bundled:arithmetic"))
    batch = quickstart.chat_batch(tokenizer, quickstart.BUNDLED_HINTS, 3)
    rows = {name: [tokenizer.decode(ids) for ids in jagged.to_rows(batch.batch[f"{name}_ids"])]
            for name in ("prompt", "response", "teacher_prompt", "chosen", "rejected")}  # fmt: skip
    for row in range(len(batch)):
        problem, said, taught, chosen, rejected = (rows[name][row] for name in rows)
        a, b = re.fullmatch(r"<\|user\|>(\d\d)\+(\d\d)=<\|assistant\|>", problem).groups()
        assert said == f"{int(a) + int(b):03d}<|end|>"
        assert taught == f"<|user|>{a}+{b}=\nsolution: {said.removesuffix('<|end|>')}<|assistant|>"
        assert chosen == problem + said
        assert rejected.startswith(problem)
        assert len(rejected) == len(chosen)
        assert rejected != chosen
    assert bool(jagged.values(batch.batch["teacher_mask"]).all())


def test_the_learning_rate_falls_with_the_size(quickstart: ModuleType) -> None:
    rates = [quickstart.learning_rate(size) for size in (80_000, 804_224, 50_000_000, 500_000_000, 70_000_000_000)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-2:] == [1e-5, 1e-5]


def test_the_model_is_trained_in_the_order_that_is_shown(quickstart: ModuleType) -> None:
    """Row 0 is before any step, and each further row after one."""
    folder = bundled_model("bundled:arithmetic")
    tokenizer = quickstart.load_tokenizer(folder)
    batch = quickstart.with_reference_logprobs(quickstart.chat_batch(tokenizer, quickstart.BUNDLED_HINTS, 0), folder)
    model = load_causal_lm(quickstart.ModelConfig(path=folder), torch.float32)
    before = quickstart.compose_loss(model, batch).loss.item()
    found = list(quickstart.looks(model, batch, 2, 1e-4))
    assert [found[0].loss, found[2].loss] == [before, quickstart.compose_loss(model, batch).loss.item()]
