"""hints.*: what a teacher is shown, written by the real tokenizer; and what the reward worker writes of it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from replay_shards import TOKENIZER, given_span, said, sampled, shard

from knobs.table import Bench, entry
from rlsys.batch import DataProto, jagged
from rlsys.config.schema import HintsConfig, RunConfig
from rlsys.environments.base import Trajectory
from rlsys.replay.hints import TeacherContexts
from rlsys.workers.groups import RewardGroup
from rlsys.workers.reward import RewardWorker

HINTS = HintsConfig(instruction="")
TASK = {"solution": "0", "other": "9", "hint": "carry", "tip": "add"}


def shown(hints: HintsConfig, rewards: tuple[float, float] = (0.0, 1.0), **changes: Any) -> str:
    """What the teacher of a first, unsuccessful response sees behind the question; nothing: there is no teacher.

    Its sibling thought first, and the environment says that it was wrong.
    """
    batch, texts = shard([[said("7"), said("<think>0+0</think>4")]], tasks=[TASK])
    contexts = TeacherContexts(TOKENIZER, replace(hints, **changes))
    made, _ = contexts.build(batch, texts, np.array(rewards, dtype=np.float32), ["wrong", None])
    prompt = TOKENIZER.decode(jagged.to_rows(made.batch["teacher_prompt_ids"])[0])
    return prompt.removeprefix("<|user|>0+0=").removesuffix("<|assistant|>")


SIBLING, REFERENCE, HINT, FEEDBACK = (
    replace(HINTS, source=[source]) for source in ("sibling", "reference", "hint", "feedback")
)


@entry("hints.threshold", "hints.strip_thinking", "hints.feedback_with_solution")
def siblings(bench: Bench) -> None:
    both = replace(HINTS, source=["sibling", "feedback"])
    assert shown(SIBLING).endswith("solution:\n\n4")
    assert shown(SIBLING, strip_thinking=False).endswith("<think>0+0</think>4")
    assert shown(SIBLING, rewards=(0.0, 0.5)) == ""
    assert shown(SIBLING, rewards=(0.0, 0.5), threshold=0.5).endswith("4")
    assert "wrong" not in shown(both)
    assert shown(both, feedback_with_solution=True).endswith("wrong")


@entry("hints.reference_key", "hints.hint_key")
def fields(bench: Bench) -> None:
    assert [shown(REFERENCE)[-1], shown(REFERENCE, reference_key="other")[-1]] == ["0", "9"]
    assert shown(HINT).endswith("carry")
    assert shown(HINT, hint_key="tip").endswith("add")


@entry("hints.solution_template", "hints.hint_template", "hints.feedback_template", "hints.instruction")
def templates(bench: Bench) -> None:
    assert shown(SIBLING, solution_template=" see {solution}") == " see 4"
    assert shown(REFERENCE, solution_template=" see {solution}") == " see 0"
    assert shown(HINT, hint_template=" see {hint}") == " see carry"
    assert shown(FEEDBACK, feedback_template=" see {feedback}") == " see wrong"
    assert shown(SIBLING, solution_template=" {solution}", instruction=" again") == " 4 again"


@entry("hints.max_tokens")
def max_tokens(bench: Bench) -> None:
    hints = replace(FEEDBACK, feedback_template=" {feedback}")
    whole = "<|user|>0+0= wrong<|assistant|>"
    length = len(TOKENIZER(whole, add_special_tokens=False)["input_ids"])
    assert shown(hints, max_tokens=length) == " wrong"
    cut = shown(hints, max_tokens=length - 2).strip()
    assert 0 < len(cut) < len("wrong")
    assert "wrong".endswith(cut), "the beginning is left out"


@entry("hints.turn_template")
def turn_template(bench: Bench) -> None:
    played = Trajectory(
        [sampled("3"), given_span("+1="), sampled("4", end=True)], "stop", info={"hint": {"turn": 1, "text": "add"}}
    )
    batch, texts = shard([[played]])

    def context(template: str) -> str:
        hints = replace(HINTS, source=["turn"], turn_template=template)
        made, _ = TeacherContexts(TOKENIZER, hints).build(batch, texts, np.zeros(1, dtype=np.float32), [None])
        return str(TOKENIZER.decode(jagged.to_rows(made.batch["teacher_prompt_ids"])[0]))

    assert context("[{hint}]").endswith("3+1=[add]")
    assert context(" {hint}:").endswith("3+1= add:")


def written(config: RunConfig, batch: DataProto) -> DataProto:
    """The columns of a real reward worker that the run started."""
    started: list[tuple[Any, ...]] = []
    group = RewardGroup.__new__(RewardGroup)
    call = lambda _, *arguments, **__: started.append(arguments)  # noqa: E731
    group._actors = [SimpleNamespace(call=call)]  # type: ignore[list-item]
    group.starting(config)
    worker = RewardWorker()
    worker.start(*started[0])
    columns, _ = worker.score([0], len(batch), True, batch)
    worker.close()
    return columns


@entry("hints.source")
def source(bench: Bench) -> None:
    """Also that the worker is told about teachers and functional tokens, and only where something reads them."""
    assert [shown(hints).split()[-1] for hints in (SIBLING, REFERENCE, HINT, FEEDBACK)] == [
        "4",
        "0",
        "carry",
        "wrong",
    ]
    batch, _ = shard([[said("a1"), said("2")]], tasks=[TASK])
    taught = bench.inputs(
        "algorithm.distillation.weight=0.5",
        "hints.source=[hint]",
        "hints.max_tokens=64",
        r"algorithm.functional_tokens=\d",
    )
    columns = written(taught.config, batch)
    assert columns.batch["has_teacher"].tolist() == [True, True]
    assert jagged.values(columns.batch["functional_mask"]).tolist() == [False, True, False, True, False]
    plain = written(bench.inputs().config, batch).batch
    assert not {"has_teacher", "functional_mask"} & set(plain.keys())
