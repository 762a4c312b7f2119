"""Real processes over gloo: one, two and four ranks of both back ends compute the same step, and read each other's
checkpoints."""

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
Group = tuple[str, int]  # back end and ranks
BACKENDS = ("fsdp", "zero3")
ONE: Group = ("fsdp", 1)
OTHERS: list[Group] = [(backend, n) for backend in BACKENDS for n in (1, 2, 4) if (backend, n) != ONE]
every_other = pytest.mark.parametrize("group", OTHERS, ids=lambda group: f"{group[0]}-{group[1]}")


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    return output


@pytest.fixture(scope="module")
def runs(output: Path) -> dict[Group, Run]:
    return {
        (backend, n): (
            json.loads((output / f"{backend}-{n}.json").read_text()),
            load_file(output / f"{backend}-{n}.safetensors"),
        )
        for backend in BACKENDS
        for n in (1, 2, 4)
    }


def part(run: Run, prefix: str) -> dict[str, torch.Tensor]:
    """Tensors below ``prefix/``, without it."""
    return {name.removeprefix(f"{prefix}/"): t for name, t in run[1].items() if name.startswith(f"{prefix}/")}


@every_other
def test_loss_metrics_and_gradient_do_not_depend_on_back_end_or_ranks(runs: dict[Group, Run], group: Group) -> None:
    (one, _), (many, _) = runs[ONE], runs[group]
    assert one["micro_batches"] == 1
    assert (many["micro_batches"] > 1) == (group[1] > 1)
    of_the_cut = {"micro_batches", "padding_fraction", "waste_fraction", "rows", "logprobs"}
    for name in {name for name in one if name.rpartition("/")[2] not in of_the_cut}:
        assert many[name] == pytest.approx(one[name], rel=1e-5, abs=1e-6), name
    expected, found = part(runs[ONE], "grad"), part(runs[group], "grad")
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@every_other
def test_one_step_leads_to_the_same_weights_and_the_same_teacher(runs: dict[Group, Run], group: Group) -> None:
    expected, found = part(runs[ONE], "first"), part(runs[group], "first")
    assert found.keys() == expected.keys()
    for name in expected:
        # The first step of Adam is lr · sign(gradient) where gradients are far above eps.
        assert (found[name] - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


@pytest.mark.parametrize("writer", BACKENDS)
def test_what_four_ranks_of_one_back_end_wrote_everyone_reads_bit_for_bit(runs: dict[Group, Run], writer: str) -> None:
    written = part(runs[writer, 4], "first")
    assert any("exp_avg_sq" in name for name in written)
    assert any("teacher" in name for name in written)
    readers = {group: part(run, f"from-{writer}") for group, run in runs.items()}
    assert {group for group, found in readers.items() if found} >= {(b, n) for b in BACKENDS for n in (1, 2)}
    for group, found in readers.items():
        for name, tensor in found.items():
            assert torch.equal(tensor, written[name]), (group, name)


@pytest.mark.parametrize("group", [g for g in [ONE, *OTHERS] if g != ("fsdp", 4)], ids=lambda g: f"{g[0]}-{g[1]}")
def test_training_goes_on_the_same_way_on_the_other_back_end_and_number_of_ranks(
    runs: dict[Group, Run], group: Group
) -> None:
    expected, moved = part(runs["fsdp", 4], "second"), part(runs["fsdp", 4], "first")
    for name, weight in part(runs[group], "second").items():
        step = (expected[name] - moved[name]).norm()
        assert step > 0
        assert (weight - expected[name]).norm() <= 1e-3 * step, name


@pytest.mark.parametrize("group", [("fsdp", 2), ("zero3", 1), ("zero3", 2)], ids=lambda group: f"{group[0]}-{group[1]}")
def test_gradients_of_a_bfloat16_pass_are_added_up_in_float32(output: Path, group: Group) -> None:
    """Over micro-batches, and over ranks. Sums in bfloat16 would be off by 2⁻⁹ of themselves, about 1e-3."""
    one, other = (load_file(output / f"{backend}-{n}-bfloat16.safetensors") for backend, n in (ONE, group))
    for name, gradient in other.items():
        assert gradient.dtype == torch.float32
        assert (gradient - one[name]).norm() <= 1e-4 * one[name].norm(), name
        assert (one[name].bfloat16() - one[name]).norm() > 5e-4 * one[name].norm(), name
