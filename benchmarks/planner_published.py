"""Step times that another framework has published for GPUs, beside what the planner says of rlsys on the same ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks import report
from rlsys.cluster.planner.plan import Question, RunPlan, plan_run
from rlsys.cluster.planner.shape import from_config
from rlsys.cluster.topology import expected
from rlsys.config.compose import compose_run

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
}  # fmt: skip
QWEN3_32B = {
    "model_type": "qwen3", "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "tie_word_embeddings": False, "max_position_embeddings": 40960,
}  # fmt: skip
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "vocab_size": 151936, "tie_word_embeddings": False, "max_position_embeddings": 40960,
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """nodes: of eight H100. sequence: mean tokens of prompt and response together; longest: of them; tensor: GPUs of a
    sampler; seconds: of a step."""

    model: str
    config: dict[str, Any]
    nodes: int
    longest: int
    sequence: int
    tensor: int
    seconds: float


SOURCE = "NeMo-RL 0.4, docs/about/performance-summary.md (github.com/NVIDIA-NeMo/RL)"
# On-policy GRPO on OpenMathInstruct-2, DGX H100, bfloat16, Megatron; 2,048 samples a step, 512 an update.
ROWS = (
    Published("Llama 3.1 8B", LLAMA_8B, 2, 4096, 1060, 1, 97.7),
    Published("Qwen3 32B", QWEN3_32B, 4, 4096, 3206, 4, 393),
    Published("Qwen3 30B-A3B", QWEN3_30B_A3B, 4, 4096, 3154, 4, 225),
)
_PROMPT = 150  # mean tokens of its problems with their template, assumed


def plan_of(row: Published) -> RunPlan:
    """rlsys with the same samples, updates and GPUs. Samplers of one GPU take turns with the trainer, as there; those
    of several have half of the GPUs to themselves, which is how rlsys runs them."""
    gpus = 8 * row.nodes
    apart = row.tensor > 1
    config = compose_run([
        "+recipe=grpo_qwen", "model=hub", "model.path=none", "data=gsm8k", "data.path=none", "cluster=gpu_pool",
        f"cluster.nodes={row.nodes}", f"cluster.placement={'disaggregated' if apart else 'colocated'}",
        "data.prompts_per_step=64", "rollout.samples_per_prompt=32", "data.max_prompt_tokens=512",
        f"data.max_response_tokens={row.longest - 512}", "trainer.updates_per_step=4", "trainer.activations=recompute",
        "eval.every=0", "rollout.gpu_memory_fraction=0.8",
        f"rollout.workers={gpus // 2 // row.tensor if apart else gpus}",
        *([f"rollout.tensor_parallel={row.tensor}", f"trainer.ranks={gpus // 2}"] if apart else []),
    ])  # fmt: skip
    shape = from_config(row.config, name=row.model)
    return plan_run(Question(config, shape, expected(config.cluster), _PROMPT, float(row.sequence - _PROMPT)))


def published() -> str:
    """The section of the page."""
    rows = []
    for row in ROWS:
        plan = plan_of(row)
        parts = ", ".join(f"{name} {phase.seconds:.0f}" for name, phase in plan.phases.items() if phase.seconds >= 0.5)
        rows.append([
            row.model, f"{8 * row.nodes} H100", f"{row.sequence:,} of {row.longest:,}", f"{row.seconds:g}",
            f"{plan.step_s:.0f}", f"{plan.step_s / row.seconds:.2f}", parts, "yes" if plan.memory.fits else "no",
        ])  # fmt: skip
    table = report.table(
        ["model", "GPUs", "mean tokens", "published, s a step", "predicted of rlsys, s", "ratio", "of which", "fits"],
        rows,
    )
    return f"""## On GPUs: predicted, and what another framework has published

No GPU run of rlsys stands behind these figures. Its GPU coefficients are assumed shares of the data sheet's peaks, and
nothing was fitted to this table. Published: {SOURCE};
on-policy GRPO, 2,048 samples a step, 512 an update, DGX H100, bfloat16.

{table}

Assumed: prompts of {_PROMPT} tokens, 64 prompts × 32 samples, lengths with a geometric tail, no KL term (the other
framework computes a reference pass too). It trains with Megatron (tensor and pipeline parallel), rlsys with FSDP2 and
recomputed activations. Where a sampler spans several GPUs, rlsys gives half of the GPUs to samplers and half to
trainers, while the other takes turns on all of them: that alone about doubles both phases."""
