"""From composed YAML to a checked :class:`RunConfig`: names, types, ranges, then what must hold between fields."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Union, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from rlsys.config import clusters, schema
from rlsys.config.errors import UserError
from rlsys.config.ignored import no_teacher
from rlsys.config.off_policy import check_controller
from rlsys.config.sampler import check_sampler
from rlsys.config.schema import RunConfig
from rlsys.config.values import FOLDED

# Names that users bring from other frameworks, and what they find here.
_TRUNCATED = (
    "training samples from the policy's full distribution: a truncated or penalised distribution is not the one whose "
    "log-probs the trainer computes, and the importance ratios would be biased. Leave it out; "
    "rollout.temperature is supported"
)
_KNOWN_ELSEWHERE = {
    "rollout.top_p": _TRUNCATED,
    "rollout.top_k": _TRUNCATED,
    "rollout.min_p": _TRUNCATED,
    "rollout.repetition_penalty": _TRUNCATED,
    "rollout.presence_penalty": _TRUNCATED,
    "rollout.frequency_penalty": _TRUNCATED,
    "model.max_length": "the longest sequence is data.max_prompt_tokens + data.max_response_tokens",
    "rollout.n": "use rollout.samples_per_prompt",
    "data.train_batch_size": "use data.prompts_per_step (prompt groups in a step, not samples)",
    "trainer.micro_batch_size": "use trainer.micro_batch_tokens (a budget in tokens, not in rows)",
    "trainer.mini_batch_size": "use trainer.updates_per_step (optimiser steps that a step's groups are divided over)",
    "trainer.learning_rate": "use trainer.lr",
    "data.task_seed": "use data.options.seed",
}


def variants(annotation: Any) -> list[type]:
    """The dataclasses that a field's annotation allows: one, or those of a discriminated union."""
    if get_origin(annotation) is typing.Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        return [t for t in get_args(annotation) if isinstance(t, type) and dataclasses.is_dataclass(t)]
    return [annotation] if isinstance(annotation, type) and dataclasses.is_dataclass(annotation) else []


def _folded(annotation: Any) -> bool:
    return FOLDED in getattr(annotation, "__metadata__", ())


def leaves(cls: type = RunConfig, prefix: str = "") -> Iterator[str]:
    """Dotted names of every config leaf, all variants included."""
    for name, annotation in typing.get_type_hints(cls, include_extras=True).items():
        nested = variants(annotation)
        if not nested:
            yield f"{prefix}{name}"
        for variant in nested:
            yield from leaves(variant, f"{prefix}{name}.")


def optional_groups(cls: type = RunConfig, prefix: str = "") -> Iterator[str]:
    """Dotted names of the groups that may be null: off, or as their defaults say."""
    for name, annotation in typing.get_type_hints(cls, include_extras=True).items():
        for variant in (nested := variants(annotation)):
            yield from optional_groups(variant, f"{prefix}{name}.")
        if nested and (type(None) in get_args(annotation) or _folded(annotation)):
            yield f"{prefix}{name}"


def defaults(cls: type) -> dict[str, Any]:
    """A dataclass's defaults as plain YAML values; required fields are ``???`` (Hydra's word for a missing value)."""
    result: dict[str, Any] = {}
    hints = typing.get_type_hints(cls, include_extras=True)
    for f in dataclasses.fields(cls):
        nested = variants(hints[f.name])
        if f.default is None or _folded(hints[f.name]):  # a group that is off, too
            result[f.name] = None
        elif len(nested) == 1:
            result[f.name] = defaults(nested[0])
        elif nested:
            continue  # a union: the config group says which
        elif f.default is not dataclasses.MISSING:
            result[f.name] = f.default
        elif f.default_factory is not dataclasses.MISSING:
            result[f.name] = f.default_factory()
        else:
            result[f.name] = "???"
    return result


def suggest(key: str) -> str | None:
    """What to write instead of the unknown ``key``."""
    if key in _KNOWN_ELSEWHERE:
        return _KNOWN_ELSEWHERE[key]
    known = sorted(set(leaves()))
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if not near:  # the right name in the wrong group
        last = key.rpartition(".")[2]
        tails = {name.rpartition(".")[2]: name for name in known}
        near = [tails[t] for t in difflib.get_close_matches(last, tails, n=1, cutoff=0.75)]
    return f"did you mean '{near[0]}'?" if near else None


_ADAPTER: TypeAdapter[RunConfig] | None = None


def _adapter() -> TypeAdapter[RunConfig]:
    global _ADAPTER
    if _ADAPTER is None:
        for cls in (*vars(schema).values(), *vars(clusters).values()):
            if isinstance(cls, type) and dataclasses.is_dataclass(cls):
                setattr(cls, "__pydantic_config__", ConfigDict(extra="forbid"))  # noqa: B010 - no declared attribute
        _ADAPTER = TypeAdapter(RunConfig)
    return _ADAPTER


def build(raw: Mapping[str, Any]) -> RunConfig:
    """Checks and freezes a composed configuration.

    Raises:
        UserError: an unknown, missing, ill-typed or out-of-range key (all of them, one a line), or fields that
            contradict each other.
    """
    try:
        config = _adapter().validate_python(dict(raw))
    except ValidationError as error:
        problems = [_describe(e) for e in error.errors()]
        keys = ", ".join(key for key, _, _ in problems)
        fixes = [fix for _, _, fix in problems if fix]
        raise UserError(
            "; ".join(f"{key}: {what}" for key, what, _ in problems), where=keys, fix="; ".join(fixes) or None
        ) from None
    cross_check(config)
    return config


def _describe(error: ErrorDetails) -> tuple[str, str, str | None]:
    tags = {cls_tag for _, cls_tag in _discriminators()}
    parts = [str(p) for i, p in enumerate(error["loc"]) if not (i == 1 and p in tags)]
    key = ".".join(parts)
    if error["type"] == "unexpected_keyword_argument":
        return key, "there is no such key", suggest(key)
    if error["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return key, "is required", f"set {key}=…"
    return key, f"{error['msg'].lower()}, got {error['input']!r}", None


def _discriminators() -> list[tuple[str, str]]:
    return [
        (group, get_args(typing.get_type_hints(cls)[tag])[0])
        for group, tag in (("data", "kind"), ("rollout", "engine"), ("controller", "kind"), ("cluster", "kind"))
        for cls in variants(typing.get_type_hints(RunConfig, include_extras=True)[group])
    ]


def cross_check(config: RunConfig) -> None:
    """What must hold between fields, before anything is started.

    Raises:
        UserError: at the first contradiction.
    """
    _check_trainer(config)
    _check_reward(config)
    check_sampler(config)
    _check_kl(config)
    _check_schedules(config)
    _check_budget(config)
    check_controller(config)


def _check_trainer(config: RunConfig) -> None:
    data, trainer = config.data, config.trainer
    sample = data.max_prompt_tokens + data.max_response_tokens
    together = trainer.sequence_ranks  # ranks that hold one sample
    if trainer.micro_batch_tokens * together < sample:
        raise UserError(
            f"the token budget of a micro-batch ({trainer.micro_batch_tokens * together}) is smaller than one sample "
            f"({data.max_prompt_tokens} prompt + {data.max_response_tokens} response tokens)",
            where="trainer.micro_batch_tokens",
            fix=f"set trainer.micro_batch_tokens={-(-sample // together)} or more, or shorten data.max_response_tokens",
        )
    if trainer.ranks is not None and trainer.shard_ranks is not None and trainer.ranks % trainer.shard_ranks:
        raise UserError(
            f"{trainer.ranks} trainer ranks cannot be divided into groups of {trainer.shard_ranks}",
            where="trainer.shard_ranks",
            fix=f"choose a divisor of {trainer.ranks}",
        )
    if together > 1 and trainer.rows == "padded":
        raise UserError(
            "ranks hold packed rows together, and rows are padded",
            where="trainer.sequence_ranks",
            fix="set trainer.rows=packed or shared",
        )
    if trainer.backend == "fsdp" and trainer.offload == "optimizer":
        raise UserError(
            "FSDP2 keeps the optimiser where the weights are: it offloads both or neither",
            where="trainer.offload",
            fix="trainer.offload=all, or trainer=zero3",
        )
    if data.prompts_per_step % trainer.updates_per_step:
        raise UserError(
            f"{data.prompts_per_step} prompt groups cannot be divided over {trainer.updates_per_step} optimiser steps",
            where="trainer.updates_per_step",
            fix="choose a divisor of data.prompts_per_step",
        )
    if trainer.critic.warmup_steps >= config.steps:
        raise UserError(
            f"the critic warms up for {trainer.critic.warmup_steps} of {config.steps} steps: the policy never learns",
            where="trainer.critic.warmup_steps",
            fix=f"set it to less than {config.steps}, or steps to more",
        )


def _check_reward(config: RunConfig) -> None:
    if not config.reward.parts:
        raise UserError(
            "the reward has no parts",
            where="reward.parts",
            fix="choose a reward group, such as reward=gsm8k",
        )
    for name in ("mean", "std"):
        if name in config.reward.parts:
            raise UserError(
                f"a reward part cannot be called '{name}': the metric reward/{name} is that of the whole reward",
                where=f"reward.parts.{name}",
                fix="give it another name",
            )
    if config.eval.metric is not None and config.eval.metric not in config.reward.parts:
        raise UserError(
            f"there is no reward part '{config.eval.metric}'",
            where="eval.metric",
            fix=f"one of: {', '.join(config.reward.parts)}",
        )
    if config.eval.samples and config.eval.pass_k > config.eval.samples:
        raise UserError(
            f"pass@{config.eval.pass_k} needs that many samples a problem, not {config.eval.samples}",
            where="eval.pass_k",
            fix=f"set eval.samples={config.eval.pass_k} or more",
        )


def _check_kl(config: RunConfig) -> None:
    kl = config.algorithm.kl
    if kl.coef and kl.placement == "reward" and kl.estimator == "k3+":
        raise UserError(
            "k3+ differs from k3 in its gradient only, and a penalty on the reward has none",
            where="algorithm.kl.estimator",
            fix="use k1, k2 or k3, or algorithm.kl.placement=loss",
        )
    if kl.coef and kl.placement == "reward" and kl.corrected:
        raise UserError(
            "the correction of the KL is one of its gradient, and a penalty on the reward has none",
            where="algorithm.kl.corrected",
            fix="leave it out, or set algorithm.kl.placement=loss",
        )
    if kl.target is not None and kl.placement == "loss":
        raise UserError(
            "the coefficient adapts as a penalty on the reward only",
            where="algorithm.kl.target",
            fix="set algorithm.kl.placement=reward, or leave the target out",
        )


def _check_schedules(config: RunConfig) -> None:
    algorithm = config.algorithm
    for key, points in (
        ("algorithm", algorithm.schedule),
        ("algorithm.distillation", algorithm.distillation.schedule),
        ("algorithm.preference", algorithm.preference.schedule),
    ):
        steps = [point[0] for point in points]
        if steps != sorted(set(steps)):
            raise UserError(
                f"the steps of the points {points} do not rise",
                where=f"{key}.schedule",
                fix="give [step, factor] in the order of the steps, each step once",
            )


def _check_budget(config: RunConfig) -> None:
    """Sequences of a row stay together in a micro-batch: a response, the same behind a teacher's prompt, a pair."""
    data, algorithm = config.data, config.algorithm
    longest = data.max_prompt_tokens + data.max_response_tokens
    count = int(algorithm.weight > 0 or algorithm.distillation.weight > 0)
    if not no_teacher(config):
        longest, count = max(longest, config.hints.max_tokens + data.max_response_tokens), count + 1
    if algorithm.preference.weight:
        count = count + 2 if config.replay.source == "groups" else max(count, 2)
    ranks = config.trainer.sequence_ranks  # that hold a row together
    if count > 1 and config.trainer.micro_batch_tokens * ranks < count * longest:
        teacher = "" if no_teacher(config) else ", or shorten hints.max_tokens"
        raise UserError(
            f"a row may have {count} sequences of {longest} tokens, which stay together, and a micro-batch "
            f"{config.trainer.micro_batch_tokens * ranks} tokens",
            where="trainer.micro_batch_tokens",
            fix=f"set trainer.micro_batch_tokens={-(-count * longest // ranks)} or more{teacher}",
        )
