"""Pictures are drawn from whatever was measured, without a screen and without pyplot's global state."""

import math
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from rlsys.config.errors import UserError
from rlsys.tracking.metrics import read_metrics
from rlsys.tracking.plots import plot_comparison, plot_run
from rlsys.tracking.run import RunFolder


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


def run_with(root: Path, lines: list[dict]) -> RunFolder:
    with RunFolder.create(root, "grpo", {}) as run:
        for step, metrics in enumerate(lines):
            run.log_metrics(metrics, step=step, lineage=0)
    return run


FULL = {
    "eval/accuracy": 0.5,
    "eval/accuracy_low": 0.4,
    "eval/accuracy_high": 0.6,
    "eval/avg@4": 0.4,
    "eval/pass@2": 0.6,
    "reward/mean": 0.5,
    "reward/std": 0.1,
    "policy/entropy": 0.3,
    "policy/kl_ref": 0.0,
    "mismatch/logprob_abs_mean": 1e-6,
    "rollout/length_mean": 5.0,
    "rollout/truncated": 0.01,
    "throughput/tokens_per_s": 100.0,
    "time/rollout_s": 1.0,
    "time/step_s": 1.1,
}


@pytest.mark.parametrize(
    "lines",
    [
        [{"eval/accuracy": 0.5}],
        [{}, {"reward/mean": 0.1}],
        [FULL] * 3,
        [FULL | {"reward/mean": math.nan, "policy/entropy": math.nan, "rollout/length_mean": math.nan}] * 2,
    ],
    ids=["only an evaluation", "only a reward", "everything", "not finite"],
)
def test_any_run_can_be_drawn(tmp_path: Path, lines: list[dict]):
    picture = plot_run(run_with(tmp_path, lines).path)
    assert picture.name == "curves.png"
    width, height = png_size(picture)
    assert width > height > 500


def test_runs_are_compared(tmp_path: Path):
    runs = {f"seed {seed}": read_metrics(run_with(tmp_path, [FULL] * 2).metrics) for seed in range(2)}
    png_size(plot_comparison(runs, tmp_path / "docs" / "compare.png", "two seeds"))


def test_a_run_without_metrics_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="metrics cannot be read"):
        plot_run(tmp_path)


def test_importing_tracking_is_light():
    code = (
        "import sys, rlsys.tracking.run, rlsys.tracking.display, rlsys.tracking.plots, rlsys.tracking.summary, "
        "rlsys.tracking.memory, rlsys.tracking.trackers as t; t.TRACKERS.names(); "
        "print([m for m in ('torch', 'matplotlib', 'wandb', 'tensorboard', 'ray', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
