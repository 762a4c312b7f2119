"""Adapters on one rank of both back ends: beside peft on a plain model, merged, rounded, off, saved and resumed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import make_model, make_model_folder
from training_batches import composed_batch, process_group, random_batch, whole
from transformers import GPT2Config

from rlsys.algorithms.channels import Distillation, PolicyGradient, Preference
from rlsys.algorithms.channels.value import ValueLoss
from rlsys.algorithms.objective import DivergencePass, Objective
from rlsys.batch import DataProto, jagged
from rlsys.config.errors import UserError
from rlsys.config.schema import DistillationConfig, LoraConfig, ModelConfig, TrainerConfig
from rlsys.engines.train import load_engine
from rlsys.engines.train.engine import ShardedEngine
from rlsys.engines.train.lora import resolve_targets, save_adapter
from rlsys.engines.train.quantized import pack, unpack
from rlsys.engines.train.reference import ReferenceEngine

TRAINER = TrainerConfig(lr=1e-2, micro_batch_tokens=200)
POLICY = Objective({"policy": (PolicyGradient(), 1.0)})
LORA = LoraConfig(rank=4, alpha=8.0)
TEMPERATURE = 0.7
BACKENDS = ("fsdp", "zero3")


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    with process_group():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"))


def load(
    folder: Path, lora: LoraConfig | None = LORA, backend: Any = "fsdp", dtype: Any = "float32", **options: Any
) -> Any:
    trainer = replace(TRAINER, backend=backend, **options.pop("trainer", {}))
    model = ModelConfig(path=str(folder), dtype=dtype, lora=lora)
    return load_engine(model, trainer, temperature=TEMPERATURE, total_steps=20, seed=0, **options)


def step(engine: ShardedEngine, batch: DataProto, objective: Objective = POLICY, times: int = 1) -> None:
    for _ in range(times):
        engine.forward_backward(batch, objective)
        engine.optim_step()


def logprobs(engine: Any, batch: DataProto, **options: Any) -> torch.Tensor:
    return jagged.values(engine.forward(batch, **options).batch["logprobs"])


def exported(engine: ShardedEngine, **options: Any) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in engine.export_weights(torch.float32, **options)}


def peft_loss(folder: Path, adapter: dict[str, torch.Tensor], batch: DataProto) -> dict[str, torch.Tensor]:
    """Gradients by peft's own model around transformers', of −Σ A·π/π_old over tokens, row after row."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    del folder
    targets = sorted({name.split(".")[-3] for name in adapter})
    settings = PeftConfig(r=LORA.rank, lora_alpha=int(LORA.alpha), target_modules=targets, lora_dropout=0.0)
    model = get_peft_model(make_model(), settings)  # type: ignore[arg-type]
    named = {
        name.removeprefix("base_model.model.").replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert named.keys() == adapter.keys()
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(adapter[name])
    total = torch.zeros(())
    columns = [jagged.to_rows(batch.batch[n]) for n in
               ("prompt_ids", "response_ids", "response_mask", "old_logprobs", "advantages")]  # fmt: skip
    count = sum(int(mask.sum()) for mask in columns[2])
    for prompt, response, mask, old, advantages in zip(*columns, strict=True):
        logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
        taken = logits.log_softmax(-1).gather(-1, response[:, None])[:, 0]
        ratio = (taken - old).exp()
        clipped = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        total = total - (clipped * mask).sum() / count
    total.backward()
    return {name: parameter.grad for name, parameter in named.items()}  # type: ignore[misc]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_peft_on_the_plain_model(folder: Path, backend: str) -> None:
    batch = random_batch()
    batch.batch["old_logprobs"] = load(folder, None).forward(batch).batch["logprobs"]
    engine = load(folder, backend=backend)
    step(engine, batch)  # at the start B is 0, and A has no gradient
    adapter = whole(engine._trained.weights())
    engine.forward_backward(batch, POLICY)
    expected = peft_loss(folder, adapter, batch)
    found = whole(engine._trained.gradient())
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_back_ends_train_the_same_adapter(folder: Path, dtype: str, quantize: Any) -> None:
    batch = random_batch()
    engines = [load(folder, replace(LORA, quantize=quantize), backend, dtype) for backend in BACKENDS]
    for engine in engines:
        step(engine, batch, times=3)
    ours, theirs = (whole(engine._trained.weights()) for engine in engines)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name] - theirs[name]).norm() <= 1e-4 * theirs[name].norm(), name


def test_only_the_adapter_is_trained_counted_and_saved(folder: Path, tmp_path: Path) -> None:
    plain, engine = load(folder, None), load(folder)
    before = exported(engine, adapter=False)
    step(engine, random_batch(), times=2)
    assert all(torch.equal(weight, before[name]) for name, weight in exported(engine, adapter=False).items())
    assert engine.trained_count == sum(t.local.numel() for t in engine._trained.weights().values())
    assert engine.parameter_count == plain.parameter_count + engine.trained_count
    engine.save_state(tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.glob("*-of-*.safetensors") if not path.name.startswith("rng"))
    assert size < 4 * 3 * 1.5 * engine.trained_count + 20_000  # weights and two moments, and headers


@pytest.mark.parametrize("options", [{"rows": "padded"}, {"rows": "shared"}, {"activations": "recompute"}])
def test_rows_and_recomputation_change_no_gradient(folder: Path, options: dict[str, Any]) -> None:
    batch = random_batch()
    engines = [load(folder), load(folder, trainer=options)]
    step(engines[0], batch)
    for name, shard in engines[1]._trained.weights().items():
        shard.fill(engines[0]._trained.weights()[name].local)
    for engine in engines:
        engine.forward_backward(batch, POLICY)
    ours, theirs = (whole(engine._trained.gradient()) for engine in engines)
    for name in ours:
        assert (ours[name] - theirs[name]).norm() <= 1e-5 * theirs[name].norm(), name


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_merged_weights_are_a_model_that_computes_what_the_trainer_does(
    folder: Path, tmp_path: Path, quantize: Any
) -> None:
    batch = random_batch()
    engine = load(folder, replace(LORA, quantize=quantize))
    step(engine, batch, times=2)
    merged = make_model()
    merged.load_state_dict(exported(engine), strict=False)
    merged.save_pretrained(tmp_path)  # type: ignore[operator]
    torch.testing.assert_close(logprobs(load(tmp_path, None), batch), logprobs(engine, batch), atol=1e-4, rtol=0)
    assert (logprobs(engine, batch) - logprobs(engine, batch, adapter=False)).abs().max() > 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_its_adapter_the_trainer_is_the_reference_bit_for_bit(folder: Path, backend: str) -> None:
    batch = random_batch()
    reference = ReferenceEngine.load(ModelConfig(path=str(folder)), TRAINER, temperature=TEMPERATURE)
    expected = jagged.values(reference.forward(batch).batch["ref_logprobs"])
    engine = load(folder, backend=backend)
    assert torch.equal(logprobs(engine, batch), expected), "B is 0"
    step(engine, batch, times=2)
    assert torch.equal(logprobs(engine, batch, adapter=False), expected)
    assert not torch.equal(logprobs(engine, batch), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_resumed_adapter_goes_on_bit_for_bit(folder: Path, tmp_path: Path, backend: str) -> None:
    batch = random_batch()
    engine = load(folder, backend=backend)
    step(engine, batch, times=2)
    engine.save_state(tmp_path)
    step(engine, batch)
    for resumed in (load(folder, backend=backend), load(folder, backend=next(b for b in BACKENDS if b != backend))):
        resumed.load_state(tmp_path)
        step(resumed, batch)
        for name, weight in whole(resumed._trained.weights()).items():
            assert torch.equal(weight, whole(engine._trained.weights())[name]), name
    with pytest.raises(UserError, match="another model"):
        load(folder, None).load_state(tmp_path)


@pytest.mark.parametrize("teacher", ["frozen", "trust_region"])
def test_a_frozen_teacher_is_the_model_without_its_adapter(folder: Path, teacher: Any) -> None:
    """Its divergence is that from a second copy of the model as it was."""
    objective = Objective({"distillation": (Distillation(DivergencePass("jsd"), old_logprobs="self"), 1.0)})
    config = DistillationConfig(weight=1.0, teacher=teacher)
    batch = composed_batch(seed=5)
    engine = load(folder, distillation=config)
    assert engine._teacher._other is None, "no second copy"
    step(engine, batch, objective)
    found = engine.forward_backward(batch, objective)
    second = load(folder, distillation=replace(config, teacher="model", teacher_path=str(folder)))
    second._teacher._mix = engine._teacher._mix
    step(second, batch, objective)
    expected = second.forward_backward(batch, objective)
    assert found["distillation/loss"] == pytest.approx(expected["distillation/loss"], rel=1e-5)
    for name, gradient in whole(engine._trained.gradient()).items():
        theirs = whole(second._trained.gradient())[name]
        assert (gradient - theirs).norm() <= 1e-5 * theirs.norm(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_critic_has_an_adapter_and_its_own_head(folder: Path, backend: str) -> None:
    batch = random_batch()
    lengths = jagged.lengths(batch.batch["response_ids"])
    for name in ("values", "returns"):
        batch.batch[name] = jagged.from_values(torch.linspace(-1, 1, int(lengths.sum())), lengths)
    engine = load(folder, backend=backend, critic=True)
    losses = [engine.forward_backward(batch, Objective({"critic": (ValueLoss(None), 1.0)}))["loss"]]
    engine.optim_step()
    losses.append(engine.forward_backward(batch, Objective({"critic": (ValueLoss(None), 1.0)}))["loss"])
    assert losses[1] < losses[0]
    assert {name.split(".")[-2] for name in engine._trained.weights()} == {"lora_A", "lora_B", "value_head"}


def test_preferences_train_an_adapter(folder: Path) -> None:
    batch = composed_batch(seed=5)
    engine = load(folder)
    objective = Objective({"preference": (Preference("dpo"), 1.0)})
    first = engine.forward_backward(batch, objective)["loss"]
    engine.optim_step()
    step(engine, batch, objective, times=3)
    assert engine.forward_backward(batch, objective)["loss"] < first


def test_the_saved_adapter_is_one_that_peft_loads(folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    batch = random_batch()
    engine = load(folder)
    step(engine, batch, times=2)
    save_adapter(tmp_path, engine.export_adapter(torch.float32), LORA, str(folder), torch.float32)
    merged = PeftModel.from_pretrained(make_model(), tmp_path).merge_and_unload().state_dict()  # type: ignore[arg-type]
    for name, weight in exported(engine).items():
        torch.testing.assert_close(merged[name], weight, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("targets", "message"), [(["lm_head"], "head"), (["embed_tokens"], "embedding"), (["q_prj"], "no linear layer")]
)
def test_targets_that_cannot_be_adapted_are_refused(folder: Path, targets: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        resolve_targets(ModelConfig(path=str(folder), lora=LoraConfig(rank=2, targets=targets)))
    assert error.value.where == "model.lora.targets"
    assert "q_proj" in str(error.value.fix)


@pytest.mark.parametrize(
    ("options", "where", "message"),
    [
        ({"rank": 65}, "rank", "rank 65 is more than"),
        ({"rank": 2, "targets": []}, "targets", "no layer is named"),
    ],
)
def test_an_adapter_that_can_be_none_is_refused_before_weights_are_read(
    folder: Path, options: dict[str, Any], where: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        resolve_targets(ModelConfig(path=str(folder), lora=LoraConfig(**options)))
    assert error.value.where == f"model.lora.{where}"
    assert error.value.fix
    resolve_targets(ModelConfig(path=str(folder), lora=LoraConfig(rank=64)))


def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=72).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="GPT2LMHeadModel has no linear layers"):
        resolve_targets(ModelConfig(path=str(tmp_path), lora=LORA))


def test_all_linear_layers_are_all_but_the_head(folder: Path) -> None:
    found = resolve_targets(ModelConfig(path=str(folder), lora=LORA))
    assert found.lora is not None
    assert found.lora.targets == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_without_peft_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "peft" else sys.modules.get(name))
    with pytest.raises(UserError, match="peft") as error:
        resolve_targets(ModelConfig(path=str(folder), lora=LORA))
    assert "rlsys[lora]" in str(error.value.fix)


@pytest.mark.parametrize(("rows", "columns"), [(3, 64), (1, 65), (5, 130), (7, 1)])
@pytest.mark.parametrize(("scheme", "bits", "error"), [("nf4", 4, 0.152), ("int8", 8, 0.5 / 127)])
def test_rounded_weights_are_near_and_small(scheme: Any, bits: int, error: float, rows: int, columns: int) -> None:
    """Half the widest gap between two codes bounds the error, relative to the largest of the block or row."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    weight[0] = 0
    packed = pack(weight, scheme)
    back = unpack(packed, columns, scheme, torch.float32)
    assert torch.equal(back[0], weight[0])
    assert (back - weight).abs().max() <= (error + 1e-6) * weight.abs().max()
    assert torch.equal(pack(back, scheme), packed), "what is rounded already stays"
    padded = -(-columns // 64) * 64 if scheme == "nf4" else columns
    scales = padded // 64 if scheme == "nf4" else 1
    assert packed.shape == (rows, padded * bits // 8 + 4 * scales)
