"""Ctrl-C and going on: nothing is lost or left behind, and the numbers are those of a run never interrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from model_folders import make_model_folder
from running import (
    RUN_S,
    command,
    comparable,
    environment,
    files_below,
    launch,
    only_run,
    processes_marked,
    read_jsonl,
    run_folders,
)

from rlsys import launch as command_line
from rlsys.checkpoint.store import CheckpointStore
from rlsys.tracking.metrics import read_metrics

# Three whole runs; in `make test` a killed driver stands for them (tests/chaos/test_each_kind.py).
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

STEPS, SAMPLES, PROBLEMS = 6, 16, 8
STOPPED_AT = 3
# Reward calls until the fourth step: the evaluations before the first step and after the second, and three steps.
CALLS_BEFORE = 2 * PROBLEMS + STOPPED_AT * SAMPLES
TESTS = Path(__file__).resolve().parents[1]


class Sessions(NamedTuple):
    """root: where the interrupted and resumed run was made; whole: the run that was never interrupted."""

    root: Path
    overrides: list[str]
    whole: Path
    interrupted: subprocess.CompletedProcess[str]
    processes_after: list[str]
    after_interrupt: dict[str, bytes]
    resumed: subprocess.CompletedProcess[str]


def overrides(root: Path, model: Path) -> list[str]:
    return [
        f"model.path={model}",
        "rollout=torch",
        f"steps={STEPS}",
        "data.prompts_per_step=4",
        f"rollout.samples_per_prompt={SAMPLES // 4}",
        "eval.every=2",
        f"eval.problems={PROBLEMS}",
        "trainer.lr=1e-2",
        "trainer.schedule=cosine",
        "checkpoint.every=1",
        "reward.timeout_s=300",
        "reward.parts.correct.use=rewards_for_runs.gated_digits",
        f"+reward.parts.correct.args={{gate: '{root / 'gate'}', after: {CALLS_BEFORE}}}",
    ]


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> Sessions:
    model = make_model_folder(tmp_path_factory.mktemp("model"))
    whole, root = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("interrupted")
    done = launch(*overrides(whole, model), cwd=whole, PYTHONPATH=str(TESTS))
    assert done.returncode == 0, done.stdout + done.stderr
    arguments = overrides(root, model)
    (root / "gate").touch()
    interrupted, left = interrupt(arguments, root)
    (root / "gate").unlink()
    before = files_below(root / "runs")
    resumed = launch(*arguments, "resume=auto", cwd=root, PYTHONPATH=str(TESTS))
    return Sessions(root, arguments, only_run(whole), interrupted, left, before, resumed)


def interrupt(arguments: list[str], root: Path) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Starts a run in a process group of its own, as a shell does, and presses Ctrl-C once its third step is done and
    its fourth waits for rewards. Returns it and the processes that it left."""
    mark = str(root)
    process = subprocess.Popen(
        command(*arguments),
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(PYTHONPATH=str(TESTS), RUN_OF_A_TEST=mark),
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + RUN_S
        while steps_done(root) < STOPPED_AT:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "the run does not get to its third step"
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            process.kill()
    return subprocess.CompletedProcess(arguments, process.returncode, out, err), processes_marked(mark)


def steps_done(root: Path) -> int:
    metrics = [folder / "metrics.jsonl" for folder in run_folders(root)]
    return max((line["step"] for file in metrics if file.exists() for line in read_metrics(file)), default=0)


def test_ctrl_c_ends_the_run_with_a_checkpoint_and_leaves_no_process(sessions: Sessions) -> None:
    assert sessions.interrupted.returncode == 130, sessions.interrupted.stderr
    assert "resume=auto" in sessions.interrupted.stdout
    assert "Traceback" not in sessions.interrupted.stdout + sessions.interrupted.stderr
    assert sessions.processes_after == []
    written = sessions.after_interrupt
    assert any(f"checkpoints/step-{STOPPED_AT:08d}/manifest.json" in name for name in written)
    assert not any("partial" in name for name in written)
    (summary,) = [json.loads(content) for name, content in written.items() if name.endswith("summary.json")]
    assert (summary["status"], summary["steps"]) == ("interrupted", STOPPED_AT)


def test_a_resumed_run_has_the_metrics_and_weights_of_one_never_interrupted(sessions: Sessions) -> None:
    assert sessions.resumed.returncode == 0, sessions.resumed.stdout + sessions.resumed.stderr
    folder = only_run(sessions.root)
    assert [line["step"] for line in comparable(folder)] == list(range(STEPS + 1))
    assert comparable(folder) == comparable(sessions.whole)
    weights = "model/model.safetensors"
    assert (folder / weights).read_bytes() == (sessions.whole / weights).read_bytes()
    last = f"checkpoints/step-{STEPS:08d}"
    tensors = sorted(path.name for path in (folder / last).glob("**/*.safetensors"))
    assert tensors == sorted(path.name for path in (sessions.whole / last).glob("**/*.safetensors")) != []
    for path in (folder / last).glob("**/*.safetensors"):
        assert path.read_bytes() == (sessions.whole / path.relative_to(folder)).read_bytes(), path.name
    for step in range(1, STEPS + 1):
        name = f"rollouts/step-{step:06d}.jsonl"
        assert read_jsonl(folder / name) == read_jsonl(sessions.whole / name)
    assert [event["kind"] for event in read_jsonl(folder / "events.jsonl") if event["kind"] in ("start", "resume")] == [
        "start",
        "resume",
    ]


def refused(
    sessions: Sessions, *arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """The error of a command line that is bad input; the run folders are as they were."""
    monkeypatch.chdir(sessions.root)
    before = files_below(sessions.root)
    capsys.readouterr()
    assert command_line.main(["+recipe=grpo_qwen", *sessions.overrides, *arguments]) == 2
    assert files_below(sessions.root) == before
    return " ".join(capsys.readouterr().err.split())


def test_a_finished_run_says_so(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(sessions, "resume=auto", monkeypatch=monkeypatch, capsys=capsys)
    assert f"already done its {STEPS} steps" in said


def test_a_run_does_not_go_on_with_another_learning_rate(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(sessions, "resume=auto", "steps=9", "trainer.lr=2e-2", monkeypatch=monkeypatch, capsys=capsys)
    assert "trainer.lr=0.01, not 0.02" in said


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_offered(
    sessions: Sessions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(only_run(sessions.root), tmp_path / "copy"))
    newest = copy / "checkpoints" / f"step-{STEPS:08d}"
    weights = next(newest.glob("**/*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    before = files_below(copy)
    said = refused(sessions, f"resume={copy}", "steps=9", monkeypatch=monkeypatch, capsys=capsys)
    assert files_below(copy) == before
    assert weights.name in said
    offered = copy / "checkpoints" / f"step-{STEPS - 1:08d}"
    assert f"resume={offered}" in said
    assert CheckpointStore.verify(offered).step == STEPS - 1
