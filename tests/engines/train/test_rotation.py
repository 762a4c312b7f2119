"""Where rotary positions depend on length, log-probs do not depend on what else is in a pass, and are the sampler's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import EOS, PAD, make_tokenizer
from training_batches import process_group
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Phi3Config, PretrainedConfig

from rlsys.batch import DataProto, jagged
from rlsys.config.errors import UserError
from rlsys.config.schema import DistillationConfig, ModelConfig, TorchRollout, TrainerConfig
from rlsys.engines.rollout import SamplingParams
from rlsys.engines.rollout.decoder import unsupported
from rlsys.engines.rollout.torch import TorchEngine
from rlsys.engines.rotary import freeze_rotation, rotation_limit
from rlsys.engines.train.fsdp import FsdpEngine
from rlsys.engines.train.reference import ReferenceEngine

ORIGINAL, LONGEST = 64, 110
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0] * 8, "long_factor": [1.0 + 0.9 * i for i in range(8)],
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
SIZES: dict[str, Any] = {
    "vocab_size": 72, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": EOS,
}  # fmt: skip


def config(family: str, length: int = 2 * ORIGINAL) -> PretrainedConfig:
    if family == "phi3":
        top = {"original_max_position_embeddings": ORIGINAL, "max_position_embeddings": length}
        return Phi3Config(**SIZES, **top, sliding_window=None, rope_parameters=dict(LONGROPE))
    rope = LONGROPE if family == "llama" else DYNAMIC
    return LlamaConfig(**SIZES, max_position_embeddings=length, rope_parameters=dict(rope))


def make_folder(path: Path, made: PretrainedConfig) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
        model.get_output_embeddings().weight[EOS] = 0.0  # rare, so that some responses are long
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    families = ("phi3", "llama", "dynamic")
    return {family: make_folder(tmp_path_factory.mktemp(family), config(family)) for family in families}


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    with process_group():
        yield


def batch(*lengths: int) -> DataProto:
    """Rows of so many tokens, 8 of which are the prompt; the first is the same in all batches."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(2, 72, (length,), generator=generator) for length in lengths]
    return rows_of([(row[:8], row[8:]) for row in rows])


def rows_of(rows: list[tuple[torch.Tensor, torch.Tensor]]) -> DataProto:
    columns = {
        "prompt_ids": jagged.from_rows([prompt for prompt, _ in rows]),
        "response_ids": jagged.from_rows([response for _, response in rows]),
        "response_mask": jagged.from_rows([torch.ones(len(response), dtype=torch.bool) for _, response in rows]),
    }
    return DataProto.from_dict(tensors=columns)


def engine(folder: Path, rows: Any, longest: int | None, **options: Any) -> FsdpEngine:
    trainer = TrainerConfig(rows=rows, micro_batch_tokens=400)
    model = ModelConfig(path=str(folder))
    return FsdpEngine.load(model, trainer, temperature=1.0, total_steps=1, seed=0, longest=longest, **options)


def first(columns: DataProto, name: str = "logprobs") -> torch.Tensor:
    return jagged.to_rows(columns.batch[name])[0]


def plain(folder: Path, rows: DataProto, longest: int) -> torch.Tensor:
    """transformers' own log-probs of the first row, in a pass with a row of ``longest`` tokens."""
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt, response = (jagged.to_rows(rows.batch[name])[0] for name in ("prompt_ids", "response_ids"))
    row = torch.cat([prompt, response])
    ids = torch.zeros(2, longest, dtype=torch.int64)
    ids[0, : len(row)] = row
    with torch.no_grad():
        logprobs = lm(ids).logits[0, len(prompt) - 1 : len(row) - 1].log_softmax(-1)
    return logprobs.gather(1, response[:, None])[:, 0]


@pytest.mark.parametrize("rows", ["packed", "padded"])
@pytest.mark.parametrize("family", ["phi3", "llama"])
def test_logprobs_do_not_depend_on_what_is_beside(folders: dict[str, Path], family: str, rows: str) -> None:
    folder, one = folders[family], batch(40)
    trained = engine(folder, rows, LONGEST)
    alone, beside = (first(trained.forward(some)) for some in (one, batch(40, 100)))
    torch.testing.assert_close(beside, alone, atol=2e-5, rtol=0)
    torch.testing.assert_close(alone, plain(folder, one, LONGEST), atol=2e-5, rtol=0)
    trainer = TrainerConfig(rows=rows)  # type: ignore[arg-type]
    reference = ReferenceEngine.load(ModelConfig(path=str(folder)), trainer, temperature=1.0, longest=LONGEST)
    torch.testing.assert_close(first(reference.forward(one), "ref_logprobs"), alone, atol=2e-5, rtol=0)
    short = first(engine(folder, rows, ORIGINAL).forward(one))
    torch.testing.assert_close(short, plain(folder, one, ORIGINAL), atol=2e-5, rtol=0)
    assert (short - alone).abs().max() > 0.1


@pytest.mark.parametrize("family", ["phi3", "llama", "dynamic"])
@pytest.mark.parametrize("longest", [ORIGINAL - 4, LONGEST])
def test_the_sampler_has_the_trainers_logprobs(folders: dict[str, Path], family: str, longest: int) -> None:
    """Of responses that end below and beyond the original length, in one batch."""

    async def sample() -> tuple[list[list[int]], list[Any]]:
        rollout = TorchRollout(engine="torch", samples_per_prompt=1)
        sampler = TorchEngine(str(folders[family]), rollout, max_length=longest)
        assert (unsupported(sampler._model) is None) == (family != "phi3")
        prompts = [[5, 6, 7, 8], list(range(5, 25))] * 6
        wanted = [SamplingParams(1.0, limit, seed) for seed, limit in enumerate((12, 100) * 6)]
        try:
            pairs = zip(prompts, wanted, strict=True)
            return prompts, list(await asyncio.gather(*(sampler.generate(p, w) for p, w in pairs)))
        finally:
            await sampler.close()

    prompts, samples = asyncio.run(sample())
    reached = max(len(p) + len(s.token_ids) for p, s in zip(prompts, samples, strict=True))
    assert (reached > ORIGINAL) == (longest > ORIGINAL)
    made = rows_of([(torch.tensor(p), torch.tensor(s.token_ids)) for p, s in zip(prompts, samples, strict=True)])
    found = jagged.to_rows(engine(folders[family], "packed", longest).forward(made).batch["logprobs"])
    for sampled, trained in zip(samples, found, strict=True):
        torch.testing.assert_close(torch.tensor(sampled.logprobs), trained, atol=5e-5, rtol=0)


def test_a_teacher_beside_is_rotated_by_the_same_length(folders: dict[str, Path]) -> None:
    teacher = DistillationConfig(weight=0.5, teacher="model", teacher_path=str(folders["phi3"]))
    trained = engine(folders["llama"], "packed", LONGEST, distillation=teacher)
    frozen = trained._teacher.beside.model.lm.base_model.rotary_emb  # type: ignore[union-attr]
    own = trained._model.lm.base_model.rotary_emb
    assert torch.equal(frozen.inv_freq, own.inv_freq)
    assert frozen.rope_type == own.rope_type == "default"


def test_rows_that_the_frozen_positions_are_not_for_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="the model takes 64"):
        engine(folders["phi3"], "packed", ORIGINAL).forward(batch(40, 100))


def test_dynamic_ntk_is_refused_beyond_the_models_own_length(tmp_path: Path) -> None:
    short = make_folder(tmp_path / "short", config("dynamic", ORIGINAL))
    engine(short, "packed", ORIGINAL).forward(batch(40, ORIGINAL))
    with pytest.raises(UserError, match="beyond 64") as error:
        engine(short, "packed", LONGEST)
    assert error.value.where == "data.max_response_tokens"


def test_layers_of_several_kinds_are_frozen_each_by_its_own(tmp_path: Path) -> None:
    rope = {"full_attention": {**LONGROPE}, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    sizes = SIZES | {"head_dim": 16, "max_position_embeddings": 128, "num_hidden_layers": 6}
    made = Gemma3TextConfig(**sizes, rope_parameters=rope)
    assert rotation_limit(made, ORIGINAL) == ORIGINAL
    assert rotation_limit(made, LONGEST) is None
    lm = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    rotary, places = lm.base_model.rotary_emb, torch.arange(ORIGINAL)[None]
    kinds = ("full_attention", "sliding_attention")
    states = torch.zeros(1, 1, 64)
    before = {kind: rotary(states, torch.arange(LONGEST)[None], kind)[0][:, :ORIGINAL] for kind in kinds}
    freeze_rotation(lm, LONGEST)
    for kind in kinds:
        assert torch.equal(rotary(states, places, kind)[0], before[kind]), kind
