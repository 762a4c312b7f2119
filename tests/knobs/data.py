"""model.path, model.chat_template and data.*: what is read, and what a step's prompts are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from model_folders import make_model_folder
from transformers import AutoTokenizer

from knobs.table import Bench, entry
from rlsys.batch import jagged
from rlsys.config.errors import UserError
from rlsys.config.schema import ArithmeticData, FileData, GSM8KData, ReasoningGymData
from rlsys.controller.inputs import Inputs
from rlsys.data.base import load_dataset

SIZES: dict[str, Any] = {"prompts_per_step": 2, "max_prompt_tokens": 64, "max_response_tokens": 8}
ARITHMETIC = ArithmeticData(kind="arithmetic", digits=1, held_out=10, **SIZES)
GYM = ReasoningGymData(kind="reasoning_gym", task="basic_arithmetic", size=6, eval_size=4, **SIZES)


def first_prompt(inputs: Inputs) -> str:
    """The first prompt of the first step, as the model sees it."""
    ids = jagged.to_rows(inputs.prompts.next_batch().batch["prompt_ids"])[0].tolist()
    return str(AutoTokenizer.from_pretrained(inputs.model_folder).decode(ids))


def write_rows(path: Path, prompt: str = "1+1") -> Path:
    row = {"prompt": prompt, "other": "7-3", "answer": "2", "gold": "4"}
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return path


def questions(config: Any) -> list[str]:
    return [row.task["prompt"] for row in load_dataset(config).train]


@entry("model.path")
def model_path(bench: Bench) -> None:
    other = make_model_folder(bench.tmp / "other", hidden=96)
    small, large = (bench.inputs(f"model.path={path}") for path in (bench.model, other))
    assert small.model_folder == bench.model
    assert large.parameters > small.parameters


@entry("model.chat_template")
def chat_template(bench: Bench) -> None:
    template = bench.tmp / "template.jinja"
    template.write_text("{{ messages[0]['content'] }} is ", encoding="utf-8")
    assert first_prompt(bench.inputs(f"model.path={bench.model}")).endswith("=")
    changed = bench.inputs(f"model.path={bench.model}", f"model.chat_template={template}", "data.max_prompt_tokens=32")
    assert first_prompt(changed).endswith("is ")


@entry("data.kind")
def kind(bench: Bench) -> None:
    assert type(bench.config("data=gsm8k", "data.path=x").data) is GSM8KData
    assert questions(ARITHMETIC)[0].endswith("=")
    assert questions(FileData(kind="file", path=str(write_rows(bench.tmp / "a.jsonl")), **SIZES)) == ["1+1"]


@entry("data.prompts_per_step")
def prompts_per_step(bench: Bench) -> None:
    assert [len(bench.inputs(f"data.prompts_per_step={n}").prompts.next_batch()) for n in (2, 5)] == [2, 5]


@entry("data.max_prompt_tokens", "data.long_prompts")
def long_prompts(bench: Bench) -> None:
    rows = bench.tmp / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": p, "answer": "2"}) + "\n" for p in ("1+1", "1+1+0+0+0")))
    options = [
        "data=file",
        f"data.path={rows}",
        "data.prompts_per_step=4",
        "data.max_response_tokens=8",
        "eval.every=0",
    ]

    def prompts(*overrides: str) -> int:
        inputs = bench.inputs(f"model.path={bench.model}", *options, *overrides)
        return len(set(inputs.prompts.next_batch().non_tensor_batch["uid"]) & {"train-1@0", "train-2@0"})

    assert prompts("data.max_prompt_tokens=9") == 2
    with pytest.raises(UserError, match=r"data.max_prompt_tokens allows 8"):
        prompts("data.max_prompt_tokens=8")
    assert prompts("data.max_prompt_tokens=8", "data.long_prompts=drop") == 1


@entry("data.max_response_tokens")
def max_response_tokens(bench: Bench) -> None:
    assert [bench.inputs(f"data.max_response_tokens={n}").max_length for n in (4, 9)] == [16 + 4, 16 + 9]


@entry("data.shuffle")
def shuffle(bench: Bench) -> None:
    def order(value: str) -> list[str]:
        inputs = bench.inputs(f"data.shuffle={value}")
        steps = [inputs.prompts.next_batch().non_tensor_batch["uid"] for _ in range(2)]
        return [str(uid) for step in steps for uid in step]

    in_file = [row.row_id for row in load_dataset(bench.config().data).train[:64]]
    assert order("false") == [f"{row}@0" for row in in_file]
    assert order("true") != order("false")


@entry("data.system_prompt")
def system_prompt(bench: Bench) -> None:
    changed = bench.inputs(f"model.path={bench.model}", "data.system_prompt=add", "data.max_prompt_tokens=32")
    assert first_prompt(changed).startswith("add")


@entry("data.digits", "data.operations", "data.held_out", "data.split_seed")
def problems(bench: Bench) -> None:
    base = load_dataset(ARITHMETIC)
    assert (len(base.train), len(base.held_out)) == (90, 10)
    assert len(questions(replace(ARITHMETIC, digits=2))[0]) > len(questions(ARITHMETIC)[0])
    assert any("-" in text for text in questions(replace(ARITHMETIC, operations=["+", "-"])))
    assert len(load_dataset(replace(ARITHMETIC, held_out=30)).train) == 70
    assert set(questions(replace(ARITHMETIC, split_seed=1))) != set(questions(ARITHMETIC))


@entry("data.instruction")
def instruction(bench: Bench) -> None:
    folder: Path = bench.request.getfixturevalue("gsm8k_folder")
    config = GSM8KData(kind="gsm8k", path=str(folder), instruction="Go on.", **SIZES)
    assert questions(config)[0].endswith("\nGo on.")


@entry("data.path", "data.eval_path", "data.prompt_key", "data.answer_key")
def files(bench: Bench) -> None:
    one, two = write_rows(bench.tmp / "one.jsonl"), write_rows(bench.tmp / "two.jsonl", "2+2")
    config = FileData(kind="file", path=str(one), **SIZES)
    assert not load_dataset(config).held_out
    assert load_dataset(replace(config, eval_path=str(two))).held_out[0].task["prompt"] == "2+2"
    assert questions(replace(config, path=str(two))) == ["2+2"]
    assert questions(replace(config, prompt_key="other")) == ["7-3"]
    assert load_dataset(replace(config, answer_key="gold")).train[0].task["answer"] == "4"


@entry("data.task", "data.size", "data.eval_size", "data.options")
def reasoning_gym(bench: Bench) -> None:
    base = load_dataset(GYM)
    assert (len(base.train), len(base.held_out)) == (6, 4)
    assert len(load_dataset(replace(GYM, size=9)).train) == 9
    assert len(load_dataset(replace(GYM, eval_size=2)).held_out) == 2
    for change in ({"task": "chain_sum"}, {"options": {"seed": 5}}, {"options": {"min_digits": 4, "max_digits": 4}}):
        assert questions(replace(GYM, **change)) != questions(GYM)
