"""Packed rows have the loss and gradient of padded ones, and no sequence sees another, however the batch is cut."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import Family, make_model, make_model_folder
from torch.utils.flop_counter import FlopCounterMode
from training_batches import composed_batch, process_group, random_batch
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

from rlsys.algorithms.channels import CrossEntropy, Distillation, PolicyGradient, Preference, ValueLoss
from rlsys.algorithms.objective import DivergencePass, Objective
from rlsys.batch import DataProto, jagged
from rlsys.config.errors import UserError
from rlsys.config.schema import DistillationConfig, ModelConfig, TrainerConfig
from rlsys.engines.train.attention import Packing, packs, set_attention, unpackable
from rlsys.engines.train.fsdp import FsdpEngine
from rlsys.engines.train.layers import prepare_layers
from rlsys.engines.train.model import _hidden, load_causal_lm
from rlsys.engines.train.reference import ReferenceEngine
from rlsys.engines.train.rows import RankRows

CPU = torch.device("cpu")
TRAINER = TrainerConfig(lr=1e-2, micro_batch_tokens=300)
OBJECTIVE = Objective(
    {
        "policy": (PolicyGradient(kl_coef=0.1, entropy_coef=0.01), 1.0),
        "distillation": (Distillation(DivergencePass("jsd", {"alpha": 0.5})), 0.5),
        "preference": (Preference("dpo"), 0.3),
    }
)
IMITATION = Objective({"imitation": (CrossEntropy(), 1.0)})
TEACHER = DistillationConfig(weight=0.5, teacher="ema", teacher_rate=0.3)
LENGTHS = (7, 3, 3, 12, 1, 9)


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    with process_group():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"), "qwen3", tied=True)


def load(folder: Path, trainer: TrainerConfig = TRAINER, **kwargs: Any) -> FsdpEngine:
    arguments = {"temperature": 0.7, "total_steps": 20, "seed": 0, **kwargs}
    return FsdpEngine.load(ModelConfig(path=str(folder)), trainer, **arguments)


def step(
    engine: FsdpEngine, batch: DataProto, objective: Objective
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    metrics = engine.forward_backward(batch, objective)
    return metrics, {name: shard.local.clone() for name, shard in engine._trained.gradient().items()}


def assert_agree(
    one: tuple[dict[str, float], dict[str, torch.Tensor]], other: tuple[dict[str, float], dict[str, torch.Tensor]]
) -> None:
    for name in one[0].keys() - {"micro_batches", "padding_fraction", "waste_fraction"}:
        assert other[0][name] == pytest.approx(one[0][name], rel=1e-5, abs=1e-6), name
    for name, gradient in one[1].items():
        assert (other[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def groups(seed: int = 3, prompts: int = 3, samples: int = 4) -> DataProto:
    """random_batch whose rows have ``prompts`` different prompts, in no order."""
    batch = random_batch(seed, rows=prompts * samples)
    own = jagged.to_rows(batch.batch["prompt_ids"])
    columns = dict(batch.batch.items()) | {
        "prompt_ids": jagged.from_rows([own[row % prompts] for row in range(prompts * samples)])
    }
    return DataProto.from_dict(tensors=columns)


def hidden_by_itself(lm: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    lm.set_attn_implementation("eager")
    return torch.cat([lm.base_model(input_ids=part[None]).last_hidden_state[0] for part in ids.split(LENGTHS)])


def packing() -> Packing:
    return Packing(LENGTHS, torch.cat([torch.arange(length) for length in LENGTHS])[None])


def hidden_packed(lm: torch.nn.Module, ids: torch.Tensor, attention: str, sizes: Packing | None = None) -> torch.Tensor:
    assert set_attention(lm, attention, packing=True, device=CPU, dtype=torch.float32) in (attention, "sdpa")
    sizes = sizes or packing()
    output = lm.base_model(input_ids=ids[None], position_ids=sizes.position_ids, packing=sizes, use_cache=False)
    return output.last_hidden_state[0]


def mistral(window: int) -> torch.nn.Module:
    config = MistralConfig(
        vocab_size=72, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=window, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    return MistralForCausalLM(config).eval()


@pytest.mark.parametrize("attention", ["auto", "eager"])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "mistral"])
def test_hidden_states_and_gradient_are_those_of_one_sequence_at_a_time(family: Family | str, attention: str) -> None:
    """With plain transformers; Mistral's layers have a window that is shorter than some sequences."""
    lm = mistral(window=4) if family == "mistral" else make_model(family)
    ids = torch.randint(72, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    weight = torch.randn(len(ids), 64, generator=torch.Generator().manual_seed(2))
    found = []
    for hidden in (hidden_by_itself(lm, ids), hidden_packed(lm, ids, attention)):
        lm.zero_grad()
        (hidden * weight).sum().backward()
        found.append((hidden.detach(), {n: p.grad.clone() for n, p in lm.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)
    for name, gradient in found[0][1].items():
        assert (found[1][1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("window", [None, 4])
def test_flex_attention_sees_the_same_tokens(window: int | None) -> None:
    """Its mask, forward; torch has no backward pass of it on a CPU."""
    from rlsys.engines.train.attention import _eager, _flex

    contexts = (-1, -1, -1, -1, 3, 0)  # the last two continue others
    places = [torch.arange(n) + (LENGTHS[c] if c >= 0 else 0) for n, c in zip(LENGTHS, contexts, strict=True)]
    sizes = Packing(LENGTHS, torch.cat(places)[None], contexts)
    q, k, v = (torch.randn(1, heads, sum(LENGTHS), 16) for heads in (4, 2, 2))
    with torch.no_grad():
        torch.testing.assert_close(
            _flex(q, k, v, sizes, None, window), _eager(q, k, v, sizes, None, window), rtol=1e-5, atol=1e-5
        )


def test_the_keys_of_variable_length_kernels() -> None:
    sizes = Packing((2, 3, 1), torch.zeros(1, 6), (-1, 0, -1))
    assert sizes.queries[0].tolist() == [0, 2, 5, 6]
    assert (sizes.keys[0].tolist(), sizes.keys[1]) == ([0, 2, 7, 8], 5)
    assert sizes.key_index.tolist() == [0, 1, 0, 1, 2, 3, 4, 5]


def test_a_sequence_changes_nothing_in_another() -> None:
    lm = make_model("qwen3")
    ids = torch.randint(72, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    before = hidden_packed(lm, ids, "sdpa").split(LENGTHS)
    for changed, part in enumerate(ids.split(LENGTHS)):
        part += 1
        after = hidden_packed(lm, ids % 72, "sdpa").split(LENGTHS)
        same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert same == [number != changed for number in range(len(LENGTHS))]
        part -= 1


@pytest.mark.parametrize("budget", [130, 5000])
def test_packed_and_padded_steps_agree(folder: Path, budget: int) -> None:
    """Every kind of sequence: responses, the teacher's, both sides of pairs."""
    batch = composed_batch(seed=3)
    engines = [
        load(folder, replace(TRAINER, micro_batch_tokens=budget, rows=rows), distillation=TEACHER)
        for rows in ("padded", "packed")
    ]
    padded, packed = (step(engine, batch, OBJECTIVE) for engine in engines)
    assert_agree(padded, packed)
    assert padded[0]["padding_fraction"] > 0.05
    assert packed[0]["padding_fraction"] == 0
    one, other = (jagged.values(engine.forward(batch).batch["logprobs"]) for engine in engines)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_critic_and_a_reference_take_packed_rows(folder: Path) -> None:
    batch = random_batch()
    tokens = jagged.values(batch.batch["response_ids"])
    columns = {name: jagged.from_values(values, jagged.lengths(batch.batch["response_ids"])) for name, values in (
        ("values", torch.zeros(len(tokens))), ("returns", torch.linspace(-1, 1, len(tokens))))}  # fmt: skip
    batch = DataProto.from_dict(tensors=dict(batch.batch.items()) | columns)
    objective = Objective({"critic": (ValueLoss(clip=None), 1.0)})
    trainers = [replace(TRAINER, rows="packed" if packed else "padded") for packed in (False, True)]
    assert_agree(*(step(load(folder, trainer, critic=True), batch, objective) for trainer in trainers))
    references = [ReferenceEngine.load(ModelConfig(path=str(folder)), t, temperature=0.7) for t in trainers]
    one, other = (jagged.values(reference.forward(batch).batch["ref_logprobs"]) for reference in references)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("budget", [60, 5000])
def test_a_shared_prompt_has_the_same_loss_and_gradient(folder: Path, budget: int, attention: str) -> None:
    batch, objective = groups(), Objective({"policy": (PolicyGradient(kl_coef=0.1, entropy_coef=0.01), 1.0)})
    trainer = replace(TRAINER, micro_batch_tokens=budget)
    sharing = replace(trainer, rows="shared")
    model = ModelConfig(path=str(folder), attention=attention)
    one, other = (FsdpEngine.load(model, t, temperature=0.7, total_steps=1, seed=0) for t in (trainer, sharing))
    assert_agree(step(one, batch, objective), step(other, batch, objective))
    inputs = [sum(micro.tokens for micro in e._rows(batch).cut(1, CPU)) for e in (one, other)]
    assert inputs[1] < inputs[0]


def test_sharing_beside_pairs_and_a_teacher(folder: Path) -> None:
    batch = composed_batch(seed=3)
    rows = jagged.to_rows(batch.batch["prompt_ids"])
    prompts = [rows[0] if len(row) else row for row in rows]
    batch = DataProto.from_dict(tensors=dict(batch.batch.items()) | {"prompt_ids": jagged.from_rows(prompts)})
    found = [
        step(load(folder, replace(TRAINER, rows=rows), distillation=TEACHER), batch, OBJECTIVE)
        for rows in ("packed", "shared")
    ]
    assert_agree(*found)


def test_the_order_of_rows_does_not_matter(folder: Path) -> None:
    batch, objective = groups(), Objective({"policy": (PolicyGradient(), 1.0)})
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = DataProto.from_dict(
        tensors={n: jagged.from_rows([jagged.to_rows(c)[row] for row in order]) for n, c in batch.batch.items()}
    )
    for trainer in (TRAINER, replace(TRAINER, rows="shared", micro_batch_tokens=80)):
        assert_agree(*(step(load(folder, trainer), b, objective) for b in (batch, shuffled)))


def test_an_empty_micro_batch_and_more_of_them_than_rows() -> None:
    rows = RankRows(random_batch(rows=3), (), max_length=99, token_budget=500, packing=True)
    cut = list(rows.cut(5, CPU))
    assert len(cut) == 5
    assert [micro.response.num_rows for micro in cut] == [1, 1, 1, 0, 0]
    assert cut[4].input_ids.shape == (1, 1)
    assert cut[4].tokens == 0
    assert cut[4].packing.lengths == (1,)


def test_a_rank_with_fewer_rows_divides_them_anew() -> None:
    rows = RankRows(random_batch(rows=40), (), max_length=99, token_budget=2000, packing=True)
    sizes = [micro.area for micro in rows.cut(4, CPU)]
    assert len(rows.plan) == 1
    assert max(sizes) - min(sizes) <= 31  # the longest row


def test_what_cannot_be_packed_is_padded_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    mamba = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=20, state_size=4))
    assert "linear_attention" in unpackable(mamba)
    llama = make_model("llama")
    assert unpackable(llama) is None
    llama.model.layers[0].mixer = torch.nn.Conv1d(64, 64, 3)
    assert "Conv1d" in unpackable(llama)
    assert unpackable(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=20))) is None
    lm = make_model("qwen3")
    lm.config.layer_types = ["full_attention", "linear_attention"]
    for _ in range(2):
        assert set_attention(lm, "auto", packing=True, device=CPU, dtype=torch.float32) == "sdpa"
    assert not packs(lm)
    said = [record.message for record in caplog.records if "padded and not packed" in record.message]
    assert len(said) == 1
    assert "linear_attention" in said[0]


@pytest.mark.parametrize("attention", ["flash", "varlen", "flex"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_attention_that_is_not_to_be_had_here_is_refused(folder: Path, attention: str) -> None:
    with pytest.raises(UserError, match="needs a GPU") as error:
        FsdpEngine.load(
            ModelConfig(path=str(folder), attention=attention), TRAINER, temperature=1.0, total_steps=1, seed=0
        )
    assert error.value.where == "model.attention"


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_offloaded_activations_are_refused_on_a_cpu(folder: Path) -> None:
    with pytest.raises(UserError, match="in main memory already") as error:
        load(folder, replace(TRAINER, activations="offload"))
    assert error.value.where == "trainer.activations"


def test_a_prompt_cannot_be_shared_by_a_family_that_is_not_packed(folder: Path) -> None:
    lm = load_causal_lm(ModelConfig(path=str(folder)), torch.float32, packing=False)
    with pytest.raises(UserError, match="packed rows") as error:
        prepare_layers(lm, replace(TRAINER, rows="shared"), CPU)
    assert error.value.where == "trainer.rows"


@pytest.mark.slow
def test_compiled_layers_have_the_same_loss_and_gradient(folder: Path) -> None:
    batch, objective = random_batch(), Objective({"policy": (PolicyGradient(), 1.0)})
    plain, compiled = (load(folder, replace(TRAINER, compile=value)) for value in (False, True))
    assert_agree(step(plain, batch, objective), step(compiled, batch, objective))


@pytest.mark.parametrize("rows", ["padded", "packed", "shared"])
def test_the_work_counted_is_what_goes_through_the_model(folder: Path, rows: Any) -> None:
    """By what torch counts; eager attention computes all pairs of queries and keys, and the formula those in sight."""
    batch = groups()
    engine = load(folder, replace(TRAINER, rows=rows, micro_batch_tokens=120))
    made = engine._rows(batch, IMITATION)
    micros = list(made.cut(len(made.plan), CPU))
    model = ModelConfig(path=str(folder), attention="eager")
    lm = load_causal_lm(model, torch.float32, packing=rows != "padded")  # not spread over ranks
    weights = sum(math.prod(p.shape) for name, p in lm.named_parameters() if name.endswith("proj.weight"))
    for micro in micros:
        work, counter = micro.work, FlopCounterMode(display=False)
        with counter, torch.no_grad():
            _hidden(lm.base_model, micro.input_ids, micro.packing)
        products = 2 * weights * micro.input_ids.numel()
        if rows == "padded":
            areas = micro.input_ids.shape[0] * micro.input_ids.shape[1] ** 2
        else:
            areas = int((work.lengths * (work.contexts + work.lengths)).sum())
            assert int(work.lengths.sum()) == micro.input_ids.numel()
        assert counter.get_total_flops() == products + 4 * 2 * 4 * 32 * areas
        assert int(work.lengths.sum()) == micro.tokens
        assert work.scored == len(micro.targets)
    engine.forward_backward(batch, IMITATION)
    assert int(engine.work.lengths.sum()) == sum(micro.tokens for micro in micros)
    assert engine.work.scored == int(jagged.values(batch.batch["response_mask"]).sum())
    assert (int(engine.work.lengths.sum()) < made.num_inputs) == (rows == "shared")


def test_the_gradient_of_each_channel_is_no_more_work(folder: Path) -> None:
    engine, found = load(folder), []
    both = Objective({name: OBJECTIVE.channels[name] for name in ("policy", "preference")})
    for channel_gradients in (False, True):
        engine.forward_backward(composed_batch(), both, channel_gradients=channel_gradients)
        found.append(engine.work)
    assert torch.equal(found[0].lengths.sort().values, found[1].lengths.sort().values)
    assert found[0].scored == found[1].scored
