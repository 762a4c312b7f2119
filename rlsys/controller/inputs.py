"""Everything that can be wrong with a run's inputs is found here, before a process is started or a folder made."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

from safetensors import safe_open
from transformers import AutoConfig, PreTrainedTokenizerBase

from rlsys.algorithms.requirements import needs_baselines, needs_critic, needs_teacher
from rlsys.batch import DataProto
from rlsys.config.assets import bundled_model
from rlsys.config.errors import UserError
from rlsys.config.modes import SyncController
from rlsys.config.schema import RunConfig, VllmRollout
from rlsys.controller.trial import try_out
from rlsys.data.base import load_dataset
from rlsys.data.prompts import PromptEncoder, load_tokenizer
from rlsys.data.sampler import PromptStream, held_out_batch
from rlsys.engines.flops import EXPERTS
from rlsys.engines.rollout.vllm_args import check_engine_args
from rlsys.engines.rotary import rotation_limit
from rlsys.engines.train import check_backend
from rlsys.engines.train.lora import resolve_targets
from rlsys.environments.base import ENVIRONMENTS
from rlsys.replay.functional import functional_pattern
from rlsys.replay.hints import TeacherContexts
from rlsys.replay.pairs import PairStream, load_pairs
from rlsys.rewards.compose import build_parts
from rlsys.tracking.collapse import CollapseMonitor

_TEACHER, _CRITIC = "algorithm.distillation.teacher_path", "trainer.critic.path"
_CHECKED_PROMPTS = 20_000  # encoded before the run, so that one that is too long is found now; seconds


@dataclass(frozen=True)
class Inputs:
    """config: with paths of models resolved to folders; held_out: None where there is no evaluation; max_length:
    longest prompt and response together; pairs, held_out_pairs: preference pairs of files; None: there are none."""

    config: RunConfig
    model_folder: Path
    critic_folder: str
    prompts: PromptStream
    held_out: DataProto | None
    max_length: int
    train_rows: int
    parameters: int
    pairs: PairStream | None = None
    held_out_pairs: DataProto | None = None


def check_inputs(config: RunConfig) -> Inputs:
    """Loads what is cheap to load and looks at the rest.

    Raises:
        UserError: model, tokenizer, data, reward, estimator, loss, guard or environment cannot be used.
    """
    try_out(config)
    _check_baselines(config)
    check_backend(config.trainer)
    ENVIRONMENTS.get(config.rollout.environment, where="rollout.environment")
    build_parts(config.reward.parts)
    CollapseMonitor(config.guards.limits, config.guards.every)
    if isinstance(config.rollout, VllmRollout) and config.rollout.engine_args:
        try:  # seconds to import: only where there is something to check
            from vllm.engine.arg_utils import AsyncEngineArgs
        except ModuleNotFoundError as error:
            raise UserError(
                "vLLM is not installed",
                where="rollout.engine_args",
                fix="install rlsys[cpu] or rlsys[gpu], or sample with rollout=torch",
            ) from error
        check_engine_args(config.rollout.engine_args, {f.name for f in fields(AsyncEngineArgs)})
    folder = find_model(config.model.path)
    config = replace(config, model=resolve_targets(replace(config.model, path=str(folder))))
    max_length = config.data.max_prompt_tokens + config.data.max_response_tokens
    _check_length(folder, config)
    _check_experts(folder, config)
    tokenizer = load_tokenizer(str(folder))
    _check_contexts(config, tokenizer)
    config = _teacher(config, tokenizer)
    critic_folder = _critic(config, folder, tokenizer)
    _check_heads(config, {str(folder), critic_folder or str(folder)})
    dataset = load_dataset(config.data)
    encoder = PromptEncoder(
        tokenizer,
        chat_template_path=config.model.chat_template,
        system_prompt=config.data.system_prompt,
        max_prompt_tokens=config.data.max_prompt_tokens,
        long_prompts=config.data.long_prompts,
    )
    if config.data.long_prompts == "error":
        encoder.encode_many(dataset.train[:_CHECKED_PROMPTS])
    stream = PromptStream(
        dataset.train,
        encoder,
        prompts_per_step=config.data.prompts_per_step,
        seed=config.seed,
        shuffle=config.data.shuffle,
    )
    held_out = None
    if config.eval.every:
        if not dataset.held_out:
            raise UserError(
                "there are no held-out problems to evaluate on",
                where="data",
                fix="set data.eval_path (data.eval_size), or eval.every=0",
            )
        held_out = held_out_batch(dataset.held_out, encoder, problems=config.eval.problems)
    pairs, held_out_pairs = _pairs(config, encoder, tokenizer)
    return Inputs(
        config,
        folder,
        critic_folder,
        stream,
        held_out,
        max_length,
        len(dataset.train),
        count_parameters(folder),
        pairs,
        held_out_pairs,
    )


def _check_contexts(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Templates of teacher contexts, and the expression of functional tokens.

    Raises:
        UserError: one of them cannot be used.
    """
    if config.algorithm.functional_tokens is not None:
        functional_pattern(config.algorithm.functional_tokens)
    if needs_teacher(config):
        TeacherContexts(
            tokenizer,
            config.hints,
            chat_template_path=config.model.chat_template,
            system_prompt=config.data.system_prompt,
        )


def _teacher(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> RunConfig:
    """The configuration with the folder of a teacher of its own.

    Raises:
        UserError: it has another vocabulary than the policy, or no room for the longest sequence that it is shown.
    """
    distillation = config.algorithm.distillation
    if not needs_teacher(config) or distillation.teacher != "model":
        return config
    if not distillation.teacher_path:
        raise UserError(
            "the teacher is a model of its own, and none is named",
            where=_TEACHER,
            fix="give a Hugging Face folder or hub id, or another algorithm.distillation.teacher",
        )
    folder = find_model(distillation.teacher_path, where=_TEACHER)
    _same_vocabulary(tokenizer, folder, "teacher", where=_TEACHER)
    _check_teacher_length(folder, config)
    named = replace(distillation, teacher_path=str(folder))
    return replace(config, algorithm=replace(config.algorithm, distillation=named))


def _critic(config: RunConfig, policy: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """The folder that the critic starts from: one of its own, or the policy's.

    Raises:
        UserError: it has another vocabulary than the policy, or no room for the longest prompt and response.
    """
    path = config.trainer.critic.path
    if path is None or not needs_critic(config):
        return str(policy)
    folder = find_model(path, where=_CRITIC)
    _same_vocabulary(tokenizer, folder, "critic", where=_CRITIC)
    limit, longest = _context(folder), config.data.max_prompt_tokens + config.data.max_response_tokens
    if limit is not None and longest > limit:
        raise UserError(
            f"prompt and response may take {longest} tokens, and the critic allows {limit}",
            where=_CRITIC,
            fix="use a critic with a longer context, or shorten data.max_prompt_tokens or data.max_response_tokens to "
            f"{limit} together",
        )
    return str(folder)


def _same_vocabulary(policy: PreTrainedTokenizerBase, folder: Path, whose: str, *, where: str) -> None:
    """Raises:
    UserError: the model in ``folder``, which reads the policy's tokens, has other words for them.
    """
    mine, theirs = policy.get_vocab(), load_tokenizer(str(folder), where=where).get_vocab()
    if mine != theirs:
        differ = sum(theirs.get(word) != number for word, number in mine.items())
        raise UserError(
            f"the policy's tokenizer has {len(mine)} words and the {whose}'s {len(theirs)}, and {differ} of the "
            f"policy's are others to the {whose}",
            where=where,
            fix=f"use a {whose} with the policy's tokenizer",
        )


def _pairs(
    config: RunConfig, encoder: PromptEncoder, tokenizer: PreTrainedTokenizerBase
) -> tuple[PairStream | None, DataProto | None]:
    """The file's pairs, and those that are only measured.

    Raises:
        UserError: no file, or a row of it is malformed.
    """
    replay = config.replay
    if not config.algorithm.preference.weight:
        return None, None
    limit = config.data.max_response_tokens
    held_out = None
    if replay.eval_path is not None:
        found, _ = load_pairs(replay, replay.eval_path, encoder, tokenizer, limit)
        held_out = PairStream(found, pairs_per_step=len(found), seed=config.seed).next_batch()
    if replay.source == "groups":
        return None, held_out
    if not replay.path:
        raise UserError(
            f"replay.source={replay.source} reads pairs from a file, and none is named",
            where="replay.path",
            fix="set replay.path to a JSONL file, or replay.source=groups",
        )
    found, _ = load_pairs(replay, replay.path, encoder, tokenizer, limit)
    return PairStream(found, pairs_per_step=replay.pairs_per_step, seed=config.seed), held_out


def find_model(path: str, *, where: str = "model.path") -> Path:
    """The folder of a bundled model, a local one, or one of the hub (downloaded into its cache).

    Args:
        where: the config key that names it, for the error message.

    Raises:
        UserError: not a model folder with config and weights, and not on the hub.
    """
    folder = Path(bundled_model(path)).expanduser()
    if not folder.is_dir():
        folder = _download(path, where)
    if not (folder / "config.json").is_file():
        raise UserError(
            "the model folder has no config.json", where=f"{where}={folder}", fix="give a Hugging Face model folder"
        )
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            "the model folder has no weights (*.safetensors; other formats hold pickles and are not read)",
            where=f"{where}={folder}",
            fix="save the model with save_pretrained, which writes safetensors",
        )
    return folder.absolute()


def count_parameters(folder: Path) -> int:
    """Weights in a folder's safetensors files, from their headers."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as weights:
            total += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return total


def _download(path: str, where: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, ignore_patterns=["*.bin", "*.pth", "*.pt", "*.gguf", "*.onnx"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"there is no model folder '{path}', and the hub does not give one: {reason}",
            where=where,
            fix="give an existing folder, a hub id such as Qwen/Qwen3-0.6B, or bundled:arithmetic",
        ) from error


def _context(folder: Path) -> int | None:
    """Longest sequence of the model, in tokens; None: it does not say."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings")


def _check_heads(config: RunConfig, folders: set[str]) -> None:
    """That ranks can share the rows of every model that is trained or looks at them.

    Raises:
        UserError: one of them has heads that do not divide.
    """
    if config.trainer.sequence_ranks == 1:
        return
    from rlsys.engines.train.model import load_config  # transformers' models take seconds to import
    from rlsys.engines.train.ulysses import check_sequence_ranks

    distillation = config.algorithm.distillation
    teachers = {distillation.teacher_path} if needs_teacher(config) and distillation.teacher == "model" else set()
    for path in sorted(folders | {path for path in teachers if path}):
        check_sequence_ranks(load_config(replace(config.model, path=path)), config.trainer)


def _check_teacher_length(folder: Path, config: RunConfig) -> None:
    """folder: of the model that is shown the teacher's prompt."""
    limit, longest = _context(folder), config.hints.max_tokens + config.data.max_response_tokens
    sample = config.data.max_prompt_tokens + config.data.max_response_tokens
    limit = rotation_limit(AutoConfig.from_pretrained(folder, trust_remote_code=False), sample) or limit
    if limit is not None and longest > limit:
        raise UserError(
            f"a teacher's prompt and the response may take {config.hints.max_tokens} + "
            f"{config.data.max_response_tokens} tokens, and the teacher allows {limit}",
            where="hints.max_tokens",
            fix=f"set hints.max_tokens={max(limit - config.data.max_response_tokens, 1)} or less",
        )


def _check_length(folder: Path, config: RunConfig) -> None:
    limit, max_length = _context(folder), config.data.max_prompt_tokens + config.data.max_response_tokens
    if needs_teacher(config) and config.algorithm.distillation.teacher != "model":
        _check_teacher_length(folder, config)
    if limit is not None and max_length > limit:
        raise UserError(
            f"prompt and response may take {max_length} tokens, and the model allows {limit}",
            where="data.max_response_tokens",
            fix=f"shorten data.max_prompt_tokens or data.max_response_tokens to {limit} together",
        )


def _check_experts(folder: Path, config: RunConfig) -> None:
    """vLLM holds the experts of a layer in one tensor with a name of its own, which new weights are not made to fit."""
    model = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    experts = max(getattr(model, name, 0) or 0 for name in EXPERTS)
    if experts > 1 and isinstance(config.rollout, VllmRollout):
        raise UserError(
            f"the model has {experts} experts a layer, and new weights of experts cannot be handed to vLLM",
            where="model.path",
            fix="choose a dense model",
        )


def _check_baselines(config: RunConfig) -> None:
    """A greedy response of the weights that are trained: a stream of samples has none."""
    if needs_baselines(config) and not isinstance(config.controller, SyncController):
        raise UserError(
            f"{config.algorithm.advantage} compares with a greedy response of the weights that are trained, which only "
            "controller=sync samples",
            where="algorithm.advantage",
            fix="choose another estimator (rloo has a baseline of the group's own), or controller=sync",
        )
