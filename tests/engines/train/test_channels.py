"""A composed objective on the engine: parity with one row at a time on plain transformers, and with every teacher."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_folders import make_model_folder
from training_batches import composed_batch, process_group
from transformers import AutoModelForCausalLM

from rlsys.algorithms.channels import CrossEntropy, Distillation, Preference
from rlsys.algorithms.objective import DivergencePass, Objective
from rlsys.batch import DataProto, jagged
from rlsys.config.errors import UserError
from rlsys.config.schema import DistillationConfig, ModelConfig, TrainerConfig
from rlsys.engines.train.fsdp import FsdpEngine

TRAINER = TrainerConfig(lr=1e-2, micro_batch_tokens=200, max_grad_norm=1e9)
FORWARD_KL = DivergencePass("forward_kl")
TEMPERATURE = 0.7
COMPOSED = Objective(
    {
        "imitation": (CrossEntropy(), 1.0),
        "distillation": (Distillation(FORWARD_KL, old_logprobs="self"), 0.5),
        "preference": (Preference("dpo", {"beta": 0.3}), 0.7),
    }
)


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    with process_group():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return make_model_folder(root / "policy"), make_model_folder(root / "other", seed=9, hidden=96)


def load(path: Path, teacher: DistillationConfig | None, trainer: TrainerConfig = TRAINER) -> FsdpEngine:
    model = ModelConfig(path=str(path))
    return FsdpEngine.load(model, trainer, temperature=TEMPERATURE, total_steps=20, seed=0, distillation=teacher)


def gradients(engine: FsdpEngine) -> dict[str, torch.Tensor]:
    return {name: p.grad.full_tensor().clone() for name, p in engine._trained.parameters.items()}


def log_softmax(lm: torch.nn.Module, ids: torch.Tensor, lead: int) -> torch.Tensor:
    """Log-probs [tokens after ``lead``, V] of a sequence."""
    return torch.log_softmax(lm(input_ids=ids[None]).logits[0, lead - 1 : -1] / TEMPERATURE, -1)


def dense_loss(
    policy: torch.nn.Module, teachers: list[tuple[float, torch.nn.Module]], batch: DataProto
) -> torch.Tensor:
    """The composed loss, one sequence at a time."""
    columns = {name: jagged.to_rows(c) if jagged.is_jagged(c) else c for name, c in batch.batch.items()}
    entropy_sum, tokens, kl_sum, taught, pair_losses = torch.zeros(()), 0, torch.zeros(()), 0, []
    for row in range(len(batch)):
        prompt, response, mask = (columns[n][row] for n in ("prompt_ids", "response_ids", "response_mask"))
        if len(response):
            log_p = log_softmax(policy, torch.cat([prompt, response]), len(prompt))
            entropy_sum = entropy_sum - log_p.gather(1, response[:, None])[mask, 0].sum()
            tokens += int(mask.sum())
            taught_here, context = columns["teacher_mask"][row], columns["teacher_prompt_ids"][row]
            if taught_here.any():
                places = taught_here.nonzero().flatten()
                first, last = int(places[0]), int(places[-1]) + 1
                ids = torch.cat([context, response[first:last]])
                with torch.no_grad():
                    logits = sum(mix * lm(input_ids=ids[None]).logits[0, len(context) - 1 : -1] for mix, lm in teachers)
                    target = torch.log_softmax(logits / TEMPERATURE, -1)[places - first]
                kl_sum = kl_sum + (target.exp() * (target - log_p[places])).sum()
                taught += len(places)
        if len(columns["chosen_ids"][row]):
            margins = []
            for side in ("chosen", "rejected"):
                ids, scored = columns[f"{side}_ids"][row], columns[f"{side}_mask"][row]
                log_p = log_softmax(policy, ids, 1).gather(1, ids[1:, None])[:, 0]
                margins.append((log_p - columns[f"{side}_ref_logprobs"][row][1:])[scored[1:]].sum())
            pair_losses.append(-torch.nn.functional.logsigmoid(0.3 * (margins[0] - margins[1])))
    return entropy_sum / tokens + 0.5 * kl_sum / taught + 0.7 * torch.stack(pair_losses).mean()


@pytest.mark.parametrize("teacher", ["self", "frozen", "trust_region", "model"])
def test_loss_and_gradient_match_one_sequence_at_a_time(folders: tuple[Path, Path], teacher: str) -> None:
    policy, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
    frozen = AutoModelForCausalLM.from_pretrained(folders[0])
    batch = composed_batch(seed=5)
    config = DistillationConfig(weight=0.5, teacher=teacher, teacher_mix=0.3, teacher_path=str(folders[1]))  # type: ignore[arg-type]
    engine = load(folders[0], config)
    with torch.no_grad():  # the policy has moved since the step that frozen weights are of
        for name, parameter in engine._trained.parameters.items():
            moved = 0.9 * policy.get_parameter(name)
            policy.get_parameter(name).copy_(moved)
            parameter.to_local().copy_(moved)
    teachers = {
        "self": [(1.0, policy)],
        "frozen": [(1.0, frozen)],
        "trust_region": [(0.3, policy), (0.7, frozen)],
        "model": [(1.0, other)],
    }[teacher]
    expected = dense_loss(policy, teachers, batch)
    expected.backward()
    metrics = engine.forward_backward(batch, COMPOSED)
    assert metrics["micro_batches"] > 1
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    for name, ours in gradients(engine).items():
        theirs = policy.get_parameter(name).grad
        assert (ours - theirs).norm() <= 2e-5 * theirs.norm(), name


def test_live_fractions_count_what_each_channel_found(folders: tuple[Path, Path]) -> None:
    batch = composed_batch(seed=5)
    metrics = load(folders[0], DistillationConfig(weight=0.5)).forward_backward(batch, COMPOSED)
    columns = batch.batch
    responses = jagged.lengths(columns["response_ids"]) > 0
    taught = jagged.segment_sum(columns["teacher_mask"]) > 0
    pairs = jagged.lengths(columns["chosen_ids"]) > 0
    assert metrics["imitation/live_fraction"] == pytest.approx(1.0, abs=0.2)
    assert metrics["distillation/live_fraction"] == pytest.approx(float(taught.sum() / responses.sum()))
    assert metrics["preference/live_fraction"] == pytest.approx(float(pairs.sum() / columns["pair_slot"].sum()))
    assert metrics["preference/pairs"] == float(pairs.sum())
    assert metrics["distillation/tokens"] == float(jagged.values(columns["teacher_mask"]).sum())


@pytest.mark.parametrize("budget", [150, 333])
def test_the_token_budget_does_not_change_the_composed_gradient(folders: tuple[Path, Path], budget: int) -> None:
    batch, teacher = composed_batch(seed=2), DistillationConfig(weight=0.5, teacher="frozen")
    whole, cut = (load(folders[0], teacher, replace(TRAINER, micro_batch_tokens=n)) for n in (100_000, budget))
    expected, found = whole.forward_backward(batch, COMPOSED), cut.forward_backward(batch, COMPOSED)
    assert expected["micro_batches"] == 1 < found["micro_batches"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    for name, gradient in gradients(cut).items():
        reference = gradients(whole)[name]
        assert (gradient - reference).norm() <= 1e-5 * reference.norm(), name


def test_measuring_each_channel_s_gradient_does_not_change_their_sum(folders: tuple[Path, Path]) -> None:
    batch, teacher = composed_batch(seed=2), DistillationConfig(weight=0.5)
    plain, measured = load(folders[0], teacher), load(folders[0], teacher)
    expected = plain.forward_backward(batch, COMPOSED)
    found = measured.forward_backward(batch, COMPOSED, channel_gradients=True)
    assert {name for name in found if name not in expected} == {
        f"{channel}/grad_norm" for channel in ("imitation", "distillation", "preference")
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    alone = load(folders[0], teacher)
    alone.forward_backward(batch, COMPOSED.only("preference"))
    norm = torch.stack([g.norm() for g in gradients(alone).values()]).norm().item()
    assert found["preference/grad_norm"] == pytest.approx(norm, rel=1e-4)
    for name, gradient in gradients(measured).items():
        reference = gradients(plain)[name]
        assert (gradient - reference).norm() <= 1e-5 * reference.norm(), name


def test_an_ema_teacher_follows_and_is_saved(folders: tuple[Path, Path], tmp_path: Path) -> None:
    batch, config = composed_batch(seed=2), DistillationConfig(weight=0.5, teacher="ema", teacher_rate=0.25)
    engine = load(folders[0], config)
    assert engine._teacher is not None
    start = {name: w.local.view(w.shape).clone() for name, w in engine._teacher.saved.items()}
    engine.forward_backward(batch, COMPOSED)
    engine.optim_step()
    followed = {name: w.local.view(w.shape).clone() for name, w in engine._teacher.saved.items()}
    for name, policy in engine.export_weights(torch.float32):
        torch.testing.assert_close(followed[name], start[name].lerp(policy, 0.25))
    engine.save_state(tmp_path)
    resumed = load(folders[0], config)
    resumed.load_state(tmp_path)
    first, second = (e.forward_backward(batch, COMPOSED) for e in (engine, resumed))
    assert first == second


def test_a_teacher_with_another_vocabulary_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    other = make_model_folder(tmp_path / "wide", vocab_size=80)
    config = DistillationConfig(weight=1.0, teacher="model", teacher_path=str(other))
    with pytest.raises(UserError, match="72 words and the teacher one of 80"):
        load(folders[0], config)
