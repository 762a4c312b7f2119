"""Pairs from files: what is refused with file and line, teacher agreement, and the stream."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_folders import make_tokenizer
from replay_shards import END, TOKENIZER, ids

from rlsys.batch import DataProto, jagged
from rlsys.batch.columns import check_columns
from rlsys.config.errors import UserError
from rlsys.config.schema import ReplayConfig
from rlsys.data.prompts import PromptEncoder
from rlsys.replay.agreement import AgreedPair, State, agreement_pairs
from rlsys.replay.pair_files import Pair, PairStream, load_pairs, pair_batch

GOOD = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}
STATE = {"prompt": "1+1=", "policy": "3", "teachers": ["2", "2", "4"]}


def load(
    tmp_path: Path,
    rows: list[Any],
    *,
    limit: int = 8,
    long_prompts: str = "error",
    prompt_tokens: int = 30,
    **config: Any,
) -> tuple[list[Pair], dict[str, int]]:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(f"{json.dumps(row) if not isinstance(row, str) else row}\n" for row in rows))
    replay = ReplayConfig(**{"source": "file", "path": str(file)} | config)
    encoder = PromptEncoder(TOKENIZER, max_prompt_tokens=prompt_tokens, long_prompts=long_prompts, system_prompt="s")
    return load_pairs(replay, replay.path, encoder, TOKENIZER, limit)


def test_a_pair_is_prompt_tokens_and_two_ended_responses(tmp_path):
    talk = [
        {"role": "user", "content": "1+1="},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "?"},
    ]
    rows = [GOOD, "", {"messages": talk, "chosen": " 4<|end|>", "rejected": "5", "more": [1]}]
    pairs, dropped = load(tmp_path, rows)
    prompt = ids("<|system|>s<|user|>1+1=<|assistant|>")
    where = str(tmp_path / "pairs.jsonl")
    assert pairs == [
        Pair("pair-1", prompt, [*ids("2"), END], [*ids("3"), END], f"{where}:1"),
        Pair(
            "pair-3",
            ids("<|system|>s<|user|>1+1=<|assistant|>2<|end|><|user|>?<|assistant|>"),
            [*ids(" 4"), END],  # not ended twice
            [*ids("5"), END],
            f"{where}:3",
        ),
    ]
    assert dropped == {"long_prompt": 0}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "1", "chosen": "2"}, "no 'rejected'"),
        ({"prompt": "1", "chosn": "2", "rejected": "3"}, "no 'chosen'"),
        ({"prompt": "1", "chosen": None, "rejected": "3"}, "no 'chosen'"),
        ({"prompt": "1", "chosen": 2, "rejected": "3"}, "'chosen' is of type int"),
        ({"prompt": "1", "chosen": "2", "rejected": " \n"}, "'rejected' is empty"),
        ({"prompt": "1", "chosen": "2", "rejected": "2"}, "are the same"),
        ({"prompt": "1", "chosen": "é", "rejected": "日"}, "the same tokens"),
        ({"prompt": "1", "chosen": "2", "rejected": "12345678"}, "'rejected' has 9 tokens"),
        ({"chosen": "2", "rejected": "3"}, "neither 'prompt' nor 'messages'"),
        ({"prompt": 1, "chosen": "2", "rejected": "3"}, "'prompt' is of type int"),
        ({"prompt": "", "chosen": "2", "rejected": "3"}, "'prompt' is empty"),
        ({"messages": [{"role": "user"}], "chosen": "2", "rejected": "3"}, "'messages.0..content' is missing"),
        ({"prompt": "1" * 40, "chosen": "2", "rejected": "3"}, "data.max_prompt_tokens"),
        ("{", "not JSON"),
        ("[]", "not an object"),
    ],
)
def test_a_row_that_is_no_pair_names_its_line(tmp_path, row, words):
    with pytest.raises(UserError, match=words) as error:
        load(tmp_path, [GOOD, "", row, GOOD])
    assert error.value.where == f"{tmp_path / 'pairs.jsonl'}:3"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "1", "teachers": ["2"]}, "no 'policy'"),
        ({"prompt": "1", "policy": "3"}, "no 'teachers'"),
        ({"prompt": "1", "policy": "3", "teachers": "2"}, "no list"),
        ({"prompt": "1", "policy": "3", "teachers": []}, "no list"),
        ({"prompt": "1", "policy": "3", "teachers": ["2", 3]}, r"'teachers\[1\]' is of type int"),
        ({"prompt": "1", "policy": "3", "teachers": ["2", None]}, r"no 'teachers\[1\]'"),
        ({"prompt": "1", "policy": "", "teachers": ["2"]}, "'policy' is empty"),
        ({"prompt": "1", "policy": "123456789", "teachers": ["2", "2"]}, "'policy' has 10 tokens"),
    ],
)
def test_a_row_that_is_no_state_names_its_line(tmp_path, row, words):
    with pytest.raises(UserError, match=words) as error:
        load(tmp_path, [STATE, row], source="agreement")
    assert error.value.where == f"{tmp_path / 'pairs.jsonl'}:2"


def test_files_that_are_not_there_name_their_key(tmp_path):
    encoder = PromptEncoder(TOKENIZER, max_prompt_tokens=30)
    replay = ReplayConfig(source="file", path=str(tmp_path / "a"), eval_path=str(tmp_path / "b"))
    for path, key in ((replay.path, "replay.path"), (replay.eval_path, "replay.eval_path")):
        with pytest.raises(UserError, match="no such file") as error:
            load_pairs(replay, path, encoder, TOKENIZER, 8)
        assert error.value.where == key
    with pytest.raises(UserError, match="no file of pairs is named"):
        load_pairs(replay, None, encoder, TOKENIZER, 8)
    endless = make_tokenizer()
    endless.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        load_pairs(replay, replay.path, encoder, endless, 8)


def test_long_prompts_are_dropped_and_counted_where_that_was_asked_for(tmp_path):
    long = GOOD | {"prompt": "1" * 40}
    pairs, dropped = load(tmp_path, [GOOD, long, GOOD], long_prompts="drop")
    assert ([pair.pair_id for pair in pairs], dropped) == (["pair-1", "pair-3"], {"long_prompt": 1})
    with pytest.raises(UserError, match=r"no row gives a pair \(long_prompt: 1\)"):
        load(tmp_path, [long], long_prompts="drop")


def test_states_give_pairs_where_teachers_agree(tmp_path):
    rows = [
        STATE,
        STATE | {"teachers": ["2", "4"]},
        STATE | {"policy": " 2\n"},
        STATE | {"teachers": [" 2 ", "2", "3"]},
    ]
    pairs, dropped = load(tmp_path, rows, source="agreement", agreement_threshold=2)
    assert [(p.pair_id, p.chosen_ids, p.rejected_ids) for p in pairs] == [
        ("pair-1", [*ids("2"), END], [*ids("3"), END]),
        ("pair-4", [*ids(" 2 "), END], [*ids("3"), END]),
    ]
    assert dropped == {"no_agreement": 1, "same_action": 1, "long_prompt": 0}
    with pytest.raises(UserError, match=r"no row gives a pair \(no_agreement: 1\)"):
        load(tmp_path, [STATE], source="agreement", agreement_threshold=3)


actions = st.sampled_from(["a", "b", " a", "b\n", "a  b", "a b"])


@given(st.lists(st.tuples(actions, st.lists(actions, max_size=6)), max_size=6), st.integers(1, 4))
def test_chosen_is_what_enough_teachers_and_more_than_for_anything_else_say(told, threshold):
    pairs, dropped = agreement_pairs([State(policy, teachers) for policy, teachers in told], threshold)
    assert len(pairs) + sum(dropped.values()) == len(told)
    found = {pair.state: pair for pair in pairs}
    for place, (policy, teachers) in enumerate(told):
        votes = Counter(" ".join(action.split()) for action in teachers)
        winners = [action for action, count in votes.items() if count == max(votes.values()) and count >= threshold]
        if len(winners) != 1 or winners[0] == " ".join(policy.split()):
            assert place not in found
            continue
        first = next(action for action in teachers if action.split() == winners[0].split())
        assert found[place] == AgreedPair(place, first, policy)


def made(count: int) -> list[Pair]:
    return [Pair(f"pair-{i}", [9] * (1 + i % 3), [10 + i, END], [50, 50 + i, END], "") for i in range(count)]


def uids(batch: DataProto) -> list[str]:
    return batch.non_tensor_batch["uid"].tolist()


def test_the_columns_of_a_batch_of_pairs():
    batch = PairStream(made(3), 4, seed=0).next_batch()
    check_columns(batch, ("chosen_ids", "chosen_mask", "rejected_ids", "rejected_mask", "pair_id", "pair_slot"), "x")
    assert batch.batch["pair_slot"].tolist() == [True] * 4
    for row, name in enumerate(batch.non_tensor_batch["pair_id"]):
        pair = next(pair for pair in made(3) if pair.pair_id == name)
        for side, response in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
            tokens, mask = (jagged.to_rows(batch.batch[f"{side}_{part}"])[row].tolist() for part in ("ids", "mask"))
            assert tokens == [*pair.prompt_ids, *response]
            assert mask == [False] * len(pair.prompt_ids) + [True] * len(response)
    assert len(pair_batch([], "eval")) == 0
    assert uids(pair_batch(made(1), "eval")) == ["pair-0@eval"]


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 2**40))
def test_every_pair_comes_once_in_every_epoch(count, per_step, seed):
    stream = PairStream(made(count), per_step, seed)
    seen = [uid for _ in range(3 * count // per_step + 1) for uid in uids(stream.next_batch())]
    assert [int(uid.split("@")[1]) for uid in seen] == [place // count for place in range(len(seen))]
    assert len(set(seen)) == len(seen)


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 2**40), st.integers(0, 6))
def test_a_stream_goes_on_from_its_state_as_if_it_had_never_stopped(count, per_step, seed, before):
    first, second = (PairStream(made(count), per_step, seed) for _ in range(2))
    for _ in range(before):
        first.next_batch()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for _ in range(3):
        left, right = first.next_batch(), second.next_batch()
        assert uids(left) == uids(right)
        assert jagged.equal(left.batch["chosen_ids"], right.batch["chosen_ids"])
    assert first.state_dict() == second.state_dict()


def test_orders_differ_by_seed_and_by_epoch():
    first, again, other = (uids(PairStream(made(50), 100, seed).next_batch()) for seed in (0, 0, 1))
    assert first == again != other
    assert [uid.split("@")[0] for uid in first[:50]] != [uid.split("@")[0] for uid in first[50:]]


def test_a_stream_over_other_pairs_is_refused():
    with pytest.raises(UserError, match="there are 3 pairs, and were 2"):
        PairStream(made(3), 1, 0).load_state_dict(PairStream(made(2), 1, 0).state_dict())
    with pytest.raises(UserError, match="no pairs"):
        PairStream([], 1, 0)
