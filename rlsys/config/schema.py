"""The configuration of a run: one frozen dataclass a config group, no torch.

Hydra composes the YAML of ``configs/`` into a plain dictionary; ``rlsys.config.build`` turns it into
:class:`RunConfig`, checking names, types and ranges. Nothing changes a config after that.

Where a group has variants (``data``, ``rollout``, ``cluster``), the field ``kind`` (``engine``) selects the dataclass.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from rlsys.config.clusters import ClusterConfig, LocalCluster
from rlsys.config.modes import ControllerConfig, HealthConfig, SyncController
from rlsys.config.values import (
    FOLDED,
    Dtype,
    Flag,
    Float,
    Fraction,
    Integer,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """A low-rank adapter: targeted layers use W + alpha / rank · B·A, of which A and B alone are trained.

    rank: rows of A. targets: names of linear layers (``q_proj``), or ``all-linear``: all but the head.
    quantize: what the frozen linear layers are held in, ``nf4`` (4 bits) or ``int8``; null: ``model.dtype``.
    sync: what samplers are sent: ``merged`` weights, or the ``adapter`` alone, which vLLM applies itself.
    """

    rank: Positive
    alpha: PositiveFloat = 32.0
    targets: Literal["all-linear"] | list[str] = "all-linear"
    quantize: Literal["nf4", "int8"] | None = None
    sync: Literal["merged", "adapter"] = "merged"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The policy that is trained.

    path: a Hugging Face folder, a hub id, or ``bundled:NAME`` for a checkpoint that ships with rlsys.
    dtype: of the trainer's and the reference's forward pass; master weights and optimiser are float32.
    attention: back end of the attention: flash-attn, torch's ``varlen`` or ``flex`` attention (all on a GPU), ``sdpa``,
        or ``eager``: plain matrix products. ``auto``: the first of those that works for the model where it runs.
    chat_template: path of a Jinja file; null: the tokenizer's own.
    """

    path: str
    dtype: Dtype = "float32"
    attention: Literal["auto", "flash", "varlen", "flex", "sdpa", "eager"] = "auto"
    chat_template: str | None = None
    lora: LoraConfig | None = None


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
    options: arguments of the generator (``min_digits``, …), checked by reasoning-gym; its ``seed`` among them (0).
    """

    kind: Literal["reasoning_gym"]
    task: str
    size: Positive = 10_000
    eval_size: NonNegative = 500
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
    permute: rewards are permuted over the batch before advantages: the control that must not learn. Refused beside
        channels that see the true rewards: pairs from groups, teachers that are shown siblings or feedback.
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
    sync: how new weights reach the samplers. ``auto``: CUDA's handles inside GPUs that both are on, else memory that
        they share on one host, NCCL between the GPUs of several, else the object store; ``delta``: through the object
        store, only what changed.
    environment: name or import path of the environment that a prompt is played in.
    mismatch_alarm: mean absolute log-prob difference between sampler and trainer above which an alarm is raised.
    """

    samples_per_prompt: Positive
    temperature: PositiveFloat = 1.0
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[Integer] = field(default_factory=list)
    workers: Positive = 1
    dtype: Dtype = "float32"
    sync: Literal["auto", "cuda_ipc", "shared_memory", "object_store", "nccl", "delta"] = "auto"
    environment: str = "single_turn"
    mismatch_alarm: PositiveFloat = 0.05


@dataclass(frozen=True, kw_only=True)
class VllmRollout(_Rollout):
    """vLLM's asynchronous engine.

    kv_cache_gib: size of the KV cache on a CPU.
    gpu_memory_fraction: of the GPU's memory, for weights and KV cache.
    max_concurrent: sequences that the engine decodes at once; null: what its memory has room for.
    tensor_parallel, pipeline_parallel: GPUs (processes, on a CPU) that each layer, and the stack of layers, of one
        sampler is cut over.
    engine_args: passed to vLLM's engine arguments as they are, checked against their names.
    """

    engine: Literal["vllm"]
    kv_cache_gib: PositiveFloat = 1.0
    gpu_memory_fraction: Fraction = 0.5
    max_concurrent: Positive | None = None
    tensor_parallel: Positive = 1
    pipeline_parallel: Positive = 1
    engine_args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TorchRollout(_Rollout):
    """A transformers model, decoded by rlsys itself: no vLLM needed.

    max_concurrent: sequences that are decoded at once.
    """

    engine: Literal["torch"]
    max_concurrent: Positive = 256


RolloutConfig = Annotated[VllmRollout | TorchRollout, Field(discriminator="engine")]


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """The value model of ``algorithm.advantage=gae``, in an actor group of its own.

    path: the model whose body it starts from; null: the policy's.
    lr: of its AdamW; everything else is as the policy's.
    value_clip: values may move this far from those before the update and still earn a gradient; null: no bound.
    warmup_steps: first training steps in which only the critic learns.
    """

    path: str | None = None
    lr: PositiveFloat = 1e-5
    value_clip: PositiveFloat | None = 0.5
    warmup_steps: NonNegative = 0


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """The optimiser and how the batch is cut.

    backend: ``fsdp``: FSDP2 (``fully_shard``); ``zero3``: DeepSpeed ZeRO-3.
    ranks: trainer processes; null: one a GPU, or one on a CPU.
    shard_ranks: weights are spread over so many ranks and replicated across the others (fsdp); null: over all.
    sequence_ranks: so many neighbouring ranks hold a packed row together, each a slice of its tokens.
    offload: on GPUs, what lies in main memory: ``optimizer``: float32 weights and moments (zero3 alone); ``all``: every
        rank's part of the weights too.
    micro_batch_tokens: most tokens (padding included) in one forward and backward pass of a rank; a row that several
        hold together may have so many for each.
    updates_per_step: optimiser steps that a step's prompt groups are divided over; 1 is strictly on-policy.
    activations: of each layer until the backward pass: ``keep`` them, ``recompute`` them then, or ``offload`` them to
        main memory (GPU).
    rows: of a micro-batch: ``packed``: one row of sequences end to end, without padding; ``shared``: the same, and the
        prompt of a group is computed once for all its responses in it; ``padded``: a row each, as long as the longest.
    compile: decoder layers are compiled with torch.compile.
    lr, betas, eps, weight_decay: AdamW; biases, norms, embeddings and anything below two dimensions do not decay.
    max_grad_norm: global gradient norm is clipped to this.
    schedule: shape of the learning rate over the run's optimiser steps; warmup_steps in optimiser steps.
    """

    backend: Literal["fsdp", "zero3"] = "fsdp"
    ranks: Positive | None = None
    shard_ranks: Positive | None = None
    sequence_ranks: Positive = 1
    offload: Literal["none", "optimizer", "all"] = "none"
    micro_batch_tokens: Positive = 8192
    updates_per_step: Positive = 1
    activations: Literal["keep", "recompute", "offload"] = "keep"
    rows: Literal["packed", "shared", "padded"] = "packed"
    compile: Flag = False
    lr: PositiveFloat = 1e-6
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = field(default_factory=lambda: [0.9, 0.999])
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.01
    max_grad_norm: PositiveFloat = 1.0
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    warmup_steps: NonNegative = 0
    critic: Annotated[CriticConfig, FOLDED] = CriticConfig()


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """KL to the reference policy.

    coef: 0: none, and no reference worker is started.
    estimator: k1, abs, k2, k3, or k3+ (k3 with the straight-through gradient of k2).
    placement: a term of the loss, or a penalty on the reward.
    corrected: the estimate is multiplied by π/π_old, which makes its gradient unbiased off-policy (loss only).
    target: the coefficient of a penalty on the reward adapts so that the KL a token comes near this; null: it is fixed.
    horizon: samples over which it adapts.
    """

    coef: NonNegativeFloat = 0.0
    estimator: Literal["k1", "abs", "k2", "k3", "k3+"] = "k3"
    placement: Literal["loss", "reward"] = "loss"
    corrected: Flag = False
    target: PositiveFloat | None = None
    horizon: Positive = 10_000


# Points (step, factor) that a factor on a weight runs through in straight lines; before the first and after the last it
# stays as it is there. Empty: always 1.
Schedule = list[Annotated[list[NonNegativeFloat], Field(min_length=2, max_length=2)]]


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """The self-distillation channel: the policy learns from a teacher that sees more (``hints``), token by token.

    weight: of the channel in the loss; 0: off.
    schedule: points [step, factor] of a factor on the weight.
    divergence, divergence_options: name or import path of the divergence, and its keyword options.
    top_k: only the student's k likeliest words, gathered from the teacher too; null: the whole vocabulary.
    tail: with top_k, the rest of the vocabulary counts as one more word.
    ratio_cap: token losses are multiplied by min(π/π_old, this); null: they are not.
    aggregation: how token losses are summed up.
    teacher: whose weights: ``self`` the policy's, ``ema`` an average that follows it, ``frozen`` those of step 0,
        ``trust_region`` step 0 and policy mixed in the logits, ``model`` those at teacher_path.
    teacher_rate: of the ema: teacher += rate · (policy − teacher) after each optimiser step.
    teacher_mix: of the trust region: this share of the policy's logits.
    teacher_path: a model with the policy's tokenizer.
    hybrid: λ of the policy channel's advantages λ·A + (1 − λ)·(log π_teacher − log π_old); null: A alone.
    """

    weight: NonNegativeFloat = 0.0
    schedule: Schedule = field(default_factory=list)
    divergence: str = "jsd"
    divergence_options: dict[str, Any] = field(default_factory=dict)
    top_k: Positive | None = None
    tail: Flag = True
    ratio_cap: PositiveFloat | None = 2.0
    aggregation: Literal["token-mean", "seq-mean-token-mean"] = "token-mean"
    teacher: Literal["self", "ema", "frozen", "trust_region", "model"] = "self"
    teacher_rate: Fraction = 0.05
    teacher_mix: Fraction = 0.5
    teacher_path: str | None = None
    hybrid: Fraction | None = None


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """The preference channel: pairs of a chosen and a rejected response (``replay``).

    weight: of the channel in the loss; 0: off.
    schedule: points [step, factor] of a factor on the weight.
    loss, loss_options: name or import path of the preference loss, and its keyword options.
    """

    weight: NonNegativeFloat = 0.0
    schedule: Schedule = field(default_factory=list)
    loss: str = "dpo"
    loss_options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """How samples become a gradient.

    advantage, advantage_options: name or import path of the estimator, and its keyword options.
    loss, loss_options: name or import path of the policy loss, and its keyword options.
    aggregation: how token losses are summed up into one number.
    weight: of the policy-gradient channel in the loss; 0: off.
    schedule: points [step, factor] of a factor on the weight.
    entropy_coef: weight of the entropy bonus.
    entropy_quantile: only tokens whose entropy under π_old is above this quantile of the batch earn a gradient.
    functional_tokens: only tokens of text that this regular expression matches earn a gradient; null: all.
    old_logprobs: π_old from the ``trainer``, or ``sampler`` (bypass: π_old := μ).
    correction: by name, options of the corrections for the distance of sampler and trainer (π_old/μ).
    filters: by name, options of the group filters; groups that fail one are replaced by new ones.
    max_refills: rounds of new prompts in a step, before it goes on with fewer groups.
    """

    advantage: str = "grpo"
    advantage_options: dict[str, Any] = field(default_factory=dict)
    loss: str = "ppo_clip"
    loss_options: dict[str, Any] = field(default_factory=dict)
    aggregation: Literal[
        "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
    ] = "token-mean"
    weight: NonNegativeFloat = 1.0
    schedule: Schedule = field(default_factory=list)
    entropy_coef: NonNegativeFloat = 0.0
    entropy_quantile: Fraction = 0.0
    functional_tokens: str | None = None
    old_logprobs: Literal["trainer", "sampler"] = "trainer"
    correction: dict[str, dict[str, Any]] = field(default_factory=dict)
    filters: dict[str, dict[str, Any]] = field(default_factory=dict)
    max_refills: NonNegative = 3
    kl: Annotated[KLConfig, FOLDED] = KLConfig()
    distillation: DistillationConfig = DistillationConfig()
    preference: PreferenceConfig = PreferenceConfig()


@dataclass(frozen=True, kw_only=True)
class HintsConfig:
    """Teacher contexts: what the teacher of the self-distillation channel sees besides the problem.

    source: where solutions and hints come from, in order of preference: ``sibling`` the first other response to the
        prompt with a reward of at least ``threshold``; ``reference`` and ``hint`` the task's fields of those names;
        ``feedback`` what environment and reward say about this very response; ``turn`` the hint that the environment
        attached to one turn.
    threshold: reward from which a sibling's response is a solution.
    feedback_with_solution: show feedback beside a solution too; false: only where there is none.
    strip_thinking: leave ``<think>…</think>`` out of a sibling's response.
    max_tokens: longest teacher prompt; a longer one loses the beginning of its solution or hint, and is counted.
    reference_key, hint_key: fields of the task.
    solution_template: of the section around ``{solution}`` (of a sibling, or the reference).
    hint_template: around ``{hint}``.
    feedback_template: around ``{feedback}``.
    turn_template: around ``{hint}``, put into the conversation right before the turn.
    instruction: text after the sections.
    """

    source: list[Literal["sibling", "feedback", "hint", "reference", "turn"]] = field(
        default_factory=lambda: ["sibling", "feedback"]
    )
    threshold: Float = 1.0
    feedback_with_solution: Flag = False
    strip_thinking: Flag = True
    max_tokens: Positive = 10_240
    reference_key: str = "solution"
    hint_key: str = "hint"
    solution_template: str = "\n\nCorrect solution:\n\n{solution}"
    hint_template: str = "\n\nHint:\n\n{hint}"
    feedback_template: str = "\n\nFeedback on an earlier, unsuccessful attempt:\n\n{feedback}"
    turn_template: str = "\n\nHint:\n\n{hint}\n\n"
    instruction: str = "\n\nNow solve the original question."


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """Preference pairs for the preference channel.

    source: ``groups`` the best against the worst response of each prompt group; ``file`` pairs from a JSONL file;
        ``agreement`` states with a policy's action and several teachers' in a JSONL file, of which pairs are made.
    path: the file, rows of {prompt | messages, chosen, rejected} or {prompt | messages, policy, teachers}.
    eval_path: a file like it whose pairs are never trained on: margin and accuracy are measured at every evaluation.
    pairs_per_step: of a file.
    agreement_threshold: so many teachers must give the same action for it to be chosen.
    min_gap: least difference in reward between the best and the worst response of a group.
    """

    source: Literal["groups", "file", "agreement"] = "groups"
    path: str | None = None
    eval_path: str | None = None
    pairs_per_step: Positive = 32
    agreement_threshold: Positive = 2
    min_gap: PositiveFloat = 1e-6


@dataclass(frozen=True, kw_only=True)
class GuardsConfig:
    """What watches over a run.

    every: steps between looks at the collapse monitors.
    on_collapse: an alert alone, or also the end of the run.
    limits: by monitor, its limit in place of the default (``rlsys/tracking/collapse.py``); null: that one is off.
    dead_steps: steps without any input after which a loss channel ends the run.
    max_skipped: updates with a loss or gradient that is not finite, which are skipped, before the run ends.
    channel_gradients: measure every channel's gradient norm, for one more forward and backward pass each.
    """

    every: Positive = 1
    on_collapse: Literal["alert", "stop"] = "alert"
    limits: dict[str, Float | None] = field(default_factory=dict)
    dead_steps: Positive = 20
    max_skipped: NonNegative = 3
    channel_gradients: Flag = False


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
    """every: steps between checkpoints (one is always written at the end and on Ctrl-C or SIGTERM); every_minutes: also
    after a step that ends so long after the last one; null: by steps alone; keep_last: how many stay; keep_best: the
    one with the best held-out accuracy stays too; export: the final weights are also written as a Hugging Face
    folder."""

    every: Positive = 20
    every_minutes: PositiveFloat | None = None
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
class TrackerConfig:
    """Who is told about the run, besides its folder.

    use: any of ``tensorboard``, ``wandb``, or import paths.
    rollouts: sampled rollouts written as JSONL each step, rounded up to whole groups.
    display: ``live``, ``plain`` lines, or ``auto`` (live on a terminal).
    """

    use: list[str] = field(default_factory=list)
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
    time_limit_minutes: the run stops with a checkpoint before it has taken so long, as on Ctrl-C; null: no limit.
    seed: of data order, sampling and everything else.
    submit: the run is handed to the cluster as a job, and this command follows its log; true, or the path of a YAML
        file in the format of Ray's runtime environments (working_dir, image_uri, env_vars, …).
    """

    name: str
    steps: Positive
    model: ModelConfig
    data: DataConfig
    reward: RewardConfig
    rollout: RolloutConfig
    trainer: TrainerConfig
    algorithm: AlgorithmConfig = AlgorithmConfig()
    hints: HintsConfig = HintsConfig()
    replay: Annotated[ReplayConfig, FOLDED] = ReplayConfig()
    guards: GuardsConfig = GuardsConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    deadlines: DeadlineConfig = DeadlineConfig()
    controller: ControllerConfig = field(default_factory=lambda: SyncController(kind="sync"))
    health: HealthConfig = field(default_factory=HealthConfig)
    cluster: ClusterConfig = field(default_factory=lambda: LocalCluster(kind="local"))
    tracker: TrackerConfig = TrackerConfig()
    run_root: str = "runs"
    resume: str | None = None
    time_limit_minutes: PositiveFloat | None = None
    seed: NonNegative = 0
    submit: Flag | str = False
