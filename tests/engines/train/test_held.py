"""Weights that stay in their file: what is trained is the same, and a rank's own memory does not hold the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_folders import make_model, make_model_folder
from safetensors.torch import load_file, save_file
from training_batches import process_group, random_batch

from rlsys.algorithms.channels import PolicyGradient
from rlsys.algorithms.objective import Objective
from rlsys.config.schema import DistillationConfig, ModelConfig, TrainerConfig
from rlsys.engines.train import load_engine
from rlsys.engines.train.held import file_dtype, hold
from rlsys.engines.train.model import load_causal_lm

POLICY = Objective({"policy": (PolicyGradient(kl_coef=0.1), 1.0)})


def cast_folder(folder: Path, dtype: torch.dtype, *, tied: bool = False) -> Path:
    make_model_folder(folder, "qwen3", tied=tied)
    path = folder / "model.safetensors"
    save_file({k: v.to(dtype) for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    return folder


def exported(backend: str, folder: Path, dtype: str) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Float32 weights as loaded, and after two optimiser steps with an averaged teacher beside; its metrics."""
    with process_group():
        engine = load_engine(
            ModelConfig(path=str(folder), dtype=dtype),
            TrainerConfig(lr=1e-2, backend=backend),
            temperature=1.0,
            total_steps=4,
            seed=0,
            distillation=DistillationConfig(weight=0.1, teacher="ema", teacher_rate=0.5),
        )
        weights = {f"start/{name}": w.clone() for name, w in engine.export_weights(torch.float32)}
        metrics = engine.forward_backward(random_batch(0), POLICY)
        engine.optim_step()
        weights |= {name: w.clone() for name, w in engine.export_weights(torch.float32)}
        return weights, metrics


@pytest.mark.parametrize("backend", ["fsdp", "zero3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_file_of_half_precision_trains_as_its_float32_copy_does(tmp_path: Path, backend: str, dtype: str) -> None:
    """The copy holds the same values, and is read without a cast."""
    half = cast_folder(tmp_path / "half", torch.bfloat16, tied=backend == "zero3")
    whole = tmp_path / "whole"
    cast_folder(whole, torch.float32, tied=backend == "zero3")
    values = {k: v.float() for k, v in load_file(half / "model.safetensors").items()}
    save_file(values, whole / "model.safetensors", metadata={"format": "pt"})
    ours, seen = exported(backend, half, dtype)
    theirs, expected = exported(backend, whole, dtype)
    assert seen == expected
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name
        assert ours[name].dtype == torch.float32


def test_the_dtype_of_a_file_is_that_of_all_its_tensors(tmp_path: Path) -> None:
    assert file_dtype(cast_folder(tmp_path / "half", torch.bfloat16)) is torch.bfloat16
    mixed = load_file(tmp_path / "half" / "model.safetensors")
    mixed["model.norm.weight"] = mixed["model.norm.weight"].float()
    save_file(mixed, tmp_path / "half" / "model.safetensors", metadata={"format": "pt"})
    assert file_dtype(tmp_path / "half") is None
    assert file_dtype(tmp_path / "nowhere") is None
    lm = load_causal_lm(ModelConfig(path=str(tmp_path / "half")), torch.float32, mapped=True)
    assert {p.dtype for p in lm.parameters()} == {torch.float32}, "a mixed file is cast at once: none is rounded"


def test_a_mapped_model_lies_in_its_file_until_it_is_held(tmp_path: Path) -> None:
    folder = cast_folder(tmp_path, torch.bfloat16)
    lm = load_causal_lm(ModelConfig(path=str(folder)), torch.float32, mapped=True)
    assert {p.dtype for p in lm.parameters()} == {torch.bfloat16}
    assert all(lies_in(p, folder / "model.safetensors") for p in lm.parameters())
    hold(lm.parameters())
    assert {p.dtype for p in lm.parameters()} == {torch.float32}
    assert not any(lies_in(p, folder / "model.safetensors") for p in lm.parameters())


def lies_in(tensor: torch.Tensor, path: Path) -> bool:
    """Whether the tensor's memory is a mapping of that file."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        span, *_, name = line.split(maxsplit=5)
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= address < last:
            return name == str(path)
    return False


def test_ties_survive_the_cast() -> None:
    lm = make_model(tied=True).bfloat16()
    for parameter in lm.parameters():
        parameter.held = torch.float32
    hold(lm.parameters())
    assert lm.get_input_embeddings().weight is lm.get_output_embeddings().weight
