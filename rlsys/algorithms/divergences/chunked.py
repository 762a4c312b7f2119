"""A divergence over the whole vocabulary from hidden states and heads, without ever holding a [tokens, V] tensor.

Both passes go through the tokens a few at a time. The backward pass computes the same few logits again and lets
autograd differentiate the dense divergence of those: exact for any divergence, a user's own included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from rlsys.algorithms.divergences import Divergence, check_divergence, entropy
from rlsys.config.plugins import reads_of

# Elements of one [chunk, V] tensor, of which about eight exist at once: 8 MiB each in float32; a GPU, which reads the
# head anew for every chunk, gets twice that.
CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 22}


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
        chunk: tokens whose logits exist at once; None: so many that chunk · V is a few million.

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
        chunk=chunk or max(1, CHUNK_ELEMENTS.get(hidden.device.type, 1 << 22) // max(1, len(head.weight))),
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
    chunk: int

    def chunks(self, tokens: int) -> list[slice]:
        return [slice(start, start + self.chunk) for start in range(0, tokens, self.chunk)]

    def teacher(self, parts: Sequence[Any], part: slice) -> torch.Tensor:
        """[c, V] log-probs of these tokens. parts: hidden, weight and bias of each model, one after the other."""
        logits: Any = None
        for mix, states, weight, bias in zip(self.mixes, parts[::3], parts[1::3], parts[2::3], strict=True):
            one = _logits(states[part], weight, bias)
            one = one if mix == 1.0 else one.mul_(mix)
            logits = one if logits is None else logits.add_(one)
        return torch.log_softmax(_scaled(logits, self.temperature), dim=-1)

    def student(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[c, V] log-probs."""
        return torch.log_softmax(_scaled(_logits(hidden, weight, bias), self.temperature), dim=-1)

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
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        teacher: torch.Tensor,
        targets: torch.Tensor | None,
        grad_losses: torch.Tensor,
    ) -> torch.Tensor:
        """[c, V] gradient of the logits before the temperature."""
        log_p = self.student(hidden, weight, bias).requires_grad_()
        with torch.enable_grad():
            losses = self.losses(log_p, teacher, targets)
        del teacher
        (grad,) = torch.autograd.grad(losses, log_p, grad_losses)
        # past the softmax: grad − p Σ grad
        grad = torch.addcmul(grad, log_p.detach().exp(), grad.sum(-1, keepdim=True), value=-1)
        return _scaled(grad, self.temperature)


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
        for part in spec.chunks(len(hidden)):
            wanted = None if targets is None else targets[part]
            teacher = spec.teacher(parts, part)
            teacher_entropy[part] = entropy(teacher)
            if wanted is not None:
                logprobs[part] = teacher.gather(1, wanted[:, None])[:, 0]
            losses[part] = spec.losses(spec.student(hidden[part], weight, bias), teacher, wanted)
            del teacher  # or it would be there while the next is made
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
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=grad_losses.dtype) if for_weight else None
        grad_bias = torch.zeros_like(bias, dtype=grad_losses.dtype) if for_bias else None
        for part in spec.chunks(len(hidden)):
            grad_logits = spec.grad_logits(
                hidden[part],
                weight,
                bias,
                spec.teacher(parts, part),
                None if targets is None else targets[part],
                grad_losses[part],
            )
            if grad_hidden is not None:
                grad_hidden[part] = grad_logits.to(weight.dtype) @ weight
            if grad_weight is not None:
                grad_weight.addmm_(grad_logits.T, hidden[part].to(grad_weight.dtype))
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
            del grad_logits
        return (
            None,
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            *[None] * len(parts),
        )


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _scaled(values: torch.Tensor, temperature: float) -> torch.Tensor:
    """In place."""
    return values if temperature == 1.0 else values.div_(temperature)


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
