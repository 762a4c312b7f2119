"""Weights as a Hugging Face folder that ``transformers`` and vLLM load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from rlsys.checkpoint.atomic import PARTIAL, fsync, move_into_place, write_json, writing
from rlsys.config.errors import UserError

# What a model folder holds besides weights and config: tokenizer, templates, the model's own code, its licence.
_COPIED = (
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*preprocessor_config.json",
    "*.py",
    "LICENSE*",
    "NOTICE*",
)


def export_hf(
    folder: Path,
    config_source: Path,
    weights: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
    shard_bytes: int = 4 << 30,
) -> Path:
    """Writes ``folder``, beside and renamed (replacing an older export of that name).

    Args:
        folder: to be made.
        config_source: the Hugging Face folder that the model came from: its config, generation config and tokenizer
            are taken over.
        weights: every weight once, by Hugging Face name; consumed in order, at most ``shard_bytes`` held at once.
        dtype: of floating-point weights in the files, and in the config.
        shard_bytes: weights above this size are split into several files with an index.

    Returns:
        ``folder``.

    Raises:
        UserError: no weights, no readable config at the source, disk full, or not writable.
    """
    config = _config(config_source, dtype)
    partial = folder.with_name(PARTIAL + folder.name)
    with writing(f"the model folder {folder.name}", folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        try:
            _write_weights(partial, weights, dtype, shard_bytes)
            write_json(partial / "config.json", config)
            for pattern in _COPIED:
                for path in config_source.glob(pattern):
                    shutil.copyfile(path, partial / path.name)
            for path in partial.iterdir():
                fsync(path)
            move_into_place(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _config(source: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The source's config with the dtype of the weights written, a class to load them with, and no quantisation."""
    path = source / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"the model's config cannot be read: {error}",
            where=str(path),
            fix="give the folder of a Hugging Face model",
        ) from error
    for stale in ("torch_dtype", "quantization_config", "_name_or_path"):
        config.pop(stale, None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    if not config.get("architectures"):
        config["architectures"] = [_causal_lm_class(config.get("model_type"), path)]
    return config


def _causal_lm_class(model_type: str | None, path: Path) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if name is None:
        raise UserError(
            f"the config names no architecture, and model_type '{model_type}' is no known language model",
            where=str(path),
            fix='add "architectures": ["CLASS"] to it',
        )
    return name


def _write_weights(
    folder: Path, weights: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype, shard_bytes: int
) -> None:
    """One ``model.safetensors``, or ``model-00001-of-0000N.safetensors`` and their index."""
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    size = total = 0
    for name, tensor in weights:
        tensor = _for_disk(tensor, dtype)
        if pending and size + tensor.nbytes > shard_bytes:
            shards.append(_save(pending, folder, len(shards)))
            pending, size = {}, 0
        pending[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    if not pending:
        raise UserError("there are no weights to export", where=str(folder), fix="export from a loaded model")
    shards.append(_save(pending, folder, len(shards)))
    if len(shards) == 1:
        _shard_path(folder, 0).rename(folder / "model.safetensors")
        return
    weight_map = {}
    for index, names in enumerate(shards):
        final = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        _shard_path(folder, index).rename(folder / final)
        weight_map.update(dict.fromkeys(names, final))
    index_content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index_content)


def _for_disk(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """On the CPU, contiguous, floating point as ``dtype``."""
    target = dtype if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", target).contiguous()


def _shard_path(folder: Path, index: int) -> Path:
    return folder / f"shard-{index}.safetensors"  # renamed when the number of shards is known


def _save(tensors: dict[str, torch.Tensor], folder: Path, index: int) -> list[str]:
    try:
        save_file(tensors, _shard_path(folder, index), metadata={"format": "pt"})
    except SafetensorError as error:  # how the library reports a full disk
        raise OSError(str(error)) from error
    return list(tensors)
