"""Real processes over gloo: adapters on one and two ranks of both back ends, which read each other's checkpoints."""

from __future__ import annotations

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
pytestmark = pytest.mark.xdist_group("lora_ranks")  # the processes are started once

Tensors = dict[str, torch.Tensor]
Group = tuple[str, int]  # back end and ranks
ONE: Group = ("fsdp", 1)
GROUPS: list[Group] = [("fsdp", 2), ("zero3", 2), ("fsdp", 1), ("zero3", 1)]
every_other = pytest.mark.parametrize("group", [g for g in GROUPS if g != ONE], ids=lambda g: f"{g[0]}-{g[1]}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Group, Tensors]:
    output = tmp_path_factory.mktemp("ranks")
    # 30 columns of hidden states and a rank of 3: shards of two ranks are uneven, or of one alone
    model = make_model_folder(output / "model", "qwen3", tied=False, hidden=30)
    log = output / "log.txt"
    with log.open("w") as sink:
        leader = subprocess.Popen(
            [sys.executable, str(HERE / "lora_ranks.py"), str(model), str(output)],
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
    return {(backend, n): load_file(output / f"{backend}-{n}.safetensors") for backend, n in GROUPS}


def part(run: Tensors, prefix: str) -> Tensors:
    """Tensors below ``prefix/``, without it."""
    return {name.removeprefix(f"{prefix}/"): t for name, t in run.items() if name.startswith(f"{prefix}/")}


@pytest.mark.parametrize("which", ["grad", "nf4"])
@every_other
def test_an_adapters_gradient_does_not_depend_on_back_end_or_ranks(
    runs: dict[Group, Tensors], group: Group, which: str
) -> None:
    expected, found = part(runs[ONE], which), part(runs[group], which)
    assert found.keys() == expected.keys()
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in found)
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@every_other
def test_merged_weights_are_the_same_and_frozen_ones_stand_still(runs: dict[Group, Tensors], group: Group) -> None:
    assert runs[group]["unmoved"]
    expected, base = part(runs[ONE], "merged"), part(runs[ONE], "base")
    for name, weight in part(runs[group], "base").items():
        assert torch.equal(weight, base[name]), name
    for name, weight in part(runs[group], "merged").items():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-4, msg=name)
    moved = {name for name in base if not torch.equal(base[name], expected[name])}
    assert moved == {name for name in base if name.endswith("_proj.weight")}


@pytest.mark.parametrize("writer", ["fsdp", "zero3"])
def test_everyone_goes_on_from_what_two_ranks_of_either_back_end_wrote(runs: dict[Group, Tensors], writer: str) -> None:
    written = runs[writer, 2]
    readers = {group: part(run, f"from-{writer}") for group, run in runs.items() if f"from-{writer}" in str(run.keys())}
    assert readers.keys() >= {("fsdp", 1), ("zero3", 1)}
    after = [part(found, "next") for found in readers.values()]
    for group, found in readers.items():
        for kind in ("adapter", "moments"):
            for name, tensor in part(found, kind).items():
                assert torch.equal(tensor, written[f"{kind}/{name}"]), (group, name)
    for other in after[1:]:
        for name, tensor in other.items():
            torch.testing.assert_close(tensor, after[0][name], atol=1e-5, rtol=1e-3, msg=name)
