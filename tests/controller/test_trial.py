"""What is found out about a configuration's maths and inputs before anything is started."""

from __future__ import annotations

import pytest
from composing import run_config, with_leaves

from rlsys.config.assets import asset
from rlsys.config.errors import UserError
from rlsys.controller.inputs import check_inputs
from rlsys.controller.trial import try_out

DISTILLATION = "algorithm.distillation"
RECIPES = sorted(path.stem for path in (asset("configs") / "recipe").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_passes(recipe: str) -> None:
    inputs = check_inputs(run_config("eval.problems=4", "rollout=torch", recipe=recipe))
    assert inputs.max_length == 24


def test_one_sample_a_prompt_is_too_few_only_where_samples_are_compared() -> None:
    alone = {"rollout.samples_per_prompt": 1}
    with pytest.raises(UserError, match="one sample per prompt") as error:
        try_out(with_leaves(run_config(), alone))
    assert error.value.where == "rollout.samples_per_prompt"
    try_out(with_leaves(run_config(recipe="opsd_qwen"), alone))


@pytest.mark.parametrize(
    ("teacher", "option", "value", "same"),
    [
        ("ema", "teacher_rate", 0.0, "frozen"),
        ("ema", "teacher_rate", 1.0, "self"),
        ("trust_region", "teacher_mix", 0.0, "frozen"),
        ("trust_region", "teacher_mix", 1.0, "self"),
    ],
)
def test_a_teacher_that_is_one_of_another_name_is_refused(teacher: str, option: str, value: float, same: str) -> None:
    config = with_leaves(run_config(recipe="sdpo_qwen"), {f"{DISTILLATION}.teacher": teacher})
    try_out(config)
    with pytest.raises(UserError, match=f"is '{same}'") as error:
        try_out(with_leaves(config, {f"{DISTILLATION}.{option}": value}))
    assert error.value.where == f"{DISTILLATION}.{option}"
    nobody_taught = {f"{DISTILLATION}.weight": 0.0, "algorithm.weight": 1.0}
    try_out(with_leaves(config, {f"{DISTILLATION}.{option}": value} | nobody_taught))


@pytest.mark.parametrize(
    ("leaves", "says"),
    [
        ({"algorithm.preference.weight": 0.1}, "pairs are made of"),
        ({f"{DISTILLATION}.weight": 0.1, "hints.source": ["hint", "sibling"]}, "sibling"),
        ({f"{DISTILLATION}.hybrid": 0.5, "hints.source": ["feedback"]}, "feedback"),
    ],
)
def test_a_control_whose_other_channels_see_the_true_rewards_is_refused(leaves: dict[str, object], says: str) -> None:
    config = run_config("reward.permute=true", "trainer.micro_batch_tokens=100000")
    try_out(config)
    with pytest.raises(UserError, match=says) as error:
        try_out(with_leaves(config, leaves))
    assert error.value.where == "reward.permute"
    try_out(with_leaves(config, leaves | {"reward.permute": False}))
    try_out(with_leaves(config, leaves | {"hints.source": ["hint"], "replay.source": "file"}))


def test_a_loss_without_channels_is_refused() -> None:
    with pytest.raises(UserError, match="no channel") as error:
        try_out(with_leaves(run_config(), {"algorithm.weight": 0.0}))
    assert error.value.where == "algorithm.weight"


@pytest.mark.parametrize(
    ("leaf", "value", "where"),
    [
        ("algorithm.loss", "ppo_klip", "algorithm.loss"),
        ("algorithm.advantage_options", {"stdd": "none"}, "algorithm.advantage_options.stdd"),
        ("algorithm.filters", {"difficulty": {"low": 2.0}}, "algorithm.filters.difficulty"),
        ("algorithm.correction", {"tis_token": {"cap": 0.0}}, "algorithm.correction.tis_token.cap"),
        ("algorithm.distillation.divergence", "jds", "algorithm.distillation.divergence"),
        (
            "algorithm.distillation.divergence_options",
            {"alpha": 2.0},
            "algorithm.distillation.divergence_options.alpha",
        ),
        ("algorithm.preference.loss_options", {"beta": -1.0}, "algorithm.preference.loss_options.beta"),
    ],
)
def test_what_a_plug_in_says_about_its_options_is_said_before_the_run(leaf: str, value: object, where: str) -> None:
    config = run_config(recipe="composer_qwen")
    try_out(config)
    with pytest.raises(UserError) as error:
        try_out(with_leaves(config, {leaf: value}))
    assert error.value.where.startswith(where)
