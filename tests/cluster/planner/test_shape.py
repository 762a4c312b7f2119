"""Sizes of models from their configuration, against the models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import make_model_folder
from transformers import AutoConfig, AutoModelForCausalLM

from rlsys.cluster.planner.shape import built_parameters, from_config, read_shape, shape_of
from rlsys.config.errors import UserError

SMALL: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": SMALL | {"model_type": "qwen3"},
    "qwen3, tied, with biases": SMALL | {"model_type": "qwen3", "tie_word_embeddings": True, "attention_bias": True},
    "qwen2": {k: v for k, v in SMALL.items() if k != "head_dim"} | {"model_type": "qwen2", "tie_word_embeddings": True},
    "llama": SMALL | {"model_type": "llama"},
    "llama with biases": SMALL | {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": SMALL | {"model_type": "mistral"},
    "qwen3_moe": SMALL
    | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    | {"decoder_sparse_step": 2, "mlp_only_layers": []},
    "phi3, which is built": {k: v for k, v in SMALL.items() if k != "head_dim"}
    | {"model_type": "phi3", "pad_token_id": 0},
}


@pytest.mark.parametrize("said", FAMILIES.values(), ids=FAMILIES)
def test_parameters_are_those_of_the_model(said: dict[str, Any]) -> None:
    fields = {key: value for key, value in said.items() if key != "model_type"}
    config = AutoConfig.for_model(said["model_type"], **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = from_config(said, name="x")
    assert shape.parameters == built_parameters(config) == sum(p.numel() for p in model.parameters())
    head = said.get("head_dim", 16)
    assert shape.sizes.cached == 2 * said["num_hidden_layers"] * said["num_key_value_heads"] * head
    assert shape.root + shape.layer * shape.layers <= shape.parameters
    assert (shape.active < shape.parameters) if shape.experts else (shape.active <= shape.parameters)


def test_the_sizes_that_the_field_gives_its_models() -> None:
    qwen = {
        "model_type": "qwen3", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "tie_word_embeddings": True,
    }  # fmt: skip
    shape = from_config(qwen, name="1.7B")
    assert shape.parameters == 1_720_574_976  # as its safetensors headers say, tied weights once
    assert shape.sizes.cached * 2 == 28 * 2 * 8 * 128 * 2  # bytes a token in bfloat16


def test_what_a_layer_keeps_is_what_autograd_saves(tmp_path: Path) -> None:
    """Within a tenth: small tensors, such as each norm's scale of a token, are left out."""
    from torch.autograd.graph import saved_tensors_hooks

    from rlsys.config.schema import ModelConfig
    from rlsys.engines.train.attention import Packing
    from rlsys.engines.train.model import load_causal_lm

    folder = make_model_folder(tmp_path, hidden=128, layers=3)
    shape = read_shape(folder)
    lm = load_causal_lm(ModelConfig(path=str(folder)), torch.float32, packing=True, longest=64)
    weights = {parameter.untyped_storage().data_ptr() for parameter in lm.parameters()}
    saved: dict[int, int] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)  # memory that is not given back is not another's
        return tensor

    lengths = tuple(64 - i % 3 for i in range(6))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        lm.base_model(torch.zeros_like(positions), position_ids=positions, packing=Packing(lengths, positions))
    said = shape.saved_bytes(4, gpu=False) * shape.layers * sum(lengths)
    assert sum(saved.values()) == pytest.approx(said, rel=0.1)


def test_a_bundled_model_and_a_folder_are_found(tmp_path: Path) -> None:
    assert shape_of("bundled:arithmetic").layers == 4
    folder = make_model_folder(tmp_path / "mine")
    assert shape_of(str(folder)) == read_shape(folder / "config.json")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not JSON"),
        ("[]", "model_type"),
        ('{"hidden_size": 8}', "model_type"),
        ('{"model_type": "no_such"}', "no language model"),
        ('{"model_type": "vit"}', "no language model"),
        (json.dumps(SMALL | {"model_type": "qwen3", "num_hidden_layers": 0}), "not positive"),
    ],
)
def test_a_shape_that_cannot_be_used_is_named(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        read_shape(path)


def test_a_model_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="--shape FILE"):
        shape_of("nobody/has-this-model")
    with pytest.raises(UserError, match="no checkpoint called"):
        shape_of("bundled:none")
    with pytest.raises(UserError, match="cannot read"):
        read_shape(Path("/no/such/config.json"))
