"""``rlsys fixture``: whole in seconds, the same bits each time, and nothing that a real run would train on."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from composing import run_config
from running import comparable, read_jsonl, tensors_below
from safetensors import safe_open
from safetensors.torch import save_file

from rlsys import cli
from rlsys.checkpoint import manifest as manifests
from rlsys.config.errors import UserError
from rlsys.controller.determinism import CUBLAS, deterministic
from rlsys.controller.fixture import DETERMINISM, FixtureConfig, make_rows, replay
from rlsys.data.base import load_dataset


def fixture(root: Path, *arguments: str, status: int = 0) -> Path:
    """The run's folder."""
    assert cli.main(["fixture", "--run-root", str(root), *arguments]) == status
    return max(root.iterdir(), key=lambda folder: folder.stat().st_mtime)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fixture(tmp_path_factory.mktemp("whole"))


def test_it_writes_all_that_a_run_leaves_with_checksums(whole: Path) -> None:
    names = {path.name for path in whole.iterdir()}
    assert names >= {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "events.jsonl",
        "rollouts",
        "checkpoints",
        "data",
        "summary.json",
        DETERMINISM,
        "manifest.json",
    }
    sealed = manifests.read(whole)
    manifests.check_files(whole, sealed)
    assert sealed.step == 50
    assert f"checkpoints/step-{50:08d}/trainer.json" in sealed.files
    assert len(read_jsonl(whole / "rollouts" / "step-000050.jsonl")) == 32


def test_it_learns(whole: Path) -> None:
    rewards = [line["reward/mean"] for line in comparable(whole)]
    assert len(rewards) == 50
    assert sum(rewards[-10:]) > sum(rewards[:10])


def test_the_report_says_what_was_set_and_that_it_was_enough(whole: Path) -> None:
    said = json.loads((whole / DETERMINISM).read_text(encoding="utf-8"))
    assert said["same_bits"]
    assert said["deterministic_algorithms"]
    assert said["cublas_workspace"]
    assert said["threads"]["torch"] == 1
    assert set(said["seeds"]) == {"run", "torch", "numpy", "python"}


@pytest.mark.parametrize("parts", [(25,), (10, 3)])
def test_in_parts_it_is_the_whole_run_bit_for_bit(parts: tuple[int, ...], whole: Path, tmp_path: Path) -> None:
    folder = fixture(tmp_path, "--stop-after", str(parts[0]))
    assert json.loads((folder / "summary.json").read_text(encoding="utf-8"))["status"] == "interrupted"
    for steps in parts[1:]:
        fixture(tmp_path, "--resume", "auto", "--stop-after", str(steps))
    torch.manual_seed(1234)  # what this process drew meanwhile does not matter
    assert fixture(tmp_path, "--resume", str(folder)) == folder
    assert comparable(folder) == comparable(whole)
    for name in ("rollouts", "data", f"checkpoints/step-{50:08d}"):
        mine, theirs = (sorted(p for p in (root / name).iterdir()) for root in (folder, whole))
        assert [p.name for p in mine] == [p.name for p in theirs]
        assert [p.read_bytes() for p in mine] == [p.read_bytes() for p in theirs], name
    assert tensors_below(folder / f"checkpoints/step-{50:08d}")


def test_another_seed_gives_other_samples(whole: Path, tmp_path: Path) -> None:
    other = fixture(tmp_path, "--seed", "1", "--steps", "2")
    first = [read_jsonl(folder / "rollouts" / "step-000001.jsonl") for folder in (whole, other)]
    assert [row["seed"] for row in first[0]] != [row["seed"] for row in first[1]]


def test_other_bits_are_noticed(tmp_path: Path) -> None:
    folder = fixture(tmp_path, "--stop-after", "10")
    checkpoint = folder / "checkpoints" / f"step-{10:08d}"
    (weights,) = checkpoint.glob("model-*")
    with safe_open(weights, framework="pt") as file:
        layout, weight = file.metadata(), file.get_tensor("weight")
    save_file({"weight": weight * (1 + 1e-6)}, weights, metadata=layout)
    manifests.seal(checkpoint, step=10, lineage=0, metric=0.5, extra={})
    fixture(tmp_path, "--resume", "auto", status=1)
    assert not json.loads((folder / DETERMINISM).read_text(encoding="utf-8"))["replayed"]["weights"]


def test_what_cannot_be_resumed_is_refused(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = fixture(tmp_path, "--steps", "4", "--stop-after", "2")
    for arguments, says in (
        (["--seed", "3"], "seed 0"),
        (["--steps", "2"], "already done its 2 steps"),
        (["--stop-after", "0"], "not positive"),
    ):
        fixture(tmp_path, "--resume", "auto", *arguments, status=2)
        assert says in capsys.readouterr().err
    assert cli.main(["fixture", "--run-root", str(tmp_path / "empty"), "--resume", "auto"]) == 2
    (folder / "data" / "train.jsonl").write_text('{"prompt": "9", "answer": "1"}\n')
    fixture(tmp_path, "--resume", str(folder), status=2)
    assert "the run's data was changed" in capsys.readouterr().err


def test_its_data_is_refused_for_training_unless_it_is_said_to_be_meant(whole: Path) -> None:
    def dataset(path: str) -> int:
        return len(load_dataset(run_config("data=file", "eval.every=0", f"data.path={path}").data).train)

    data = whole / "data" / "train.jsonl"
    with pytest.raises(UserError, match="this is fixture data") as error:
        dataset(str(data))
    assert error.value.where == "data.path"
    assert f"data.path=fixture:{data}" in str(error.value)
    assert dataset(f"fixture:{data}") == 48


def test_real_data_is_not_called_a_fixture(tmp_path: Path) -> None:
    real = tmp_path / "real.jsonl"
    real.write_text('{"prompt": "1+1=", "answer": "2"}\n')
    with pytest.raises(UserError, match=r"no data-manifest\.json beside it"):
        load_dataset(run_config("data=file", "eval.every=0", f"data.path=fixture:{real}").data)


def test_what_was_set_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CUBLAS, raising=False)
    threads, was = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    config = FixtureConfig(steps=2)
    assert replay(config, make_rows(config), 2).stream == replay(config, make_rows(config), 2).stream
    with deterministic(0):
        assert torch.get_num_threads() == 1
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == (threads, was)
    assert CUBLAS not in os.environ
