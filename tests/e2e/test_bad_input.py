"""Bad input that shows only once data, folders and clusters are looked at: one clear error, and nothing is started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from model_folders import make_model_folder
from running import launch

from rlsys import launch as command_line

Refuse = Callable[..., str]
FROM_FILE = ("data=file", "eval.every=0", "data.max_prompt_tokens=32", "data.max_response_tokens=8")


@pytest.fixture
def refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """The error of a command line that is bad input."""
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str) -> str:
        assert command_line.main(["+recipe=grpo_qwen", *overrides]) == 2
        said = capsys.readouterr().err
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
