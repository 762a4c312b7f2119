"""From messages to prompt tokens: tokenizers and chat templates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlsys.config.errors import UserError
from rlsys.data.base import Message, Row

# At least one of these makes a folder a tokenizer's; without them transformers makes up an empty one for some models.
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken", "tekken.json")


def load_tokenizer(path: str, *, where: str = "model.path") -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Code that comes with the folder is not run.

    Args:
        where: the config key that names it, for the error message.

    Raises:
        UserError: there is no such folder, or no tokenizer in it that this version of transformers knows.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(
            "there is no such model folder", where=f"{where}={folder}", fix="give a Hugging Face model folder"
        )
    if not any(match for name in _VOCABULARIES for match in folder.glob(name)):
        raise UserError(
            "the model folder has no tokenizer (tokenizer.json, tokenizer.model or vocab.json)",
            where=f"{where}={folder}",
            fix="copy the tokenizer's files of the model that it was trained from into the folder",
        )
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise UserError(
            f"the tokenizer cannot be loaded: {(str(error).strip() or type(error).__name__).splitlines()[0]}",
            where=f"{where}={folder}",
            fix="check the tokenizer's files; code that comes with a model is not run",
        ) from error


class PromptEncoder:
    """Chat-templated prompts, ready to be continued by the model.

    A tokenizer without a chat template (a base model's) takes a single user message as plain text, with the special
    tokens that it puts before any text.

    Args:
        chat_template_path: a Jinja file in place of the tokenizer's own template.
        system_prompt: put before every conversation that does not begin with a system message.
        max_prompt_tokens: longest prompt.
        long_prompts: what happens to a longer one: ``error``, or ``drop``.

    Raises:
        UserError: the template cannot be read or is no Jinja, or there is none and a system prompt needs one.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_prompt_tokens: int,
        chat_template_path: str | None = None,
        system_prompt: str | None = None,
        long_prompts: Literal["error", "drop"] = "error",
    ):
        self._tokenizer = tokenizer
        self._max_tokens, self._drop = max_prompt_tokens, long_prompts == "drop"
        self.dropped = 0  # prompts that were too long, over all epochs
        self._system = None if system_prompt is None else {"role": "system", "content": system_prompt}
        self._template_source = chat_template_path or "the tokenizer's chat template"
        self._template = _read_template(chat_template_path) if chat_template_path else None
        self._templated = self._template is not None or tokenizer.chat_template is not None
        if self._templated:
            self._render(self._complete([{"role": "user", "content": "Hello"}]), where=self._template_source)
        elif self._system is not None:
            raise _no_template("a system prompt was given (data.system_prompt)", where="data.system_prompt")

    def encode(self, row: Row) -> list[int] | None:
        """Prompt tokens; None: the prompt is too long, and such prompts are dropped.

        Raises:
            UserError: the prompt is too long, or the template or the tokenizer makes nothing of it.
        """
        return self.encode_many([row])[0]

    def encode_many(self, rows: Sequence[Row]) -> list[list[int] | None]:
        """:meth:`encode` of several rows, with one call of the tokenizer."""
        if not rows:
            return []
        texts = [self._text(row) for row in rows]
        # A template writes the special tokens itself.
        ids = self._tokenizer(texts, add_special_tokens=not self._templated, verbose=False)["input_ids"]
        return [self._checked(row, tokens) for row, tokens in zip(rows, ids, strict=True)]

    def _checked(self, row: Row, tokens: list[int]) -> list[int] | None:
        if not tokens:
            raise UserError("the prompt has no tokens", where=row.where, fix="check the chat template and the row")
        if len(tokens) <= self._max_tokens:
            return tokens
        if self._drop:
            self.dropped += 1
            return None
        raise UserError(
            f"the prompt has {len(tokens)} tokens, and data.max_prompt_tokens allows {self._max_tokens}",
            where=row.where,
            fix=f"set data.max_prompt_tokens={len(tokens)} or more, or data.long_prompts=drop",
        )

    def _text(self, row: Row) -> str:
        messages = self._complete(row.messages)
        if self._templated:
            return self._render(messages, where=row.where)
        if len(messages) != 1 or messages[0]["role"] != "user":
            raise _no_template("the row is a conversation, not a single user message", where=row.where)
        return messages[0]["content"]

    def _complete(self, messages: list[Message]) -> list[Message]:
        if self._system is None or messages[0]["role"] == "system":
            return messages
        return [self._system, *messages]

    def _render(self, messages: list[Message], *, where: str) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                messages, chat_template=self._template, add_generation_prompt=True, tokenize=False
            )
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"the chat template does not take the messages: {error}",
                where=where,
                fix=f"change the row, data.system_prompt or model.chat_template ({self._template_source})",
            ) from error


def _read_template(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"the chat template cannot be read: {error}", where=path, fix="set model.chat_template to a Jinja file"
        ) from error


def _no_template(what: str, *, where: str) -> UserError:
    return UserError(
        f"{what}, and the tokenizer has no chat template",
        where=where,
        fix="set model.chat_template to a Jinja file, or use a model that has one",
    )
