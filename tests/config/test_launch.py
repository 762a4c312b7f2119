"""The command line: what comes out, and with which exit code. None of these starts a process of a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlsys import launch as command_line


def launch(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rlsys.launch", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"COLUMNS": "200"},
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "+recipe=NAME"),
        (["+recipe=grpo_qwem"], "known: composer_qwen, dapo_qwen, grpo_qwen"),
        (["+recipe=grpo_qwen", "trainer.lrr=1"], "did you mean 'trainer.lr'?"),
        (["+recipe=grpo_qwen", "+trainer.lrr=1"], "did you mean 'trainer.lr'?"),
        (
            ["+recipe=grpo_qwen", "reward.parts.correct.use=exact_match", "reward.parts.correct.args.mode=last"],
            "known: strip, ignore_case, tag",
        ),
        (["+recipe=grpo_qwen", "reward.parts.correct.wieght=2"], "reward.parts.correct.wieght"),
        (["+recipe=grpo_qwen", "data=gsm9k"], "known: arithmetic"),
        (["+recipe=grpo_qwen", "trainer.lr=quick"], "valid number"),
        (["+recipe=grpo_qwen", "rollout.top_p=0.9"], "full distribution"),
        (["+recipe=grpo_qwen", "algorithm.kl.estimator=k1"], "algorithm.kl.coef"),
        (["+recipe=grpo_qwen", "data=reasoning_gym"], "data.task"),
        (["+recipe=grpo_qwen", "rollout.samples_per_prompt=1"], "rollout.samples_per_prompt"),
        (["+recipe=grpo_qwen", "reward.parts.correct.use=my_rewards.nothing"], "cannot be imported"),
        (["+recipe=grpo_qwen", "model.path=/nowhere/model"], "model.path"),
        (["+recipe=sdpo_qwen", "algorithm.kl.coef=0.1"], "set algorithm.weight to more than 0"),
        (["+recipe=dapo_qwen", "algorithm.filters={zero_varience: {}}"], "did you mean 'zero_variance'?"),
        (["+recipe=composer_qwen", "hints.solution_template=see"], "the template has no {solution}"),
        (["+recipe=composer_qwen", "replay.source=file"], "set replay.path to a JSONL file"),
    ],
)
def test_bad_input_gets_one_clear_error_and_exit_code_2(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert command_line.main(arguments) == 2
    check_refused(capsys.readouterr().err, says, tmp_path)


def test_a_process_ends_with_that_code(tmp_path: Path) -> None:
    done = launch("+recipe=grpo_qwen", "trainer.lrr=1", cwd=tmp_path)
    assert done.returncode == 2
    check_refused(done.stderr, "did you mean 'trainer.lr'?", tmp_path)


def check_refused(said: str, says: str, folder: Path) -> None:
    assert says in said
    assert said.count("error:") == 1
    assert "Traceback" not in said
    assert not any(folder.iterdir()), "nothing is left behind"


def test_help_and_cfg_show_keys_and_values(tmp_path: Path) -> None:
    assert "samples_per_prompt: 8" in launch("--help", cwd=tmp_path).stdout
    assert "lr: 0.0003" in launch("+recipe=grpo_qwen", "--cfg", "job", cwd=tmp_path).stdout
    assert not any(tmp_path.iterdir())
