"""Keys that a chosen combination ignores: an override of one is an error with a suggestion, never silence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rlsys.config.errors import UserError
from rlsys.config.schema import RunConfig


def _own(name: str) -> bool:
    """Whether a plug-in is somebody's own, by its import path: what it reads is not known here."""
    return "." in name or ":" in name


def _no_adapter(c: RunConfig) -> bool:
    return c.model.lora is None


def _no_kl(c: RunConfig) -> bool:
    return c.algorithm.kl.coef == 0


def _no_eval(c: RunConfig) -> bool:
    return c.eval.every == 0


def _one_update(c: RunConfig) -> bool:
    return c.trainer.updates_per_step == 1 and c.algorithm.old_logprobs == "trainer"


def _never_clips(c: RunConfig) -> bool:
    clips = ("ppo_clip", "dapo", "gspo", "gmpo", "decoupled_ppo", "clip_cov")
    return c.algorithm.loss in clips and _one_update(c)


def _loss_options_that_wait(c: RunConfig) -> tuple[str, ...]:
    """Options of the policy loss that have no gradient at π = π_old, and so none with one update a step."""
    if not _one_update(c):
        return ()
    given = c.algorithm.loss_options
    match c.algorithm.loss:
        case "cispo":
            # A window holds the ratio 1 whatever its bounds; an absolute cap below 1 does not.
            below_one = given.get("cap") == "absolute" and (given.get("clip_high") or 1.0) < 1
            return () if below_one else ("cap", "clip_low", "clip_high")
        case "sapo":
            return ("tau_positive", "tau_negative")
        case "kl_cov":
            return ("cov_ratio", "kl_coef")
    return ("clip_low", "clip_high", "dual_clip") if _never_clips(c) else ()


def _waits(option: str) -> Callable[[RunConfig], bool]:
    return lambda c: option in _loss_options_that_wait(c)


def _taid_options(c: RunConfig) -> dict[str, Any]:
    """Empty where the divergence is another."""
    distillation = c.algorithm.distillation
    return distillation.divergence_options if distillation.divergence == "taid" else {}


def _no_adaptive_taid(c: RunConfig) -> bool:
    """Whether the straight line alone says what TAID's t is: there is no room above it."""
    options = _taid_options(c)
    return options.get("t_start", 0.4) == options.get("t_end", 1.0)


def _no_policy(c: RunConfig) -> bool:
    return c.algorithm.weight == 0


def _no_distillation(c: RunConfig) -> bool:
    return c.algorithm.distillation.weight == 0


def no_teacher(c: RunConfig) -> bool:
    return _no_distillation(c) and (c.algorithm.distillation.hybrid is None or _no_policy(c))


def _no_preference(c: RunConfig) -> bool:
    return c.algorithm.preference.weight == 0


def _no_critic(c: RunConfig) -> bool:
    return _no_policy(c) or (c.algorithm.advantage != "gae" and not _own(c.algorithm.advantage))


def _no_response(c: RunConfig) -> bool:
    """No channel looks at the sampled responses, only at pairs."""
    return _no_policy(c) and _no_distillation(c)


def _not_compared(c: RunConfig) -> bool:
    """Nothing looks at the sampler's log-probs beside the trainer's."""
    return _no_response(c) and (c.trainer.updates_per_step == 1 or c.algorithm.old_logprobs == "sampler")


def _no_ratio(c: RunConfig) -> bool:
    """Nothing looks at π_old."""
    return _no_policy(c) and (_no_distillation(c) or c.algorithm.distillation.ratio_cap is None)


def _teacher_is_not(kind: str) -> Callable[[RunConfig], bool]:
    return lambda c: no_teacher(c) or c.algorithm.distillation.teacher != kind


def _no_hint_of(*sources: str) -> Callable[[RunConfig], bool]:
    return lambda c: no_teacher(c) or not set(sources) & set(c.hints.source)


def _pairs_not_of(*sources: str) -> Callable[[RunConfig], bool]:
    return lambda c: _no_preference(c) or c.replay.source not in sources


def _no_reference(c: RunConfig) -> bool:
    policy = not _no_policy(c) and (not _no_kl(c) or _own(c.algorithm.loss))
    return not policy and (_no_preference(c) or c.algorithm.preference.loss == "simpo")


def _kl_is_zero(c: RunConfig) -> bool:
    """Nothing is measured that could exceed a limit: no KL to a reference, and none of π to π_old."""
    return _no_policy(c) or (_no_kl(c) and _one_update(c) and not _own(c.algorithm.loss))


_CLIPS = (
    "with one optimiser step a batch the ratio is always 1 and nothing is clipped: "
    "set trainer.updates_per_step=2 or more"
)

_WAITS = (
    "with one optimiser step a batch π is π_old, where this has no gradient: set trainer.updates_per_step=2 or more"
)
_LINE = "TAID's t does not adapt: leave algorithm.distillation.divergence_options.{} out"

_NO_CHANNEL = "the channel is off: set {}.weight to more than 0"

# (key, when the chosen combination ignores it, what to do). A key stands for everything below it too.
_IGNORED: list[tuple[str, Callable[[RunConfig], bool], str]] = [
    ("algorithm.kl.estimator", _no_kl, "set algorithm.kl.coef to more than 0"),
    ("algorithm.kl.placement", _no_kl, "set algorithm.kl.coef to more than 0"),
    (
        "deadlines.reference",
        lambda c: not _no_adapter(c),
        "the trainer without its adapter is the reference: set deadlines.train",
    ),
    (
        "deadlines.reference",
        _no_reference,
        "no reference worker runs: set algorithm.kl.coef to more than 0, or use a preference loss that reads it",
    ),
    (
        "algorithm.kl.horizon",
        lambda c: _no_kl(c) or c.algorithm.kl.target is None,
        "the coefficient is fixed: set algorithm.kl.target",
    ),
    ("algorithm.kl.target", _no_kl, "set algorithm.kl.coef to more than 0"),
    ("algorithm.kl.corrected", _no_kl, "set algorithm.kl.coef to more than 0"),
    *(
        (f"algorithm.{key}", _no_policy, "the policy-gradient channel is off: set algorithm.weight to more than 0")
        for key in (
            "advantage",
            "advantage_options",
            "loss",
            "loss_options",
            "aggregation",
            "schedule",
            "entropy_coef",
            "entropy_quantile",
            "functional_tokens",
            "correction",
            "kl",
            "distillation.hybrid",
        )
    ),
    ("reward.permute", _no_policy, "only advantages are made of permuted rewards: set algorithm.weight to more than 0"),
    ("algorithm.old_logprobs", _no_ratio, "nothing reads π_old: set algorithm.weight to more than 0"),
    (
        "rollout.mismatch_alarm",
        _not_compared,
        "no channel looks at the responses: set algorithm.weight or algorithm.distillation.weight to more than 0",
    ),
    ("algorithm.max_refills", lambda c: not c.algorithm.filters, "no group is filtered: set algorithm.filters"),
    *(
        (
            f"trainer.critic.{key}",
            _no_critic,
            "no critic runs: set algorithm.advantage=gae, and algorithm.weight to more than 0",
        )
        for key in ("path", "lr", "value_clip", "warmup_steps")
    ),
    ("trainer.critic.value_clip", lambda c: c.trainer.updates_per_step == 1, _CLIPS),
    (
        "trainer.shard_ranks",
        lambda c: c.trainer.backend != "fsdp",
        "ZeRO-3 spreads weights over all ranks: leave it out, or use trainer=fsdp",
    ),
    *(
        (f"algorithm.distillation.{key}", _no_distillation, _NO_CHANNEL.format("algorithm.distillation"))
        for key in (
            "schedule",
            "divergence",
            "divergence_options",
            "top_k",
            "tail",
            "ratio_cap",
            "aggregation",
        )
    ),
    (
        "algorithm.distillation.tail",
        lambda c: c.algorithm.distillation.top_k is None,
        "the whole vocabulary counts: set algorithm.distillation.top_k",
    ),
    ("algorithm.distillation.ratio_cap", _one_update, _CLIPS),
    ("algorithm.distillation.teacher", no_teacher, _NO_CHANNEL.format("algorithm.distillation")),
    ("algorithm.distillation.teacher_rate", _teacher_is_not("ema"), "set algorithm.distillation.teacher=ema"),
    (
        "algorithm.distillation.teacher_mix",
        _teacher_is_not("trust_region"),
        "set algorithm.distillation.teacher=trust_region",
    ),
    ("algorithm.distillation.teacher_path", _teacher_is_not("model"), "set algorithm.distillation.teacher=model"),
    ("hints", no_teacher, "nothing has a teacher: " + _NO_CHANNEL.format("algorithm.distillation")),
    ("hints.threshold", _no_hint_of("sibling"), "it is about siblings: put sibling into hints.source"),
    ("hints.strip_thinking", _no_hint_of("sibling"), "it is about siblings: put sibling into hints.source"),
    ("hints.solution_template", _no_hint_of("sibling", "reference"), "put sibling or reference into hints.source"),
    ("hints.reference_key", _no_hint_of("reference"), "put reference into hints.source"),
    ("hints.hint_key", _no_hint_of("hint"), "put hint into hints.source"),
    ("hints.hint_template", _no_hint_of("hint"), "put hint into hints.source"),
    ("hints.feedback_template", _no_hint_of("feedback"), "put feedback into hints.source"),
    ("hints.feedback_with_solution", _no_hint_of("feedback"), "put feedback into hints.source"),
    (
        "hints.feedback_with_solution",
        _no_hint_of("sibling", "reference", "hint"),
        "feedback is all that is shown: put sibling, reference or hint into hints.source",
    ),
    (
        "hints.instruction",
        _no_hint_of("sibling", "reference", "hint", "feedback"),
        "a hint to a turn stands in the response: put another source into hints.source",
    ),
    ("hints.turn_template", _no_hint_of("turn"), "put turn into hints.source"),
    *(
        (f"algorithm.preference.{key}", _no_preference, _NO_CHANNEL.format("algorithm.preference"))
        for key in ("schedule", "loss", "loss_options")
    ),
    ("replay", _no_preference, _NO_CHANNEL.format("algorithm.preference")),
    ("replay.path", _pairs_not_of("file", "agreement"), "set replay.source=file or agreement"),
    ("replay.pairs_per_step", _pairs_not_of("file", "agreement"), "set replay.source=file or agreement"),
    ("replay.agreement_threshold", _pairs_not_of("agreement"), "set replay.source=agreement"),
    ("replay.min_gap", _pairs_not_of("groups"), "set replay.source=groups"),
    ("replay.eval_path", _no_eval, "set eval.every to more than 0"),
    *(
        (f"guards.limits.{name}", _no_critic, "it watches the critic: set algorithm.advantage=gae")
        for name in ("variance", "distance", "variance_start", "distance_start")
    ),
    (
        "guards.limits.kl",
        _kl_is_zero,
        "no KL is there to be limited: set algorithm.weight to more than 0, and algorithm.kl.coef to more than 0 or "
        "trainer.updates_per_step to 2 or more",
    ),
    (
        "guards.limits.entropy",
        _no_response,
        "no channel looks at the responses: set algorithm.weight or algorithm.distillation.weight to more than 0",
    ),
    *(
        (f"algorithm.loss_options.{option}", _waits(option), _CLIPS)
        for option in ("cap", "clip_low", "clip_high", "dual_clip")
    ),
    *(
        (f"algorithm.loss_options.{option}", _waits(option), _WAITS)
        for option in ("tau_positive", "tau_negative", "cov_ratio", "kl_coef")
    ),
    *(
        (
            f"algorithm.distillation.divergence_options.{option}",
            lambda c: _taid_options(c).get("t") is not None,
            _LINE.format("t"),
        )
        for option in ("t_start", "t_end", "alpha", "beta")
    ),
    *(
        (f"algorithm.distillation.divergence_options.{option}", _no_adaptive_taid, _LINE.format("t_start"))
        for option in ("alpha", "beta")
    ),
    (
        "algorithm.distillation.divergence_options.beta",
        lambda c: _taid_options(c).get("alpha") == 0,
        _LINE.format("alpha"),
    ),
    (
        "algorithm.advantage_options.eps",
        lambda c: c.algorithm.advantage_options.get("std") == "none",
        "it is added to the standard deviation: leave algorithm.advantage_options.std=none out",
    ),
    (
        "algorithm.advantage_options.eps",
        lambda c: c.algorithm.advantage == "grpo_passk" and c.algorithm.advantage_options.get("normalize") is False,
        "it is added to the standard deviation: leave algorithm.advantage_options.normalize=false out",
    ),
    ("eval.pass_k", lambda c: c.eval.samples == 0, "set eval.samples to the number of responses a problem"),
    ("eval.samples", _no_eval, "set eval.every to more than 0"),
    ("eval.problems", _no_eval, "set eval.every to more than 0"),
    ("eval.metric", _no_eval, "set eval.every to more than 0"),
    (
        "checkpoint.keep_best",
        _no_eval,
        "without held-out evaluation no checkpoint is the best: set eval.every to more than 0",
    ),
    ("data.eval_path", _no_eval, "set eval.every to more than 0"),
    ("data.eval_size", _no_eval, "set eval.every to more than 0"),
]


# (key, whether a cluster with so many GPUs ignores it, what to do). Recipes may say both: they run on either.
_IGNORED_ON: list[tuple[str, Callable[[int], bool], str]] = [
    ("rollout.kv_cache_gib", lambda gpus: gpus > 0, "on a GPU set rollout.gpu_memory_fraction"),
    ("rollout.gpu_memory_fraction", lambda gpus: gpus == 0, "without a GPU set rollout.kv_cache_gib"),
    ("trainer.offload", lambda gpus: gpus == 0, "everything is in main memory already: leave it out"),
]


def refuse_ignored_on(gpus: int, overridden: Iterable[str]) -> None:
    """Refuses an override that a cluster with ``gpus`` GPUs would ignore; see :func:`refuse_ignored`."""
    for key in overridden:
        for ignored, holds, fix in _IGNORED_ON:
            if key == ignored and holds(gpus):
                where = f"a cluster with {gpus} GPUs" if gpus else "a cluster without GPUs"
                raise UserError(f"{key} has no effect on {where}", where=key, fix=fix)


def refuse_ignored(config: RunConfig, overridden: Iterable[str]) -> None:
    """Refuses an override that the chosen combination would ignore.

    Args:
        overridden: dotted keys that the user set himself.

    Raises:
        UserError: naming the key and what would make it count.
    """
    for key in _with_members(config, overridden):
        for ignored, holds, fix in _IGNORED:
            if (key == ignored or key.startswith(ignored + ".")) and holds(config):
                raise UserError(f"{key} has no effect in this combination", where=key, fix=fix)


def _with_members(config: RunConfig, keys: Iterable[str]) -> Iterator[str]:
    """The keys, and where one is a mapping's those of its members."""
    for key in keys:
        yield key
        value: Any = config
        for name in key.split("."):
            value = getattr(value, name, None)
        if isinstance(value, dict):
            yield from (f"{key}.{member}" for member in value)
