"""A transformers model's forward pass, one token a row at a time, without what makes that slow: a dozen small modules a
layer, masks and caches made anew. The weights are the model's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

_FAMILIES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # the others change with the sequence's length


def unsupported(model: PreTrainedModel) -> str | None:
    """Why :class:`Decoder` cannot run this model; None: it can."""
    config = model.config
    if type(model).__name__ not in _FAMILIES:
        return f"the family {config.model_type} is not known to it"
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        return "some layers have sliding-window attention"
    rope = model.base_model.rotary_emb.rope_type  # "default" as well where the engine has frozen it
    if rope not in _FIXED_ROPE:
        return f"its position embeddings ({rope}) change with the length"
    if model.get_output_embeddings() is None:
        return "it has no language-model head"
    return None


@dataclass(frozen=True)
class _Layer:
    """A block's weights; two matrices that read the same input are one. heads_norm: [heads, D] of q and k, or none."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    heads_norm: torch.Tensor | None
    out: torch.Tensor
    out_bias: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


# (layer, q [B, …, Hq, D] scaled, k [B, …, Hk, D], v likewise) -> [B, …, Hq·D]
_Attention = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Decoder:
    """Llama, Qwen2 and Qwen3 with full attention. Parameters of the model become views of this decoder's matrices: what
    is copied into them is decoded with, once :meth:`refresh` was called.

    Args:
        model: see :func:`unsupported`.
        max_length: positions.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, max_length: int):
        config, body = model.config, model.base_model
        self._model = model
        self.layers = len(body.layers)
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = body.layers[0].self_attn.head_dim
        self.dtype, self.device = model.dtype, model.device
        self._eps = config.rms_norm_eps
        self._activation = body.layers[0].mlp.act_fn
        self._fused = [
            (
                _fuse([layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]),
                _fuse([layer.mlp.gate_proj, layer.mlp.up_proj]),
            )
            for layer in body.layers
        ]
        positions = torch.arange(max_length, device=self.device)[None]
        cos, sin = body.rotary_emb(torch.zeros(1, dtype=self.dtype, device=self.device), positions)
        self._cos, self._sin = cos[0], sin[0, :, : self.head_dim // 2].contiguous()
        # The softmax's scale rides on the rotation of q, where it is not rounded noticeably.
        self._own_attention = self.dtype == torch.float32
        self._head_scale = torch.ones(self.heads + self.kv_heads, 1, dtype=self.dtype, device=self.device)
        if self._own_attention:
            self._head_scale[: self.heads] = self.head_dim**-0.5
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """To be called when the model's parameters have been written to."""
        self._layers = [
            self._layer(layer, *fused) for layer, fused in zip(self._model.base_model.layers, self._fused, strict=True)
        ]

    @torch.inference_mode()
    def prefill(
        self, token_ids: torch.Tensor, pads: torch.Tensor, *, padded: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts, padded on the left.

        Args:
            token_ids: [P, T]. pads: [P] int64, how many of each row are padding; padded: whether any are.

        Returns:
            Logits [P, V] float32 after the last token; keys and values [layers, 2, P, Hk, T, D], of the padding too.
        """
        rows, length = token_ids.shape
        columns = torch.arange(length, device=self.device)
        mask = None
        if padded:
            seen = columns[None, None, :] >= pads[:, None, None]
            causal = columns[None, :] <= columns[:, None]
            # Padding sees itself: a row of the softmax must not be empty.
            mask = ((seen & causal) | torch.eye(length, dtype=torch.bool, device=self.device))[:, None]
        kept = torch.empty(
            (self.layers, 2, rows, self.kv_heads, length, self.head_dim), dtype=self.dtype, device=self.device
        )

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            kept[layer, 0], kept[layer, 1] = k.transpose(1, 2), v.transpose(1, 2)
            attended = self._sdpa(q.transpose(1, 2), kept[layer, 0], kept[layer, 1], mask, causal=mask is None)
            return attended.transpose(1, 2).flatten(2)

        positions = (columns[None, :] - pads[:, None]).clamp_(min=0)
        return self._forward(token_ids, positions, attend, last=True), kept

    @torch.inference_mode()
    def step(
        self, token_ids: torch.Tensor, positions: torch.Tensor, cache: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """One more token a row, whose keys and values are written into the last column of ``cache``.

        Args:
            token_ids, positions: [B] int64.
            cache: [layers, 2, B, Hk, C, D].
            mask: [B, C] of the cache's dtype, added to scores: −inf on columns that are not the row's; None: all are.

        Returns:
            Logits [B, V] float32.
        """
        rows, columns = cache.shape[2], cache.shape[4]
        groups = self.heads // self.kv_heads
        added = None if mask is None else mask.view(rows, 1, 1, columns)

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            keys, values = cache[layer, 0], cache[layer, 1]
            keys[:, :, -1], values[:, :, -1] = k, v
            if not self._own_attention:
                return self._sdpa(q.unsqueeze(2), keys, values, added).view(rows, -1)
            scores = torch.matmul(q.view(rows, self.kv_heads, groups, self.head_dim), keys.transpose(2, 3))
            if added is not None:
                scores += added
            return torch.matmul(scores.softmax(-1), values).view(rows, -1)

        return self._forward(token_ids, positions, attend)

    def _forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, attend: _Attention, *, last: bool = False
    ) -> torch.Tensor:
        """token_ids, positions: [B] or [B, T]. Returns logits [B, V]; last: of each row's last token."""
        cos = self._cos[positions].unsqueeze(-2) * self._head_scale
        sin = self._sin[positions].unsqueeze(-2) * self._head_scale
        body = self._model.base_model
        x = F.embedding(token_ids, body.embed_tokens.weight)
        for index, layer in enumerate(self._layers):
            h = self._norm(x, layer.input_norm)
            x = x + F.linear(attend(index, *self._qkv(h, layer, cos, sin)), layer.out, layer.out_bias)
            h = self._norm(x, layer.mlp_norm)
            gate, up = F.linear(h, layer.gate_up, layer.gate_up_bias).chunk(2, -1)
            x = x + F.linear(self._activation(gate).mul_(up), layer.down, layer.down_bias)
        if last:
            x = x[:, -1]
        head = self._model.get_output_embeddings()
        return F.linear(self._norm(x, body.norm.weight), head.weight, head.bias).float()

    def _sdpa(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, *, causal: bool = False
    ) -> torch.Tensor:
        scale = 1.0 if self._own_attention else None
        grouped = self.heads != self.kv_heads
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped)

    def _qkv(
        self, h: torch.Tensor, layer: _Layer, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v [B, …, heads, D]; q and k with positions."""
        qkv = F.linear(h, layer.qkv, layer.qkv_bias).unflatten(-1, (-1, self.head_dim))
        qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), -2)
        if layer.heads_norm is not None:
            qk = self._norm(qk, None) * layer.heads_norm
        half = self.head_dim // 2
        turned = qk * cos
        turned[..., :half].addcmul_(qk[..., half:], sin, value=-1.0)
        turned[..., half:].addcmul_(qk[..., :half], sin)
        q, k = turned.split((self.heads, self.kv_heads), -2)
        return q, k, v

    def _norm(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self._eps)

    def _layer(self, layer: torch.nn.Module, attention: _Fused, mlp: _Fused) -> _Layer:
        own = layer.self_attn
        heads_norm = None
        if hasattr(own, "q_norm"):
            norms = ((own.q_norm.weight, self.heads), (own.k_norm.weight, self.kv_heads))
            heads_norm = torch.cat([weight.expand(count, -1) for weight, count in norms])
        return _Layer(
            layer.input_layernorm.weight,
            attention.weight,
            attention.bias,
            heads_norm,
            own.o_proj.weight,
            own.o_proj.bias,
            layer.post_attention_layernorm.weight,
            mlp.weight,
            mlp.bias,
            layer.mlp.down_proj.weight,
            layer.mlp.down_proj.bias,
        )


@dataclass(frozen=True)
class _Fused:
    weight: torch.Tensor
    bias: torch.Tensor | None


def _fuse(linears: list[torch.nn.Linear]) -> _Fused:
    """One matrix (and bias) for all; their own parameters become views of it."""

    def join(name: str) -> torch.Tensor | None:
        parameters = [getattr(linear, name) for linear in linears]
        if parameters[0] is None:
            return None
        whole = torch.cat([p.detach() for p in parameters])
        for parameter, part in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
            parameter.data = part
        return whole

    weight = join("weight")
    assert weight is not None
    return _Fused(weight, join("bias"))
