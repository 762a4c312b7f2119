"""A model as the planner sees it: sizes, from its ``config.json`` alone. No weights are read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsys.cluster.memory import Sizes
from rlsys.config.assets import bundled_model
from rlsys.config.errors import UserError
from rlsys.engines.flops import EXPERTS, ModelFlops

_DENSE = ("llama", "mistral", "qwen2", "qwen3")
_MOE = ("qwen3_moe",)


@dataclass(frozen=True)
class ModelShape:
    """Of a decoder-only transformer.

    parameters: of all weights, tied ones once; active: of those that one token goes through.
    hidden, attention, keys, inner: widths of the residual stream, of all query heads, of all key heads, and of the
    feed-forward part (of experts: those that a token goes through). normed_heads: queries and keys are normalised.
    longest: tokens of a sequence; None: it does not say.
    """

    name: str
    parameters: int
    active: int
    layers: int
    hidden: int
    attention: int
    keys: int
    inner: int
    vocabulary: int
    tied: bool
    normed_heads: bool
    experts: int
    flops: ModelFlops
    longest: int | None = None

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.parameters, 2 * self.layers * self.keys, self.layers * self.hidden)

    @property
    def root(self) -> int:
        """Parameters outside the layers: embedding, head, last norm."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def layer(self) -> int:
        """Parameters of one layer, on average."""
        return (self.parameters - self.root) // self.layers

    def saved_bytes(self, element: int, *, gpu: bool) -> int:
        """Bytes a token that one layer keeps for its backward pass.

        Counted from what autograd saves of a Llama-like block: each norm its float32 input, the normalised one and what
        the next matrices read; of queries and keys that are normalised the same without the last; attention its inputs
        and output (on a CPU in float32, and joined once more); the feed-forward part two matrices' results, their
        activation and product.

        Args:
            element: bytes of one, in the dtype of the forward pass.
        """
        norm = 4 + element
        kept = 2 * (norm + element) * self.hidden
        if self.normed_heads:
            kept += norm * (self.attention + self.keys)
        inside = element if gpu else 4
        kept += inside * (2 * self.attention + 2 * self.keys)
        kept += (0 if gpu else 2 * element) * self.attention
        return kept + 4 * element * self.inner

    def adapter(self, rank: int) -> int:
        """Parameters of a low-rank adapter beside all linear layers."""
        attention = (self.hidden + self.attention) * 2 + (self.hidden + self.keys) * 2
        return self.layers * rank * (attention + 3 * (self.hidden + self.inner))


def shape_of(path: str, *, where: str = "model.path") -> ModelShape:
    """Of a folder, of ``bundled:NAME``, or of a hub id, of which ``config.json`` alone is fetched.

    Raises:
        UserError: there is none, or it is not one of a language model.
    """
    folder = Path(bundled_model(path, where=where)).expanduser()
    if folder.is_dir():
        return read_shape(folder / "config.json", where=f"{where}={path}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = hf_hub_download(path, "config.json")
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"there is no model folder '{path}', and the hub gives no config.json of that name: "
            f"{next(iter(str(error).strip().splitlines()), type(error).__name__)}",
            where=where,
            fix="give a folder or a hub id such as Qwen/Qwen3-8B, or name a config.json with --shape FILE",
        ) from None
    return read_shape(Path(found), name=path, where=f"{where}={path}")


def read_shape(path: Path, *, name: str | None = None, where: str = "--shape") -> ModelShape:
    """From a ``config.json``, or a folder that has one.

    Raises:
        UserError: it cannot be read, or is not one of a language model that transformers knows.
    """
    path = path / "config.json" if path.is_dir() else path
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}", where=where, fix="check the path") from None
    except ValueError as error:
        raise UserError(f"'{path}' is not JSON: {error}", where=where, fix="give a model's config.json") from None
    if not isinstance(said, dict) or not said.get("model_type"):
        raise UserError(
            f"'{path}' does not say which model it is of (model_type)", where=where, fix="give a model's config.json"
        )
    return from_config(said, name=name or path.parent.name or path.stem, where=where)


def from_config(said: dict[str, Any], *, name: str, where: str = "--shape") -> ModelShape:
    """From the content of a ``config.json``. See :func:`read_shape`."""
    from transformers import AutoConfig

    fields = {key: value for key, value in said.items() if key not in ("model_type", "transformers_version")}
    try:
        config = AutoConfig.for_model(said["model_type"], **fields)
        text = config.get_text_config()
        widths = (text.hidden_size, text.num_hidden_layers, text.num_attention_heads, text.vocab_size)
    except (ValueError, AttributeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise UserError(
            f"a '{said['model_type']}' is no language model that can be planned: {reason}",
            where=where,
            fix="give the config.json of a decoder-only transformer",
        ) from None
    hidden, layers, heads, vocabulary = widths
    if min(widths) < 1:
        raise UserError("a size is not positive", where=where, fix="give a model's own config.json")
    head = getattr(text, "head_dim", None) or hidden // heads
    keys = head * (getattr(text, "num_key_value_heads", None) or heads)
    experts = next((n for field in EXPERTS if (n := getattr(text, field, None))), 0)
    inner = text.intermediate_size
    if experts:
        inner = (getattr(text, "moe_intermediate_size", None) or inner) * text.num_experts_per_tok
    parameters = _parameters(config, text)
    flops = ModelFlops.of(config, parameters)
    return ModelShape(
        name=name,
        parameters=parameters,
        active=flops.weights + flops.head,
        layers=layers,
        hidden=hidden,
        attention=heads * head,
        keys=keys,
        inner=inner,
        vocabulary=vocabulary,
        tied=bool(text.tie_word_embeddings),
        normed_heads=text.model_type.startswith("qwen3"),
        experts=experts,
        flops=flops,
        longest=getattr(text, "max_position_embeddings", None),
    )


def _parameters(config: Any, text: Any) -> int:
    """All weights, tied ones once. Families that are common are counted here; of others transformers builds the model
    without memory, which takes seconds."""
    if config is not text or text.model_type not in (*_DENSE, *_MOE):
        return built_parameters(config)
    h, heads = text.hidden_size, text.num_attention_heads
    head = getattr(text, "head_dim", None) or h // heads
    q, k = heads * head, text.num_key_value_heads * head
    attention = h * q + 2 * h * k + q * h
    match text.model_type:
        case "qwen2":
            attention += q + 2 * k
        case "qwen3" | "qwen3_moe":
            attention += 2 * head + (q + 2 * k + h if text.attention_bias else 0)
        case "llama":
            attention += q + 2 * k + h if text.attention_bias else 0
    dense = 3 * h * text.intermediate_size
    if text.model_type == "llama" and text.mlp_bias:
        dense += 2 * text.intermediate_size + h
    layers, sparse = text.num_hidden_layers, 0
    each = dense
    if text.model_type in _MOE:
        step, plain = text.decoder_sparse_step, text.mlp_only_layers or []
        sparse = sum(1 for i in range(layers) if i not in plain and (i + 1) % step == 0)
        each = h * text.num_experts + 3 * h * text.moe_intermediate_size * text.num_experts
    root = text.vocab_size * h * (1 if text.tie_word_embeddings else 2) + h
    return (
        root + layers * (attention + 2 * h) + (layers - sparse) * dense + sparse * each
        if sparse
        else (root + layers * (attention + 2 * h + dense))
    )


def built_parameters(config: Any) -> int:
    """As transformers builds the model, on the device without memory."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())
