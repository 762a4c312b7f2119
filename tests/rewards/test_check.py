"""``rlsys reward check``, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlsys.cli import main
from rlsys.rewards.check import distribution, parse_arguments

ROWS: list[dict[str, Any]] = [
    {"prompt": "2+2?", "response": "#### 4", "answer": "4"},
    {"prompt": "2+3?", "response": "#### 4", "answer": 5},
    {"prompt": "2+4?", "response": "well, [bold]6", "answer": "6"},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.jsonl", *map(json.dumps, ROWS[:2]), "", json.dumps(ROWS[2]))


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_scores_are_printed_and_written(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert main(["reward", "check", "gsm8k", "--data", str(data), "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert (report["name"], report["rows"], report["failures"]) == ("gsm8k", 3, 0)
    assert report["mean"] == pytest.approx(2 / 3)
    assert [(r["row"], r["line"], r["score"], r["error"]) for r in report["results"]] == [
        (0, 1, 1.0, None),
        (1, 2, 0.0, None),
        (2, 4, 1.0, None),
    ]
    assert report["results"][1]["feedback"] == "the final number is wrong"
    printed = capsys.readouterr().out
    assert "mean 0.6667" in printed
    assert "the final number is" in printed


def test_options_and_limit(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = ["reward", "check", "gsm8k", "--data", str(data), "--json", str(out)]
    assert main([*command, "--arg", "mode=strict", "--limit", "3"]) == 0
    assert [r["score"] for r in json.loads(out.read_text())["results"]] == [1.0, 0.0, 0.0]
    assert main([*command, "--limit", "1"]) == 0
    assert json.loads(out.read_text())["rows"] == 1


def test_a_reward_of_ones_own_that_fails_on_some_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: Path
) -> None:
    write(
        tmp_path / "my_checked_rewards.py",
        "def f(response, task):",
        "    return float(task['answer']) / (len(response) - 6)",
    )
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out.json"
    assert main(["reward", "check", "my_checked_rewards.f", "--data", str(data), "--json", str(out)]) == 1
    report = json.loads(out.read_text())
    assert report["failures"] == 2
    assert report["results"][0]["score"] is None
    assert report["results"][0]["error"].startswith("raised: ")
    assert "ZeroDivisionError" in report["results"][0]["error"]
    assert report["mean"] == report["results"][2]["score"]
    assert "2 raised" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "list, not an object"),
        ('{"prompt": "p", "answer": "4"}', "no 'response'"),
        ('{"response": 4, "answer": "4"}', "int, not text"),
        ('{"response": "4"}', "no 'answer'"),
        ('{"prompt": 3, "response": "4", "answer": "4"}', "'prompt' is int"),
    ],
)
def test_a_malformed_row_is_named_with_file_and_line(
    line: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "rows.jsonl", json.dumps(ROWS[0]), "", line)
    assert main(["reward", "check", "gsm8k", "--data", str(path)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert f"{path}:3" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gsm8", "--data", "DATA"], "did you mean 'gsm8k'?"),
        (["gsm8k", "--data", "missing.jsonl"], "No such file"),
        (["gsm8k", "--data", "DATA", "--arg", "mode=strikt"], "--arg mode"),
        (["gsm8k", "--data", "DATA", "--arg", "mod=strict"], "did you mean 'mode'?"),
        (["gsm8k", "--data", "DATA", "--arg", "strict"], "KEY=VALUE"),
        (["regex", "--data", "DATA"], "--arg pattern"),
        (["gsm8k", "--data", "DATA", "--limit", "0"], "not positive"),
        (["gsm8k", "--data", "DATA", "--json", "no/such/folder/out.json"], "no folder"),
        (["gsm8k", "--data", "EMPTY"], "no rows"),
    ],
)
def test_bad_input_is_exit_code_2(
    arguments: list[str], words: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {"DATA": str(data), "EMPTY": str(write(tmp_path / "empty.jsonl", ""))}
    assert main(["reward", "check", *(paths.get(a, a) for a in arguments)]) == 2
    assert words in capsys.readouterr().err


def test_arguments_are_json_or_text() -> None:
    parsed = parse_arguments(["a=1", "b=true", "c=text", 'd="1"', r"e=\d=", "f="])
    assert parsed == {"a": 1, "b": True, "c": "text", "d": "1", "e": r"\d=", "f": ""}


def test_the_distribution_counts_every_score_once() -> None:
    assert distribution([1.0, 0.0, 1.0]) == [("0", 1), ("1", 2)]
    many = [i / 100 for i in range(101)]
    assert sum(count for _, count in distribution(many)) == len(many)
