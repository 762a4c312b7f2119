from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_folders import CHARACTERS, make_tokenizer

from rlsys.config.errors import UserError
from rlsys.data.base import Row, user_row
from rlsys.data.prompts import PromptEncoder, load_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def tokenizer(template: str | None = TEMPLATE):
    made = make_tokenizer()
    made.chat_template = template
    return made


def encoder(template: str | None = TEMPLATE, **fields) -> PromptEncoder:
    return PromptEncoder(tokenizer(template), **{"max_prompt_tokens": 64, **fields})


def text_of(ids: list[int] | None) -> str:
    assert ids is not None
    return make_tokenizer().decode(ids)


def row(*messages: tuple[str, str], where: str = "rows.jsonl:7") -> Row:
    return Row("7", [{"role": role, "content": content} for role, content in messages], {}, where)


ASK = row(("user", "1+1"))


def test_a_prompt_ends_where_the_assistant_begins_to_speak():
    assert text_of(encoder().encode(ASK)) == "u:1+1\na:"


def test_the_system_prompt_goes_before_conversations_that_have_none():
    with_system = encoder(system_prompt="be brief")
    assert text_of(with_system.encode(ASK)) == "s:be brief\nu:1+1\na:"
    assert text_of(with_system.encode(row(("system", "sum"), ("user", "1+1")))) == "s:sum\nu:1+1\na:"
    assert ASK.messages == [{"role": "user", "content": "1+1"}]


def test_a_template_file_takes_the_place_of_the_tokenizers_own(tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text("{{ messages[0]['content'] }}=")
    assert text_of(encoder(chat_template_path=str(path)).encode(ASK)) == "1+1="
    assert text_of(encoder(None, chat_template_path=str(path)).encode(ASK)) == "1+1="


def test_without_a_template_a_single_user_message_is_plain_text():
    plain = encoder(None)
    assert text_of(plain.encode(ASK)) == "1+1"
    with pytest.raises(UserError) as error:
        plain.encode(row(("user", "1"), ("assistant", "2"), ("user", "3")))
    assert error.value.where == "rows.jsonl:7"
    assert "model.chat_template" in str(error.value)
    with pytest.raises(UserError, match=r"model\.chat_template"):
        encoder(None, system_prompt="be brief")


@pytest.mark.parametrize("content", ["{% for %}", "{{ messages | nothing }}", b"\xff\xfe"])
def test_a_broken_template_file_is_found_before_any_row(tmp_path, content):
    path = tmp_path / "template.jinja"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        encoder(chat_template_path=str(path))
    assert str(path) in str(error.value)
    assert "model.chat_template" in str(error.value)


def test_a_missing_template_file():
    with pytest.raises(UserError, match=r"model\.chat_template"):
        encoder(chat_template_path="/nowhere/template.jinja")


def test_a_row_that_the_template_refuses_is_named():
    template = (
        "{% if messages|length > 1 %}{{ raise_exception('one at a time') }}{% endif %}{{ messages[0]['content'] }}"
    )
    strict = encoder(template)
    assert text_of(strict.encode(ASK)) == "1+1"
    with pytest.raises(UserError, match="one at a time") as error:
        strict.encode(row(("user", "1"), ("user", "2")))
    assert error.value.where == "rows.jsonl:7"


@given(st.text(CHARACTERS, min_size=1), st.integers(1, 40))
def test_a_prompt_is_refused_or_dropped_exactly_where_it_is_too_long(text, limit):
    asked = row(("user", text))
    strict = PromptEncoder(_TOKENIZER, max_prompt_tokens=limit)
    dropping = PromptEncoder(_TOKENIZER, max_prompt_tokens=limit, long_prompts="drop")
    if len(text) + 5 <= limit:
        assert strict.encode(asked) == dropping.encode(asked)
        assert dropping.dropped == 0
        return
    assert dropping.encode(asked) is None
    assert dropping.dropped == 1
    with pytest.raises(UserError) as error:
        strict.encode(asked)
    assert error.value.where == "rows.jsonl:7"
    assert "data.max_prompt_tokens" in str(error.value)


_TOKENIZER = tokenizer()


def test_many_rows_are_encoded_as_one_by_one_and_as_the_template_would():
    rows = [user_row(str(i), f"{i}+{i}", {}, "") for i in range(20)]
    one = encoder(long_prompts="drop", max_prompt_tokens=8)
    many = one.encode_many(rows)
    assert many == [one.encode(r) for r in rows]
    assert None in many
    for r, ids in zip(rows, many, strict=True):
        expected = _TOKENIZER.apply_chat_template(r.messages, add_generation_prompt=True, return_dict=False)
        assert ids in (None, expected)
    assert one.encode_many([]) == []


def test_a_prompt_without_tokens_is_an_error():
    with pytest.raises(UserError, match="no tokens"):
        encoder("").encode(ASK)


def test_a_tokenizer_survives_its_folder(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).get_vocab() == make_tokenizer().get_vocab()


def _without_tokenizer(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3"}))


def _with_broken_tokenizer(folder: Path) -> None:
    make_tokenizer().save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"model": 3}')


@pytest.mark.parametrize("spoil", [_without_tokenizer, _with_broken_tokenizer])
def test_a_folder_without_a_usable_tokenizer(tmp_path, spoil):
    spoil(tmp_path)
    with pytest.raises(UserError) as error:
        load_tokenizer(str(tmp_path))
    assert error.value.where == f"model.path={tmp_path}"


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')")
    fields = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError) as error:
        load_tokenizer(str(tmp_path))
    assert error.value.where == f"model.path={tmp_path}"
    assert not (tmp_path / "was_run").exists()


def test_a_missing_folder():
    with pytest.raises(UserError) as error:
        load_tokenizer("/nowhere/model")
    assert error.value.where == "model.path=/nowhere/model"
