"""Which tokens end a response: the same answer for every engine."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase


def end_token_ids(model_path: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every end-of-sequence id that the model folder names, sorted: chat models often have a second one in
    ``generation_config.json`` only. Nothing else of that file (top-p, penalties) is used anywhere."""
    named = [
        tokenizer.eos_token_id,
        getattr(AutoConfig.from_pretrained(model_path, trust_remote_code=False), "eos_token_id", None),
    ]
    if (Path(model_path) / "generation_config.json").is_file():
        named.append(GenerationConfig.from_pretrained(model_path).eos_token_id)
    ids: set[int] = set()
    for value in named:
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return tuple(sorted(ids))
