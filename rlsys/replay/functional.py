"""Which tokens of a response are functional: part of text that a regular expression matches."""

from __future__ import annotations

import re
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlsys.batch import jagged
from rlsys.config.errors import UserError

# A character has at most four bytes, so that no more byte tokens can wait for its end.
_LONGEST_CHARACTER = 4
_REPLACEMENT = "�"


def functional_pattern(pattern: str) -> re.Pattern[str]:
    """Compiles ``algorithm.functional_tokens``.

    Raises:
        UserError: it is no regular expression.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"'{pattern}' is no regular expression: {error}",
            where="algorithm.functional_tokens",
            fix="write it as Python's re module takes it",
        ) from None


def functional_mask(tokenizer: PreTrainedTokenizerBase, response_ids: Tensor, pattern: str) -> Tensor:
    """[B, j:response] bool: tokens of which a character lies in a match.

    The text is the decoded response without special tokens, as rewards see it; special tokens are never functional. Of
    tokens that only together make a character all are, or none.

    Args:
        response_ids: [B, j:response]
        pattern: searched for all over the text; matches of nothing count for nothing.

    Raises:
        UserError: the pattern is no regular expression.
    """
    compiled = functional_pattern(pattern)
    ids = jagged.values(response_ids)
    unique = ids.unique().tolist()
    alone = dict(zip(unique, _decode_all(tokenizer, [[token] for token in unique]), strict=True))
    rows = [row.tolist() for row in jagged.to_rows(response_ids)]
    masks = [torch.zeros(0, dtype=torch.bool)]
    for row, text in zip(rows, _decode_all(tokenizer, rows), strict=True):
        mask = torch.zeros(len(row), dtype=torch.bool)
        masks.append(mask)
        matched = np.zeros(len(text) + 1, dtype=np.int64)
        for match in compiled.finditer(text):
            matched[match.start() + 1 : match.end() + 1] = 1
        if not matched.any():
            continue
        before = matched.cumsum()  # matched characters among the first i
        spans = np.asarray(_spans(tokenizer, row, text, alone)).clip(0, len(text))
        mask[:] = torch.from_numpy(before[spans[:, 1]] > before[spans[:, 0]])
    return jagged.from_values(torch.cat(masks), offsets=jagged.offsets(response_ids))


def token_spans(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> list[tuple[int, int]]:
    """Where each token's characters begin and end in the text of all; empty for special tokens. Tokens that only
    together make a character share its place.

    Decoded as the tokens came in, each with the few before it: how a token reads can depend on its neighbours.
    """
    spans: list[tuple[int, int]] = []
    context = start = 0  # the first token that is decoded with those from start on, which have no text yet
    place = 0
    for stop in range(1, len(token_ids) + 1):
        known, text = _decode_all(tokenizer, [token_ids[context:start], token_ids[context:stop]])
        if text == known:  # no characters
            spans += [(place, place)] * (stop - start)
            start = stop
            continue
        waiting = text.endswith(_REPLACEMENT) and stop - start < _LONGEST_CHARACTER
        if waiting and stop < len(token_ids):
            continue
        new = max(len(text) - len(known), 0)
        spans += [(place, place + new)] * (stop - start)
        place += new
        context, start = start, stop
    return spans


def _spans(
    tokenizer: PreTrainedTokenizerBase, token_ids: list[int], text: str, alone: dict[int, str]
) -> list[tuple[int, int]]:
    """:func:`token_spans`, without decoding again where the text is that of its tokens one after the other."""
    pieces = [alone[token] for token in token_ids]
    if "".join(pieces) != text:
        return token_spans(tokenizer, token_ids)
    ends = list(accumulate(map(len, pieces)))
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _decode_all(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> list[str]:
    return tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False) if rows else []
