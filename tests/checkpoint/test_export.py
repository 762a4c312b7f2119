"""An exported folder is a model that transformers loads, with the same logits."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config, Qwen3Config

from rlsys.checkpoint.export import export_hf
from rlsys.config.errors import UserError

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def model_folder(folder: Path, config_class: type = Qwen3Config, tied: bool = True) -> torch.nn.Module:
    """A tiny random model saved by transformers, with a tokenizer beside it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**SIZES, tie_word_embeddings=tied)).eval()
    model.save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="b").save_pretrained(folder)
    return model


def weights_of(model: torch.nn.Module):
    """As the trainer yields them: each weight once, tied ones included only once."""
    return ((name, parameter) for name, parameter in model.named_parameters())


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(10)[None]).logits


@pytest.mark.parametrize("config_class", [Qwen2Config, Qwen3Config, LlamaConfig])
@pytest.mark.parametrize("tied", [True, False])
def test_loads_with_the_same_logits(tmp_path: Path, config_class: type, tied: bool):
    source = tmp_path / "source"
    model = model_folder(source, config_class, tied)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    folder = export_hf(tmp_path / "hf", source, weights_of(model), torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.float32
    assert torch.equal(logits(loaded), logits(model))
    assert AutoTokenizer.from_pretrained(folder).eos_token == "b"
    assert (folder / "generation_config.json").is_file()


def test_several_shards_hold_every_weight_once(tmp_path: Path):
    model = model_folder(tmp_path / "source")
    folder = export_hf(tmp_path / "hf", tmp_path / "source", weights_of(model), torch.float32, shard_bytes=8_000)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {name for name, _ in weights_of(model)}
    assert set(index["weight_map"].values()) == set(shards)
    assert index["metadata"]["total_size"] == sum(parameter.nbytes for parameter in model.parameters())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(model))


def test_dtype_is_of_the_files_and_of_the_config(tmp_path: Path):
    model = model_folder(tmp_path / "source")
    folder = export_hf(tmp_path / "hf", tmp_path / "source", weights_of(model), torch.bfloat16)
    assert AutoConfig.from_pretrained(folder).dtype == torch.bfloat16
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    written = dict(loaded.named_parameters())
    assert all(torch.equal(written[name], weight.bfloat16()) for name, weight in weights_of(model))


def test_config_states_no_quantisation_and_names_a_class(tmp_path: Path):
    model = model_folder(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"bits": 4}, "torch_dtype": "float16"}
    del config["architectures"]
    path.write_text(json.dumps(config))
    folder = export_hf(tmp_path / "hf", tmp_path / "source", weights_of(model), torch.float32)
    written = json.loads((folder / "config.json").read_text())
    assert written["architectures"] == ["Qwen3ForCausalLM"]
    assert written["dtype"] == "float32"
    assert not {"quantization_config", "torch_dtype"} & set(written)


def test_a_failed_export_leaves_the_old_one(tmp_path: Path):
    model = model_folder(tmp_path / "source")
    folder = export_hf(tmp_path / "hf", tmp_path / "source", weights_of(model), torch.float32)
    before = logits(AutoModelForCausalLM.from_pretrained(folder))

    def breaks_off():
        yield next(iter(weights_of(model)))
        raise RuntimeError("a rank died")

    with pytest.raises(RuntimeError):
        export_hf(folder, tmp_path / "source", breaks_off(), torch.float32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "source"]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), before)


def test_bad_sources_are_named(tmp_path: Path):
    with pytest.raises(UserError, match="config cannot be read"):
        export_hf(tmp_path / "hf", tmp_path, [], torch.float32)
    model_folder(tmp_path / "source")
    with pytest.raises(UserError, match="no weights"):
        export_hf(tmp_path / "hf", tmp_path / "source", [], torch.float32)
