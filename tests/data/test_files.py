from __future__ import annotations

import json
from datetime import date
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.config.errors import UserError
from rlsys.config.schema import FileData
from rlsys.data.base import Dataset, load_dataset

SIZES = {"prompts_per_step": 4, "max_prompt_tokens": 64, "max_response_tokens": 64}
GOOD = {"prompt": "1+1?", "answer": "2"}
USER = {"role": "user", "content": "1+1?"}


def load(path: Path, **fields) -> Dataset:
    return load_dataset(FileData(kind="file", path=str(path), **SIZES, **fields))


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def parquet(path: Path, *rows: dict) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


WRITERS = {"rows.jsonl": jsonl, "rows.parquet": parquet}
everywhere = pytest.mark.parametrize("name", WRITERS)


@everywhere
def test_a_prompt_becomes_a_user_message_and_all_fields_stay_in_the_task(tmp_path, name):
    path = WRITERS[name](tmp_path / name, {**GOOD, "level": 3, "tags": ["a", "b"]})
    (row,) = load(path).train
    assert row.messages == [USER]
    assert row.task == {**GOOD, "level": 3, "tags": ["a", "b"]}


@everywhere
def test_messages_are_kept_and_the_task_has_the_last_question(tmp_path, name):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "and 2+2?"},
    ]
    (row,) = load(WRITERS[name](tmp_path / name, {"messages": messages, "answer": "4"})).train
    assert row.messages == messages
    assert row.task["prompt"] == "and 2+2?"


@everywhere
def test_columns_of_other_names(tmp_path, name):
    path = WRITERS[name](tmp_path / name, {"chat": [USER], "gold": 2})
    (row,) = load(path, prompt_key="chat", answer_key="gold").train
    assert row.messages == [USER]
    assert (row.task["prompt"], row.task["answer"]) == ("1+1?", 2)


@everywhere
def test_held_out_rows_come_from_their_own_file(tmp_path, name):
    train = WRITERS[name](tmp_path / name, GOOD, GOOD)
    held_out = WRITERS[name](tmp_path / f"eval-{name}", GOOD)
    dataset = load(train, eval_path=str(held_out))
    assert (len(dataset.train), len(dataset.held_out)) == (2, 1)
    assert len({row.row_id for rows in (dataset.train, dataset.held_out) for row in rows}) == 3
    assert not load(train).held_out


texts = st.text(min_size=1).filter(lambda text: text.strip())


@given(
    rows=st.lists(st.tuples(texts, texts, st.booleans()), min_size=1, max_size=8), bom=st.booleans(), crlf=st.booleans()
)
def test_any_text_comes_back_with_its_line_number(tmp_path_factory, rows, bom, crlf):
    """Blank lines, a byte-order mark, CRLF, and line separators inside of text included."""
    end, lines, numbers = ("\r\n" if crlf else "\n"), [], []
    for prompt, answer, blank_before in rows:
        lines += [""] if blank_before else []
        lines.append(
            json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii="\ud800" <= max(prompt + answer) <= "\udfff")
        )
        numbers.append(len(lines))
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + end.join(lines).encode())
    loaded = load(path).train
    assert [(row.task["prompt"], row.task["answer"]) for row in loaded] == [
        (prompt, answer) for prompt, answer, _ in rows
    ]
    assert [row.where for row in loaded] == [f"{path}:{number}" for number in numbers]


BAD_ROWS = {
    "no prompt": {"answer": "2"},
    "no answer": {"prompt": "1+1?"},
    "null answer": {"prompt": "1+1?", "answer": None},
    "empty prompt": {"prompt": " \n", "answer": "2"},
    "prompt is a number": {"prompt": 11, "answer": "2"},
    "no messages": {"messages": [], "answer": "2"},
    "message without content": {"messages": [{"role": "user"}], "answer": "2"},
    "message without text": {"messages": [{"role": "user", "content": 3}], "answer": "2"},
    "empty message": {"messages": [{"role": "user", "content": ""}], "answer": "2"},
    "unknown role": {"messages": [{"role": "human", "content": "1+1?"}], "answer": "2"},
    "no user message": {"messages": [{"role": "system", "content": "Hi"}], "answer": "2"},
    "only a tool": {"messages": [{"role": "tool", "content": "Hi"}], "answer": "2"},
    "nothing to answer": {"messages": [USER, {"role": "assistant", "content": "2"}], "answer": "2"},
}


@pytest.mark.parametrize("bad", BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_malformed_row_is_named_by_its_line_or_row(tmp_path, bad):
    with pytest.raises(UserError) as error:
        load(jsonl(tmp_path / "rows.jsonl", GOOD, "", bad, GOOD))
    assert error.value.where == f"{tmp_path / 'rows.jsonl'}:3"
    assert error.value.fix
    with pytest.raises(UserError) as error:
        load(parquet(tmp_path / "rows.parquet", bad))
    assert error.value.where == f"{tmp_path / 'rows.parquet'}:row 1"


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[1]",
        b'"text"',
        b"null",
        b'{"prompt": "\xff", "answer": "2"}',
        b"[" * 100_000,
        b'{"a": 1' + b"0" * 5000 + b"}",
    ],
    ids=["cut", "list", "text", "null", "not UTF-8", "deep", "long number"],
)
def test_a_line_that_is_no_json_object_is_named(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    with pytest.raises(UserError) as error:
        load(path)
    assert error.value.where == f"{path}:2"


def test_a_malformed_parquet_row_far_down_is_named_by_its_number(tmp_path):
    rows = [GOOD] * 5000
    rows[4321] = {"prompt": "", "answer": "2"}
    with pytest.raises(UserError) as error:
        load(parquet(tmp_path / "rows.parquet", *rows))
    assert error.value.where == f"{tmp_path / 'rows.parquet'}:row 4322"


def test_parquet_values_become_json_content(tmp_path):
    fields = {"day": date(2026, 1, 2), "price": Decimal("1.50"), "deep": [{"day": date(2026, 1, 2)}]}
    (row,) = load(parquet(tmp_path / "rows.parquet", {**GOOD, **fields})).train
    assert json.loads(json.dumps(row.task)) == row.task
    assert (row.task["day"], row.task["price"], row.task["deep"]) == ("2026-01-02", "1.50", [{"day": "2026-01-02"}])


def test_binary_parquet_columns_are_refused(tmp_path):
    with pytest.raises(UserError, match="image"):
        load(parquet(tmp_path / "rows.parquet", {**GOOD, "image": b"\x00"}))


@everywhere
def test_messages_of_other_shapes_have_no_nulls(tmp_path, name):
    rows = [{"messages": [USER], "answer": "2"}, {"messages": [{**USER, "name": None}], "answer": "2"}]
    for row in load(WRITERS[name](tmp_path / name, *rows)).train:
        assert row.messages == [USER]


@pytest.mark.parametrize("key", ["data.path", "data.eval_path"])
@pytest.mark.parametrize("name", ["missing.jsonl", "missing.parquet", "rows.csv", "folder.jsonl"])
def test_files_that_cannot_be_used_name_the_key(tmp_path, key, name):
    good = jsonl(tmp_path / "good.jsonl", GOOD)
    (tmp_path / "rows.csv").write_text("prompt,answer\n")
    (tmp_path / "folder.jsonl").mkdir()
    bad = tmp_path / name
    with pytest.raises(UserError) as error:
        load(bad) if key == "data.path" else load(good, eval_path=str(bad))
    assert key in (error.value.where or "")


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.parquet", "broken.parquet"])
def test_empty_and_broken_files(tmp_path, name):
    path = tmp_path / name
    if name == "empty.parquet":
        pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
    else:
        path.write_bytes(b"\n\n")
    with pytest.raises(UserError) as error:
        load(path)
    assert str(path) in (error.value.where or "")
