"""compose_loss: the trainer's loss and gradient, and which channels there are."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import make_model_folder
from training_batches import composed_batch, process_group
from transformers import AutoModelForCausalLM, PreTrainedModel

import rlsys
from rlsys import compose_loss
from rlsys.algorithms.channels import CrossEntropy, Distillation, Preference
from rlsys.algorithms.objective import DivergencePass, Objective
from rlsys.batch import DataProto, jagged
from rlsys.config.errors import UserError
from rlsys.config.schema import DistillationConfig, ModelConfig, TrainerConfig
from rlsys.engines.train.fsdp import FsdpEngine

WRAPPERS: dict[str, dict[str, Any]] = {
    "jsd": {},
    "forward_kl": {},
    "reverse_kl": {},
    "taid": {"taid_t": 0.6},
    "entropy_opd": {"entropy_opd_h_max": 1.5},
    "entropy_opd_additive": {},
    "sampled_token": {},
}
VARIANTS = ("dpo", "ipo", "cdpo", "simpo")
TEACHER = ("teacher_prompt_ids", "teacher_mask")
REFERENCE = ("chosen_ref_logprobs", "rejected_ref_logprobs")
PAIR = ("chosen_ids", "chosen_mask", "rejected_ids", "rejected_mask")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def batch() -> DataProto:
    return composed_batch(seed=5)


def without(batch: DataProto, *names: str) -> DataProto:
    return batch.select([name for name in batch.batch.keys() if name not in names])  # noqa: SIM118


def with_columns(batch: DataProto, columns: Mapping[str, torch.Tensor]) -> DataProto:
    return DataProto.from_dict(tensors={**dict(batch.batch.items()), **columns})


def gradient(model: PreTrainedModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, [*parameters.values()]), strict=True))


def run(model: PreTrainedModel, batch: DataProto, **arguments: Any) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Channels with the loss, and the gradient."""
    composed = compose_loss(model, batch, **arguments)
    return {**composed.channels, "loss": composed.loss.item()}, gradient(model, composed.loss)


def assert_same(
    left: tuple[dict[str, float], dict[str, torch.Tensor]], right: tuple[dict[str, float], dict[str, torch.Tensor]]
) -> None:
    assert left[0] == right[0]
    for name, ours in left[1].items():
        assert torch.equal(ours, right[1][name]), name


@pytest.mark.parametrize(
    ("wrapper", "variant"),
    [("jsd", "dpo"), ("taid", "simpo"), ("entropy_opd", "ipo"), ("entropy_opd_additive", "cdpo")],
)
def test_loss_and_gradient_are_the_trainer_s(
    folder: Path, model: PreTrainedModel, batch: DataProto, wrapper: str, variant: str
) -> None:
    spec = DivergencePass(wrapper, {"h_max": 1.5} if wrapper == "entropy_opd" else {}, t=0.6)
    objective = Objective(
        {
            "cross_entropy": (CrossEntropy(), 1.0),
            "distillation": (Distillation(spec, ratio_cap=None, old_logprobs="self"), 0.7),
            "preference": (Preference(variant, {"beta": 0.3}), 0.4),
        }
    )
    trainer = TrainerConfig(lr=1e-2, micro_batch_tokens=200)
    with process_group():
        engine = FsdpEngine.load(
            ModelConfig(path=str(folder)),
            trainer,
            temperature=0.7,
            total_steps=1,
            seed=0,
            distillation=DistillationConfig(weight=0.7),
        )
        expected = engine.forward_backward(batch, objective)
        gradients = {name: p.grad.full_tensor().clone() for name, p in engine._trained.parameters.items()}
    composed = compose_loss(
        model,
        batch,
        alpha_sdpo=0.7,
        beta_replay=0.4,
        sdpo_wrapper=wrapper,
        dpo_variant=variant,
        dpo_options={"beta": 0.3},
        temperature=0.7,
        **WRAPPERS[wrapper],
    )
    assert expected["micro_batches"] > 1
    assert composed.loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    for name, value in composed.metrics.items():
        assert value == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
    for name, ours in gradient(model, composed.loss).items():
        assert (ours - gradients[name]).norm() <= 1e-5 * gradients[name].norm(), name


def test_the_loss_is_the_weighted_sum_of_its_channels(model: PreTrainedModel, batch: DataProto) -> None:
    found, _ = run(model, batch, alpha_sdpo=0.3, beta_replay=0.2)
    total = found["cross_entropy"] + 0.3 * found["distillation"] + 0.2 * found["preference"]
    assert found["loss"] == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize(
    "arguments",
    [
        *({"sdpo_wrapper": wrapper, "beta_replay": 0.0, **more} for wrapper, more in WRAPPERS.items()),
        *({"dpo_variant": variant, "alpha_sdpo": 0.0} for variant in VARIANTS),
        {"sdpo_wrapper": "taid", "taid_t": 0.6, "dpo_variant": "simpo"},
    ],
)
def test_every_wrapper_and_variant_gives_a_finite_gradient(
    model: PreTrainedModel,
    batch: DataProto,
    plain: tuple[dict[str, float], dict[str, torch.Tensor]],
    arguments: dict[str, Any],
) -> None:
    found, gradients = run(model, batch, **arguments)
    assert ("distillation" in found) == ("sdpo_wrapper" in arguments)
    assert ("preference" in found) == ("dpo_variant" in arguments)
    assert all(math.isfinite(value) for value in found.values())
    assert all(bool(g.isfinite().all()) for g in gradients.values())
    assert any(not torch.allclose(g, plain[1][name]) for name, g in gradients.items())


@pytest.fixture(scope="module")
def plain(model: PreTrainedModel, batch: DataProto) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Cross-entropy alone."""
    return run(model, batch, alpha_sdpo=0.0, beta_replay=0.0)


@pytest.mark.parametrize("missing", TEACHER)
def test_no_distillation_without_its_weight_or_a_column(model: PreTrainedModel, batch: DataProto, missing: str) -> None:
    bare = run(model, without(batch, *TEACHER))
    assert "distillation" not in bare[0]
    assert_same(run(model, without(batch, missing)), bare)
    assert_same(run(model, batch, alpha_sdpo=0.0), bare)


@pytest.mark.parametrize("missing", [*PAIR, *REFERENCE])
def test_no_preference_without_its_weight_or_a_column(model: PreTrainedModel, batch: DataProto, missing: str) -> None:
    bare = run(model, without(batch, *PAIR, *REFERENCE))
    assert "preference" not in bare[0]
    assert_same(run(model, without(batch, missing)), bare)
    assert_same(run(model, batch, beta_replay=0.0), bare)


def test_no_cross_entropy_without_responses(model: PreTrainedModel, batch: DataProto) -> None:
    found, _ = run(model, without(batch, "prompt_ids", "response_ids", "response_mask", *TEACHER))
    assert set(found) == {"preference", "loss"}
    assert found["preference"] == pytest.approx(run(model, batch)[0]["preference"], rel=1e-6)


def test_a_pair_slot_is_not_needed(model: PreTrainedModel, batch: DataProto) -> None:
    assert_same(run(model, without(batch, "pair_slot")), run(model, batch))


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_simpo_does_without_a_reference(model: PreTrainedModel, batch: DataProto, variant: str) -> None:
    found, _ = run(model, without(batch, *REFERENCE), dpo_variant=variant)
    assert ("preference" in found) == (variant == "simpo")


def test_rows_without_teacher_or_pair_add_nothing_to_those_channels(model: PreTrainedModel, batch: DataProto) -> None:
    empty = jagged.from_values(torch.zeros(0, dtype=torch.int64), [0] * len(batch))
    nobody = torch.zeros_like(jagged.values(batch.batch["teacher_mask"]))
    untaught = with_columns(
        batch,
        {
            "teacher_prompt_ids": empty,
            "teacher_mask": jagged.from_values(nobody, jagged.lengths(batch.batch["teacher_mask"])),
        },
    )
    found, gradients = run(model, untaught, alpha_sdpo=3.0)
    assert found["distillation"] == 0.0
    bare, expected = run(model, without(batch, *TEACHER))
    assert found["loss"] == bare["loss"]
    for name, ours in gradients.items():
        torch.testing.assert_close(ours, expected[name])


def test_taid_begins_at_the_student(model: PreTrainedModel, batch: DataProto) -> None:
    ids = batch.batch["teacher_prompt_ids"]
    other = with_columns(
        batch, {"teacher_prompt_ids": jagged.from_values((jagged.values(ids) + 7) % 72, jagged.lengths(ids))}
    )
    start, end = {"sdpo_wrapper": "taid", "taid_t": 0.0}, {"sdpo_wrapper": "taid", "taid_t": 1.0}
    assert_same(run(model, batch, **start), run(model, other, **start))
    assert run(model, batch, **end)[0]["distillation"] != run(model, other, **end)[0]["distillation"]


def test_the_gate_and_options_change_the_divergence(model: PreTrainedModel, batch: DataProto) -> None:
    gates = [run(model, batch, sdpo_wrapper="entropy_opd", entropy_opd_h_max=h)[0]["distillation"] for h in (1e-3, 1e6)]
    ends = [run(model, batch, sdpo_wrapper=name)[0]["distillation"] for name in ("forward_kl", "reverse_kl")]
    assert gates == pytest.approx(ends, rel=1e-4)
    jsd = run(model, batch, sdpo_options={"alpha": 0.0})[0]["distillation"]
    assert jsd == pytest.approx(ends[0], rel=1e-6)


def test_the_batch_and_the_model_stay_as_they_were(model: PreTrainedModel, batch: DataProto) -> None:
    mine = without(composed_batch(seed=5), "pair_slot")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    compose_loss(model, mine).loss.backward()
    model.zero_grad()
    assert set(mine.batch.keys()) == set(batch.batch.keys()) - {"pair_slot"}
    for name, column in mine.batch.items():
        assert jagged.equal(column, batch.batch[name]), name
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        ({"sdpo_wrapper": "js"}, "sdpo_wrapper"),
        ({"dpo_variant": "dpoo"}, "dpo_variant"),
        ({"dpo_options": {"bta": 1.0}}, "dpo_options.bta"),
        ({"dpo_options": {"beta": -1.0}}, "dpo_options.beta"),
        ({"sdpo_options": {"alfa": 1.0}}, "sdpo_options.alfa"),
        ({"sdpo_options": {"alpha": 1.5}}, "sdpo_options.alpha"),
        ({"sdpo_wrapper": "taid"}, "taid_t"),
        ({"sdpo_wrapper": "taid", "taid_t": 1.5}, "taid_t"),
        ({"sdpo_wrapper": "taid", "taid_t": 0.5, "sdpo_options": {"t": 0.5}}, "sdpo_options.t"),
        ({"taid_t": 0.5}, "taid_t"),
        ({"entropy_opd_h_max": 1.0}, "entropy_opd_h_max"),
        ({"sdpo_wrapper": "entropy_opd", "entropy_opd_h_max": 0.0}, "entropy_opd_h_max"),
        ({"alpha_sdpo": -0.1}, "alpha_sdpo"),
        ({"beta_replay": math.nan}, "beta_replay"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_a_wrong_argument_is_named(
    model: PreTrainedModel, batch: DataProto, arguments: dict[str, Any], where: str
) -> None:
    with pytest.raises(UserError) as caught:
        compose_loss(model, batch, **arguments)
    assert caught.value.where == where


def test_a_batch_without_channels_or_rows_is_refused(model: PreTrainedModel, batch: DataProto) -> None:
    with pytest.raises(UserError, match="no channel"):
        compose_loss(model, batch.select(["chosen_ids"]))
    with pytest.raises(UserError, match="no channel"):
        compose_loss(model, DataProto())
    with pytest.raises(UserError, match="no rows"):
        compose_loss(model, batch[:0])


def _retyped(column: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return jagged.from_values(jagged.values(column).to(dtype), jagged.lengths(column))


def _one_shorter(column: torch.Tensor) -> torch.Tensor:
    first, *others = jagged.lengths(column).tolist()
    return jagged.from_values(jagged.values(column)[1:], [first - 1, *others])


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("response_mask", lambda c: c.to_padded_tensor(0), "'response_mask' is dense"),
        ("response_mask", lambda c: _retyped(c, torch.int64), "'response_mask' is of torch.int64"),
        ("response_ids", lambda c: _retyped(c, torch.int32), "'response_ids' is of torch.int32"),
        ("prompt_ids", lambda c: jagged.from_values(jagged.values(c) - 1000, jagged.lengths(c)), "row 0 .* token id -"),
        ("chosen_ids", lambda c: jagged.from_values(jagged.values(c) + 1000, jagged.lengths(c)), "row 0 .* token id 1"),
        ("teacher_mask", _one_shorter, "row lengths of .* row 0 has"),
    ],
)  # fmt: skip
def test_a_column_that_is_not_what_it_is_declared_as_is_named(
    model: PreTrainedModel, batch: DataProto, name: str, change: Callable[[torch.Tensor], torch.Tensor], said: str
) -> None:
    spoilt = with_columns(batch, {name: change(batch.batch[name])})
    with pytest.raises(UserError, match=said):
        compose_loss(model, spoilt, alpha_sdpo=1.0, beta_replay=1.0)


def test_the_package_offers_it_and_imports_no_torch() -> None:
    script = "import sys, rlsys; assert 'compose_loss' in dir(rlsys); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    assert not hasattr(rlsys, "compose_los")
