"""Teacher contexts: what the teacher of the self-distillation channel sees before it scores a response.

The teacher is shown a solution, a hint or feedback with the problem and scores the student's own tokens
("Reinforcement Learning via Self-Distillation", 2026, arXiv 2601.20802; with a reference solution: arXiv 2601.18734).
Only the prompt is made of text. Tokens of responses are taken as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from sys import maxsize
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rlsys.batch import DataProto, jagged
from rlsys.batch.columns import check_columns
from rlsys.config.errors import UserError
from rlsys.config.schema import HintsConfig
from rlsys.data.base import Message, Row
from rlsys.data.prompts import PromptEncoder
from rlsys.replay.sections import Section, check_template, shortened, task_text, without_thinking
from rlsys.replay.siblings import solved_siblings
from rlsys.replay.turns import turn_hint, turns

_READS = ("uid", "task", "sample_index", "prompt_ids", "response_ids", "response_mask", "environment")
_SOLUTION, _HINT, _FEEDBACK = "{solution}", "{hint}", "{feedback}"


@dataclass(frozen=True)
class HintCounts:
    """rows: all; live: with a teacher; truncated: of those, with a text that lost its beginning; too_long: without a
    teacher because nothing of the text would have been left; sources: live rows by where a text comes from (a row with
    a solution and feedback counts for both)."""

    rows: int = 0
    live: int = 0
    truncated: int = 0
    too_long: int = 0
    sources: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: HintCounts) -> HintCounts:
        names = [*self.sources, *(name for name in other.sources if name not in self.sources)]
        return HintCounts(
            self.rows + other.rows,
            self.live + other.live,
            self.truncated + other.truncated,
            self.too_long + other.too_long,
            {name: self.sources.get(name, 0) + other.sources.get(name, 0) for name in names},
        )


@dataclass(frozen=True)
class _Context:
    """What one row's teacher gets. tokens: the whole prompt with these texts in the sections' places.
    start, stop: the response tokens that count, where they are sampled."""

    sections: list[Section]
    tokens: Callable[[Sequence[str]], list[int]]
    start: int
    stop: int


class TeacherContexts:
    """Builds the teacher's prompt of every sample.

    The prompt is the conversation, its last user message followed by the solution (or hint), the feedback and the
    instruction, through the chat template. What the sample itself answered is not in it. A hint of source ``turn``
    stands in the trajectory instead: behind the tokens before that turn, which alone is scored then.

    Args:
        tokenizer: of the policy.
        hints: sources, in order of preference, and templates.
        chat_template_path, system_prompt: as the policy's prompts have them (``PromptEncoder``).

    Raises:
        UserError: no source, or a template without its placeholder; or as ``PromptEncoder`` does.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        hints: HintsConfig,
        *,
        chat_template_path: str | None = None,
        system_prompt: str | None = None,
    ):
        if not hints.source:
            raise UserError(
                "there is nothing to show to a teacher", where="hints.source", fix="name one source at least"
            )
        for name, placeholder in (
            ("solution_template", _SOLUTION),
            ("hint_template", _HINT),
            ("feedback_template", _FEEDBACK),
            ("turn_template", _HINT),
        ):
            check_template(getattr(hints, name), placeholder, where=f"hints.{name}")
        self._tokenizer, self._hints = tokenizer, hints
        self._encoder = PromptEncoder(
            tokenizer,
            max_prompt_tokens=maxsize,  # what is too long is shortened here
            chat_template_path=chat_template_path,
            system_prompt=system_prompt,
        )

    def build(
        self, batch: DataProto, texts: Sequence[str], rewards: np.ndarray, feedback: Sequence[str | None]
    ) -> tuple[DataProto, HintCounts]:
        """The teacher columns of a shard of whole prompt groups.

        Args:
            batch: B rows with the columns of prompts and rollout; where it has no ``messages``, the text of the task is
                the one user message.
            texts: of the responses, without special tokens.
            rewards: [B]
            feedback: what is said about each response; None or blank: nothing.

        Returns:
            teacher_prompt_ids [B, j:teacher_prompt] int64, has_teacher [B] bool, teacher_mask [B, j:response] bool.

        Raises:
            ValueError: there is not one text, reward and feedback a row.
            UserError: a task's field or an environment's hint is not what it should be; with the prompt group.
        """
        check_columns(batch, _READS, "hints")
        count = len(batch)
        sizes = {"texts": len(texts), "rewards": tuple(rewards.shape), "feedback": len(feedback)}
        if rewards.shape != (count,) or len(texts) != count or len(feedback) != count:
            raise ValueError(f"a batch of {count} rows came with {sizes}")
        if not count:
            return _columns([], [], []), self._counts([], [], 0, 0)
        lengths = jagged.lengths(batch.batch["response_ids"])
        contexts = self._contexts(batch, texts, rewards, feedback)
        prompts: list[list[int]] = []
        shown: list[_Context] = []
        masks = []
        truncated = too_long = 0
        for context, sampled, length in zip(
            contexts, jagged.to_rows(batch.batch["response_mask"]), lengths.tolist(), strict=True
        ):
            mask = torch.zeros(length, dtype=torch.bool)
            masks.append(mask)
            prompts.append([])
            if context is None:
                continue
            tokens, cut = self._within(context)
            if tokens is None:
                too_long += 1
                continue
            truncated += cut
            prompts[-1] = tokens
            shown.append(context)
            mask[context.start : context.stop] = sampled[context.start : context.stop]
        return _columns(prompts, masks, lengths), self._counts(contexts, shown, truncated, too_long)

    def _contexts(
        self, batch: DataProto, texts: Sequence[str], rewards: np.ndarray, feedback: Sequence[str | None]
    ) -> list[_Context | None]:
        """What is to be shown with each row; None: nothing is known, or nothing was sampled."""
        hints, objects = self._hints, batch.non_tensor_batch
        uids, tasks = objects["uid"], objects["task"]
        siblings: list[str | None] = [None] * len(batch)
        if "sibling" in hints.source:
            solutions = [without_thinking(text) if hints.strip_thinking else text for text in texts]
            order = batch.batch["sample_index"].tolist()
            siblings = solved_siblings(uids.tolist(), order, solutions, rewards >= hints.threshold)
        tokens = (jagged.to_rows(batch.batch[name]) for name in ("prompt_ids", "response_ids", "response_mask"))
        contexts: list[_Context | None] = []
        for row, (prompt, response, mask) in enumerate(zip(*tokens, strict=True)):
            where, spans = f"prompt '{uids[row]}'", turns(mask)
            solution, turn = self._solution(siblings[row], tasks[row], objects["environment"][row], len(spans), where)
            if turn is not None and solution is not None:
                contexts.append(self._turn_context(solution, prompt, response, *spans[turn]))
                continue
            sections = [] if solution is None else [solution]
            said = feedback[row]
            if "feedback" in hints.source and (not sections or hints.feedback_with_solution) and said and said.strip():
                sections.append(Section("feedback", hints.feedback_template, _FEEDBACK, said))
            if not sections or not spans:
                contexts.append(None)
                continue
            messages = objects["messages"][row] if "messages" in objects else _user_message(tasks[row], where)
            contexts.append(self._prompt_context(sections, messages, response[: spans[0][0]].tolist(), where))
        return contexts

    def _solution(
        self, sibling: str | None, task: dict[str, Any], played: dict[str, Any], count: int, where: str
    ) -> tuple[Section | None, int | None]:
        """The first source's solution or hint, and the turn (of ``count``) that it is for; None: the whole response."""
        hints = self._hints
        for source in hints.source:
            if source == "sibling" and sibling is not None:
                return Section(source, hints.solution_template, _SOLUTION, sibling), None
            if source == "reference" and (text := task_text(task, hints.reference_key, where=where)) is not None:
                return Section(source, hints.solution_template, _SOLUTION, text), None
            if source == "hint" and (text := task_text(task, hints.hint_key, where=where)) is not None:
                return Section(source, hints.hint_template, _HINT, text), None
            if source == "turn" and (hint := turn_hint(played, count, where)) is not None:
                return Section(source, hints.turn_template, _HINT, hint.text), hint.turn
        return None, None

    def _prompt_context(
        self, sections: list[Section], messages: Sequence[Message], given: list[int], where: str
    ) -> _Context:
        """given: response tokens before the first sampled one, which the teacher sees as the policy did."""
        asked = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
        if asked is None:
            raise UserError("the conversation has no user message to show a hint with", where=where, fix="add one")

        def tokens(texts: Sequence[str]) -> list[int]:
            shown = "".join(section.render(text) for section, text in zip(sections, texts, strict=True))
            content = messages[asked]["content"] + shown + self._hints.instruction
            told = [*messages[:asked], {**messages[asked], "content": content}, *messages[asked + 1 :]]
            return (self._encoder.encode(Row("", told, {}, where)) or []) + given

        return _Context(sections, tokens, len(given), maxsize)

    def _turn_context(
        self, hint: Section, prompt: torch.Tensor, response: torch.Tensor, start: int, stop: int
    ) -> _Context:
        before = [*prompt.tolist(), *response[:start].tolist()]

        def tokens(texts: Sequence[str]) -> list[int]:
            words = hint.render(texts[0])
            return before + self._tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]

        return _Context([hint], tokens, start, stop)

    def _within(self, context: _Context) -> tuple[list[int] | None, bool]:
        """The prompt within the limit (None: not even with next to nothing shown), and whether that took a cut."""
        texts = [section.text for section in context.sections]
        limit = self._hints.max_tokens
        if len(tokens := context.tokens(texts)) <= limit:
            return tokens, False
        kept = shortened(texts, lambda some: len(context.tokens(some)) <= limit)
        return (None, False) if kept is None else (context.tokens(kept), True)

    def _counts(
        self, rows: Sequence[_Context | None], shown: Sequence[_Context], truncated: int, too_long: int
    ) -> HintCounts:
        sources = dict.fromkeys(self._hints.source, 0)
        for context in shown:
            for section in context.sections:
                sources[section.source] += 1  # type: ignore[index]
        return HintCounts(len(rows), len(shown), truncated, too_long, {str(name): n for name, n in sources.items()})


def _columns(
    prompts: Sequence[list[int]], masks: Sequence[torch.Tensor], lengths: torch.Tensor | list[int]
) -> DataProto:
    prompt_ids = jagged.from_rows([torch.tensor(ids, dtype=torch.int64) for ids in prompts], dtype=torch.int64)
    flat = torch.cat([torch.zeros(0, dtype=torch.bool), *masks])
    return DataProto.from_dict(
        {
            "teacher_prompt_ids": prompt_ids,
            "has_teacher": jagged.lengths(prompt_ids) > 0,
            "teacher_mask": jagged.from_values(flat, torch.as_tensor(lengths, dtype=torch.int64)),
        }
    )


def _user_message(task: dict[str, Any], where: str) -> list[Message]:
    text = task.get("prompt")
    if not isinstance(text, str):
        raise UserError(
            "the task has no text of its prompt, and the batch no messages",
            where=where,
            fix="give the task a field 'prompt'",
        )
    return [{"role": "user", "content": text}]
