"""A whole run on ZeRO-3 with two ranks, which goes on with FSDP2 on one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def launch(root: Path, *overrides: str) -> None:
    command = [sys.executable, "-m", "rlsys.launch", "+recipe=grpo_qwen", "rollout=torch", "data.prompts_per_step=4"]
    done = subprocess.run(
        [*command, "eval.every=0", f"run_root={root}", *overrides], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_on_zero3_goes_on_with_fsdp_on_another_number_of_ranks(tmp_path: Path) -> None:
    launch(tmp_path, "trainer=zero3", "trainer.ranks=2", "steps=2")
    launch(tmp_path, "trainer=fsdp", "trainer.ranks=1", "steps=3", "resume=auto")
    (folder,) = tmp_path.iterdir()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    # Sampler and trainer hold the same weights after either back end's steps.
    assert all(line["mismatch/logprob_abs_mean"] < 1e-5 for line in lines)
    state = json.loads((folder / "checkpoints" / "step-00000003" / "trainer.json").read_text())
    assert (state["optimizer_steps"], state["ranks"]) == (3, 1)
