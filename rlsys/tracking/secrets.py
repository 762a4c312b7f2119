"""Keeps secrets out of what a run records about itself."""

from __future__ import annotations

import re
from typing import Any

MASK = "***"
_NAMES = re.compile(r"(^|[_\-.])(token|secret|password|passwd|api_?key|access_?key|private_?key|credentials?)$", re.I)
_VALUES = re.compile(
    r"hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_\-]{16,}|gh[oprsu]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|AKIA[0-9A-Z]{16}"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"  # user:password in a URL
)


def mask(value: Any, name: str = "") -> Any:
    """``value`` (nested mappings and lists) with secrets replaced by ``***``: texts under a key that is named like one
    (``hf_token``, ``api_key``; not ``max_prompt_tokens``) and texts that look like one wherever they stand."""
    if isinstance(value, dict):
        return {key: mask(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [mask(inner, name) for inner in value]
    if not isinstance(value, str) or not value:
        return value
    return MASK if _NAMES.search(name) else _VALUES.sub(MASK, value)


def mask_arguments(arguments: list[str]) -> list[str]:
    """Command-line arguments (``key=value``, ``--key value``) with secrets masked."""
    masked, name = [], ""
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if equals:
            masked.append(f"{key}={mask(text, key.lstrip('-+'))}")
        else:
            masked.append(mask(argument, name))
        name = argument.lstrip("-") if argument.startswith("-") and not equals else ""
    return masked
