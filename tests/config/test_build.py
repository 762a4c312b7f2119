"""What a configuration may say, and what is said about one that may not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from composing import composed

from rlsys.config.assets import asset, bundled_model
from rlsys.config.build import build, leaves, suggest
from rlsys.config.compose import overridden_keys
from rlsys.config.errors import UserError
from rlsys.config.ignored import refuse_ignored


def test_the_quick_start_recipe_composes() -> None:
    config = build(composed())
    assert config.name == "grpo_qwen"
    assert config.rollout.engine == "vllm"
    assert config.data.kind == "arithmetic"


@pytest.mark.parametrize("recipe", sorted(p.stem for p in (asset("configs") / "recipe").glob("*.yaml")))
@pytest.mark.parametrize("rollout", ["vllm", "torch"])
def test_every_recipe_composes_with_either_sampler(recipe: str, rollout: str) -> None:
    build(composed(f"rollout={rollout}", recipe=recipe))


def test_a_composed_run_has_fewer_than_150_leaves() -> None:
    def count(node: Any) -> int:
        return sum(count(v) for v in node.values()) if isinstance(node, dict) and node else 1

    assert count(composed()) < 150
    assert len(set(leaves())) < 150, "all variants of all groups together"


def test_the_reward_follows_the_data_unless_another_is_chosen() -> None:
    assert build(composed("data=gsm8k", "data.path=x")).reward.parts["correct"].use == "gsm8k"
    assert build(composed("data=gsm8k", "data.path=x", "reward=math")).reward.parts["correct"].use == "math_verify"


def test_a_command_line_wins_over_the_recipe() -> None:
    assert build(composed("trainer.lr=0.5", "steps=3")).trainer.lr == 0.5


@pytest.mark.parametrize(
    ("path", "value", "key", "says"),
    [
        ("trainer.lr", "fast", "trainer.lr", "valid number"),
        ("trainer.lr", -1.0, "trainer.lr", "greater than 0"),
        ("trainer.lr", float("nan"), "trainer.lr", "finite"),
        ("steps", True, "steps", "valid integer"),
        ("steps", 1.5, "steps", "valid integer"),
        ("checkpoint.keep_best", 1, "checkpoint.keep_best", "valid boolean"),
        ("data.kind", "gsm9k", "data", "gsm9k"),
        ("data.digits", 9, "data.digits", "less than or equal to 3"),
        ("trainer.backend", "megatron", "trainer.backend", "fsdp"),
        ("reward.parts", {}, "reward.parts", "no parts"),
        ("trainer.micro_batch_tokens", 10, "trainer.micro_batch_tokens", "smaller than one sample"),
        ("trainer.updates_per_step", 5, "trainer.updates_per_step", "cannot be divided"),
        ("model.max_length", 12, "model.max_length", "data.max_prompt_tokens"),
        ("eval.metric", "speed", "eval.metric", "no reward part"),
    ],
)
def test_bad_values_name_their_key(path: str, value: Any, key: str, says: str) -> None:
    raw = copy.deepcopy(composed())
    node = raw
    *parents, last = path.split(".")
    for parent in parents:
        node = node[parent]
    node[last] = value
    with pytest.raises(UserError) as caught:
        build(raw)
    assert key in str(caught.value.where)
    assert says in str(caught.value)


def test_several_problems_are_reported_together() -> None:
    raw = composed()
    raw["steps"], raw["trainer"]["lr"] = "many", "fast"
    with pytest.raises(UserError, match=r"steps.*trainer\.lr"):
        build(raw)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("trainer.lrr", "trainer.lr"),
        ("rollout.samples_per_promt", "rollout.samples_per_prompt"),
        ("lr", "trainer.lr"),
        ("trainer.temperature", "rollout.temperature"),
        ("rollout.n", "rollout.samples_per_prompt"),
        ("data.train_batch_size", "data.prompts_per_step"),
    ],
)
def test_a_misspelt_key_names_the_nearest_right_one(wrong: str, right: str) -> None:
    assert right in (suggest(wrong) or "")


@pytest.mark.parametrize("key", ["top_p", "top_k", "min_p", "repetition_penalty"])
def test_a_truncated_sampling_distribution_is_refused_with_the_reason(key: str) -> None:
    raw = composed()
    raw["rollout"][key] = 0.9
    with pytest.raises(UserError, match="full distribution"):
        build(raw)


@pytest.mark.parametrize(
    "override",
    [
        "algorithm.kl.estimator=k1",
        "algorithm.loss_options.clip_high=0.3",
        "eval.pass_k=1",
        "tracker.project=x",
        "deadlines.reference=1",
    ],
)
def test_an_override_that_would_be_ignored_is_refused(override: str) -> None:
    config = build(composed(override))
    with pytest.raises(UserError, match="no effect"):
        refuse_ignored(config, overridden_keys([override]))


def test_the_same_override_counts_where_it_is_used() -> None:
    overrides = ["algorithm.kl.coef=0.1", "algorithm.kl.estimator=k1"]
    refuse_ignored(build(composed(*overrides)), overridden_keys(["+recipe=grpo_qwen", *overrides]))


def test_choices_of_groups_are_no_keys() -> None:
    assert overridden_keys(["+recipe=grpo_qwen", "data=gsm8k", "trainer.lr=1", "++a.b=2"]) == ["trainer.lr", "a.b"]


def test_an_unknown_bundled_model_is_named() -> None:
    with pytest.raises(UserError, match="no checkpoint called 'algebra'"):
        bundled_model("bundled:algebra")
    assert bundled_model("some/folder") == "some/folder"
