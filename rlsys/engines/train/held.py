"""Weights that stay in their file until a rank needs them.

A safetensors file is mapped into memory, and a model in its dtype is made of views of it: all ranks of a host
share its pages, which the system may drop at any time. Cast one layer after the other, right before it is spread over
the ranks, a model that fills the host once in its file's dtype does not fill it once more for each rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def file_dtype(folder: Path) -> torch.dtype | None:
    """The dtype that all tensors of a model's files have; None: they differ, have another, or there is no folder."""
    found = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            found |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    return _DTYPES.get(found.pop()) if len(found) == 1 else None


def promise(model: nn.Module, dtype: torch.dtype) -> None:
    """Notes that the weights are to be ``dtype`` once :func:`hold` was called with them."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.held = dtype


def hold(parameters: Iterable[nn.Parameter]) -> None:
    """Casts those weights of which it was noted, in place: ties between them stay."""
    for parameter in parameters:
        dtype = getattr(parameter, "held", None)
        if dtype is not None:
            parameter.data = parameter.data.to(dtype)
            del parameter.held
