"""Models and rows of ``benchmarks.gpu``: Qwen3 shapes with random weights, and packed rows of known length."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from rlsys.batch import DataProto, jagged
from rlsys.config.assets import bundled_model
from rlsys.engines.flops import ModelFlops


@dataclass(frozen=True)
class Shape:
    """Of a Qwen3 with tied embeddings."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    words: int

    def config(self) -> Qwen3Config:
        return Qwen3Config(
            vocab_size=self.words, hidden_size=self.hidden, intermediate_size=self.intermediate,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim, max_position_embeddings=40_960, tie_word_embeddings=True, pad_token_id=0,
            bos_token_id=None, eos_token_id=1, dtype="bfloat16",
        )  # fmt: skip

    def parameters(self) -> int:
        """Tied weights once."""
        with torch.device("meta"):
            return sum(p.numel() for p in AutoModelForCausalLM.from_config(self.config()).parameters())

    def flops(self) -> ModelFlops:
        return ModelFlops.of(self.config(), self.parameters())


QWEN3_1_7B = Shape(2048, 28, 16, 8, 128, 6144, 151_936)
SMALL = Shape(512, 4, 8, 4, 64, 1536, 4096)
TINY = Shape(64, 2, 4, 2, 32, 128, 512)


def write_model(folder: Path, shape: Shape) -> Path:
    """The shape with random weights (standard deviation 0.02) in bfloat16 as a Hugging Face folder, with the bundled
    model's tokenizer, which has fewer words."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape.config(), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for file in Path(bundled_model("bundled:arithmetic")).glob("*token*"):
        shutil.copy(file, folder)
    return folder


def equal_rows(rows: int, length: int, words: int, *, prompt: int = 16) -> DataProto:
    """Rows of ``length`` tokens each, which is what a micro-batch's budget counts; the last of them is no input."""
    generator = torch.Generator().manual_seed(0)
    responses = torch.full((rows,), length - prompt)
    return _rows(torch.full((rows,), prompt), responses, words, generator)


def ragged_rows(rows: int, mean: int, words: int) -> DataProto:
    """Responses of 1 to 2 · ``mean`` tokens, prompts of 4 to 32, with advantages."""
    generator = torch.Generator().manual_seed(0)
    responses = torch.randint(1, 2 * mean + 1, (rows,), generator=generator)
    batch = _rows(torch.randint(4, 33, (rows,), generator=generator), responses, words, generator)
    advantages = torch.randn(rows, generator=generator).repeat_interleave(responses)
    batch.batch["advantages"] = jagged.from_values(advantages, responses)
    return batch


def _rows(prompts: torch.Tensor, responses: torch.Tensor, words: int, generator: torch.Generator) -> DataProto:
    def ids(lengths: torch.Tensor) -> torch.Tensor:
        drawn = torch.randint(2, words, (int(lengths.sum()),), generator=generator)
        return jagged.from_values(drawn, lengths)

    mask = jagged.from_values(torch.ones(int(responses.sum()), dtype=torch.bool), responses)
    return DataProto.from_dict(
        tensors={"prompt_ids": ids(prompts), "response_ids": ids(responses), "response_mask": mask}
    )


def training_flops(shape: Shape, batch: DataProto) -> tuple[float, int]:
    """Of a forward and backward pass over these rows, and the tokens that go through the model."""
    prompts, responses = (jagged.lengths(batch.batch[name]) for name in ("prompt_ids", "response_ids"))
    inputs = prompts + responses - 1
    return shape.flops().training(inputs, int(responses.sum())), int(inputs.sum())
