"""Tiny random models with a tokenizer, written as Hugging Face folders: every family the loop is tested on."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

Family = Literal["qwen2", "qwen3", "llama"]
FAMILIES: dict[str, type[PretrainedConfig]] = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}
PAD, EOS = 0, 1
CHARACTERS = " 0123456789+-=abcdefghijklmnopqrstuvwxyz\n.,:?"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character: ``<pad>`` 0, ``<eos>`` 1, ``<unk>`` 2, then :data:`CHARACTERS`."""
    vocabulary = {"<pad>": PAD, "<eos>": EOS, "<unk>": 2}
    vocabulary |= {character: len(vocabulary) + i for i, character in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )


def make_model(
    family: Family = "qwen3",
    *,
    tied: bool = True,
    vocab_size: int = 72,
    hidden: int = 64,
    layers: int = 2,
    max_length: int = 128,
    scale: float = 0.2,
    seed: int = 0,
) -> torch.nn.Module:
    """A float32 model with every weight drawn from N(0, scale²), norms (around 1) and biases too, so that no two
    tensors of a shape are equal and log-probs are far from uniform."""
    config = FAMILIES[family](
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        # Qwen3's heads need not add up to the hidden size; vLLM's Qwen2 knows no other than hidden / heads.
        num_attention_heads=4 if family == "qwen3" else hidden // 32,
        num_key_value_heads=2 if family == "qwen3" else max(hidden // 64, 1),
        head_dim=32,
        max_position_embeddings=max_length,
        tie_word_embeddings=tied,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
        dtype="float32",
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, scale, generator=generator)
    return model.eval()


def make_model_folder(
    path: Path,
    family: Family = "qwen3",
    *,
    tied: bool = True,
    vocab_size: int = 72,
    hidden: int = 64,
    layers: int = 2,
    max_length: int = 128,
    scale: float = 0.2,
    seed: int = 0,
) -> Path:
    """Writes config, weights and tokenizer of a tiny random model into ``path`` (made if missing) and returns it.

    Args:
        path: the folder.
        family: the architecture.
        tied: the head shares the embedding's weights.
        vocab_size: at least the tokenizer's 48; 72 is not a multiple of 64, so that samplers have to pad it.
        hidden: width of the residual stream; the feed-forward layer has twice that.
        layers: number of blocks.
        max_length: positions that the model's config allows.
        scale: standard deviation of every weight.
        seed: of the weights.
    """
    sizes = {"vocab_size": vocab_size, "hidden": hidden, "layers": layers, "max_length": max_length}
    model = make_model(family, tied=tied, scale=scale, seed=seed, **sizes)
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return Path(path)
