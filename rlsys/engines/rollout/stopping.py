"""Which tokens end a response: the same answer for every engine."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase


def end_token_ids(model_path: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every end-of-sequence id that the model folder names, sorted: chat models often have a second one in
    ``generation_config.json`` only. Nothing else of that file (top-p, penalties) is used anywhere. An id that the model
    has no word for cannot be sampled, and vLLM refuses it: it is left out."""
    config = AutoConfig.from_pretrained(model_path, trust_remote_code=False)
    named = [tokenizer.eos_token_id, getattr(config, "eos_token_id", None)]
    if (Path(model_path) / "generation_config.json").is_file():
        named.append(GenerationConfig.from_pretrained(model_path).eos_token_id)
    ids: set[int] = set()
    for value in named:
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    words = config.get_text_config().vocab_size
    return tuple(sorted(number for number in ids if number < words))
