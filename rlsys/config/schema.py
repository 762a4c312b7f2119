"""The configuration of a run: one frozen dataclass a config group, no torch.

Hydra composes the YAML of ``configs/`` into a plain dictionary; ``rlsys.config.build`` turns it into
:class:`RunConfig`, checking names, types and ranges. Nothing changes a config after that.

Where a group has variants (``data``, ``rollout``), the field ``kind`` (``engine``) selects the dataclass.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

# Strict: a quoted number or a bool in place of a number is an error, not a guess.
Positive = Annotated[int, Field(gt=0, strict=True)]
NonNegative = Annotated[int, Field(ge=0, strict=True)]
Integer = Annotated[int, Field(strict=True)]
Float = Annotated[float, Field(strict=True, allow_inf_nan=False)]
PositiveFloat = Annotated[Float, Field(gt=0)]
NonNegativeFloat = Annotated[Float, Field(ge=0)]
Fraction = Annotated[Float, Field(ge=0, le=1)]
Flag = Annotated[bool, Field(strict=True)]
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The policy that is trained.

    path: a Hugging Face folder, a hub id, or ``bundled:NAME`` for a checkpoint that ships with rlsys.
    dtype: of the trainer's and the reference's forward pass; master weights and optimiser are float32.
    attention: transformers' attention implementation.
    chat_template: path of a Jinja file; null: the tokenizer's own.
    """

    path: str
    dtype: Dtype = "float32"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    chat_template: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Data:
    """What every data set has.

    prompts_per_step: prompt groups in one training step.
    max_prompt_tokens: longest prompt after the chat template.
    max_response_tokens: longest response (all turns together).
    long_prompts: a longer prompt is an ``error`` that names the row, or it is dropped and counted.
    shuffle: a new seeded order each epoch; false: the order of the file.
    system_prompt: a system message put before every prompt that has none.
    """

    prompts_per_step: Positive
    max_prompt_tokens: Positive
    max_response_tokens: Positive
    long_prompts: Literal["error", "drop"] = "error"
    shuffle: Flag = True
    system_prompt: str | None = None


@dataclass(frozen=True, kw_only=True)
class ArithmeticData(_Data):
    """Generated problems such as ``37+05=``; held-out problems are never trained on.

    digits: digits of each operand, zero-padded.
    operations: any of ``+``, ``-``.
    held_out: number of problems kept for evaluation.
    split_seed: decides which problems are held out; change it only together with the model, which
        must not have seen them.
    """

    kind: Literal["arithmetic"]
    digits: Annotated[int, Field(ge=1, le=3, strict=True)] = 2
    operations: list[Literal["+", "-"]] = field(default_factory=lambda: ["+"])
    held_out: Positive = 1000
    split_seed: Integer = 0


@dataclass(frozen=True, kw_only=True)
class GSM8KData(_Data):
    """Grade-school word problems.

    path: a folder with ``train.jsonl`` and ``test.jsonl``, or a hub id (``openai/gsm8k``).
    instruction: text put after every question.
    """

    kind: Literal["gsm8k"]
    path: str
    instruction: str = "Let's think step by step and write the final answer after '####'."


@dataclass(frozen=True, kw_only=True)
class FileData(_Data):
    """JSONL or parquet rows of ``{prompt | messages, answer, …}``.

    path: file of the training rows.
    eval_path: file of the held-out rows; null: there are none (then set eval.every=0).
    prompt_key: column with the user's text (or, under the name ``messages``, the list of messages).
    answer_key: column with the answer that the reward compares with.
    """

    kind: Literal["file"]
    path: str
    eval_path: str | None = None
    prompt_key: str = "prompt"
    answer_key: str = "answer"


@dataclass(frozen=True, kw_only=True)
class ReasoningGymData(_Data):
    """Tasks of the package reasoning-gym, by name.

    task: name of the generator (``basic_arithmetic``, ``chain_sum``, …).
    size: number of training problems; ``eval_size`` of held-out ones (another seed; repeats are dropped).
    task_seed: seed of the generator.
    options: arguments of the generator (``min_digits``, …), checked by reasoning-gym.
    """

    kind: Literal["reasoning_gym"]
    task: str
    size: Positive = 10_000
    eval_size: NonNegative = 500
    task_seed: Integer = 0
    options: dict[str, Any] = field(default_factory=dict)


DataConfig = Annotated[ArithmeticData | GSM8KData | FileData | ReasoningGymData, Field(discriminator="kind")]


@dataclass(frozen=True, kw_only=True)
class RewardPart:
    """One term of the reward.

    use: name of a reward function, or the import path of your own.
    weight: its factor in the sum.
    args: keyword arguments of the function.
    when: a condition on parts listed before this one, such as ``correct > 0.5``; where it does not hold the part
        is not computed and counts 0.
    """

    use: str
    weight: Float = 1.0
    args: dict[str, Any] = field(default_factory=dict)
    when: str | None = None


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """reward = Σ weight · part.

    parts: by name, in order; the first one (or ``eval.metric``) is what held-out accuracy counts.
    workers: processes that compute rewards.
    timeout_s: time limit of one call.
    max_failure_rate: fraction of a step's samples whose reward may raise or time out before the run stops.
    permute: rewards are permuted over the batch before advantages: the control that must not learn.
    """

    parts: dict[str, RewardPart]
    workers: Positive = 1
    timeout_s: PositiveFloat = 5.0
    max_failure_rate: Fraction = 0.0
    permute: Flag = False


@dataclass(frozen=True, kw_only=True)
class _Rollout:
    """Sampling. Training samples from the policy's full distribution at ``temperature``: a truncated or
    penalised distribution (top-p, top-k, min-p, penalties) is not the one whose log-probs the trainer computes.

    samples_per_prompt: size of a prompt group.
    temperature: of the policy; trainer and reference divide logits by it too.
    stop: texts that end a response, besides the end-of-sequence token.
    stop_token_ids: token ids that end a response.
    workers: number of RolloutWorker actors.
    dtype: of the sampler's weights.
    environment: name or import path of the environment that a prompt is played in.
    mismatch_alarm: mean absolute log-prob difference between sampler and trainer above which an alarm is raised.
    """

    samples_per_prompt: Positive
    temperature: PositiveFloat = 1.0
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[Integer] = field(default_factory=list)
    workers: Positive = 1
    dtype: Dtype = "float32"
    environment: str = "single_turn"
    mismatch_alarm: PositiveFloat = 0.05


@dataclass(frozen=True, kw_only=True)
class VllmRollout(_Rollout):
    """vLLM's asynchronous engine.

    kv_cache_gib: size of the KV cache on a CPU.
    gpu_memory_fraction: of the GPU's memory, for weights and KV cache.
    max_concurrent: sequences that the engine decodes at once.
    enforce_eager: no graph capture or compilation (faster start, slower decoding on a GPU).
    engine_args: passed to vLLM's engine arguments as they are, checked against their names.
    """

    engine: Literal["vllm"]
    kv_cache_gib: PositiveFloat = 1.0
    gpu_memory_fraction: Fraction = 0.5
    max_concurrent: Positive = 256
    enforce_eager: Flag = True
    engine_args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TorchRollout(_Rollout):
    """transformers' own generation: no vLLM needed, slower.

    max_concurrent: sequences in one call of ``generate``.
    """

    engine: Literal["torch"]
    max_concurrent: Positive = 256


RolloutConfig = Annotated[VllmRollout | TorchRollout, Field(discriminator="engine")]


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """The optimiser and how the batch is cut.

    backend: ``fsdp``: FSDP2 (``fully_shard``).
    ranks: trainer processes; null: one a GPU, or one on a CPU.
    micro_batch_tokens: most tokens (padding included) in one forward and backward pass of a rank.
    updates_per_step: optimiser steps that a step's prompt groups are divided over; 1 is strictly on-policy.
    logprob_chunk_tokens: tokens whose [tokens, vocabulary] logits exist at once.
    activation_checkpointing: recompute each layer's activations in the backward pass.
    lr, betas, eps, weight_decay: AdamW; biases, norms, embeddings and anything below two dimensions do not decay.
    max_grad_norm: global gradient norm is clipped to this.
    schedule: shape of the learning rate over the run's optimiser steps; warmup_steps in optimiser steps.
    """

    backend: Literal["fsdp"] = "fsdp"
    ranks: Positive | None = None
    micro_batch_tokens: Positive = 8192
    updates_per_step: Positive = 1
    logprob_chunk_tokens: Positive = 4096
    activation_checkpointing: Flag = False
    lr: PositiveFloat = 1e-6
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.01
    max_grad_norm: PositiveFloat = 1.0
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    warmup_steps: NonNegative = 0


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """KL to the reference policy.

    coef: 0: none, and no reference worker is started.
    estimator: k1, abs, k2, k3, or k3+ (k3 with the straight-through gradient of k2).
    placement: a term of the loss, or a penalty on the reward.
    """

    coef: NonNegativeFloat = 0.0
    estimator: Literal["k1", "abs", "k2", "k3", "k3+"] = "k3"
    placement: Literal["loss", "reward"] = "loss"


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """How samples become a gradient.

    advantage, advantage_options: name or import path of the estimator, and its keyword options.
    loss, loss_options: name or import path of the policy loss, and its keyword options.
    aggregation: how token losses are summed up into one number.
    entropy_coef: weight of the entropy bonus.
    old_logprobs: π_old from the ``trainer``, or ``sampler`` (bypass: π_old := μ).
    """

    advantage: str = "grpo"
    advantage_options: dict[str, Any] = field(default_factory=dict)
    loss: str = "ppo_clip"
    loss_options: dict[str, Any] = field(default_factory=dict)
    aggregation: Literal[
        "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
    ] = "token-mean"
    entropy_coef: NonNegativeFloat = 0.0
    old_logprobs: Literal["trainer", "sampler"] = "trainer"
    kl: KLConfig = KLConfig()


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Held-out evaluation, before the first step, every ``every`` steps and after the last.

    every: steps between evaluations; 0: never.
    problems: at most this many held-out problems.
    samples: responses a problem at the training temperature, for avg@n and pass@k; 0: greedy accuracy only.
    pass_k: the k of pass@k.
    metric: the reward part that counts as correct when ≥ 1; null: the first part.
    """

    every: NonNegative = 10
    problems: Positive = 1000
    samples: NonNegative = 0
    pass_k: Positive = 1
    metric: str | None = None


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """every: steps between checkpoints (one is always written at the end and on Ctrl-C); keep_last: how many stay;
    keep_best: the one with the best held-out accuracy stays too; export: the final weights are also written as a
    Hugging Face folder."""

    every: Positive = 20
    keep_last: Positive = 2
    keep_best: Flag = True
    export: Flag = True


@dataclass(frozen=True, kw_only=True)
class DeadlineConfig:
    """Seconds that the controller waits for one answer of an actor in each phase before it ends the run."""

    start: PositiveFloat = 600.0
    rollout: PositiveFloat = 1800.0
    reward: PositiveFloat = 600.0
    reference: PositiveFloat = 600.0
    train: PositiveFloat = 1800.0
    sync: PositiveFloat = 300.0
    checkpoint: PositiveFloat = 600.0


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where it runs.

    address: of a running Ray cluster (``auto``: the one on this machine); null: a local one for this run.
    threads: CPU threads of a trainer rank, a sampler or the reference; null: the machine's cores divided by the ranks.
    object_store_gib: shared memory of a local cluster's object store; null: sized for the model's weights.
    """

    address: str | None = None
    threads: Positive | None = None
    object_store_gib: PositiveFloat | None = None


@dataclass(frozen=True, kw_only=True)
class TrackerConfig:
    """Who is told about the run, besides its folder.

    use: any of ``tensorboard``, ``wandb``, or import paths.
    project: name for trackers that have projects.
    rollouts: sampled rollouts written as JSONL each step, rounded up to whole groups.
    display: ``live``, ``plain`` lines, or ``auto`` (live on a terminal).
    """

    use: list[str] = field(default_factory=list)
    project: str = "rlsys"
    rollouts: NonNegative = 16
    display: Literal["auto", "live", "plain"] = "auto"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A reinforcement-learning run.

    name: of the run; part of its folder's name.
    run_root: folder that run folders are made in.
    resume: null: a new run; ``auto``: the newest run of this name under run_root goes on from its last checkpoint;
        or the path of a run folder, or of a checkpoint in one.
    steps: training steps in all (a resumed run counts from its beginning).
    seed: of data order, sampling and everything else.
    """

    name: str
    steps: Positive
    model: ModelConfig
    data: DataConfig
    reward: RewardConfig
    rollout: RolloutConfig
    trainer: TrainerConfig
    algorithm: AlgorithmConfig = AlgorithmConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    deadlines: DeadlineConfig = DeadlineConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracker: TrackerConfig = TrackerConfig()
    run_root: str = "runs"
    resume: str | None = None
    seed: NonNegative = 0
