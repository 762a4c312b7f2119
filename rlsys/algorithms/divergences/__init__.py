"""Divergences of a student from a teacher, token by token, for self-distillation. Small files, one decorator each.

A divergence is a function ``(student [n, W], teacher [n, W], *, reads, options) -> [n]``: log-probs of n tokens over W
words in, one loss a token in nats out. Both rows are distributions (they sum to 1), over the vocabulary or over the
student's likeliest words and one for the rest. ``student`` carries the gradient, ``teacher`` none. It sees a few tokens
at a time (``chunked.token_divergence``), so it may be as dense as it likes, and must not look across tokens.

With :func:`rlsys.config.plugins.reads` it may ask for more, as keyword arguments:

- ``targets`` [n] int64: the response's own token. Only over the whole vocabulary.
- ``t`` float: the present interpolation between student and teacher (``rlsys.algorithms.taid``). An option ``t`` fixes
  it instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from rlsys.config.errors import UserError
from rlsys.config.plugins import Registry, check_options, reads_of

Divergence = Callable[..., torch.Tensor]
DIVERGENCES: Registry[Divergence] = Registry("divergence", "rlsys.algorithms.divergences")

OPTIONS = "algorithm.distillation.divergence_options"
_READS = ("targets", "t")


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p‖q) of log-probs [n, W] -> [n], as Σ p (log p − log q) − p + q.

    p and q sum to 1, so the last two terms change neither the value nor the gradient past a softmax. They make every
    word's part ≥ 0 and its derivative exactly 0 where p = q, and round-off in either's normalisation second-order.
    """
    return (p.exp() * (p - q) - p.exp() + q.exp()).sum(-1)


def entropy(log_p: torch.Tensor) -> torch.Tensor:
    """Of log-probs [n, W], in nats -> [n]."""
    return -(log_p.exp() * log_p).sum(-1)


def require(condition: bool, option: str, what: str) -> None:
    """Raises UserError at ``algorithm.distillation.divergence_options.OPTION`` unless the condition holds."""
    if not condition:
        raise UserError(what, where=f"{OPTIONS}.{option}")


def check_divergence(
    divergence: str | Divergence, options: Mapping[str, Any], *, top_k: int | None = None, tail: bool = True
) -> Divergence:
    """The divergence of this name or import path (or the function itself), with the names and types of its options
    checked. Values are the divergence's own affair.

    Raises:
        UserError: there is no such divergence, it reads what nothing provides, an option is unknown, missing or of
            another type, or it cannot be computed from the student's top_k words.
    """
    if isinstance(divergence, str):
        name, function = divergence, DIVERGENCES.get(divergence, where="algorithm.distillation.divergence")
    else:
        name, function = getattr(divergence, "__name__", repr(divergence)), divergence
    wanted = reads_of(function)
    if unknown := [read for read in wanted if read not in _READS]:
        raise UserError(
            f"the divergence '{name}' reads '{unknown[0]}', which no divergence is given",
            where="algorithm.distillation.divergence",
            fix=f"it may read {', '.join(_READS)}",
        )
    own = {option: value for option, value in options.items() if option != "t" or "t" not in wanted}
    check_options(function, own, where=OPTIONS)
    fixed = options.get("t") if "t" in wanted else None
    in_range = fixed is None or (isinstance(fixed, int | float) and not isinstance(fixed, bool) and 0 <= fixed <= 1)
    require(in_range, "t", f"t is a share of the teacher, from 0 to 1, not {fixed!r}")
    for parameter in inspect.signature(function).parameters.values():
        needed = parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty
        given = parameter.name in options or parameter.name in wanted
        require(not needed or given, parameter.name, f"the divergence '{name}' needs the option '{parameter.name}'")
    _check_top_k(name, wanted, top_k, tail)
    return function


def _check_top_k(name: str, wanted: tuple[str, ...], top_k: int | None, tail: bool) -> None:
    where = "algorithm.distillation.top_k"
    if top_k is None:
        return
    if top_k < 1:
        raise UserError(f"top_k counts words, so it is at least 1, not {top_k}", where=where)
    if top_k == 1 and not tail:
        raise UserError(
            "one word alone has probability 1 under student and teacher alike: there is nothing to learn",
            where=where,
            fix="raise top_k, or set algorithm.distillation.tail=true",
        )
    if "targets" in wanted:
        raise UserError(
            f"'{name}' is about the response's own token, which need not be among the student's {top_k} likeliest",
            where=where,
            fix="set algorithm.distillation.top_k=null",
        )
