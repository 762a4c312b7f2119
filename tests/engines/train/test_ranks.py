"""Real processes over gloo: one, two and four ranks compute the same step, and read each other's checkpoints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_folders import make_model_folder
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.xdist_group("train_ranks")  # the processes are started once

Run = tuple[dict[str, float], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Run]:
    output = tmp_path_factory.mktemp("ranks")
    # 30 columns of hidden states: on four ranks the last has fewer rows of most weights than the others
    model = make_model_folder(output / "model", "qwen3", tied=False, hidden=30)
    log = output / "log.txt"
    with log.open("w") as sink:
        leader = subprocess.Popen(
            [sys.executable, str(HERE / "ranks.py"), str(model), str(output)],
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
        n: (json.loads((output / f"{n}.json").read_text()), load_file(output / f"{n}.safetensors")) for n in (1, 2, 4)
    }


def part(run: Run, prefix: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in run[1].items() if name.startswith(prefix)}


@pytest.mark.parametrize("ranks", [2, 4])
def test_loss_metrics_and_gradient_do_not_depend_on_ranks(runs: dict[int, Run], ranks: int) -> None:
    (one, _), (many, _) = runs[1], runs[ranks]
    assert (one["micro_batches"], many["micro_batches"]) == (1, pytest.approx(many["micro_batches"], abs=0))
    assert many["micro_batches"] > 1
    of_the_cut = {"micro_batches", "padding_fraction", "rows", "logprobs"}
    for name in {name for name in one if name.rpartition("/")[2] not in of_the_cut}:
        assert many[name] == pytest.approx(one[name], rel=1e-5, abs=1e-6), name
    expected = part(runs[1], "grad/")
    for name, gradient in part(runs[ranks], "grad/").items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize("ranks", [1, 4])
def test_state_written_by_two_ranks_is_read_bit_for_bit(runs: dict[int, Run], ranks: int) -> None:
    written, read = part(runs[2], "loaded/"), part(runs[ranks], "loaded/")
    assert written.keys() == read.keys()
    assert any("exp_avg_sq" in name for name in written)
    for name in written:
        assert torch.equal(read[name], written[name]), name
    after = part(runs[2], "weight/")
    assert all(torch.equal(written[f"loaded/{name.removeprefix('weight/')}"], w) for name, w in after.items())


@pytest.mark.parametrize("ranks", [1, 4])
def test_training_goes_on_the_same_way_on_another_number_of_ranks(runs: dict[int, Run], ranks: int) -> None:
    expected = part(runs[2], "second/")
    moved = part(runs[2], "weight/")
    for name, weight in part(runs[ranks], "second/").items():
        step = (expected[name] - moved[f"weight/{name.removeprefix('second/')}"]).norm()
        assert step > 0
        assert (weight - expected[name]).norm() <= 1e-3 * step, name
