"""A divergence over the whole vocabulary from hidden states and heads, without ever holding a [tokens, V] tensor.

Both passes go through the tokens in chunks: large enough for the matrix products, which read the head anew for each.
The divergence itself goes through a chunk a few rows at a time, which the cache holds. The backward pass computes the
same logits again and lets autograd differentiate the dense divergence of those few rows: exact for any divergence, a
user's own included. The gradient takes the place of the student's logits, so two [chunk, V] tensors are all there is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from rlsys.algorithms.divergences import Divergence, check_divergence, entropy
from rlsys.algorithms.kernels.tiles import add_product, even_slices
from rlsys.config.plugins import reads_of


@dataclass(frozen=True)
class _Size:
    """tokens: of a chunk, at most. elements: of a [chunk, V] tensor. row_elements: of the rows that a divergence sees
    at once, of which it and its gradient may well hold ten."""

    tokens: int
    elements: int
    row_elements: int


_CPU = _Size(tokens=1024, elements=1 << 24, row_elements=1 << 20)  # in float32: 64 MiB and 4 MiB
_GPU = _Size(tokens=4096, elements=1 << 25, row_elements=1 << 23)


@dataclass(frozen=True)
class Head:
    """From hidden states to logits. weight: [V, H]. bias: [V] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True)
class TeacherPart:
    """One of the models whose logits, mixed, are the teacher's. mix: its share. hidden: [n, H'], H' its own width."""

    mix: float
    hidden: torch.Tensor
    head: Head


@dataclass(frozen=True)
class TokenDivergence:
    """[n] each, float32 (float64 for float64 inputs), in nats.

    loss: with gradient to the student's hidden states and head. teacher_logprobs: at the targets (None: there are
    none), teacher_entropy: over the whole vocabulary, both without gradient.
    """

    loss: torch.Tensor
    teacher_logprobs: torch.Tensor | None
    teacher_entropy: torch.Tensor


def token_divergence(
    hidden: torch.Tensor,
    head: Head,
    teacher: Sequence[TeacherPart],
    divergence: str | Divergence,
    options: Mapping[str, Any],
    *,
    targets: torch.Tensor | None = None,
    t: float | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    tail: bool = True,
    chunk: int | None = None,
) -> TokenDivergence:
    """Divergence of the student's next-token distribution from the teacher's, for each of n tokens (n may be 0).

    Student: softmax((hidden · weightᵀ + bias) / temperature). Teacher: the same of Σ mix · (its logits) over its parts,
    one model or several (a trust region is the policy and its start, mixed). Matrix products run in the inputs' dtype;
    everything after them, and the sum over chunks of the head's gradient, in float32 at least.

    Args:
        hidden: [n, H]. head: the student's.
        teacher: at least one part, each about the same n tokens; gets no gradient.
        divergence: name, import path, or the function. options: its keyword options.
        targets: [n] int64, the response's own tokens.
        t: for a divergence that reads it, unless its option ``t`` is fixed.
        temperature: of both.
        top_k: then the divergence is over the student's k likeliest words, with the probabilities that student and
            teacher give them. None or ≥ V: over all V.
        tail: with top_k, all other words are one more, with their summed probability; else the k are made to sum to 1.
        chunk: tokens whose logits exist at once; None: what was measured best.

    Raises:
        ValueError: shapes that do not go together, vocabularies of different size, a divergence that reads targets or t
            without there being any, or that does not return [n].
        UserError: an unknown divergence or option, or top_k with a divergence that reads the targets.
    """
    function = check_divergence(divergence, options, top_k=top_k, tail=tail)
    _check_shapes(hidden, head, teacher, targets)
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, not {temperature}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"a chunk has at least one token, not {chunk}")
    spec = _Spec(
        function=function,
        options=_with_reads(function, options, targets, t),
        reads_targets="targets" in reads_of(function),
        mixes=tuple(part.mix for part in teacher),
        temperature=temperature,
        top_k=top_k,
        tail=tail,
        chunk=chunk,
    )
    parts = [tensor for part in teacher for tensor in (part.hidden, part.head.weight, part.head.bias)]
    loss, logprobs, teacher_entropy = _TokenDivergence.apply(spec, hidden, head.weight, head.bias, targets, *parts)
    return TokenDivergence(loss, logprobs if targets is not None else None, teacher_entropy)


@dataclass(frozen=True)
class _Spec:
    """What is computed, without the tensors."""

    function: Divergence
    options: dict[str, Any]
    reads_targets: bool
    mixes: tuple[float, ...]
    temperature: float
    top_k: int | None
    tail: bool
    chunk: int | None

    def chunks(self, hidden: torch.Tensor, weight: torch.Tensor) -> tuple[list[slice], int]:
        """Chunks of tokens, none larger than the first, and how many rows of one the divergence sees at once."""
        size, words = _GPU if hidden.is_cuda else _CPU, max(1, len(weight))
        most = self.chunk or max(1, min(size.tokens, size.elements // words))
        return even_slices(len(hidden), most), max(1, size.row_elements // words)

    def teacher_logits(self, parts: Sequence[Any], part: slice, out: torch.Tensor) -> torch.Tensor:
        """[c, V] of these tokens. parts: hidden, weight and bias of each model, one after the other."""
        for number, mix in enumerate(self.mixes):
            states, weight, bias = parts[3 * number : 3 * number + 3]
            _logits(states[part], weight, bias, out, mix=mix, more=number > 0)
        return out

    def log_softmax(self, logits: torch.Tensor) -> torch.Tensor:
        """[r, V] log-probs."""
        logits = logits if self.temperature == 1.0 else logits / self.temperature
        return torch.log_softmax(logits, dim=-1)

    def losses(self, student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor | None) -> torch.Tensor:
        """[c] from log-probs [c, V]."""
        if self.top_k is not None and self.top_k < student.shape[1]:
            top = student.detach().topk(self.top_k, dim=-1).indices
            student, teacher = (_at(log_p, top, self.tail) for log_p in (student, teacher))
        more = {"targets": targets} if self.reads_targets else {}
        losses = self.function(student, teacher, **more, **self.options)
        if losses.shape != student.shape[:1]:
            raise ValueError(
                f"the divergence of log-probs {tuple(student.shape)} is {tuple(student.shape[:1])}, "
                f"but the function returned {tuple(losses.shape)}"
            )
        return losses

    def grad_logits(
        self, logits: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor | None, grad_losses: torch.Tensor
    ) -> None:
        """Writes the gradient of the student's logits [r, V], before the temperature, over them. teacher: log-probs."""
        log_p = self.log_softmax(logits).requires_grad_()
        with torch.enable_grad():
            losses = self.losses(log_p, teacher, targets)
        (grad,) = torch.autograd.grad(losses, log_p, grad_losses / self.temperature)
        # past the softmax: grad − p Σ grad
        p = torch.exp(log_p.detach(), out=logits)
        torch.addcmul(grad, p, grad.sum(-1, keepdim=True), value=-1, out=logits)


class _TokenDivergence(torch.autograd.Function):
    """Keeps the inputs and no logits."""

    @staticmethod
    def forward(
        ctx: Any,
        spec: _Spec,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor | None,
        *parts: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        losses = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        logprobs, teacher_entropy = torch.zeros_like(losses), torch.empty_like(losses)
        chunks, rows = spec.chunks(hidden, weight)
        memories = _memory(chunks, hidden, weight)
        for part in chunks:
            student = _logits(hidden[part], weight, bias, memories[0][: _size(part)])
            teacher = spec.teacher_logits(parts, part, memories[1][: _size(part)])
            for few, here in _rows(part, rows):
                wanted = None if targets is None else targets[here]
                log_q = spec.log_softmax(teacher[few])
                teacher_entropy[here] = entropy(log_q)
                if wanted is not None:
                    logprobs[here] = log_q.gather(1, wanted[:, None])[:, 0]
                losses[here] = spec.losses(spec.log_softmax(student[few]), log_q, wanted)
        ctx.spec = spec
        ctx.save_for_backward(hidden, weight, bias, targets, *parts)
        ctx.mark_non_differentiable(logprobs, teacher_entropy)
        return losses, logprobs, teacher_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        spec: _Spec = ctx.spec
        hidden, weight, bias, targets, *parts = ctx.saved_tensors
        _, for_hidden, for_weight, for_bias, *_ = ctx.needs_input_grad
        chunks, rows = spec.chunks(hidden, weight)
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        # With no token there is no chunk that would write it.
        new = torch.empty_like if chunks else torch.zeros_like
        grad_weight = new(weight, dtype=grad_losses.dtype) if for_weight else None
        grad_bias = torch.zeros_like(bias, dtype=grad_losses.dtype) if for_bias else None
        memories = _memory(chunks, hidden, weight)
        for part in chunks:
            logits = _logits(hidden[part], weight, bias, memories[0][: _size(part)])
            teacher = spec.teacher_logits(parts, part, memories[1][: _size(part)])
            for few, here in _rows(part, rows):
                wanted = None if targets is None else targets[here]
                spec.grad_logits(logits[few], spec.log_softmax(teacher[few]), wanted, grad_losses[here])
            if grad_bias is not None:
                grad_bias += logits.sum(0)
            grad_logits = logits.to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[part])
            if grad_weight is not None:
                add_product(grad_weight, grad_logits.T, hidden[part], new=part.start == 0, last=part is chunks[-1])
        return (
            None,
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            *[None] * len(parts),
        )


def _memory(chunks: list[slice], hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[c, V] each, for the student's and the teacher's logits of every chunk: fresh memory for each would cost more
    than the arithmetic on it."""
    most = _size(chunks[0]) if chunks else 0
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    student = torch.empty(most, len(weight), dtype=dtype, device=hidden.device)
    return student, torch.empty_like(student)


def _logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    mix: float = 1.0,
    more: bool = False,
) -> torch.Tensor:
    """Writes mix · logits [c, V] into ``out``; more: adds them to it."""
    if hidden.dtype == out.dtype:
        torch.addmm(out, hidden, weight.T, beta=int(more), alpha=mix, out=out)
        return out if bias is None else out.add_(bias, alpha=mix)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return out.add_(logits, alpha=mix) if more else torch.mul(logits, mix, out=out)


def _size(part: slice) -> int:
    return part.stop - part.start


def _rows(part: slice, rows: int) -> Iterator[tuple[slice, slice]]:
    """A few rows at a time: which of the chunk, and which of all tokens."""
    for start in range(0, _size(part), rows):
        stop = min(start + rows, _size(part))
        yield slice(start, stop), slice(part.start + start, part.start + stop)


def _at(log_p: torch.Tensor, top: torch.Tensor, tail: bool) -> torch.Tensor:
    """[c, k + 1] or [c, k] from [c, V]: these words, and the rest as one.

    The rest is added up over the rest, not as 1 − Σ: where the words take all but 1e-8, that would be nothing at all.
    """
    words = log_p.gather(1, top)
    if not tail:
        return words - words.logsumexp(-1, keepdim=True)
    return torch.cat([words, log_p.scatter(1, top, -torch.inf).logsumexp(-1, keepdim=True)], dim=1)


def _with_reads(
    function: Divergence, options: Mapping[str, Any], targets: torch.Tensor | None, t: float | None
) -> dict[str, Any]:
    """Options and ``t``; a fixed one goes before the schedule's."""
    result = dict(options)
    if "t" in reads_of(function):
        result["t"] = t if options.get("t") is None else options["t"]
        if result["t"] is None:
            raise ValueError("the divergence reads t, and there is none")
    if "targets" in reads_of(function) and targets is None:
        raise ValueError("the divergence reads the targets, and there are none")
    return result


def _check_shapes(
    hidden: torch.Tensor, head: Head, teacher: Sequence[TeacherPart], targets: torch.Tensor | None
) -> None:
    if not teacher:
        raise ValueError("a teacher has at least one part")
    _check_head("student", hidden, head)
    for part in teacher:
        _check_head("teacher", part.hidden, part.head)
        if len(part.head.weight) != len(head.weight):
            sizes = f"{len(head.weight)} and {len(part.head.weight)} words"
            raise ValueError(f"student and teacher have vocabularies of different size: {sizes}")
        if len(part.hidden) != len(hidden):
            shapes = f"{tuple(hidden.shape)} and {tuple(part.hidden.shape)}"
            raise ValueError(f"student's and teacher's hidden states are of different tokens: {shapes}")
    if targets is not None and targets.shape != hidden.shape[:1]:
        raise ValueError(f"hidden states {tuple(hidden.shape)} have no targets {tuple(targets.shape)}")


def _check_head(who: str, hidden: torch.Tensor, head: Head) -> None:
    if hidden.dim() != 2 or head.weight.dim() != 2 or hidden.shape[1] != head.weight.shape[1]:
        raise ValueError(
            f"the {who}'s hidden states {tuple(hidden.shape)} do not fit its head {tuple(head.weight.shape)}"
        )
    if head.bias is not None and head.bias.shape != head.weight.shape[:1]:
        raise ValueError(f"the {who}'s head {tuple(head.weight.shape)} has a bias {tuple(head.bias.shape)}")
