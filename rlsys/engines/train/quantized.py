"""Frozen linear layers with rounded weights, for adapters to be trained on (QLoRA, arXiv 2305.14314).

``nf4``: 4 bits a weight, the nearest of 16 quantiles of a normal distribution, times the largest magnitude of its block
of 64 weights of a row. ``int8``: the nearest of 255 even steps of the row's largest magnitude. A layer has one tensor
of bytes, in each row first the codes and then the float32 scales: it is spread over ranks by rows or by elements like
any other weight, no scale is away from its codes, and no back end takes it for something to cast.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

Scheme = Literal["nf4", "int8"]
_BLOCK = 64
_SCALE = 4  # bytes of a float32
# QLoRA, appendix E.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class QuantizedLinear(nn.Module):
    """``linear`` with rounded weights and its own bias; neither is trained. Whole weights are made of them in every
    pass, forward and backward, and exist for one layer at a time.

    packed: [out_features, bytes of a row] uint8.
    """

    def __init__(self, linear: nn.Linear, scheme: Scheme):
        super().__init__()
        self.in_features, self.out_features, self.scheme = linear.in_features, linear.out_features, scheme
        self.packed = nn.Parameter(pack(linear.weight.detach(), scheme), requires_grad=False)
        self.bias = linear.bias

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        product = _Product.apply(states, self.packed, self.unpack)
        return product if self.bias is None else product + self.bias

    def unpack(self, packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[out_features, in_features] from this layer's bytes."""
        return unpack(packed, self.in_features, self.scheme, dtype)


class _Product(torch.autograd.Function):
    """states · Wᵀ; keeps the bytes and not W."""

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, packed: torch.Tensor, back: Callable[..., torch.Tensor]
    ) -> torch.Tensor:
        ctx.save_for_backward(packed)
        ctx.back, ctx.dtype = back, states.dtype
        return states @ back(packed, states.dtype).T

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        (packed,) = ctx.saved_tensors
        return (gradient @ ctx.back(packed, ctx.dtype) if ctx.needs_input_grad[0] else None), None, None


def quantize_layers(model: nn.Module, scheme: Scheme) -> None:
    """Replaces the linear layers of ``model``, those inside adapted layers included; adapters stay as they are."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and ".lora_" not in name:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, QuantizedLinear(module, scheme))


def pack(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """[out, bytes of a row] uint8 from a floating-point [out, in]."""
    exact = weight.float()
    if scheme == "int8":
        scales = exact.abs().amax(1, keepdim=True) / 127
        codes = (exact / _not_zero(scales)).round().to(torch.int8).view(torch.uint8)
        return torch.cat([codes, scales.view(torch.uint8)], dim=1)
    rows, columns = weight.shape
    blocks = F.pad(exact, (0, -columns % _BLOCK)).view(rows, -1, _BLOCK)
    scales = blocks.abs().amax(-1)
    levels = _levels(weight.device)
    midpoints = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(blocks / _not_zero(scales)[..., None], midpoints, out_int32=True).to(torch.uint8)
    codes = codes.view(rows, -1)
    return torch.cat([codes[:, ::2] << 4 | codes[:, 1::2], scales.view(torch.uint8)], dim=1)


def unpack(packed: torch.Tensor, columns: int, scheme: Scheme, dtype: torch.dtype) -> torch.Tensor:
    """[out, columns] of ``dtype`` from what :func:`pack` made; the products of codes and scales are float32."""
    width = columns if scheme == "int8" else -(-columns // _BLOCK) * _BLOCK // 2
    codes = packed[:, :width]
    scales = packed[:, width:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    if scheme == "int8":
        return (codes.view(torch.int8) * scales).to(dtype)
    pairs = torch.stack([codes >> 4, codes & 15], dim=-1).view(len(packed), -1, _BLOCK)
    return (_levels(packed.device)[pairs.int()] * scales[..., None]).view(len(packed), -1)[:, :columns].to(dtype)


def _not_zero(scales: torch.Tensor) -> torch.Tensor:
    return torch.where(scales == 0, torch.ones_like(scales), scales)


@lru_cache
def _levels(device: torch.device) -> torch.Tensor:
    return torch.tensor(_NF4, device=device)
