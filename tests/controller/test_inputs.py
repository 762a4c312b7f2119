"""Models beside the policy: they are found, read its tokens and have room for its sequences, or the run is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from composing import run_config
from model_folders import make_model_folder

from rlsys.config.errors import UserError
from rlsys.config.schema import RunConfig
from rlsys.controller.inputs import check_inputs

CRITIC, TEACHER = "trainer.critic.path", "algorithm.distillation.teacher_path"
PROMPT, RESPONSE, HINTS = 20, 12, 60


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The policy, one like it with room for prompt and response alone, and a shorter one."""
    root = tmp_path_factory.mktemp("models")
    make_model_folder(root / "policy")
    make_model_folder(root / "short", max_length=PROMPT + RESPONSE)
    make_model_folder(root / "shorter", max_length=PROMPT + RESPONSE - 1)
    return root


def with_model(folders: Path, key: str, path: str) -> RunConfig:
    """Policy and another model, under the key."""
    beside = {CRITIC: ["algorithm.advantage=gae"], TEACHER: ["algorithm.distillation.teacher=model"]}[key]
    weight = ["algorithm.distillation.weight=0.5"] if key == TEACHER else []
    lengths = [f"data.max_prompt_tokens={PROMPT}", f"data.max_response_tokens={RESPONSE}", f"hints.max_tokens={HINTS}"]
    return run_config(
        "rollout=torch", "eval.every=0", f"model.path={folders / 'policy'}", f"{key}={path}", *beside, *weight, *lengths
    )


@pytest.mark.parametrize("key", [CRITIC, TEACHER])
def test_a_model_with_the_policys_words_and_room_passes(folders: Path, key: str) -> None:
    inputs = check_inputs(with_model(folders, key, str(folders / "policy")))
    used = {CRITIC: inputs.critic_folder, TEACHER: inputs.config.algorithm.distillation.teacher_path}[key]
    assert used == str(folders / "policy")


@pytest.mark.parametrize(("key", "whose"), [(CRITIC, "critic"), (TEACHER, "teacher")])
def test_another_vocabulary_is_refused(folders: Path, key: str, whose: str) -> None:
    with pytest.raises(UserError, match=rf"the policy's tokenizer has \d+ words and the {whose}'s \d+") as error:
        check_inputs(with_model(folders, key, "bundled:arithmetic"))
    assert error.value.where == key


@pytest.mark.parametrize(("key", "path"), [(CRITIC, "shorter"), (TEACHER, "short")])
def test_a_context_that_is_too_short_is_refused(folders: Path, key: str, path: str) -> None:
    with pytest.raises(UserError, match=f"allows {PROMPT + RESPONSE - (key == CRITIC)}") as error:
        check_inputs(with_model(folders, key, str(folders / path)))
    assert error.value.where == (key if key == CRITIC else "hints.max_tokens")


def test_only_who_is_shown_the_teachers_prompt_needs_room_for_it(folders: Path) -> None:
    overrides = [f"model.path={folders / 'short'}", f"{TEACHER}={folders / 'policy'}"]
    lengths = [f"data.max_prompt_tokens={PROMPT}", f"data.max_response_tokens={RESPONSE}", f"hints.max_tokens={HINTS}"]
    common = [*overrides, *lengths, "rollout=torch", "eval.every=0", "algorithm.distillation.weight=0.5"]
    check_inputs(run_config(*common, "algorithm.distillation.teacher=model"))
    with pytest.raises(UserError, match=f"allows {PROMPT + RESPONSE}"):
        check_inputs(run_config(*common, "algorithm.distillation.teacher=frozen"))


@pytest.mark.parametrize("key", [CRITIC, TEACHER])
def test_a_model_that_is_not_there_is_said_under_its_own_key(folders: Path, key: str, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    make_model_folder(bare)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    for path in ("/nowhere/model", str(tmp_path), str(bare)):
        with pytest.raises(UserError) as error:
            check_inputs(with_model(folders, key, path))
        assert error.value.where.startswith(key)


def test_experts_are_refused_where_vllm_would_have_to_take_new_weights_of_them(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "policy")
    lengths = [f"data.max_prompt_tokens={PROMPT}", f"data.max_response_tokens={RESPONSE}"]
    overrides = ["eval.every=0", f"model.path={folder}", *lengths]
    check_inputs(run_config("rollout=vllm", *overrides))
    config = json.loads((folder / "config.json").read_text())
    sparse = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    (folder / "config.json").write_text(json.dumps(config | sparse))
    with pytest.raises(UserError, match="4 experts") as error:
        check_inputs(run_config("rollout=vllm", *overrides))
    assert error.value.where == "model.path"
