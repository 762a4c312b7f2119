"""What a configuration may say, and what is said about one that may not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from composing import composed

from rlsys.config.assets import asset, bundled_model
from rlsys.config.build import build, suggest
from rlsys.config.compose import overridden_keys
from rlsys.config.errors import UserError
from rlsys.config.ignored import refuse_ignored


def test_the_quick_start_recipe_composes() -> None:
    config = build(composed())
    assert config.name == "grpo_qwen"
    assert config.rollout.engine == "vllm"
    assert config.data.kind == "arithmetic"


RECIPES = sorted(path.stem for path in (asset("configs") / "recipe").glob("*.yaml"))


def leaf_count(node: Any) -> int:
    return sum(leaf_count(value) for value in node.values()) if isinstance(node, dict) and node else 1


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("rollout", ["vllm", "torch"])
def test_every_recipe_composes_with_either_sampler(recipe: str, rollout: str) -> None:
    raw = composed(f"rollout={rollout}", recipe=recipe)
    config = build(raw)
    assert config.name == recipe
    assert leaf_count(raw) < 150, "no more than a reader can know"


@pytest.mark.parametrize("data", ["arithmetic", "gsm8k", "file", "reasoning_gym"])
def test_a_run_on_any_data_has_fewer_than_150_leaves(data: str) -> None:
    given = {"gsm8k": ["data.path=x"], "file": ["data.path=x"], "reasoning_gym": ["data.task=x"]}
    assert leaf_count(composed(f"data={data}", *given.get(data, []))) < 150


@pytest.mark.parametrize(
    ("recipe", "channels"),
    [
        ("grpo_qwen", (1.0, 0.0, 0.0)),
        ("dapo_qwen", (1.0, 0.0, 0.0)),
        ("gspo_qwen", (1.0, 0.0, 0.0)),
        ("ppo_qwen", (1.0, 0.0, 0.0)),
        ("sdpo_qwen", (0.0, 1.0, 0.0)),
        ("opsd_qwen", (0.0, 1.0, 0.0)),
        ("composer_qwen", (1.0, 0.1, 0.05)),
    ],
)
def test_a_recipe_s_channels_have_the_weights_of_its_algorithm(recipe: str, channels: tuple[float, ...]) -> None:
    algorithm = build(composed(recipe=recipe)).algorithm
    assert (algorithm.weight, algorithm.distillation.weight, algorithm.preference.weight) == channels


def test_the_reward_follows_the_data_unless_another_is_chosen() -> None:
    assert build(composed("data=gsm8k", "data.path=x")).reward.parts["correct"].use == "gsm8k"
    assert build(composed("data=file", "data.path=x", "reward=code")).reward.parts["correct"].use == "code"
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
        ("algorithm.kl.target", 0.1, "algorithm.kl.target", "penalty on the reward only"),
        ("algorithm.schedule", [[1, 0.5, 2]], "algorithm.schedule.0", "at most 2 items"),
        ("algorithm.schedule", [[5, 1.0], [1, 0.0]], "algorithm.schedule", "do not rise"),
        ("algorithm.distillation.schedule", [[5, 1.0], [5, 0.0]], "algorithm.distillation.schedule", "do not rise"),
        ("algorithm.weight", -1.0, "algorithm.weight", "greater than or equal to 0"),
        ("algorithm.entropy_quantile", 1.5, "algorithm.entropy_quantile", "less than or equal to 1"),
        ("algorithm.distillation.teacher", "student", "algorithm.distillation.teacher", "frozen"),
        ("algorithm.filters", {"zero_variance": None}, "algorithm.filters.zero_variance", "dictionary"),
        ("hints.source", ["oracle"], "hints.source.0", "sibling"),
        ("replay.source", "memory", "replay.source", "agreement"),
        ("guards.limits", {"kl": "high"}, "guards.limits.kl", "valid number"),
        ("guards.dead_steps", 0, "guards.dead_steps", "greater than 0"),
    ],
)
def test_bad_values_name_their_key(path: str, value: Any, key: str, says: str) -> None:
    raw = copy.deepcopy(composed())
    node = raw
    *parents, last = path.split(".")
    for parent in parents:
        node[parent] = node[parent] or {}  # a group that composes to null
        node = node[parent]
    node[last] = value
    with pytest.raises(UserError) as caught:
        build(raw)
    assert key in str(caught.value.where)
    assert says in str(caught.value)


KL_IN_REWARD = ["algorithm.kl.coef=0.1", "algorithm.kl.placement=reward"]


def test_a_penalty_on_the_reward_has_no_gradient_to_correct_and_may_have_a_target() -> None:
    with pytest.raises(UserError, match="has none") as error:
        build(composed(*KL_IN_REWARD, "algorithm.kl.corrected=true"))
    assert error.value.where == "algorithm.kl.corrected"
    with pytest.raises(UserError, match="differs from k3 in its gradient only"):
        build(composed(*KL_IN_REWARD, "algorithm.kl.estimator=k3+"))
    assert build(composed(*KL_IN_REWARD, "algorithm.kl.target=0.1")).algorithm.kl.target == 0.1
    assert build(composed("algorithm.kl.coef=0.1", "algorithm.kl.corrected=true")).algorithm.kl.corrected


TEACHER, PAIRS = ["algorithm.distillation.weight=0.1", "hints.max_tokens=64"], ["algorithm.preference.weight=0.1"]
FILE = ["replay.source=file", "replay.path=x"]


@pytest.mark.parametrize(
    ("overrides", "tokens"),
    [
        ([], 24),  # 16 of the prompt and 8 of the response
        (TEACHER, 2 * 72),  # the response twice, once behind 64 tokens
        (["algorithm.distillation.hybrid=0.5", "hints.max_tokens=64"], 2 * 72),
        (PAIRS, 3 * 24),  # the response and both sides
        ([*PAIRS, *FILE], 2 * 24),  # a row has a response or a pair
        ([*PAIRS, "algorithm.weight=0"], 2 * 24),  # no channel reads the response
        ([*TEACHER, *PAIRS], 4 * 72),
        ([*TEACHER, *PAIRS, "algorithm.weight=0"], 4 * 72),
        ([*TEACHER, *PAIRS, *FILE], 2 * 72),
    ],
)
def test_a_micro_batch_has_room_for_all_sequences_of_a_row(overrides: list[str], tokens: int) -> None:
    build(composed(*overrides, f"trainer.micro_batch_tokens={tokens}"))
    with pytest.raises(UserError, match="micro-batch") as error:
        build(composed(*overrides, f"trainer.micro_batch_tokens={tokens - 1}"))
    assert error.value.where == "trainer.micro_batch_tokens"
    assert f"={tokens} or more" in str(error.value.fix)


def test_a_mapping_takes_the_place_of_the_recipe_s() -> None:
    """With Hydra alone it would be merged into what is there, and could not empty it."""

    def filters(*overrides: str) -> dict[str, Any]:
        return build(composed(*overrides, recipe="dapo_qwen")).algorithm.filters

    assert filters() == {"zero_variance": {}}
    assert filters("algorithm.filters={}") == {}
    assert filters("algorithm.filters={difficulty: {low: 0.1}}") == {"difficulty": {"low": 0.1}}
    assert filters("algorithm.filters.difficulty={low: 0.1}") == {"zero_variance": {}, "difficulty": {"low": 0.1}}
    assert build(composed("guards.limits={kl: null}")).guards.limits == {"kl": None}


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
        "trainer.critic.lr=1e-4",
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
