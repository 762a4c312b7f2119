"""What is done to each decoder layer before the weights are spread over the ranks: what becomes of its activations
until the backward pass, and whether it is compiled."""

from __future__ import annotations

import importlib.util
import shutil
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from rlsys.config.errors import UserError
from rlsys.config.schema import TrainerConfig
from rlsys.engines.train.attention import packs

_SMALL = 1 << 16  # elements; what is smaller stays where it is


def prepare_layers(lm: PreTrainedModel, trainer: TrainerConfig, device: torch.device) -> None:
    """Applies ``trainer.activations`` and ``trainer.compile``, and checks ``trainer.rows``. device: that it
    will be trained on.

    Raises:
        UserError: not possible there, or the model has no list of layers.
    """
    layers = getattr(lm.base_model, "layers", None)
    for key, wanted in (("activations", trainer.activations == "offload"), ("compile", trainer.compile)):
        if wanted and not isinstance(layers, nn.ModuleList):
            raise UserError(f"{type(lm).__name__} has no list of layers", where=f"trainer.{key}", fix="leave it out")
    if trainer.rows == "shared" and not packs(lm):
        raise UserError(
            f"prompts are shared in packed rows only, and {type(lm).__name__} cannot be packed",
            where="trainer.rows",
            fix="set trainer.rows=padded",
        )
    if trainer.activations == "offload" and device.type == "cpu":
        raise UserError(
            "activations of a model on the CPU are in main memory already",
            where="trainer.activations",
            fix="set trainer.activations=recompute to need less of it",
        )
    if trainer.activations == "recompute":
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        lm.train()  # transformers recomputes in training mode only; there is no dropout that it would switch on
    for layer in layers if isinstance(layers, nn.ModuleList) else ():
        if trainer.compile:
            _compile(layer, device)
        if trainer.activations == "offload":
            offload(layer)


def _compile(layer: nn.Module, device: torch.device) -> None:
    """The layer's forward, and not its hooks, with which weights are gathered."""
    needed = "triton" if device.type == "cuda" else "a C++ compiler (g++ or clang++)"
    there = (
        importlib.util.find_spec("triton") if device.type == "cuda" else shutil.which("g++") or shutil.which("clang++")
    )
    if there is None:
        raise UserError(f"layers cannot be compiled: {needed} is missing", where="trainer.compile", fix="leave it out")
    layer.forward = torch.compile(layer.forward, dynamic=True)


def offload(layer: nn.Module) -> None:
    """What the layer's forward pass keeps for its backward pass waits in pinned main memory. Not its weights: a back
    end that gathers them frees them in between."""
    forward = layer.forward

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        weights = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor | tuple[torch.device, torch.Tensor]:
            held = tensor.untyped_storage().data_ptr() in weights
            if held or tensor.numel() < _SMALL or tensor.device.type == "cpu":
                return tensor
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            host.copy_(tensor, non_blocking=True)  # the copy back comes later on the same stream
            return tensor.device, host

        def unpack(packed: torch.Tensor | tuple[torch.device, torch.Tensor]) -> torch.Tensor:
            return packed if isinstance(packed, torch.Tensor) else packed[1].to(packed[0], non_blocking=True)

        with saved_tensors_hooks(pack, unpack):
            return forward(*args, **kwargs)

    layer.forward = wrapped
