"""Bad input that shows only once data, folders and clusters are looked at: one clear error, and nothing is started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from model_folders import make_model_folder
from running import launch, write_jsonl

from rlsys import launch as command_line

Refuse = Callable[..., str]
FROM_FILE = ("data=file", "eval.every=0", "data.max_prompt_tokens=32", "data.max_response_tokens=8")


@pytest.fixture
def refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """The error of a command line that is bad input."""
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str, recipe: str = "grpo_qwen") -> str:
        assert command_line.main([f"+recipe={recipe}", *overrides]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert said.count("error:") == 1
        assert "Traceback" not in said
        return said

    return run


def test_an_empty_data_set(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n")
    assert "rows.jsonl" in refuse(*FROM_FILE, "data.path=rows.jsonl")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("row", "says"), [('{"prompt": "1+1="', "JSON"), ('{"prompt": "1+1="}', "answer"), ('{"answer": "2"}', "prompt")]
)
def test_a_malformed_row_is_named_with_file_and_line(row: str, says: str, refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n' + row + "\n")
    said = refuse(*FROM_FILE, "data.path=rows.jsonl")
    assert "rows.jsonl:2" in said
    assert says in said
    assert not (tmp_path / "runs").exists()


def test_a_prompt_that_is_too_long_is_named(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "' + "1+" * 40 + '1=", "answer": "41"}\n')
    said = refuse(*FROM_FILE, "data.path=rows.jsonl")
    assert "rows.jsonl:1" in said
    assert "data.max_prompt_tokens" in said


def test_a_model_that_cannot_hold_prompt_and_response(refuse: Refuse, tmp_path: Path) -> None:
    make_model_folder(tmp_path / "model", max_length=32)
    assert "the model allows 32" in refuse("model.path=model", "data.max_response_tokens=64")


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_model_folder_that_lacks_a_file(missing: str, refuse: Refuse, tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model")
    (folder / missing).unlink()
    assert str(folder) in refuse(f"model.path={folder}")
    assert not (tmp_path / "runs").exists()


def test_a_run_folder_that_cannot_be_made(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    assert "taken" in refuse("run_root=taken/runs")
    assert (tmp_path / "taken").read_text() == "a file"


def test_a_cluster_that_does_not_answer(tmp_path: Path) -> None:
    """In a process of its own: Ray keeps what a failed connection began."""
    done = launch("cluster=ray", "cluster.address=127.0.0.1:1", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "no Ray cluster answers at '127.0.0.1:1'" in done.stderr
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr


COMPOSED = "composer_qwen"
PAIR = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}


@pytest.mark.parametrize(
    ("recipe", "overrides", "where", "says"),
    [
        ("grpo_qwen", ["algorithm.loss=ppo_klip"], "algorithm.loss", "did you mean 'ppo_clip'"),
        ("grpo_qwen", ["+algorithm.loss_options.clip=1"], "algorithm.loss_options.clip", "clip_high"),
        ("grpo_qwen", ["algorithm.advantage=grppo"], "algorithm.advantage", "did you mean 'grpo'"),
        ("grpo_qwen", ["+algorithm.advantage_options.stdd=none"], "algorithm.advantage_options.stdd", "'std'"),
        ("grpo_qwen", ["algorithm.loss=gspo"], "algorithm.aggregation", "seq-mean-token-mean"),
        ("grpo_qwen", ["rollout.samples_per_prompt=1"], "rollout.samples_per_prompt", "one sample per prompt"),
        (
            "dapo_qwen",
            ["rollout.samples_per_prompt=1", "algorithm.advantage=remax"],
            "algorithm.filters.zero_variance",
            "one sample per prompt",
        ),
        (
            "grpo_qwen",
            ["+algorithm.correction={tis_token: {cap: 2.0}}", "algorithm.old_logprobs=sampler"],
            "algorithm.correction",
            "no effect",
        ),
        ("grpo_qwen", ["+guards.limits.entropie=0.1"], "guards.limits.entropie", "kl, entropy"),
        (COMPOSED, ["algorithm.distillation.divergence=jds"], "algorithm.distillation.divergence", "'jsd'"),
        (
            COMPOSED,
            ["+algorithm.distillation.divergence_options.alpha=2.0"],
            "algorithm.distillation.divergence_options.alpha",
            "2.0",
        ),
        (COMPOSED, ["algorithm.preference.loss=dppo"], "algorithm.preference.loss", "'dpo'"),
        (COMPOSED, ["hints.max_tokens=5000", "trainer.micro_batch_tokens=30000"], "hints.max_tokens", "allows"),
        (COMPOSED, ["algorithm.distillation.teacher=model"], "algorithm.distillation.teacher_path", "none is named"),
        (COMPOSED, ["replay.eval_path=nowhere.jsonl"], "replay.eval_path", "no such file"),
    ],
)
def test_parts_that_do_not_go_together_or_do_not_exist(
    recipe: str, overrides: list[str], where: str, says: str, refuse: Refuse, tmp_path: Path
) -> None:
    said = refuse(*overrides, recipe=recipe)
    assert f"where: {where} " in f"{said} "
    assert says in said
    assert not any(tmp_path.iterdir()), "nothing is left behind"


def test_a_teacher_with_another_vocabulary(refuse: Refuse, tmp_path: Path) -> None:
    make_model_folder(tmp_path / "teacher")
    overrides = ("algorithm.distillation.teacher=model", "algorithm.distillation.teacher_path=teacher")
    said = refuse(*overrides, recipe=COMPOSED)
    assert "algorithm.distillation.teacher_path" in said
    assert "the teacher's 48" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("key", ["replay.path", "replay.eval_path"])
@pytest.mark.parametrize("missing", list(PAIR))
def test_a_pair_that_lacks_a_field_is_named_with_file_and_line(
    key: str, missing: str, refuse: Refuse, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "good.jsonl", [PAIR])
    write_jsonl(tmp_path / "bad.jsonl", [PAIR, {name: text for name, text in PAIR.items() if name != missing}])
    files = {"replay.path": "good.jsonl", "replay.eval_path": "good.jsonl"} | {key: "bad.jsonl"}
    said = refuse("replay.source=file", *(f"{name}={file}" for name, file in files.items()), recipe=COMPOSED)
    assert "bad.jsonl:2" in said
    assert missing in said
    assert not (tmp_path / "runs").exists()


def test_a_state_that_lacks_its_teachers_is_named_with_file_and_line(refuse: Refuse, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "states.jsonl", [{"prompt": "1+1=", "policy": "3"}])
    said = refuse("replay.source=agreement", "replay.path=states.jsonl", recipe=COMPOSED)
    assert "states.jsonl:1" in said
    assert "teachers" in said
    assert not (tmp_path / "runs").exists()
