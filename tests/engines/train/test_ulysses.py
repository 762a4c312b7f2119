"""Ranks that hold a packed row together: real processes over gloo compute the step of one rank, and keep less."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from composing import composed, run_config
from model_folders import make_model_folder
from safetensors.torch import load_file
from training_batches import process_group

from rlsys.cluster.placement import plan
from rlsys.config.build import build
from rlsys.config.errors import UserError
from rlsys.config.schema import ModelConfig, TrainerConfig
from rlsys.engines.train import load_engine

HERE = Path(__file__).resolve().parent

Run = tuple[dict[str, float], dict[str, torch.Tensor]]
SEVERAL = ("zero3", "copies", "four", "recomputed", "two")  # groups of sequence_ranks.py in which rows are shared
several = pytest.mark.parametrize("group", SEVERAL)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    output = tmp_path_factory.mktemp("sequence_ranks")
    model = make_model_folder(output / "model", "qwen3", tied=False, hidden=30, max_length=512)
    log = output / "log.txt"
    with log.open("w") as sink:
        leader = subprocess.Popen(
            [sys.executable, str(HERE / "sequence_ranks.py"), str(model), str(output)],
            env=os.environ | {"PYTHONPATH": str(HERE.parent.parent), "OMP_NUM_THREADS": "1"},
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            returncode = leader.wait(timeout=200)
        except subprocess.TimeoutExpired:
            os.killpg(leader.pid, signal.SIGKILL)  # the ranks too
            returncode = leader.wait()
    assert returncode == 0, log.read_text()
    return {
        name: (json.loads((output / f"{name}.json").read_text()), load_file(output / f"{name}.safetensors"))
        for name in (*SEVERAL, "one")
    }


def part(run: Run, prefix: str) -> dict[str, torch.Tensor]:
    """Tensors below ``prefix/``, without it."""
    return {name.removeprefix(f"{prefix}/"): t for name, t in run[1].items() if name.startswith(f"{prefix}/")}


@several
def test_log_probs_come_back_to_the_rank_whose_rows_they_are_of(runs: dict[str, Run], group: str) -> None:
    expected, found = part(runs["one"], "column"), part(runs[group], "column")
    assert bool(found) == (group != "four"), "its first rank has no rows"
    for name, values in found.items():  # the first rank has the first rows
        torch.testing.assert_close(values, expected[name][: len(values)], rtol=1e-5, atol=1e-5)


@several
def test_loss_metrics_and_gradient_are_those_of_one_rank(runs: dict[str, Run], group: str) -> None:
    (one, _), (many, _) = runs["one"], runs[group]
    of_the_cut = {"micro_batches", "padding_fraction", "waste_fraction", "kept_bytes"}
    names = {name for name in one if name.rpartition("/")[2] not in of_the_cut}
    for name in names & many.keys():
        assert many[name] == pytest.approx(one[name], rel=1e-5, abs=1e-6), name
    without_critic = {name for name in names if name.startswith("value/")} if group == "zero3" else set()
    assert names - many.keys() == without_critic
    expected, found = part(runs["one"], "grad"), part(runs[group], "grad")
    assert found.keys() == {n for n in expected if not (without_critic and n.startswith("critic/"))}
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@several
def test_a_row_is_longer_than_what_one_rank_may_have(runs: dict[str, Run], group: str) -> None:
    metrics = runs[group][0]
    assert (metrics["micro_batches"] > 1) == (group not in ("zero3", "two"))
    assert metrics["padding_fraction"] < 0.03  # to a multiple of the ranks, and a token of ranks without rows


@several
def test_an_optimiser_step_leads_to_the_same_weights(runs: dict[str, Run], group: str) -> None:
    expected, found = part(runs["one"], "first"), part(runs[group], "first")
    assert found.keys() == expected.keys()
    for name in expected:
        # The first step of Adam is lr · sign(gradient) where gradients are far above eps.
        assert (found[name] - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


def test_one_rank_goes_on_from_what_two_that_share_rows_wrote(runs: dict[str, Run]) -> None:
    written, second = part(runs["two"], "first"), part(runs["two"], "second")
    for name, weight in part(runs["one"], "resumed").items():
        assert torch.equal(weight, written[name]), name
    for name, weight in part(runs["one"], "second").items():
        step = (second[name] - written[name]).norm()
        assert step > 0
        assert (weight - second[name]).norm() <= 1e-3 * step, name


def test_a_rank_keeps_its_share_of_the_activations(runs: dict[str, Run]) -> None:
    one, two = (runs[name][0]["kept_bytes"] for name in ("one", "two"))
    assert 0.45 * one < two < 0.55 * one


@pytest.fixture
def _one_rank() -> Iterator[None]:
    with process_group():
        yield


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"sequence_ranks": 2}, "1 trainer ranks cannot be divided into groups of 2"),
        ({"sequence_ranks": 3}, "4 attention heads cannot be divided over 3 ranks"),
        ({"sequence_ranks": 2, "rows": "padded"}, "rows are padded"),
    ],
)
def test_what_cannot_be_shared_is_refused(tmp_path: Path, options: dict, what: str) -> None:
    model = ModelConfig(path=str(make_model_folder(tmp_path / "model")))
    with pytest.raises(UserError, match=what) as error:
        load_engine(model, TrainerConfig(**options), temperature=1.0, total_steps=1, seed=0)
    assert error.value.where == "trainer.sequence_ranks"


def test_a_configuration_that_does_not_divide_is_refused_before_anything_starts() -> None:
    with pytest.raises(UserError, match="3 trainer ranks cannot be divided into groups of 2"):
        plan(run_config("trainer.ranks=3", "trainer.sequence_ranks=2"), gpus=0, cores=3)
    with pytest.raises(UserError, match="rows are padded"):
        build(composed("trainer.sequence_ranks=2", "trainer.rows=padded"))


def test_a_sample_may_be_longer_than_what_one_rank_may_have() -> None:
    sample = ("data.max_prompt_tokens=100", "data.max_response_tokens=101", "trainer.micro_batch_tokens=101")
    build(composed("trainer.sequence_ranks=2", *sample))
    with pytest.raises(UserError) as error:
        build(composed(*sample))
    assert error.value.where == "trainer.micro_batch_tokens"
