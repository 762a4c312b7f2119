"""The tokenizer that the bundled start is made with."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.data.base import user_row
from rlsys.data.prompts import PromptEncoder, load_tokenizer

_RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "start_model"


def _module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("start_model_tokenizer", _RECIPE / "tokenizer.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODULE = _module()
TOKENIZER = MODULE.make_tokenizer()


@given(st.text([*map(chr, range(32, 127)), "\n"]))
def test_printable_ascii_comes_back_one_token_a_character(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    # Special tokens spelt out in a text are themselves; everything else is its characters.
    if not any(token in text for token in MODULE.SPECIAL):
        assert len(ids) == len(text)
    assert TOKENIZER.decode(ids) == text
    assert max(ids, default=0) < MODULE.VOCABULARY


def test_ids_never_move():
    """The bundled model's embedding was trained on them."""
    assert TOKENIZER.get_vocab() == MODULE.make_tokenizer().get_vocab()
    assert TOKENIZER.convert_tokens_to_ids(["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]) == [
        *range(5)
    ]
    assert TOKENIZER.encode("0\n+=") == [22, 5, 17, 35]
    assert (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id) == (0, 1)


@pytest.mark.parametrize(
    ("system", "text"), [(None, "<|user|>37+05=<|assistant|>"), ("Add.", "<|system|>Add.<|user|>37+05=<|assistant|>")]
)
def test_prompts_end_with_the_assistants_token(tmp_path, system, text):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    row = user_row("37+05=", "37+05=", {}, "")
    ids = PromptEncoder(loaded, system_prompt=system, max_prompt_tokens=16).encode(row)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == (system or "") + "37+05="


def test_what_the_assistant_says_ends_with_the_end_token():
    messages = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "02"}]
    assert TOKENIZER.apply_chat_template(messages, tokenize=False) == "<|user|>1+1=<|assistant|>02<|end|>"
