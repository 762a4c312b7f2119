"""Floating-point operations of training a model, and how many this machine can do.

*Model* FLOPs are those that the maths needs, whatever an implementation repeats: a product of a [m, k] and a [k, n]
matrix is 2·m·k·n, the backward pass twice the forward pass. For a sequence of L inputs, S tokens of which are scored:

    forward  = 2·L·W  +  2·S·H  +  Σ_layers 4·A·P(L)
    training = 3 · forward

W are the weights that every token is multiplied with (all but embedding and head; of experts, those that a token goes
through), H those of the head, A = heads · head size, and P(L) the (query, key) pairs: L·(L+1)/2, or with a sliding
window w those that lie inside it. Norms, softmax and activations are left out, as is the custom (PaLM, arXiv
2204.02311, appendix B). Recomputed activations and passes without gradient (old log-probs, teachers, references) count
nothing. A prompt that several responses share in a micro-batch is an input once: it is a sequence of
its own, and a response of L inputs behind C tokens of it has P(C + L) − P(C) pairs.
Of frozen weights (those that an adapter is put beside) there is no gradient: their products count twice the
forward pass and not three times.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # what models call their number


@dataclass(frozen=True)
class Work:
    """What goes through a model in training.

    lengths: [n] inputs of each sequence, without padding. contexts: [n] tokens that it sees in front of its own, which
    are inputs of another. scored: tokens that go through the head.
    """

    lengths: torch.Tensor
    contexts: torch.Tensor
    scored: int

    @classmethod
    def joined(cls, parts: Sequence[Work]) -> Work:
        none = torch.zeros(0, dtype=torch.int64)
        lengths, contexts = (torch.cat([none, *(getattr(p, f) for p in parts)]) for f in ("lengths", "contexts"))
        return cls(lengths, contexts, sum(part.scored for part in parts))


@dataclass(frozen=True)
class ModelFlops:
    """weights, head: W and H above. attention: A. windows: (sliding window or None, how many layers have it). trained:
    of the weights; None: all, and the head."""

    weights: int
    head: int
    attention: int
    windows: tuple[tuple[int | None, int], ...]
    trained: int | None = None

    @classmethod
    def of(cls, config: Any, parameters: int, trained: int | None = None, *, value_head: bool = False) -> ModelFlops:
        """Of a transformer.

        Args:
            config: its Hugging Face configuration.
            parameters: of the whole model, tied weights once. trained: those that are not frozen; None: all.
            value_head: it ends in one number a token instead of logits.
        """
        config = config.get_text_config()
        width, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
        embedding = config.vocab_size * width
        tied = value_head or bool(config.tie_word_embeddings)
        weights = parameters - embedding * (1 if tied else 2) - _idle_experts(config)
        head_size = getattr(config, "head_dim", None) or width // heads
        head = width if value_head else embedding
        some = None if trained is None or trained == parameters else trained
        return cls(weights, head, heads * head_size, _windows(config, layers), some)

    def training(self, lengths: torch.Tensor, scored: int, contexts: torch.Tensor | None = None) -> float:
        """Of forward and backward pass over sequences of these lengths [B], ``scored`` of whose tokens in all go
        through the head. contexts: as Work has them; None: all 0."""
        lengths = lengths.double()
        contexts = torch.zeros_like(lengths) if contexts is None else contexts.double()
        tokens = float(lengths.sum())
        products = 2.0 * self.weights * tokens + 2.0 * self.head * scored
        attention = 0.0
        for window, layers in self.windows:
            pairs = _pairs(contexts + lengths, window) - _pairs(contexts, window)
            attention += 4.0 * self.attention * layers * float(pairs.sum())
        gradients = products if self.trained is None else 2.0 * self.trained * tokens
        return 2.0 * products + gradients + 3.0 * attention


def _pairs(lengths: torch.Tensor, window: int | None) -> torch.Tensor:
    """[B] (query, key) pairs of causal attention in which a query sees at most ``window`` keys."""
    inside = lengths if window is None else lengths.clamp(max=window)
    return inside * (inside + 1) / 2 + (lengths - inside) * inside


def _windows(config: Any, layers: int) -> tuple[tuple[int | None, int], ...]:
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return ((None, layers),)
    if kinds is None:
        return ((window, layers),)
    counts = Counter(window if kind == "sliding_attention" else None for kind in kinds)
    return tuple(counts.items())


def _idle_experts(config: Any) -> int:
    """Weights of the experts that a token does not go through."""
    experts = next((n for name in EXPERTS if (n := getattr(config, name, None))), 0)
    if not experts:
        return 0
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    step, dense = getattr(config, "decoder_sparse_step", 1), getattr(config, "mlp_only_layers", None) or []
    first = getattr(config, "first_k_dense_replace", 0)
    sparse = sum(1 for i in range(first, config.num_hidden_layers) if i not in dense and (i + 1) % step == 0)
    return sparse * (experts - config.num_experts_per_tok) * 3 * config.hidden_size * width


_SIDES = {"cpu": 1024, "cuda": 8192}


def matmul_peak(dtype: torch.dtype, device: torch.device | str = "cpu", seconds: float = 0.15) -> float:
    """FLOP/s of the fastest of several products of square matrices, measured for so many seconds (at least two).

    The largest rate that this process sees: with the threads it has, and whatever else runs beside it.
    """
    device = torch.device(device)
    side = _SIDES.get(device.type, 4096)
    left = torch.ones(side, side, dtype=dtype, device=device)
    result = torch.empty_like(left)
    _timed_product(left, result)  # loads the kernel, touches the memory
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 2 or time.perf_counter() - began < seconds:
        times.append(_timed_product(left, result))
    return 2.0 * side**3 / min(times)


def _timed_product(matrix: torch.Tensor, out: torch.Tensor) -> float:
    if matrix.is_cuda:
        torch.cuda.synchronize(matrix.device)
    began = time.perf_counter()
    torch.mm(matrix, matrix, out=out)
    if matrix.is_cuda:
        torch.cuda.synchronize(matrix.device)
    return time.perf_counter() - began
