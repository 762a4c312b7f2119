"""Divergences against TRL's, and against float64 sums written word by word.

Most cases are about logits (hidden states behind a head that is the identity), through ``token_divergence`` three
tokens at a time: losses of the masked tokens, and the gradient of their weighted sum. Those against TRL's chunked loss,
and the trust region's, have real heads of different widths, and gradients of hidden states, head and bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.parity.case import Case, Tensors
from rlsys.algorithms import taid
from rlsys.algorithms.divergences.chunked import Head, TeacherPart, token_divergence

TRL = "trl 1.16.0"
LOOPS = "float64 reference"


def draw(seed: int) -> dict[str, Any]:
    """Logits of ragged rows of tokens with holes, targets that the student sampled, mask, and weights of the token
    losses (0 off the mask)."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [_integer(generator, 1, 8) for _ in range(_integer(generator, 2, 6))]
    tokens, words = sum(lengths), _integer(generator, 8, 13)
    logits = 1.5 * torch.rand(tokens, words, generator=generator)
    # The teacher is sure of a word that the student takes for one of several: where the two cancel, the relative error
    # of a difference would say nothing.
    teacher = logits + 0.5 * torch.rand(tokens, words, generator=generator)
    teacher[torch.arange(tokens), logits.topk(2).indices[:, 1]] += 4
    head, no_bias = torch.eye(words), torch.zeros(words)
    return {
        "leaves": ("hidden",),
        "hidden": logits,
        "weight": head,
        "bias": no_bias,
        "teacher_hidden": teacher,
        "teacher_weight": head,
        "teacher_bias": no_bias,
        "targets": torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0],
        **_masked(generator, lengths),
        "top_k": _integer(generator, 3, 7),
        "t": 0.3 + 0.7 * float(torch.rand((), generator=generator)),
    }


def draw_heads(seed: int) -> dict[str, Any]:
    """Hidden states and heads in place of logits. The teacher is sure of one word wherever it is asked, and the head
    points to that: sums over tokens or words of terms that cancel would say nothing about relative errors."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    lengths = [_integer(generator, 1, 8) for _ in range(_integer(generator, 2, 6))]
    words, width, other = (_integer(generator, *bounds) for bounds in ((8, 13), (3, 6), (3, 6)))
    bias, weight = 2 * uniform(words) - 1, -0.1 - 0.2 * uniform(words, width)
    teacher_bias = bias + uniform(words)
    teacher_bias[0] += 4
    weight[0] *= -1
    return {
        "leaves": ("hidden", "weight", "bias"),
        "lengths": lengths,
        "hidden": 0.3 + 0.5 * uniform(sum(lengths), width),
        "weight": weight,
        "bias": bias,
        "teacher_hidden": uniform(sum(lengths), other),
        "teacher_weight": uniform(words, other) / 3,
        "teacher_bias": teacher_bias,
        "targets": torch.randint(words, (sum(lengths),), generator=generator),
        **_masked(generator, lengths),
        "t": 0.5,
    }


def _integer(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high, (), generator=generator))


def _masked(generator: torch.Generator, lengths: list[int]) -> dict[str, torch.Tensor]:
    mask = torch.rand(sum(lengths), generator=generator) < 0.8
    mask[0] = True
    return {"mask": mask, "weights": (0.5 + torch.rand(sum(lengths), generator=generator)) * mask}


def gradients(losses: torch.Tensor, leaves: dict[str, torch.Tensor], inputs: dict) -> Tensors:
    """Losses on the mask, and gradients of their weighted sum."""
    wanted = {("logits" if inputs["leaves"] == ("hidden",) else n): leaves[n] for n in inputs["leaves"]}
    found = torch.autograd.grad((losses * inputs["weights"]).sum(), list(wanted.values()))
    return {"loss": losses[inputs["mask"]]} | {f"grad {name}": g for name, g in zip(wanted, found, strict=True)}


def leaves_of(inputs: dict, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: inputs[name].to(dtype).clone().requires_grad_() for name in ("hidden", "weight", "bias")}


def ours(
    divergence: str,
    options: dict[str, Any],
    inputs: dict,
    *,
    temperature: float = 1.0,
    top_k: bool = False,
    tail: bool = True,
    mix: float | None = None,
) -> Tensors:
    """mix: share of the policy's own logits in the teacher's."""
    leaves = leaves_of(inputs, torch.float32)
    teacher = [TeacherPart(1.0, inputs["teacher_hidden"], Head(inputs["teacher_weight"], inputs["teacher_bias"]))]
    if mix is not None:
        own = TeacherPart(mix, inputs["hidden"], Head(inputs["weight"], inputs["bias"]))
        teacher = [own, TeacherPart(1 - mix, teacher[0].hidden, teacher[0].head)]
    result = token_divergence(
        leaves["hidden"],
        Head(leaves["weight"], leaves["bias"]),
        teacher,
        divergence,
        options,
        targets=inputs["targets"],
        t=inputs["t"],
        temperature=temperature,
        top_k=inputs["top_k"] if top_k else None,
        tail=tail,
        chunk=3,
    )
    return gradients(result.loss, leaves, inputs)


# --- TRL, on whole [tokens, words] tensors in float64 ----------------------------------------------------------------


def student_logits(leaves: dict[str, torch.Tensor]) -> torch.Tensor:
    return leaves["hidden"] @ leaves["weight"].T + leaves["bias"]


def teacher_logits(inputs: dict, mix: float | None = None) -> torch.Tensor:
    states, weight, bias = (inputs[f"teacher_{name}"].double() for name in ("hidden", "weight", "bias"))
    logits = states @ weight.T + bias
    if mix is None:
        return logits
    own = inputs["hidden"].double() @ inputs["weight"].double().T + inputs["bias"].double()
    return mix * own + (1 - mix) * logits


def trl(function: Callable[[torch.Tensor, torch.Tensor, dict], torch.Tensor], inputs: dict) -> Tensors:
    """function: student's and teacher's logits, inputs -> [n]."""
    leaves = leaves_of(inputs, torch.float64)
    return gradients(function(student_logits(leaves), teacher_logits(inputs), inputs), leaves, inputs)


def gkd(beta: float, temperature: float, student: torch.Tensor, teacher: torch.Tensor, inputs: dict) -> torch.Tensor:
    from trl.experimental.gkd import GKDTrainer

    loss = GKDTrainer.generalized_jsd_loss
    return loss(student[None], teacher[None], beta=beta, temperature=temperature, reduction="none")[0].sum(-1)


def sdpo_full(alpha: float, student: torch.Tensor, teacher: torch.Tensor, inputs: dict) -> torch.Tensor:
    from trl.experimental.sdpo import loss_utils

    return loss_utils.compute_full_logit_self_distillation_loss(student, teacher, distillation_alpha=alpha)


def sdpo_top_k(alpha: float, tail: bool, student: torch.Tensor, teacher: torch.Tensor, inputs: dict) -> torch.Tensor:
    from trl.experimental.sdpo import loss_utils

    return loss_utils.compute_topk_self_distillation_loss(
        student,
        teacher,
        distillation_topk=inputs["top_k"],
        distillation_alpha=alpha,
        distillation_add_tail=tail,
    )


def sdpo_sampled(student: torch.Tensor, teacher: torch.Tensor, inputs: dict) -> torch.Tensor:
    from trl.experimental.sdpo import loss_utils

    return loss_utils.compute_sampled_token_self_distillation_loss(
        student, teacher, inputs["targets"], distillation_alpha=1.0
    )


def trl_chunked(beta: float, temperature: float, inputs: dict) -> Tensors:
    """TRL's own chunked loss, of padded rows; it computes in float32 itself and returns the sum over the mask."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    leaves = leaves_of(inputs, torch.float32)
    rows = lambda flat: torch.nn.utils.rnn.pad_sequence(flat.split(inputs["lengths"]), batch_first=True)  # noqa: E731
    loss, _, _ = _chunked_divergence_loss(
        rows(leaves["hidden"]),
        rows(inputs["teacher_hidden"]),
        leaves["weight"],
        inputs["teacher_weight"],
        rows(inputs["mask"].long()),
        beta,
        num_items_in_batch=1,
        student_lm_head_bias=leaves["bias"],
        teacher_lm_head_bias=inputs["teacher_bias"],
        temperature=temperature,
    )
    return summed(gradients(loss, leaves, inputs | {"weights": torch.ones(()), "mask": ...}))


def without_gradient(found: Tensors) -> Tensors:
    """Where it is 0 but for round-off."""
    return {"loss": found["loss"]}


def ours_summed(options: dict[str, Any], temperature: float, inputs: dict) -> Tensors:
    return summed(ours("jsd", options, inputs | {"weights": inputs["mask"].float()}, temperature=temperature))


def summed(found: Tensors) -> Tensors:
    return found | {"loss": found["loss"].sum()}


# --- float64, word by word -------------------------------------------------------------------------------------------

Token = Callable[[list[torch.Tensor], list[float], int, dict], torch.Tensor]


def loops(token: Token, inputs: dict, *, mix: float | None = None) -> Tensors:
    """token: the student's log-probs of each word (scalars with gradient), the teacher's, the target, inputs."""
    leaves = leaves_of(inputs, torch.float64)
    students, teachers = student_logits(leaves), teacher_logits(inputs, mix)
    losses = []
    for student, teacher, target in zip(students, teachers.tolist(), inputs["targets"].tolist(), strict=True):
        log_z = math.log(sum(math.exp(logit) for logit in teacher))
        words = (student - student.exp().sum().log()).unbind()
        losses.append(token(list(words), [logit - log_z for logit in teacher], target, inputs))
    return gradients(torch.stack(losses), leaves, inputs)


def forward(student: list[torch.Tensor], teacher: list[float]) -> Any:
    return sum(math.exp(q) * (q - p) for p, q in zip(student, teacher, strict=True))


def reverse(student: list[torch.Tensor], teacher: list[float]) -> Any:
    return sum(p.exp() * (p - q) for p, q in zip(student, teacher, strict=True))


def teacher_entropy(teacher: list[float]) -> float:
    return -sum(math.exp(q) * q for q in teacher)


def interpolated(fixed: float | None, student: list[torch.Tensor], teacher: list[float], y: int, inputs: dict) -> Any:
    t = inputs["t"] if fixed is None else fixed
    mixed = [math.exp((1 - t) * p.item() + t * q) for p, q in zip(student, teacher, strict=True)]
    return -sum(m / sum(mixed) * p for m, p in zip(mixed, student, strict=True))


def gated(h_max: float | None, student: list[torch.Tensor], teacher: list[float], y: int, inputs: dict) -> Any:
    gate = min(max(teacher_entropy(teacher) / (h_max or math.log(len(teacher))), 0.0), 1.0)
    return gate * forward(student, teacher) + (1 - gate) * reverse(student, teacher)


def additive(threshold: float, student: list[torch.Tensor], teacher: list[float], y: int, inputs: dict) -> Any:
    surrogate = -(teacher[y] - student[y].item()) * student[y]
    return surrogate + forward(student, teacher) if teacher_entropy(teacher) > threshold else surrogate


def half(student: list[torch.Tensor], teacher: list[float], y: int, inputs: dict) -> Any:
    total: Any = 0.0
    for p, q in zip(student, teacher, strict=True):
        m = (p.exp() + math.exp(q)).log() - math.log(2)
        total = total + p.exp() * (p - m) / 2 + math.exp(q) * (q - m) / 2
    return total


# --- TAID's schedule -------------------------------------------------------------------------------------------------


def draw_losses(seed: int) -> dict[str, Any]:
    """A run's losses: they fall, with noise, and may rise again."""
    generator = torch.Generator().manual_seed(seed)
    steps = int(torch.randint(5, 200, (), generator=generator))
    fall = torch.exp(-3 * torch.rand((), generator=generator) * torch.linspace(0, 1, steps))
    losses = fall + 0.3 * torch.rand(steps, generator=generator)
    return {"losses": losses.tolist(), "alpha": 0.05, "beta": 0.9, "t_start": 0.3, "t_end": 0.95}


def ours_schedule(inputs: dict) -> Tensors:
    options = {name: inputs[name] for name in ("t_start", "t_end", "alpha", "beta")}
    state, seen = taid.TaidState(inputs["t_start"]), []
    for step, loss in enumerate(inputs["losses"], 1):
        state = taid.advance(state, loss, step, len(inputs["losses"]), **options)
        seen.append([state.t, state.momentum])
    return {"t": torch.tensor(seen)[:, 0], "momentum": torch.tensor(seen)[:, 1]}


def loop_schedule(inputs: dict) -> Tensors:
    losses, t, momentum, ts, momenta = inputs["losses"], inputs["t_start"], 0.0, [], []
    for step, loss in enumerate(losses):
        if step:
            delta = (losses[step - 1] - loss) / (losses[step - 1] + 1e-15)
            momentum = inputs["beta"] * momentum + (1 - inputs["beta"]) * delta
            ahead = t + inputs["alpha"] / (1 + math.exp(-momentum)) * (1 - t)
            line = inputs["t_start"] + (inputs["t_end"] - inputs["t_start"]) * (step + 1) / len(losses)
            t = min(inputs["t_end"], max(line, ahead))
        ts.append(t)
        momenta.append(momentum)
    return {"t": torch.tensor(ts).double(), "momentum": torch.tensor(momenta).double()}


def _trl(what: str, oracle: str, function: Callable, divergence: str, options: dict[str, Any], **more: Any) -> Case:
    return Case(
        f"divergences/{what}",
        f"{TRL} {oracle}",
        draw,
        partial(ours, divergence, options, **more),
        partial(trl, function),
    )


def _chunked(beta: float, temperature: float) -> Case:
    return Case(
        f"divergences/jsd({beta}), chunked, temperature {temperature}",
        f"{TRL} distillation_trainer._chunked_divergence_loss",
        draw_heads,
        partial(ours_summed, {"alpha": beta}, temperature),
        partial(trl_chunked, beta, temperature),
    )


def _loops(what: str, divergence: str, options: dict[str, Any], token: Token, mix: float | None = None) -> Case:
    return Case(
        f"divergences/{what}",
        LOOPS,
        draw if mix is None else draw_heads,
        partial(ours, divergence, options, mix=mix),
        partial(loops, token, mix=mix),
    )


_GKD, _SDPO = "GKDTrainer.generalized_jsd_loss", "sdpo.loss_utils"

CASES = [
    _trl("forward_kl", _GKD, partial(gkd, 0, 1.0), "forward_kl", {}),
    _trl("reverse_kl", _GKD, partial(gkd, 1, 1.0), "reverse_kl", {}),
    *(
        _trl(f"jsd({a}), temperature {x}", _GKD, partial(gkd, a, x), "jsd", {"alpha": a}, temperature=x)
        for a, x in ((0.0, 0.7), (0.1, 1.0), (0.5, 1.0), (0.5, 1.3), (0.9, 1.0), (1.0, 0.7))
    ),
    *(_chunked(beta, temperature) for beta, temperature in ((0.0, 1.0), (0.5, 1.2), (1.0, 1.0))),
    *(
        _trl(f"jsd({a}), SDPO", f"{_SDPO}.compute_full_logit_…", partial(sdpo_full, a), "jsd", {"alpha": a})
        for a in (0.0, 0.3, 1.0)
    ),
    *(
        _trl(
            f"jsd({a}), top-k {'and tail' if tail else 'renormalised'}",
            f"{_SDPO}.compute_topk_…",
            partial(sdpo_top_k, a, tail),
            "jsd",
            {"alpha": a},
            top_k=True,
            tail=tail,
        )
        for a in (0.0, 0.5, 1.0)
        for tail in (True, False)
    ),
    _trl("sampled_token", f"{_SDPO}.compute_sampled_token_…", sdpo_sampled, "sampled_token", {}),
    _loops("taid, scheduled t", "taid", {}, partial(interpolated, None)),
    Case(
        "divergences/taid, t = 0",
        LOOPS,
        draw,
        lambda inputs: without_gradient(ours("taid", {"t": 0.0}, inputs)),
        lambda inputs: without_gradient(loops(partial(interpolated, 0.0), inputs)),
    ),
    _loops("taid, t = 1", "taid", {"t": 1.0}, partial(interpolated, 1.0)),
    _loops("entropy_opd (h_max = log V)", "entropy_opd", {}, partial(gated, None)),
    _loops("entropy_opd (h_max 2.5)", "entropy_opd", {"h_max": 2.5}, partial(gated, 2.5)),
    _loops("entropy_opd_additive", "entropy_opd_additive", {"threshold": 2.3}, partial(additive, 2.3)),
    _loops("entropy_opd_additive (0.8)", "entropy_opd_additive", {}, partial(additive, 0.8)),
    _loops("jsd(0.5), trust region 0.3", "jsd", {}, half, mix=0.3),
    Case("divergences/taid's schedule", LOOPS, draw_losses, ours_schedule, loop_schedule),
]
