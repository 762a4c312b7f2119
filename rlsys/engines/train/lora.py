"""Low-rank adapters (LoRA, arXiv 2106.09685), put into the model's linear layers by peft.

An adapted layer computes W·x + scale · B·(A·x), scale = alpha / rank. W and every other weight are frozen; A and B are
what is trained, what the optimiser knows and what a checkpoint holds. With the adapter off the model is the one that
training began with, bit for bit. Names are those of the plain model (``….q_proj.weight``), and beside them
``….q_proj.lora_A.weight`` [rank, in] and ``….q_proj.lora_B.weight`` [out, rank].
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from rlsys.config.errors import UserError
from rlsys.config.schema import LoraConfig, ModelConfig
from rlsys.engines.train.quantized import QuantizedLinear, quantize_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ADAPTER = "default"  # peft's name of the adapter
_A, _B = ".lora_A.weight", ".lora_B.weight"
_PEFT_PREFIX = "base_model.model."  # of names in peft's files

Whole = Callable[[str, torch.dtype], torch.Tensor]


@dataclass(frozen=True)
class Adapter:
    """What was put into a model. quantized: its rounded layers, by the plain name of their bytes (``….packed``)."""

    config: LoraConfig
    quantized: dict[str, QuantizedLinear]

    @property
    def scale(self) -> float:
        return self.config.alpha / self.config.rank


def plain_name(name: str) -> str:
    """A parameter's name without what adapted layers add to it."""
    return name.replace(".base_layer.", ".").replace(f".{_ADAPTER}.", ".")


def resolve_targets(model: ModelConfig) -> ModelConfig:
    """The model with the names of the layers that are adapted, without its weights being read.

    Raises:
        UserError: peft is not installed, a target is no linear layer of this model, or the rank is larger than one has.
    """
    if model.lora is None:
        return model
    _check_package()
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model.path), attn_implementation="eager")
    return replace(model, lora=replace(model.lora, targets=_targets(lm, model.lora)))


def add_adapter(lm: PreTrainedModel, config: LoraConfig, *, seed: int) -> Adapter:
    """Freezes ``lm``, puts an adapter into it and rounds its linear layers if ``config`` says so.

    A starts uniform as in peft and B at 0, so that the model is as it was; every rank draws the same A from ``seed``.
    The adapter is float32 with values that the weights' dtype has.

    Raises:
        UserError: see :func:`resolve_targets`.
    """
    _check_package()
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    lm.requires_grad_(False)
    settings: dict[str, Any] = {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": 0.0}
    inject_adapter_in_model(PeftConfig(target_modules=_targets(lm, config), **settings), lm)
    generator = torch.Generator().manual_seed(seed)
    for layer in _adapted(lm):
        a, b = (getattr(layer, part)[_ADAPTER].weight for part in ("lora_A", "lora_B"))
        bound = 1 / math.sqrt(a.shape[1])
        drawn = torch.empty(a.shape).uniform_(-bound, bound, generator=generator)
        a.data, b.data = drawn.to(a.dtype).float(), torch.zeros(b.shape)
    if config.quantize is not None:
        quantize_layers(lm.base_model, config.quantize)
    quantized = {
        f"{plain_name(f'{name}.')}packed": module
        for name, module in lm.named_modules()
        if isinstance(module, QuantizedLinear)
    }
    return Adapter(config, quantized)


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` is what it was before the adapter. Leaves ``requires_grad`` alone, which peft's own switch does
    not: sharded parameters must not change it."""
    layers = _adapted(model)
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(all, trained) weights, tied ones once, before they are spread over ranks."""
    packed = {id(m.packed): m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantizedLinear)}
    sizes = [(packed.get(id(p), p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def merged_weights(
    names: Sequence[str], whole: Whole, adapter: Adapter, dtype: torch.dtype, *, on: bool = True
) -> Iterator[tuple[str, torch.Tensor]]:
    """The plain model's weights, W + scale·B·A summed in float32 and then cast to ``dtype``.

    Args:
        names: of all parameters. whole: gathers one, in a dtype; a collective.
        on: False: without the adapter.
    """
    there = set(names)
    for name in names:
        if name.endswith((_A, _B)):
            continue
        layer = name.rpartition(".")[0]
        rounded = adapter.quantized.get(name)
        if rounded is not None:
            weight, name = rounded.unpack(whole(name, torch.uint8), torch.float32), f"{layer}.weight"
        if not (on and name == f"{layer}.weight" and layer + _A in there):
            yield name, weight.to(dtype) if rounded is not None else whole(name, dtype)
            continue
        if rounded is None:
            weight = whole(name, torch.float32)
        a, b = (whole(layer + part, torch.float32) for part in (_A, _B))
        yield name, torch.addmm(weight, b, a, alpha=adapter.scale).to(dtype)


def adapter_weights(
    names: Iterable[str], whole: Whole, adapter: Adapter, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """A and scale·B of every adapted layer, cast to ``dtype``; arguments as :func:`merged_weights`."""
    for name in names:
        if name.endswith(_A):
            yield name, whole(name, dtype)
        elif name.endswith(_B):
            yield name, (whole(name, torch.float32) * adapter.scale).to(dtype)


def save_adapter(
    folder: Path, weights: Iterable[tuple[str, torch.Tensor]], config: LoraConfig, base: str, dtype: torch.dtype
) -> None:
    """Writes A and scale·B as an adapter that peft and vLLM load (its own scale is 1).

    Args:
        folder: made if missing. base: the model that it belongs to. dtype: in the file.
    """
    tensors = {_PEFT_PREFIX + name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in weights}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    names = sorted({name.removesuffix(_A).rpartition(".")[2] for name in tensors if name.endswith(_A)})
    described = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": config.rank,
        "lora_alpha": config.rank, "target_modules": names, "lora_dropout": 0.0, "bias": "none",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def _adapted(model: nn.Module) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def _targets(lm: PreTrainedModel, config: LoraConfig) -> list[str]:
    """Last parts of the names of the linear layers that ``config`` means.

    Raises:
        UserError: a name is none of them, there are none, or the rank is larger than a layer has.
    """
    layers: dict[str, list[nn.Linear]] = {}
    for name, module in lm.base_model.named_modules():
        if isinstance(module, nn.Linear):
            layers.setdefault(name.rpartition(".")[2], []).append(module)
    if not layers:
        raise UserError(
            f"{type(lm).__name__} has no linear layers that an adapter could be put into",
            where="model.lora.targets",
            fix="leave model.lora out to train all weights",
        )
    names = sorted(layers) if config.targets == "all-linear" else list(config.targets)
    fix = f"some of: {', '.join(sorted(layers))}; or all-linear"
    if not names:
        raise UserError("no layer is named", where="model.lora.targets", fix=fix)
    for target in names:
        if target not in layers:
            raise UserError(_no_target(lm, target), where="model.lora.targets", fix=fix)
        smallest = min(min(layer.in_features, layer.out_features) for layer in layers[target])
        if config.rank > smallest:
            raise UserError(
                f"B·A of rank {config.rank} is more than '{target}' can have, which is {smallest} wide at its narrow "
                "side",
                where="model.lora.rank",
                fix=f"at most {smallest}; adapters are useful far below it (4 to 64)",
            )
    return names


def _no_target(lm: PreTrainedModel, target: str) -> str:
    """Why ``target`` is no layer to adapt."""
    kept = {"embedding": lm.get_input_embeddings(), "head": lm.get_output_embeddings()}
    for which, part in kept.items():
        if any(module is part and name.rpartition(".")[2] == target for name, module in lm.named_modules()):
            return (
                f"'{target}' is the model's {which}, which cannot have an adapter: log-probs are computed from the "
                "head's weight itself, a few rows at a time, and many models share it with the embedding"
            )
    return f"{type(lm).__name__} has no linear layer '{target}'"


def _check_package() -> None:
    if importlib.util.find_spec("peft") is None:
        raise UserError(
            "adapters are put into the model by peft, which is not installed",
            where="model.lora.rank",
            fix="pip install rlsys[lora], or leave model.lora.rank out to train all weights",
        )
