"""A user's own estimator, policy loss, divergence, preference loss and reward, just as docs/how-to/new-algorithm.md has
them: from one file outside of the package, in under 40 lines."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from pages import commands, python_block, write_python_block
from running import RUN_S, SMALL, environment, only_run, read_jsonl, steps_of

from rlsys.algorithms.advantages import estimate
from rlsys.algorithms.divergences.chunked import Head, TeacherPart, token_divergence
from rlsys.algorithms.losses import check_loss
from rlsys.algorithms.preferences import PREFERENCE_LOSSES, PairLogprobs
from rlsys.config.errors import UserError
from rlsys.tracking.metrics import Line

PAGE, MODULE = "how-to/new-algorithm.md", "my_algorithm"
ONE_STEP = (
    "steps=1",
    "rollout=torch",
    "eval.every=0",
    "data.prompts_per_step=8",
    "tracker.rollouts=64",
    "checkpoint.export=false",
)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The page's file, importable by its name from outside of the package."""
    path = write_python_block(PAGE, tmp_path / "mine", MODULE)
    monkeypatch.syspath_prepend(path.parent)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    return importlib.import_module(MODULE)


def run(command: list[str], tmp_path: Path) -> tuple[Path, Line]:
    """Runs a command of the page for one step, in a folder that is not the module's. Returns run folder and metrics."""
    mine, work = write_python_block(PAGE, tmp_path / "mine", MODULE).parent, tmp_path / "work"
    work.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "rlsys.launch", *command, *SMALL, *ONE_STEP],
        cwd=work,
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
        env=environment(PYTHONPATH=str(mine)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = only_run(work)
    (line,) = steps_of(folder)
    return folder, line


def command_with(word: str) -> list[str]:
    (found,) = [command for command in commands(PAGE) if any(word in override for override in command)]
    return found


def test_the_file_is_short() -> None:
    assert len(python_block(PAGE).splitlines()) < 40


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(RUN_S + 60)
def test_estimator_loss_and_reward_train_from_the_command_of_the_page(module: ModuleType, tmp_path: Path) -> None:
    folder, line = run(command_with("short_first"), tmp_path)
    assert 0 <= line["policy/capped"] <= 1  # what this loss reports,
    assert "policy/clip_fraction" not in line  # and not what the recipe's would
    assert math.isfinite(line["policy/loss"])
    assert line["train/grad_norm"] > 0
    rows = read_jsonl(folder / "rollouts" / "step-000001.jsonl")
    assert len(rows) == line["rollout/samples"]
    for row in rows:
        assert row["reward"] == pytest.approx(module.digits_right(row["response"], {"answer": row["answer"]}), abs=1e-6)
    lengths = torch.tensor([sum(row["response_mask"]) for row in rows])
    advantages, _ = estimate(
        f"{MODULE}.short_first",
        torch.tensor([row["reward"] for row in rows]),
        [row["uid"] for row in rows],
        inputs={"lengths": lengths},
        bonus=0.05,
    )
    assert [row["advantage"] for row in rows] == pytest.approx(advantages.tolist(), abs=1e-6)
    assert advantages.abs().max() > 0


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(RUN_S + 60)
def test_divergence_and_preference_loss_train_beside_the_policy_gradient(tmp_path: Path) -> None:
    _, line = run(command_with("hellinger"), tmp_path)
    assert line["distillation/live_fraction"] > 0
    assert 0 < line["distillation/divergence"] <= 1
    assert line["preference/live_fraction"] > 0
    assert line["preference/violated"] == 1.0  # before the first update π is the reference, h is 0, and the loss 1
    assert line["preference/loss"] == pytest.approx(1.0, abs=1e-4)
    assert line["train/grad_norm"] > 0


def test_the_divergence_is_exact_in_chunks_over_the_whole_vocabulary(module: ModuleType) -> None:
    generator = torch.Generator().manual_seed(3)
    tokens, width, words = 11, 6, 23
    hidden = torch.randn(tokens, width, generator=generator, requires_grad=True)
    weight = torch.randn(words, width, generator=generator, requires_grad=True)
    other = torch.randn(tokens, width, generator=generator)
    teacher = [TeacherPart(1.0, other, Head(weight.detach(), None))]
    found = token_divergence(hidden, Head(weight, None), teacher, f"{MODULE}.hellinger", {}, chunk=4).loss
    gradients = torch.autograd.grad(found.sum(), (hidden, weight))
    probabilities = torch.softmax(hidden @ weight.T, -1)
    wanted = 1 - (probabilities * torch.softmax(other @ weight.detach().T, -1)).sqrt().sum(-1)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    for mine, dense in zip(gradients, torch.autograd.grad(wanted.sum(), (hidden, weight)), strict=True):
        torch.testing.assert_close(mine, dense, atol=1e-6, rtol=1e-5)


def test_the_divergence_of_a_teacher_that_says_the_same_is_zero(module: ModuleType) -> None:
    hidden, weight = torch.eye(3), torch.ones(5, 3)
    same = [TeacherPart(1.0, hidden, Head(weight, None))]
    loss = token_divergence(hidden, Head(weight, None), same, f"{MODULE}.hellinger", {}).loss
    torch.testing.assert_close(loss, torch.zeros(3), atol=1e-6, rtol=0)


def test_the_preference_loss_pushes_pairs_apart_until_the_margin_is_there(module: ModuleType) -> None:
    hinge = PREFERENCE_LOSSES.get(f"{MODULE}.hinge", where="algorithm.preference.loss")
    policy = torch.tensor([0.0, 30.0], requires_grad=True)
    none, lengths = torch.zeros(2), torch.ones(2, dtype=torch.int64)
    loss = hinge(PairLogprobs(policy, none, lengths), PairLogprobs(none, none, lengths), beta=0.1)
    loss.pairs.sum().backward()
    assert loss.pairs.tolist() == [1.0, 0.0]
    assert policy.grad is not None
    assert policy.grad.tolist() == pytest.approx([-0.1, 0.0])
    assert [float(value) for value in loss.sums["violated"]] == [1.0, 2.0]


def test_masked_tokens_of_the_loss_earn_nothing(module: ModuleType) -> None:
    logprobs = torch.tensor([-1.0, -0.5, 3.0], requires_grad=True)
    old, mask = torch.tensor([-1.0, -1.5, -torch.inf]), torch.tensor([True, True, False])
    loss = module.upper_clip(logprobs, old, torch.tensor([1.0, 1.0, torch.nan]), mask, cap=1.2)
    loss.tokens.sum().backward()
    assert loss.tokens.tolist() == pytest.approx([-1.0, -1.2, 0.0])
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [-1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("check", "words"),
    [
        (lambda: check_loss(f"{MODULE}.upper_clip", {"capp": 1.1}), "cap"),
        (lambda: check_loss(f"{MODULE}.upper_clip", {"cap": "wide"}), "cap"),
        (lambda: check_loss(f"{MODULE}.lower_clip", {}), "lower_clip"),
        (lambda: estimate(f"{MODULE}.short_first", torch.ones(2), ["a", "a"], bonus=None), "bonus"),
    ],
    ids=["misspelt option", "option of another type", "no such function", "option without a value"],
)
def test_mistakes_are_named(module: ModuleType, check: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check()
