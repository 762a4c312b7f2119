from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rlsys.config.errors import UserError
from rlsys.config.schema import GSM8KData
from rlsys.data import gsm8k
from rlsys.data.base import load_dataset
from rlsys.rewards.gsm8k import gsm8k as verify

SIZES = {"prompts_per_step": 4, "max_prompt_tokens": 512, "max_response_tokens": 512}


def load(path: Path | str, **fields):
    return load_dataset(GSM8KData(kind="gsm8k", path=str(path), **SIZES, **fields))


def write(folder: Path, train: list[object], test: list[object]) -> Path:
    for name, rows in (("train", train), ("test", test)):
        text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


GOOD = {"question": "1 + 1?", "answer": "It is two.\n#### 2"}


def test_every_gold_answer_is_a_number_and_its_solution_scores_one(gsm8k_folder):
    dataset = load(gsm8k_folder)
    for rows, name in ((dataset.train, "train"), (dataset.held_out, "test")):
        lines = (gsm8k_folder / f"{name}.jsonl").read_bytes().count(b"\n")
        assert len(rows) == lines
        for row in rows:
            assert re.fullmatch(r"-?\d+(\.\d+)?", row.task["answer"])
    for row in dataset.held_out:
        assert verify(row.task["solution"], row.task, mode="strict").score == 1.0


def test_row_ids_are_unique_over_both_sets(gsm8k_folder):
    dataset = load(gsm8k_folder)
    ids = [row.row_id for rows in (dataset.train, dataset.held_out) for row in rows]
    assert len(set(ids)) == len(ids)


def test_the_instruction_follows_the_question(tmp_path):
    write(tmp_path, [GOOD], [GOOD])
    row = load(tmp_path, instruction="Think.").train[0]
    assert row.messages[0]["content"].split() == ["1", "+", "1?", "Think."]
    assert row.task["question"] == "1 + 1?"
    assert row.task["prompt"] == row.messages[0]["content"]
    assert load(tmp_path, instruction="").train[0].messages == [{"role": "user", "content": "1 + 1?"}]


@pytest.mark.parametrize(
    "bad",
    [
        {"question": "1 + 1?"},
        {"question": "", "answer": "#### 2"},
        {"question": "1 + 1?", "answer": "two"},
        {"question": "1 + 1?", "answer": "#### "},
        {"question": "1 + 1?", "answer": 2},
        {"question": ["1 + 1?"], "answer": "#### 2"},
        "{",
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, bad):
    write(tmp_path, [GOOD, GOOD, bad], [GOOD])
    with pytest.raises(UserError) as error:
        load(tmp_path)
    assert error.value.where == f"{tmp_path / 'train.jsonl'}:3"


def test_a_folder_without_the_files(tmp_path):
    with pytest.raises(UserError, match=r"train\.jsonl"):
        load(tmp_path)


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "~/no such"])
def test_a_path_that_is_no_folder_is_not_looked_for_on_the_hub(path):
    with pytest.raises(UserError) as error:
        load(path)
    assert "data.path" in (error.value.where or "")


def test_the_layout_of_the_hub(tmp_path):
    """``datasets`` reads a repository's files from a folder as from the hub."""
    for name in ("train", "test"):
        (tmp_path / "main").mkdir(exist_ok=True)
        (tmp_path / "main" / f"{name}-00000.jsonl").write_text(json.dumps(GOOD) + "\n", encoding="utf-8")
    configs = "".join(f"  - split: {name}\n    path: main/{name}-*\n" for name in ("train", "test"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: main\n  data_files:\n{configs}---\n")
    train, test = gsm8k._from_hub(str(tmp_path), "Think.")
    assert (len(train), len(test)) == (1, 1)
    assert train[0].task["answer"] == "2"
    assert train[0].where.endswith(":1")


def test_a_hub_data_set_without_the_splits(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError) as error:
        gsm8k._from_hub(str(tmp_path), "")
    assert error.value.where == "data.path"
