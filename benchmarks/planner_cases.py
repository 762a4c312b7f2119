"""The runs that the planner is calibrated on and judged by: Qwen3 shapes of random weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """hidden, layers, intermediate: of the model. prompts × samples: of a step; limit: longest response; stops: whether
    responses end before it (at 16 of 512 words that are about equally likely); steps: of the run, the first of which
    does not count."""

    name: str
    hidden: int
    layers: int
    intermediate: int
    prompts: int
    samples: int
    limit: int
    stops: bool
    steps: int = 4

    @property
    def mean(self) -> float:
        """Of responses that stop with a chance of 1/32 at each token and at the limit."""
        return 32 * (1 - (1 - 1 / 32) ** self.limit)

    @property
    def words(self) -> str:
        return f"{self.prompts} × {self.samples}, {'long tail to' if self.stops else 'all'} {self.limit}"

    def write_config(self, folder: Path) -> Path:
        """The model's ``config.json``, as ``benchmarks.grpo_step_sides`` makes the model."""
        folder.mkdir(parents=True)
        said = {
            "model_type": "qwen3", "vocab_size": 512, "hidden_size": self.hidden,
            "intermediate_size": self.intermediate, "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // 64,
            "num_key_value_heads": self.hidden // 128, "head_dim": 64, "max_position_embeddings": 512,
            "tie_word_embeddings": True,
        }  # fmt: skip
        path = folder / "config.json"
        path.write_text(json.dumps(said), encoding="utf-8")
        return path


CALIBRATED = (
    Case("0.2M", 128, 1, 128, 4, 4, 16, False, 8),
    Case("3.3M", 256, 4, 768, 8, 8, 128, True, 6),
    Case("25M", 512, 8, 1536, 8, 8, 64, False),
)
JUDGED = (
    Case("4.9M", 256, 6, 768, 8, 16, 96, True, 6),
    Case("11M", 384, 6, 1152, 4, 8, 64, False, 5),
    Case("19M", 512, 6, 1536, 16, 4, 128, True),
    Case("32M", 512, 8, 2048, 4, 8, 32, False),
    Case("57M", 768, 8, 2304, 4, 8, 64, True),
)
QUICK = (
    Case("0.2M", 128, 1, 128, 2, 4, 8, False, 3),
    Case("1M", 128, 4, 384, 4, 4, 16, False, 3),
    Case("3.3M", 256, 4, 768, 4, 4, 16, False, 3),
    Case("2M", 256, 2, 768, 4, 4, 16, False, 3),
)
