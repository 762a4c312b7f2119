"""Tokens of text that a regular expression matches, for tokenizers of characters, words and bytes."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_folders import make_tokenizer
from replay_shards import END, TOKENIZER, ids
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlsys.batch import jagged
from rlsys.config.errors import UserError
from rlsys.replay.functional import functional_mask, token_spans


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and a few that join bytes, one of them across characters; ``<eos>`` is special."""
    joined = ["aÃ", "Ã©", "Ġa", "ab"]  # "a" and half of "é", "é", " a", "ab"
    vocabulary = {token: place for place, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *joined])}
    merges = [(token[0], token[1]) for token in joined]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Words that carry the space before them, which the decoder drops at the beginning of a text."""
    vocabulary = {token: place for place, token in enumerate(["<unk>", "▁one", "▁two", "t", "▁"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


BYTES, WORDS = byte_tokenizer(), metaspace_tokenizer()


def masks(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]], pattern: str) -> list[list[bool]]:
    column = jagged.from_rows([torch.tensor(row, dtype=torch.int64) for row in rows], dtype=torch.int64)
    mask = functional_mask(tokenizer, column, pattern)
    assert mask.dtype == torch.bool
    assert torch.equal(jagged.offsets(mask), jagged.offsets(column))
    return [row.tolist() for row in jagged.to_rows(mask)]


@given(st.lists(st.text("0123456789+-= ab", max_size=20), max_size=4), st.sampled_from([r"\d+", "a.b", "=", "b*", "x"]))
def test_a_token_a_character_is_functional_where_the_character_is(texts, pattern):
    rows = [[*ids(text), END] for text in texts]
    expected = []
    for text in texts:
        inside = {place for match in re.finditer(pattern, text) for place in range(*match.span())}
        expected.append([place in inside for place in range(len(text))] + [False])
    assert masks(TOKENIZER, rows, pattern) == expected


@given(st.text("ab éł日🙂", max_size=12), st.sampled_from(["é", "日", "🙂", "[a-b]+", "łab", " a", "日🙂"]))
def test_all_tokens_of_a_character_of_several_bytes_go_together(text, pattern):
    tokens = BYTES(text)["input_ids"]
    assert BYTES.decode(tokens) == text
    # Where each token's bytes lie in the text's: the truth, without decoding anything.
    lengths = [len(BYTES.convert_ids_to_tokens(token)) for token in tokens]
    owner = [place for place, character in enumerate(text) for _ in character.encode()]
    inside = {place for match in re.finditer(pattern, text) for place in range(*match.span())}
    expected, start = [], 0
    for length in lengths:
        expected.append(any(owner[byte] in inside for byte in range(start, start + length)))
        start += length
    (mask,) = masks(BYTES, [tokens], pattern)
    # A token that ends within a character shares its place with those that end it: more may be marked, and not less.
    assert all(found or not wanted for found, wanted in zip(mask, expected, strict=True))
    if BYTES.convert_tokens_to_ids("aÃ") not in tokens:
        assert mask == expected


def test_bytes_that_make_no_character_end_with_the_row_or_with_the_next():
    broken = BYTES("é日")["input_ids"][:-1]  # the last byte of the last character is missing
    after = BYTES(" ab")["input_ids"]
    assert masks(BYTES, [broken, [*broken, *after]], "ab")[0] == [False] * len(broken)
    assert masks(BYTES, [[*broken, *after]], "b")[0][-1]
    assert masks(BYTES, [broken], "é")[0] == [True] + [False] * (len(broken) - 1)
    half, rest = BYTES("aé")["input_ids"]
    assert masks(BYTES, [[half, rest], [half]], "é") == [[True, True], [False]]


def test_a_space_that_only_the_middle_of_a_text_has():
    one, two, t = WORDS.convert_tokens_to_ids(["▁one", "▁two", "t"])
    assert WORDS.decode([one, two, t, one]) == "one twot one"
    assert token_spans(WORDS, [one, two, t, one]) == [(0, 3), (3, 7), (7, 8), (8, 12)]
    assert masks(WORDS, [[one, two, t, one]], "^one") == [[True, False, False, False]]
    assert masks(WORDS, [[one, two, t, one]], "ot") == [[False, True, True, False]]


def test_special_tokens_have_no_text():
    end = BYTES.eos_token_id
    a, b = BYTES.convert_tokens_to_ids(["a", "b"])
    assert token_spans(BYTES, [end, a, end, end, b]) == [(0, 0), (0, 1), (1, 1), (1, 1), (1, 2)]
    assert masks(BYTES, [[a, end, b], [end]], ".*") == [[True, False, True], [False]]


@given(st.lists(st.integers(0, 255), max_size=24))
def test_the_spans_of_any_tokens_lie_side_by_side(tokens):
    spans = token_spans(BYTES, tokens)
    assert len(spans) == len(tokens)
    steps = list(dict.fromkeys(spans))
    assert all(before[1] == after[0] for before, after in pairwise(steps))


def test_matches_of_nothing_and_rows_of_nothing():
    rows = [ids("12"), []]
    assert masks(TOKENIZER, rows, "x*") == [[False, False], []]
    assert masks(TOKENIZER, [], r"\d") == []
    assert masks(make_tokenizer(), [make_tokenizer()("a1")["input_ids"]], r"\d") == [[False, True]]


def test_a_pattern_that_is_none():
    with pytest.raises(UserError, match="no regular expression") as error:
        masks(TOKENIZER, [], "(")
    assert error.value.where == "algorithm.functional_tokens"
