"""benchmarks.gpu without a GPU: that it says so, what it counts, how parts join, and its parts on a tiny shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_parts
from benchmarks.gpu_models import QWEN3_1_7B, TINY, equal_rows, training_flops, write_model
from benchmarks.train_util import one_rank
from rlsys.batch import jagged

WHERE = {"machine": "a machine", "versions": {"torch": "2"}, "date": "2026-01-31", "quick": False}
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def measured(value: float) -> dict[str, Any]:
    figures = {"text": "What it is.", "header": ("a", "b"), "rows": [("x", "1")]}
    return figures | {"ratios": {"MFU, 4k packed tokens": value}} | WHERE


def test_help_names_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert all(name in said for name in gpu.NAMES)
    assert set(gpu.NAMES) == gpu_parts.PARTS.keys()


@without_gpu
def test_without_a_gpu_it_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    assert gpu.main(["--part", "mfu", "--json", str(path), "--out", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "GPU" in said.err
    assert not list(tmp_path.iterdir())


@without_gpu
def test_a_part_whose_process_fails_has_its_last_words_and_no_figure() -> None:
    found = gpu.apart("mfu", True)
    assert found["failed"].startswith("error: benchmarks.gpu measures on a GPU")
    assert "ratios" not in found
    assert found["quick"] is True


def test_parts_of_several_calls_join_and_the_last_figure_counts(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    assert list(gpu.joined(path, {"mfu": measured(0.3)})) == ["mfu"]
    path.write_text(json.dumps({"parts": {"mfu": measured(0.3), "sync": {"skipped": "no vLLM"} | WHERE}}))
    parts = gpu.joined(path, {"mfu": measured(0.5), "correctness": {"failed": "it broke"} | WHERE})
    assert list(parts) == ["correctness", "mfu", "sync"]
    text = gpu.page(parts, gpu_parts.LIMITS)
    assert "| MFU, 4k packed tokens | 0.5 | 0.45 |" in text
    assert "*skipped*: no vLLM" in text
    assert "*failed*: it broke" in text
    assert "Not measured yet: logprob, activations, sampling, grpo_step." in text


def test_a_package_that_is_not_there_is_a_reason_and_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_parts.PARTS, "sync", lambda quick: gpu_parts.needs("json", "no_such_package"))
    assert gpu.measure("sync", False) == {"skipped": "no_such_package is not installed"}


def test_the_shape_is_that_of_a_1_7b_and_its_flops_are_six_a_weight_and_attention() -> None:
    h, layers, words = 2048, 28, 151_936
    layer = h * 128 * (16 + 2 * 8) + 16 * 128 * h + 3 * h * 6144 + 2 * h + 2 * 128
    assert QWEN3_1_7B.parameters() == words * h + layers * layer + h == 1_720_574_976
    batch = equal_rows(8, 512, words)
    flops, tokens = training_flops(QWEN3_1_7B, batch)
    assert tokens == 8 * 511  # the last token of a row is no input
    scored = int(jagged.lengths(batch.batch["response_ids"]).sum())
    assert scored == 8 * (512 - 16)
    pairs = 8 * 511 * 512 / 2
    expected = 6 * (layers * layer + h) * tokens + 6 * words * h * scored + 3 * 4 * 16 * 128 * layers * pairs
    assert flops == pytest.approx(expected, rel=1e-9)


def test_equal_rows_fill_their_micro_batches(tmp_path: Path) -> None:
    folder = write_model(tmp_path, TINY)
    with one_rank():
        engine = gpu_parts.load(folder, "float32", micro_batch_tokens=256)
        metrics = engine.forward_backward(equal_rows(8, 64, TINY.words), gpu_parts.IMITATION)
    assert metrics["micro_batches"] == 2
    assert metrics["waste_fraction"] == 0


@without_gpu
def test_gradients_are_held_against_exact_ones() -> None:
    part = gpu_parts.correctness(True, TINY)
    assert max(part.ratios[f"{what} error, float32"] for what in ("log-prob", "gradient")) < 1e-5
    assert 1e-4 < part.ratios["gradient error, bfloat16"] < 0.05
    assert ("rlsys, flash", "float32") in {row[:2] for row in part.rows}
    exact = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    assert gpu_parts.error({"a": torch.tensor([3.0, 0.5]), "b": torch.tensor([4.0])}, exact) == pytest.approx(0.1)


def test_log_probs_are_held_against_dense_ones() -> None:
    values, gradients = gpu_parts.kernel_differences(16, 700, "cpu")
    assert values < 1e-4
    assert gradients < 1e-4


@without_gpu
def test_activations_that_cannot_be_offloaded_are_a_row_that_says_so() -> None:
    part = gpu_parts.activations(True, TINY)
    assert [row[0] for row in part.rows] == ["keep", "recompute", "offload"]
    assert part.rows[2][1].startswith("not run: ")
    assert part.ratios.keys() == {"activations, recompute / keep"}


@pytest.mark.slow
@pytest.mark.vllm
@without_gpu
def test_utilisation_sampling_and_a_run_are_measured() -> None:
    part = gpu_parts.mfu(True, TINY)
    assert 0 < part.ratios["MFU, 4k packed tokens"] < 1
    assert gpu_parts.sampling(True, TINY, kv_cache_gib=0.1).rows
    updated = gpu_parts.sync(True, TINY, ("rollout.sync=auto", "rollout.kv_cache_gib=0.1"))
    assert updated.ratios["seconds of a colocated sync"] > 0
