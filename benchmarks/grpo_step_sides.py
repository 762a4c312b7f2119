"""The two sides of ``benchmarks.grpo_step``, each a process that trains windows of steps when it is told to."""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

STOPS = list(range(496, 512))  # of 512 words that are about equally likely: a response ends after 32 on average
END = 512  # the tokenizer's end of sequence: a word that the model does not have, so nothing but STOPS ends a response
CHARACTERS = "0123456789+-=abcdefghijklmnopqrstuvwxyz .,:?"
PROMPTS = 512


@dataclass(frozen=True)
class Workload:
    """prompts: groups a step; samples: of each; limit: longest response in tokens; stops: whether any ends earlier."""

    prompts: int
    limit: int
    stops: bool
    samples: int = 8


@dataclass(frozen=True)
class Task:
    """What a side is to do. folder: holds the model and ``prompts.jsonl``; work: for files of its own; rows: of a
    micro-batch of TRL's."""

    workload: Workload
    folder: Path
    work: Path
    threads: int
    sampler: str
    rows: int = 0


def digits(response: str, task: dict[str, Any] | None = None) -> float:
    """The reward of both sides: the fraction of digits."""
    return sum(character.isdigit() for character in response) / max(len(response), 1)


def make_folder(folder: Path, *, hidden: int, layers: int, intermediate: int) -> int:
    """Writes a Qwen3 with random weights (words about equally likely), its tokenizer (one token a character) and
    prompts. Returns the number of parameters."""
    import json

    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

    words = {"<pad>": 0, "<unk>": 1} | {c: 2 + i for i, c in enumerate(CHARACTERS)} | {"<eos>": END}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=512, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, head_dim=64,
        max_position_embeddings=512, tie_word_embeddings=True, pad_token_id=0, bos_token_id=None, eos_token_id=END,
        dtype="float32",
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    draw = random.Random(0)
    rows = [{"prompt": "".join(draw.choices(CHARACTERS, k=draw.randint(8, 16))), "answer": "0"} for _ in range(PROMPTS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return sum(p.numel() for p in model.parameters())


class Gate:
    """Between two steps: waits until the next window of steps is asked for, and says how long the last one took."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._left, self._began = 0, 0.0

    def passes(self) -> bool:
        """Called before every step. False: no step is wanted any more."""
        if self._left == 0:
            now = time.perf_counter()
            self._connection.send(now - self._began if self._began else 0.0)  # the first: ready
            self._left = self._connection.recv()
            if not self._left:
                return False
            self._began = time.perf_counter()
        self._left -= 1
        return True


def rlsys_overrides(task: Task) -> list[str]:
    load = task.workload
    return [
        "+recipe=grpo_qwen", f"rollout={task.sampler}", f"model.path={task.folder}",
        "data=file", f"data.path={task.folder / 'prompts.jsonl'}", f"data.prompts_per_step={load.prompts}",
        "data.max_prompt_tokens=32", f"data.max_response_tokens={load.limit}",
        f"rollout.samples_per_prompt={load.samples}", f"rollout.stop_token_ids={STOPS if load.stops else []}",
        "reward.parts.correct.use=benchmarks.grpo_step_sides.digits",
        "trainer.lr=1e-8", "trainer.schedule=constant", "trainer.weight_decay=0",
        "eval.every=0", "checkpoint.every=1000000", "checkpoint.export=false", "tracker.rollouts=0",
        "tracker.display=plain", f"cluster.threads={task.threads}", "steps=1000000",
        f"run_root={task.work}",
    ]  # fmt: skip


def run_rlsys(task: Task, connection: Connection) -> None:
    """A run as the command line starts it: Ray, actors, controller. Last it sends its phases and lengths."""
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])  # reward processes import this module
    from rlsys import launch
    from rlsys.controller.job import Job
    from rlsys.tracking.metrics import read_metrics
    from rlsys.workers.waits import StopRequested

    gate, begin = Gate(connection), Job.begin_step

    def gated(job: Job) -> None:
        if not gate.passes():
            raise StopRequested
        begin(job)

    Job.begin_step = gated  # type: ignore[method-assign]
    launch.main(rlsys_overrides(task))
    (folder,) = task.work.glob("*-grpo_qwen")
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "reward/mean" in line][1:]
    names = [name for name in lines[-1] if name.startswith(("time/", "train/", "throughput/", "rollout/"))]
    found = {name: statistics.median(line[name] for line in lines) for name in names}
    connection.send(found | {"rollout/length_mean": statistics.mean(line["rollout/length_mean"] for line in lines)})


def run_trl(task: Task, connection: Connection) -> None:
    """TRL's trainer. Last it sends its phases and lengths."""
    os.environ["OMP_NUM_THREADS"] = str(task.threads)
    import torch

    torch.set_num_threads(task.threads)
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    load = task.workload
    model = AutoModelForCausalLM.from_pretrained(task.folder, dtype=torch.float32)
    model.generation_config.eos_token_id = STOPS if load.stops else [END]
    rows = load.prompts * load.samples
    config = GRPOConfig(
        output_dir=str(task.work), use_cpu=not torch.cuda.is_available(), bf16=False, report_to=[], save_strategy="no",
        logging_steps=1_000_000, disable_tqdm=True, gradient_checkpointing=False, max_steps=1_000_000,
        per_device_train_batch_size=task.rows, gradient_accumulation_steps=rows // task.rows,
        num_generations=load.samples,
        max_completion_length=load.limit, temperature=1.0, beta=0.0, num_iterations=1,
        learning_rate=1e-8, lr_scheduler_type="constant", weight_decay=0.0, optim="adamw_torch_fused",
        dataloader_pin_memory=False, seed=0,
        use_transformers_continuous_batching=task.sampler == "continuous",
        # Left to itself it takes most of the memory. A page is 256 tokens, so a sequence needs one.
        transformers_continuous_batching_config=(
            {"num_blocks": rows + 1, "max_batch_tokens": max(1024, 2 * rows)} if task.sampler == "continuous" else None
        ),
    )  # fmt: skip
    gate, sampling = Gate(connection), []

    class Gated(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not gate.passes():
                raise _Enough

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [digits(text) for text in completions]

    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_json(str(task.folder / "prompts.jsonl")).select_columns("prompt"),
        processing_class=AutoTokenizer.from_pretrained(task.folder),
        callbacks=[Gated()],
    )
    trainer._generate_and_score_completions = _timed(trainer._generate_and_score_completions, sampling)
    lengths = trainer._metrics["train"]["completions/mean_length"]
    with contextlib.suppress(_Enough):
        trainer.train()
    connection.send({"time/rollout_s": statistics.median(sampling[1:]), "length": statistics.mean(lengths)})


class _Enough(Exception):
    pass


def _timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def timed(*args: Any) -> Any:
        began = time.perf_counter()
        result = function(*args)
        seconds.append(time.perf_counter() - began)
        return result

    return timed
