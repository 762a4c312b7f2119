"""What a self-teacher is shown: solutions of siblings, references, hints, feedback, and hints at one turn."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from replay_shards import TOKENIZER, given_span, ids, said, sampled, shard

from rlsys.batch import DataProto, jagged
from rlsys.batch.columns import check_columns
from rlsys.config.errors import UserError
from rlsys.config.schema import HintsConfig
from rlsys.environments.base import Trajectory
from rlsys.replay.hints import HintCounts, TeacherContexts
from rlsys.replay.sections import shortened, without_thinking

HINTS = HintsConfig(
    solution_template="\nSolution: {solution}",
    hint_template="\nHint: {hint}",
    feedback_template="\nFeedback: {feedback}",
    turn_template="[{hint}]",
    instruction="\nAgain.",
)
WRITTEN = ("teacher_prompt_ids", "has_teacher", "teacher_mask")


def build(
    batch: DataProto,
    texts: list[str],
    rewards: list[float],
    feedback: list[str | None] | None = None,
    *,
    system: str | None = None,
    **changes: Any,
) -> tuple[DataProto, HintCounts]:
    contexts = TeacherContexts(TOKENIZER, replace(HINTS, **changes), system_prompt=system)
    return contexts.build(batch, texts, np.asarray(rewards, dtype=np.float32), feedback or [None] * len(batch))


def prompts(made: DataProto) -> list[str]:
    return [TOKENIZER.decode(row) for row in jagged.to_rows(made.batch["teacher_prompt_ids"])]


def masks(made: DataProto, name: str = "teacher_mask") -> list[list[bool]]:
    return [row.tolist() for row in jagged.to_rows(made.batch[name])]


def test_the_first_other_solution_of_the_group_is_shown_and_never_the_own():
    batch, texts = shard([[said("7"), said("4"), said("04"), said("9")], [said("1"), said("2")]])
    made, counts = build(batch, texts, [0, 1, 1, 0, 0, 1])
    shown = {
        1: "04",  # of the solved ones the first that is not its own
        **dict.fromkeys((0, 2, 3), "4"),
    }
    expected = [f"<|user|>0+0=\nSolution: {shown[row]}\nAgain.<|assistant|>" for row in range(4)]
    assert prompts(made) == [*expected, "<|user|>1+1=\nSolution: 2\nAgain.<|assistant|>", ""]
    assert made.batch["has_teacher"].tolist() == [True] * 5 + [False]
    assert counts == HintCounts(6, 5, 0, 0, {"sibling": 5, "feedback": 0})
    check_columns(batch.union(made), WRITTEN, "objective")
    for row, mask in enumerate(masks(made)):
        assert mask == [row != 5] * len(mask)


def test_what_is_first_among_siblings_does_not_depend_on_the_order_of_rows():
    batch, texts = shard([[said("a"), said("b"), said("c")], [said("d"), said("e")]])
    rewards = np.array([1, 1, 0, 1, 1], dtype=np.float32)
    made, _ = build(batch, texts, rewards.tolist())
    order = [4, 2, 0, 3, 1]
    moved, _ = build(batch.select_idxs(order), [texts[row] for row in order], rewards[order].tolist())
    assert prompts(moved) == [prompts(made)[row] for row in order]


def test_a_sibling_needs_the_threshold_and_something_besides_thoughts():
    batch, texts = shard([[said("<think>4?</think>"), said("<think>2+2</think> 4"), said("5")]])
    made, _ = build(batch, texts, [0.75, 0.5, 0], threshold=0.5)
    assert prompts(made)[2] == "<|user|>0+0=\nSolution: 4\nAgain.<|assistant|>"
    kept, _ = build(batch, texts, [0.75, 0.5, 0], threshold=0.5, strip_thinking=False)
    assert prompts(kept)[2] == "<|user|>0+0=\nSolution: <think>4?</think>\nAgain.<|assistant|>"
    none, counts = build(batch, texts, [0.75, 0.5, 0], threshold=0.9)
    assert (prompts(none), counts.live) == (["", "", ""], 0)
    assert not jagged.values(none.batch["teacher_mask"]).any()


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("<think>a</think> b <think>c</think>d", "b d"),
        ("opened by the template</think> b", "b"),
        ("b <think>never closed", "b"),
        ("<think>\n</think>", ""),
        ("no thoughts", "no thoughts"),
    ],
)
def test_thoughts_are_left_out(text, left):
    assert without_thinking(text).split() == left.split()


def test_the_first_source_that_has_something_wins():
    tasks = [{"solution": 12, "hint": "carry"}, {"hint": "carry"}, {"solution": "  "}, {}]
    batch, texts = shard([[said("1"), said("2")]] + [[said("1")]] * 3, tasks=tasks)
    rewards = [0, 1, 0, 0, 0]
    made, counts = build(batch, texts, rewards, source=["reference", "hint", "sibling"])
    assert [text.partition("\n")[2].removesuffix("\nAgain.<|assistant|>") for text in prompts(made)] == [
        "Solution: 12",
        "Solution: 12",
        "Hint: carry",
        "",
        "",
    ]
    assert counts.sources == {"reference": 2, "hint": 1, "sibling": 0}
    turned, _ = build(batch, texts, rewards, source=["sibling", "hint", "reference"])
    assert [text.split("\n")[1] for text in prompts(turned)[:2]] == ["Solution: 2", "Hint: carry"]
    other, _ = build(batch, texts, rewards, source=["hint"], hint_key="solution")
    assert prompts(other)[0] == "<|user|>0+0=\nHint: 12\nAgain.<|assistant|>"


def test_feedback_is_shown_where_there_is_no_solution_or_where_asked_beside_it():
    batch, texts = shard([[said("1"), said("4"), said("5")], [said("1")]])
    rewards, feedback = [0, 1, 0, 0], ["too low", None, " ", "wrong"]
    made, counts = build(batch, texts, rewards, feedback)
    assert [text.removeprefix("<|user|>0+0=") for text in prompts(made)] == [
        "\nSolution: 4\nAgain.<|assistant|>",
        "",
        "\nSolution: 4\nAgain.<|assistant|>",
        "<|user|>1+1=\nFeedback: wrong\nAgain.<|assistant|>",
    ]
    assert counts.sources == {"sibling": 2, "feedback": 1}
    both, counts = build(batch, texts, rewards, feedback, feedback_with_solution=True)
    assert prompts(both)[0] == "<|user|>0+0=\nSolution: 4\nFeedback: too low\nAgain.<|assistant|>"
    assert (counts.live, counts.sources) == (3, {"sibling": 2, "feedback": 2})
    alone, _ = build(batch, texts, rewards, feedback, source=["feedback"])
    assert alone.batch["has_teacher"].tolist() == [True, False, False, True]
    off, _ = build(batch, texts, rewards, feedback, source=["sibling"], feedback_with_solution=True)
    assert prompts(off)[3] == ""


def test_the_last_user_message_of_a_conversation_is_what_grows():
    talk = [
        {"role": "user", "content": "1+1="},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "and twice?"},
    ]
    batch, texts = shard([[said("3")], [said("4")]], messages=[talk, [{"role": "system", "content": "s"}, talk[2]]])
    made, _ = build(batch, texts, [0, 0], ["no", "no"], system="Add.")
    assert prompts(made) == [
        "<|system|>Add.<|user|>1+1=<|assistant|>2<|end|><|user|>and twice?\nFeedback: no\nAgain.<|assistant|>",
        "<|system|>s<|user|>and twice?\nFeedback: no\nAgain.<|assistant|>",
    ]
    assert talk[2]["content"] == "and twice?"


braces = st.text("{}ab solutionhintfeedback", max_size=30).filter(str.strip)


@given(braces, braces)
def test_texts_stand_in_the_prompt_as_they_are(solution, said_about):
    batch, texts = shard([[said("1")]], tasks=[{"solution": solution}])
    made, _ = build(batch, texts, [0], [said_about], source=["reference", "feedback"], feedback_with_solution=True)
    assert prompts(made) == [f"<|user|>0+0=\nSolution: {solution}\nFeedback: {said_about}\nAgain.<|assistant|>"]


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 150))
def test_a_long_prompt_loses_the_beginning_of_its_longest_text(long, short, limit):
    solution, feedback = "0123456789" * 6, "abcdefghij" * 6
    solution, feedback = "x" + solution[:long], "y" + feedback[:short]
    batch, texts = shard([[said("1")]], tasks=[{"solution": solution}])
    options: dict[str, Any] = {"source": ["reference", "feedback"], "feedback_with_solution": True}
    whole, _ = build(batch, texts, [0], [feedback], **options)
    made, counts = build(batch, texts, [0], [feedback], **options, max_tokens=limit)
    over = int(jagged.lengths(whole.batch["teacher_prompt_ids"])) - limit
    shown = min(over, len(solution) + len(feedback))
    if over <= 0:
        assert jagged.equal(made.batch["teacher_prompt_ids"], whole.batch["teacher_prompt_ids"])
        assert (counts.live, counts.truncated, counts.too_long) == (1, 0, 0)
    elif over >= len(solution) + len(feedback):  # nothing would be left to show
        assert (counts.live, counts.truncated, counts.too_long) == (0, 0, 1)
        assert not made.batch["has_teacher"].any()
        assert not jagged.values(made.batch["teacher_mask"]).any()
    else:
        first = min(shown, max(len(solution), len(feedback)))  # one token is one character here
        kept = [solution, feedback]
        place = 0 if len(solution) > len(feedback) else 1
        kept[place] = kept[place][first:]
        kept[1 - place] = kept[1 - place][shown - first :]
        assert prompts(made) == [f"<|user|>0+0=\nSolution: {kept[0]}\nFeedback: {kept[1]}\nAgain.<|assistant|>"]
        assert int(jagged.lengths(made.batch["teacher_prompt_ids"])) == limit
        assert (counts.live, counts.truncated, counts.too_long) == (1, 1, 0)


def test_no_more_is_cut_than_has_to_be():
    assert shortened(["abc", "abcdef"], lambda texts: len("".join(texts)) <= 7) == ["abc", "cdef"]
    assert shortened(["abc", "abcdef"], lambda texts: len("".join(texts)) <= 2) == ["bc", ""]
    assert shortened(["abc"], lambda texts: not texts[0]) is None
    assert shortened(["abc"], lambda texts: False) is None


def two_turns(**info: Any) -> Trajectory:
    return Trajectory([sampled("ab"), given_span("(no)"), sampled("cde", end=True)], "stop", info=info)


def test_a_hint_at_a_turn_stands_right_before_it_and_counts_there_only():
    hint = {"turn": 1, "text": "add {them}"}
    group = [
        two_turns(hint=hint),
        two_turns(hint={"turn": 0, "text": "x"}),
        two_turns(),
        two_turns(hint={"turn": 2, "text": "x"}),
        two_turns(hint={"turn": 0, "text": " "}),
    ]
    batch, texts = shard([group])
    made, counts = build(batch, texts, [0] * 5, source=["turn"])
    assert prompts(made) == ["<|user|>0+0=<|assistant|>ab(no)[add {them}]", "<|user|>0+0=<|assistant|>[x]", "", "", ""]
    assert masks(made) == [[False] * 6 + [True] * 4, [True] * 2 + [False] * 8, *[[False] * 10] * 3]
    assert counts == HintCounts(5, 2, 0, 0, {"turn": 2})
    mixed, counts = build(batch, texts, [0] * 5, ["f"] * 5, source=["turn", "feedback"], feedback_with_solution=True)
    assert prompts(mixed)[:2] == prompts(made)[:2]
    assert prompts(mixed)[2] == "<|user|>0+0=\nFeedback: f\nAgain.<|assistant|>"
    assert masks(mixed)[2] == [True] * 2 + [False] * 4 + [True] * 4  # sampled tokens alone
    before = len(ids("<|user|>0+0=<|assistant|>ab(no)"))
    cut, counts = build(batch, texts, [0] * 5, source=["turn"], max_tokens=before + 4)
    assert prompts(cut)[0] == "<|user|>0+0=<|assistant|>ab(no)[m}]"
    assert (counts.live, counts.truncated, counts.too_long) == (2, 1, 0)


def test_tokens_of_a_trajectory_are_never_made_again():
    """``<|end|>`` in pieces is one token when its text is tokenised."""
    pieces = [token for character in "<|end|>" for token in ids(character)]
    turn = Trajectory(
        [replace(sampled("0000000"), token_ids=pieces), given_span("."), sampled("4")],
        "stop",
        info={"hint": {"turn": 1, "text": "x"}},
    )
    batch, texts = shard([[turn]])
    made, _ = build(batch, texts, [0], source=["turn"])
    prompt, *_ = jagged.to_rows(batch.batch["prompt_ids"])
    assert jagged.values(made.batch["teacher_prompt_ids"]).tolist() == [
        *prompt.tolist(),
        *pieces,
        *ids("."),
        *ids("[x]"),
    ]


def test_given_tokens_before_the_first_sampled_one_are_in_the_teachers_prompt():
    """Its sequence goes on with the first token that counts."""
    batch, texts = shard([[Trajectory([given_span("obs:"), sampled("4")], "stop")]])
    made, _ = build(batch, texts, [0], ["no"])
    assert prompts(made) == ["<|user|>0+0=\nFeedback: no\nAgain.<|assistant|>obs:"]
    assert masks(made) == [[False] * 4 + [True]]


def test_a_response_without_a_sampled_token_has_no_teacher():
    batch, texts = shard([[Trajectory([], "length"), Trajectory([given_span("a")], "length"), said("2")]])
    made, counts = build(batch, texts, [0, 0, 1], ["no", "no", None])
    assert made.batch["has_teacher"].tolist() == [False] * 3
    assert counts == HintCounts(3, 0, 0, 0, {"sibling": 0, "feedback": 0})


def test_no_rows():
    batch, _ = shard([[said("1")]])
    made, counts = build(batch.select_idxs([]), [], [])
    assert (len(made), counts.rows) == (0, 0)
    assert made.batch["teacher_prompt_ids"].dtype == torch.int64
    assert made.batch["teacher_mask"].dtype == torch.bool
    assert build(DataProto(), [], [])[1].live == 0


def test_counts_of_shards_add_up():
    batch, texts = shard([[said("1"), said("4")], [said("2")]])
    rewards, feedback = [0.0, 1.0, 0.0], [None, None, "no"]
    _, whole = build(batch, texts, rewards, feedback)
    parts = [build(batch[rows], texts[rows], rewards[rows], feedback[rows])[1] for rows in (slice(0, 2), slice(2, 3))]
    assert parts[0] + parts[1] == whole
    assert sum(parts, HintCounts()) == whole
    assert pickle.loads(pickle.dumps(whole)) == whole  # noqa: S301


@pytest.mark.parametrize("name", ["solution_template", "hint_template", "feedback_template", "turn_template"])
def test_a_template_without_its_placeholder_is_refused(name):
    with pytest.raises(UserError) as error:
        TeacherContexts(TOKENIZER, replace(HINTS, **{name: "nothing {of} it"}))
    assert error.value.where == f"hints.{name}"


def test_no_source_is_refused():
    with pytest.raises(UserError, match="nothing to show"):
        TeacherContexts(TOKENIZER, replace(HINTS, source=[]))


@pytest.mark.parametrize(
    ("task", "info", "words"),
    [
        ({"solution": ["a"]}, {}, "'solution' is of type list"),
        ({"hint": True}, {}, "'hint' is of type bool"),
        ({}, {"hint": "x"}, "has the hint 'x'"),
        ({}, {"hint": {"turn": -1, "text": "x"}}, "has the hint"),
        ({}, {"hint": {"turn": True, "text": "x"}}, "has the hint"),
        ({}, {"hint": {"turn": 0}}, "has the hint"),
    ],
)
def test_what_cannot_be_shown_names_the_prompt(task, info, words):
    batch, texts = shard([[said("1")], [said("1", **info)]], tasks=[{}, task])
    with pytest.raises(UserError, match=words) as error:
        build(batch, texts, [0, 0], source=["reference", "hint", "turn"])
    assert error.value.where == "prompt '1@0'"


def test_shapes_that_disagree_are_told():
    batch, texts = shard([[said("1"), said("2")]])
    with pytest.raises(ValueError, match=r"2 rows came with .*'rewards': \(1,\)"):
        build(batch, texts, [0])
    with pytest.raises(ValueError, match=r"2 rows came with .*'texts': 1"):
        build(batch, texts[:1], [0, 0])
