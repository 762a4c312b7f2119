"""The FSDP engine on one rank: parity with plain transformers, invariance to the cut, optimiser, state, bad input."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_folders import make_model_folder
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from training_batches import process_group, random_batch, rows_of
from transformers import AutoModelForCausalLM

from rlsys.algorithms.channels import CrossEntropy, PolicyGradient
from rlsys.algorithms.objective import Objective
from rlsys.batch import DataProto, jagged
from rlsys.config.errors import UserError
from rlsys.config.schema import ModelConfig, TrainerConfig
from rlsys.engines.train.fsdp import FsdpEngine
from rlsys.engines.train.reference import ReferenceEngine

TRAINER = TrainerConfig(lr=1e-2, micro_batch_tokens=70)
POLICY = Objective({"policy": (PolicyGradient(kl_coef=0.1, entropy_coef=0.01), 1.0)})
COMBINATIONS = [(family, tied) for family in ("qwen2", "qwen3", "llama") for tied in (True, False)]


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    with process_group():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"), "qwen3", tied=True)


def load(
    path: Path, trainer: TrainerConfig = TRAINER, temperature: float = 0.7, total_steps: int = 20, **model
) -> FsdpEngine:
    config = ModelConfig(path=str(path), **model)
    return FsdpEngine.load(config, trainer, temperature=temperature, total_steps=total_steps, seed=0)


def gradients(engine: FsdpEngine) -> dict[str, torch.Tensor]:
    return {name: p.grad.full_tensor().clone() for name, p in engine._trained.parameters.items()}


def weights(engine: FsdpEngine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in engine.export_weights(torch.float32)}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def dense_logprobs(
    lm: torch.nn.Module, batch: DataProto, temperature: float
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Log-probs and entropy of each row's response, one row at a time, from plain transformers' logits."""
    result = []
    for prompt, response in zip(*(jagged.to_rows(batch.batch[c]) for c in ("prompt_ids", "response_ids")), strict=True):
        logits = lm(input_ids=torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1] / temperature
        log_p = torch.log_softmax(logits.float(), -1)
        result.append((log_p.gather(1, response[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)))
    return result


@pytest.mark.parametrize(("family", "tied"), COMBINATIONS)
def test_forward_and_gradient_match_plain_transformers(tmp_path: Path, family: str, tied: bool) -> None:
    make_model_folder(tmp_path, family, tied=tied)
    lm = AutoModelForCausalLM.from_pretrained(tmp_path)
    batch, engine = random_batch(), load(tmp_path)
    masks = jagged.to_rows(batch.batch["response_mask"])
    dense = dense_logprobs(lm, batch, 0.7)

    output = engine.forward(batch)
    for column, which in (("logprobs", 0), ("entropy", 1)):
        for ours, theirs, mask in zip(jagged.to_rows(output.batch[column]), dense, masks, strict=True):
            torch.testing.assert_close(ours, theirs[which] * mask, rtol=1e-5, atol=1e-5)

    metrics = engine.forward_backward(batch, Objective({"imitation": (CrossEntropy(), 1.0)}))
    count = sum(int(mask.sum()) for mask in masks)
    loss = -sum((row[0] * mask).sum() for row, mask in zip(dense, masks, strict=True)) / count
    loss.backward()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    expected = {name: p.grad for name, p in lm.named_parameters()}
    for name, ours in gradients(engine).items():
        error = torch.linalg.vector_norm(ours - expected[name]) / torch.linalg.vector_norm(expected[name])
        assert error < 1e-5, name
    assert_same(weights(engine), {n: p.detach() for n, p in lm.named_parameters()}, rtol=0, atol=0)
    assert engine.parameter_count == sum(p.numel() for p in lm.parameters())


def test_export_has_the_checkpoint_s_own_names(folder: Path) -> None:
    exported = dict(load(folder).export_weights(torch.bfloat16))
    saved = load_file(folder / "model.safetensors")
    assert exported.keys() == saved.keys()
    assert "lm_head.weight" not in exported
    assert_same(exported, {n: t.bfloat16() for n, t in saved.items()}, rtol=0, atol=0)


@pytest.mark.parametrize("budget", [31, 64, 10_000])
def test_the_token_budget_does_not_change_loss_gradient_or_metrics(folder: Path, budget: int) -> None:
    batch = random_batch(seed=1)
    whole, cut = (
        load(folder, replace(TRAINER, micro_batch_tokens=5000)),
        load(folder, replace(TRAINER, micro_batch_tokens=budget)),
    )
    expected, metrics = whole.forward_backward(batch, POLICY), cut.forward_backward(batch, POLICY)
    assert (metrics["micro_batches"] > 1) == (budget < 5000)
    for name in expected.keys() - {"micro_batches", "padding_fraction"}:
        assert metrics[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
    assert_same(gradients(cut), gradients(whole), rtol=1e-4, atol=1e-6)


def test_the_mean_of_micro_batch_means_would_be_another_gradient(folder: Path) -> None:
    """What the global normaliser is for: averaging each micro-batch's own mean is wrong by far more than rounding."""
    batch = random_batch(seed=1)
    objective = Objective({"imitation": (CrossEntropy(), 1.0)})
    right = load(folder)
    metrics = right.forward_backward(batch, objective)
    rows = len(batch)
    naive = load(folder)
    for row in range(rows):  # a batch of one row has that row's own normaliser
        naive.forward_backward(_only(batch, row), objective)
    naive_gradients = {name: gradient / rows for name, gradient in gradients(naive).items()}
    difference = max((naive_gradients[n] - g).norm() / g.norm() for n, g in gradients(right).items())
    assert difference > 0.1
    assert metrics["micro_batches"] > 1


def _only(batch: DataProto, row: int) -> DataProto:
    return DataProto.from_dict(tensors={n: jagged.from_rows([jagged.to_rows(c)[row]]) for n, c in batch.batch.items()})


def test_old_logprobs_of_the_engine_give_a_ratio_of_one(folder: Path) -> None:
    engine, batch = load(folder), random_batch()
    columns = dict(batch.batch.items()) | {"old_logprobs": engine.forward(batch).batch["logprobs"]}
    metrics = engine.forward_backward(
        DataProto.from_dict(tensors=columns), Objective({"policy": (PolicyGradient(), 1.0)})
    )
    assert metrics["policy/ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["policy/clip_fraction"] == 0
    assert metrics["policy/approx_kl"] == pytest.approx(0.0, abs=1e-9)
    by_column = gradients(engine)
    itself = load(folder)
    itself.forward_backward(batch, Objective({"policy": (PolicyGradient(old_logprobs="self"), 1.0)}))
    assert_same(gradients(itself), by_column, rtol=1e-4, atol=1e-7)


def test_weights_move_and_forward_sees_it(folder: Path) -> None:
    engine, batch = load(folder), random_batch()
    objective = Objective({"imitation": (CrossEntropy(), 1.0)})
    losses = []
    for _ in range(3):
        before = engine.forward(batch).batch["logprobs"].values().sum()
        losses.append(engine.forward_backward(batch, objective)["loss"])
        engine.forward(batch)  # gathers the root's weights again between backward pass and step
        engine.optim_step()
        assert engine.forward(batch).batch["logprobs"].values().sum() > before
    assert losses[0] > losses[1] > losses[2]


def test_resuming_is_bit_exact_and_reads_what_was_written(folder: Path, tmp_path: Path) -> None:
    trainer = replace(TRAINER, schedule="cosine", warmup_steps=2)
    batches = [random_batch(seed) for seed in range(4)]

    def train(engine: FsdpEngine, part: list[DataProto]) -> list[dict[str, float]]:
        return [engine.forward_backward(batch, POLICY) | engine.optim_step() for batch in part]

    through = load(folder, trainer)
    expected = train(through, batches)
    first = load(folder, trainer)
    assert train(first, batches[:2]) == expected[:2]
    first.save_state(tmp_path)
    drawn = torch.rand(3)
    again = load(folder, trainer)
    again.forward(batches[0])  # whatever it has gathered must not survive loading
    again.load_state(tmp_path)
    assert torch.equal(torch.rand(3), drawn)
    assert train(again, batches[2:]) == expected[2:]
    assert_same(weights(again), weights(through), rtol=0, atol=0)


def test_a_checkpoint_before_the_first_step(folder: Path, tmp_path: Path) -> None:
    engine = load(folder)
    engine.save_state(tmp_path)
    engine.forward_backward(random_batch(), POLICY)
    engine.optim_step()
    engine.load_state(tmp_path)
    assert_same(weights(engine), load_file(folder / "model.safetensors"), rtol=0, atol=0)
    assert engine.forward_backward(random_batch(), POLICY) | engine.optim_step()
    assert json.loads((tmp_path / "trainer.json").read_text())["optimizer_steps"] == 0


def test_a_checkpoint_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    load(folder).save_state(tmp_path / "state")
    other = load(make_model_folder(tmp_path / "model", "qwen3", hidden=32))
    with pytest.raises(UserError, match="another model"):
        other.load_state(tmp_path / "state")
    with pytest.raises(UserError, match="no trainer state"):
        other.load_state(tmp_path)


def test_schedule_sets_the_rate_of_each_step(folder: Path) -> None:
    engine = load(folder, replace(TRAINER, lr=0.1, schedule="linear", warmup_steps=2), total_steps=4)
    rates = []
    for _ in range(5):
        engine.forward_backward(random_batch(rows=2), POLICY)
        rates.append(engine.optim_step()["lr"])
    assert rates == pytest.approx([0.05, 0.1, 0.1, 0.05, 0.05])


def test_decay_reaches_matrices_only(folder: Path) -> None:
    engine = load(folder, replace(TRAINER, lr=0.1, weight_decay=0.5))
    before = weights(engine)
    batch = random_batch()
    batch.batch["advantages"] = jagged.from_values(
        torch.zeros_like(jagged.values(batch.batch["advantages"])), jagged.lengths(batch.batch["advantages"])
    )
    engine.forward_backward(batch, Objective({"policy": (PolicyGradient(), 1.0)}))
    assert engine.optim_step()["grad_norm"] == 0
    for name, after in weights(engine).items():
        matrix = after.ndim == 2 and "embed" not in name
        torch.testing.assert_close(after, before[name] * (0.95 if matrix else 1.0))


def test_the_gradient_is_clipped_to_the_global_norm(folder: Path) -> None:
    engine = load(folder, replace(TRAINER, max_grad_norm=1e-2))
    engine.forward_backward(random_batch(), POLICY)
    raw = gradients(engine)
    norm = engine.optim_step()["grad_norm"]
    assert norm == pytest.approx(torch.stack([g.norm() for g in raw.values()]).norm().item(), rel=1e-5)
    assert norm > 1e-2
    # After one step the first moment is (1 − beta1) times the gradient that the optimiser was given.
    moments = [
        engine._trained.optimizer.state[p]["exp_avg"].full_tensor() / 0.1 for p in engine._trained.parameters.values()
    ]
    assert torch.stack([m.norm() for m in moments]).norm().item() == pytest.approx(1e-2, rel=1e-4)


def test_an_update_whose_gradient_is_not_finite_is_skipped(folder: Path) -> None:
    engine, batch = load(folder), random_batch()
    before = weights(engine)
    jagged.values(batch.batch["advantages"]).fill_(torch.inf)
    engine.forward_backward(batch, POLICY)
    metrics = engine.optim_step()
    assert metrics["skipped"] == 1
    assert not math.isfinite(metrics["grad_norm"])
    assert_same(weights(engine), before, rtol=0, atol=0)
    engine.forward_backward(random_batch(), POLICY)  # the next one is trained on
    assert engine.optim_step()["skipped"] == 0
    assert any(not torch.equal(after, before[name]) for name, after in weights(engine).items())


@pytest.mark.parametrize("good", [0, 1])
def test_resuming_after_a_skipped_update_is_bit_exact(folder: Path, tmp_path: Path, good: int) -> None:
    spoilt = random_batch()
    jagged.values(spoilt.batch["advantages"]).fill_(torch.inf)
    engine = load(folder)
    for batch in [spoilt, *(random_batch(seed) for seed in range(good))]:
        engine.forward_backward(batch, POLICY)
        engine.optim_step()
    engine.save_state(tmp_path)
    again = load(folder)
    again.load_state(tmp_path)
    for one in (engine, again):
        one.forward_backward(random_batch(9), POLICY)
        one.optim_step()
    assert_same(weights(again), weights(engine), rtol=0, atol=0)


def test_a_step_without_a_gradient_is_refused(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="forward_backward first"):
        load(folder).optim_step()


def test_activation_checkpointing_has_the_same_gradient(folder: Path) -> None:
    plain, saving = load(folder), load(folder, replace(TRAINER, activations="recompute"))
    layers = saving._model.lm.base_model.layers
    calls = []
    layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    expected, metrics = (e.forward_backward(random_batch(), POLICY) for e in (plain, saving))
    assert metrics == pytest.approx(expected)
    assert_same(gradients(saving), gradients(plain), rtol=1e-5, atol=1e-7)
    assert len(calls) == 2 * metrics["micro_batches"]  # once forward, once again in the backward pass


def test_bfloat16_forward_keeps_float32_weights_and_gradients(folder: Path) -> None:
    exact, engine, batch = load(folder), load(folder, dtype="bfloat16"), random_batch()
    a, b = (jagged.values(e.forward(batch).batch["logprobs"]) for e in (exact, engine))
    assert b.dtype == torch.float32
    assert 0 < (a - b).abs().mean() < 0.2
    metrics = engine.forward_backward(batch, POLICY)
    assert {p.dtype for p in engine._trained.parameters.values()} == {torch.float32}
    assert {p.grad.dtype for p in engine._trained.parameters.values()} == {torch.float32}
    assert metrics["loss"] == pytest.approx(exact.forward_backward(batch, POLICY)["loss"], rel=0.2)


def test_the_reference_sees_what_the_trainer_sees(folder: Path) -> None:
    batch = random_batch()
    reference = ReferenceEngine.load(ModelConfig(path=str(folder)), TRAINER, temperature=0.7)
    theirs = jagged.values(load(folder).forward(batch).batch["logprobs"])
    ours = reference.forward(batch)
    assert list(ours.batch.keys()) == ["ref_logprobs"]
    torch.testing.assert_close(jagged.values(ours.batch["ref_logprobs"]), theirs, rtol=1e-6, atol=1e-6)
    assert rows_of(ours, "ref_logprobs")[0][0] == pytest.approx(theirs[0].item())


def test_parameters_are_sharded(folder: Path) -> None:
    assert all(isinstance(p, DTensor) for p in load(folder)._trained.parameters.values())


def test_rows_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    batch = random_batch()
    with pytest.raises(UserError, match="a micro-batch may have 8") as error:
        load(folder, replace(TRAINER, micro_batch_tokens=8)).forward(batch)
    assert error.value.where == "trainer.micro_batch_tokens"
    short = make_model_folder(tmp_path, max_length=10)
    with pytest.raises(UserError, match="the model takes 10") as error:
        load(short).forward(batch)
    assert error.value.where == "data.max_response_tokens"


def test_missing_columns_are_named_with_their_writer(folder: Path) -> None:
    batch = random_batch()
    columns = {name: column for name, column in batch.batch.items() if name != "ref_logprobs"}
    with pytest.raises(UserError, match=r"'ref_logprobs'.*'reference'"):
        load(folder).forward_backward(DataProto.from_dict(tensors=columns), POLICY)


def test_folders_that_hold_no_usable_model_are_refused(folder: Path, tmp_path: Path) -> None:
    def refused(path: Path) -> str:
        with pytest.raises(UserError) as error:
            load(path)
        assert error.value.where == "model.path"
        return str(error.value)

    assert "no folder" in refused(tmp_path / "missing")
    assert "no config.json" in refused(tmp_path)
    shutil.copy(folder / "config.json", tmp_path)
    assert "no weights" in refused(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"garbage")
    assert "no model can be loaded" in refused(tmp_path)
    save_file(
        {n: t for n, t in tensors.items() if "down_proj" not in n}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    assert "lack 2 tensors" in refused(tmp_path)
    save_file({n: t[:1].clone() for n, t in tensors.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    assert "no model can be loaded" in refused(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"final_logit_softcapping": 30.0}))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert "final_logit_softcapping" in refused(tmp_path)
