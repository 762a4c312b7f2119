"""Preference pairs from JSONL files, and the seeded stream of them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlsys.batch import DataProto
from rlsys.config.errors import UserError
from rlsys.config.schema import ReplayConfig
from rlsys.data.base import Row
from rlsys.data.files import make_row
from rlsys.data.jsonl import JsonlRows
from rlsys.data.manifest import data_path
from rlsys.data.prompts import PromptEncoder
from rlsys.data.sampler import DataPosition, PromptOrder
from rlsys.replay.agreement import State, agreement_pairs
from rlsys.replay.pair_columns import SIDES, side_columns, side_row

LONG_PROMPT = "long_prompt"


@dataclass(frozen=True)
class Pair:
    """Two responses to a prompt, of which the first is better.

    pair_id: the same whenever the file is read, and of no other pair in it. chosen_ids, rejected_ids: of the responses,
    the end-of-sequence token included. where: file and line.
    """

    pair_id: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    where: str


@dataclass(frozen=True)
class _Told:
    """A pair in words; row: its prompt's."""

    row: Row
    chosen: str
    rejected: str


def load_pairs(
    replay: ReplayConfig,
    path: str | None,
    encoder: PromptEncoder,
    tokenizer: PreTrainedTokenizerBase,
    max_response_tokens: int,
) -> tuple[list[Pair], dict[str, int]]:
    """The pairs of a file.

    A response is the tokens of its text and the end-of-sequence token.

    Args:
        replay: ``source`` says whether rows are pairs (``file``) or states with actions (``agreement``).
        path: ``replay.path`` or ``replay.eval_path``.
        encoder: of prompts, as for the policy's. Where it drops long ones their pairs are dropped too.

    Returns:
        The pairs, in the order of the file, and how many rows gave none, by reason: ``long_prompt``, ``no_agreement``,
        ``same_action``.

    Raises:
        UserError: the file cannot be read or gives no pair, or a row has a field that is missing, of the wrong type,
            empty or too long, or two sides that are the same; with file and line.
    """
    key = "replay.eval_path" if path is not None and path == replay.eval_path != replay.path else "replay.path"
    if path is None:
        raise UserError("no file of pairs is named", where=key, fix=f"set {key}, or replay.source=groups")
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end-of-sequence token, and a pair's responses end with it",
            where="model.path",
            fix="use a model whose tokenizer has one",
        )
    file = data_path(path, where=key)
    if not file.is_file():
        raise UserError(f"there is no such file: {file}", where=key, fix="give a JSONL file of pairs")
    told, dropped = _told(file, replay)
    pairs: list[Pair] = []
    dropped[LONG_PROMPT] = 0
    prompts = encoder.encode_many([pair.row for pair in told])
    chosen, rejected = (_responses([getattr(p, side) for p in told], tokenizer) for side in SIDES)
    for pair, prompt_ids, chosen_ids, rejected_ids in zip(told, prompts, chosen, rejected, strict=True):
        where = pair.row.where
        _check_sides(chosen_ids, rejected_ids, max_response_tokens, where, replay)
        if prompt_ids is None:
            dropped[LONG_PROMPT] += 1
            continue
        pairs.append(Pair(pair.row.row_id, prompt_ids, chosen_ids, rejected_ids, where))
    if not pairs:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped.items() if count)
        raise UserError(f"no row gives a pair ({reasons})", where=str(file), fix="give a file with others")
    return pairs, dropped


def pair_batch(pairs: Sequence[Pair], epoch: str) -> DataProto:
    """The columns of pairs, one row each, and uid (``PAIR@EPOCH``)."""
    sides = {"chosen": [pair.chosen_ids for pair in pairs], "rejected": [pair.rejected_ids for pair in pairs]}
    columns: dict[str, torch.Tensor] = {}
    for side in SIDES:
        rows = [
            side_row(_tokens(pair.prompt_ids), _tokens(ids), torch.ones(len(ids), dtype=torch.bool))
            for pair, ids in zip(pairs, sides[side], strict=True)
        ]
        columns |= side_columns(side, rows, reference=False)
    names = [pair.pair_id for pair in pairs]
    return DataProto.from_dict(
        {**columns, "pair_slot": torch.ones(len(pairs), dtype=torch.bool)},
        {"pair_id": names, "uid": [f"{name}@{epoch}" for name in names]},
    )


class PairStream:
    """A run's pairs, ``pairs_per_step`` at a time, for ever; every epoch in an order of its own.

    Raises:
        UserError: there are no pairs.
    """

    def __init__(self, pairs: Sequence[Pair], pairs_per_step: int, seed: int):
        if not pairs:
            raise UserError("there are no pairs", where="replay.path", fix="give a file with pairs")
        self._pairs, self._pairs_per_step = pairs, pairs_per_step
        self._order = PromptOrder(len(pairs), seed)
        self.position = DataPosition()

    def next_batch(self) -> DataProto:
        """The next pairs: chosen_ids, chosen_mask, rejected_ids, rejected_mask, pair_id, pair_slot, uid."""
        places, self.position = self._order.take(self.position, self._pairs_per_step)
        epochs = dict.fromkeys(epoch for _, epoch in places)  # in order; more than one where an epoch ends
        return DataProto.concat(
            [pair_batch([self._pairs[row] for row, of in places if of == epoch], str(epoch)) for epoch in epochs]
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as JSON content."""
        return {**asdict(self.position), "pairs": len(self._pairs)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where a stream over the same pairs stood.

        Raises:
            UserError: there is another number of pairs than there was.
        """
        if state["pairs"] != len(self._pairs):
            raise UserError(
                f"there are {len(self._pairs)} pairs, and were {state['pairs']} when the checkpoint was written",
                where="replay.path",
                fix="resume with the pairs that the run was started with",
            )
        self.position = DataPosition(state["epoch"], state["index"])


def _told(file: Path, replay: ReplayConfig) -> tuple[list[_Told], dict[str, int]]:
    """The file's pairs in words, and how many rows gave none, by reason."""
    if replay.source != "agreement":
        rows = list(JsonlRows(file, _pair_row))
        return [_Told(row, row.task["chosen"], row.task["rejected"]) for row in rows], {}
    rows = list(JsonlRows(file, _state_row))
    states = (State(row.task["policy"], row.task["teachers"]) for row in rows)
    agreed, dropped = agreement_pairs(states, replay.agreement_threshold)
    return [_Told(rows[pair.state], pair.chosen, pair.rejected) for pair in agreed], dropped


def _pair_row(fields: dict[str, Any], number: int, where: str) -> Row:
    sides: dict[str, Any] = {side: _text(fields, side, where) for side in SIDES}
    if sides["chosen"] == sides["rejected"]:
        raise UserError("'chosen' and 'rejected' are the same", where=where, fix="leave the row out")
    return _prompt_row(fields, sides, number, where)


def _state_row(fields: dict[str, Any], number: int, where: str) -> Row:
    policy = _text(fields, "policy", where)
    teachers = _field(fields, "teachers", where)
    if not isinstance(teachers, list) or not teachers:
        raise UserError("'teachers' is no list of their actions", where=where, fix="give a list with a text a teacher")
    named = {f"teachers[{place}]": action for place, action in enumerate(teachers)}
    return _prompt_row(
        fields, {"policy": policy, "teachers": [_text(named, name, where) for name in named]}, number, where
    )


def _prompt_row(fields: dict[str, Any], task: dict[str, Any], number: int, where: str) -> Row:
    """A row with the conversation of ``prompt`` or ``messages``, and this as its task."""
    if fields.get("prompt") is None and fields.get("messages") is None:
        raise UserError(
            "the row has neither 'prompt' nor 'messages'",
            where=where,
            fix="give the text of a prompt, or [{role, content}, …]",
        )
    asked = {name: fields[name] for name in ("prompt", "messages") if fields.get(name) is not None}
    row = make_row({**asked, "answer": ""}, number, where, part="pair")
    return Row(row.row_id, row.messages, task, where)


def _field(fields: dict[str, Any], name: str, where: str) -> Any:
    if fields.get(name) is None:
        near = difflib.get_close_matches(name, fields, n=1)
        fix = f"did you mean '{near[0]}'?" if near else f"it has: {', '.join(fields) or 'nothing'}"
        raise UserError(f"the row has no '{name}'", where=where, fix=fix)
    return fields[name]


def _text(fields: dict[str, Any], name: str, where: str) -> str:
    text = _field(fields, name, where)
    if not isinstance(text, str):
        raise UserError(f"'{name}' is of type {type(text).__name__}, not text", where=where, fix="give a string")
    if not text.strip():
        raise UserError(f"'{name}' is empty", where=where, fix="leave the row out, or give what was answered")
    return text


def _responses(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if not texts:
        return []
    end = tokenizer.eos_token_id
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [ids if ids and ids[-1] == end else [*ids, end] for ids in rows]


def _check_sides(chosen: list[int], rejected: list[int], limit: int, where: str, replay: ReplayConfig) -> None:
    for side, ids in (("chosen", chosen), ("rejected", rejected)):
        if len(ids) > limit:
            name = side if replay.source != "agreement" else {"chosen": "teachers", "rejected": "policy"}[side]
            raise UserError(
                f"'{name}' has {len(ids)} tokens with the end, and data.max_response_tokens allows {limit}",
                where=where,
                fix=f"set data.max_response_tokens={len(ids)} or more, or leave the row out",
            )
    if chosen == rejected:
        raise UserError(
            "the two responses are the same tokens", where=where, fix="leave the row out, or check the tokenizer"
        )


def _tokens(ids: list[int]) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64)
