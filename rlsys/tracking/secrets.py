"""Keeps secrets out of what a run records about itself."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

MASK = "***"
_NAMES = re.compile(
    r"(^|[_\-.])(token|secret|password|passwd|pwd|api_?key|access_?key|secret_?key|private_?key|credentials?)$", re.I
)
_VALUES = re.compile(
    r"hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_\-]{16,}|gh[oprsu]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|AKIA[0-9A-Z]{16}"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"  # user:password in a URL
    r"|(?<=://)[A-Za-z0-9_\-.]{16,}(?=@)"  # a token in the place of a user
)
_QUERY = re.compile(
    r"([?&](?:[\w.-]*(?:token|signature|secret|password|api_?key|access_?key|credential)|sig)=)[^&#\s\"']+", re.I
)
_HEADER = re.compile(r"(\b(?:authorization: *)?(?:bearer|basic) +)[A-Za-z0-9+/=_\-.]{8,}", re.I)
_LEAST = 12  # characters: a shorter value of a variable is no secret worth the name, and appears by chance


def mask(value: Any, name: str = "") -> Any:
    """``value`` (nested mappings and lists) with secrets replaced by ``***``: texts under a key that is named like one
    (``hf_token``, ``api_key``; not ``max_prompt_tokens``) and texts that look like one wherever they stand."""
    if isinstance(value, dict):
        return {key: mask(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [mask(inner, name) for inner in value]
    if not isinstance(value, str) or not value:
        return value
    return MASK if _NAMES.search(name) else mask_text(value)


def mask_text(text: str) -> str:
    """``text`` without what looks like a secret in it: keys, credentials in URLs and headers, and what this process's
    environment has under a name of a secret (a job is given its tokens there)."""
    for known in _known(os.environ):
        text = text.replace(known, MASK)
    text = _VALUES.sub(MASK, text)
    return _HEADER.sub(rf"\1{MASK}", _QUERY.sub(rf"\1{MASK}", text))


def _known(environ: Mapping[str, str]) -> list[str]:
    """Longest first: one may be a part of another."""
    found = {value for name, value in environ.items() if _NAMES.search(name) and len(value) >= _LEAST}
    return sorted(found, key=len, reverse=True)


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
