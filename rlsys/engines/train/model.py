"""The policy as a module: token ids in, log-probs and entropy of chosen tokens out. Trainer and reference share it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from rlsys.algorithms.divergences.chunked import Head, TeacherPart, token_divergence
from rlsys.algorithms.logprobs import token_logprobs
from rlsys.algorithms.objective import DivergencePass
from rlsys.config.errors import UserError
from rlsys.config.schema import ModelConfig
from rlsys.engines.rotary import freeze_rotation
from rlsys.engines.train.attention import Packing, set_attention
from rlsys.engines.train.collectives import training_device
from rlsys.engines.train.held import file_dtype, promise

PREFIX = "lm."  # of the language model's parameter names inside PolicyModel and ValueModel

# What some families do to the logits after the head, which token_logprobs does not.
_LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


@dataclass(frozen=True)
class TeacherInputs:
    """What a student's forward pass needs to know of its teacher.

    student: [n] int64, which of the K targets the divergence is about.
    parts: (share in the logits, the teacher's hidden states [n, H'], its head); no head: the student's own.
    spec: the divergence.
    """

    student: torch.Tensor
    parts: tuple[tuple[float, torch.Tensor, Head | None], ...]
    spec: DivergencePass


class PolicyOutput(NamedTuple):
    """log-prob and entropy [K] of each target; with a teacher, [n] each: divergence, its log-prob and its entropy."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    divergence: torch.Tensor | None = None
    teacher_logprobs: torch.Tensor | None = None
    teacher_entropy: torch.Tensor | None = None


class PolicyModel(nn.Module):
    """A causal language model and the head's log-probs in one forward: a sharded head is whole while it is used."""

    def __init__(self, lm: PreTrainedModel, *, temperature: float):
        super().__init__()
        self.lm = lm
        self._temperature = temperature

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        targets: torch.Tensor | None,
        entropy_gradient: bool = False,
        teacher: TeacherInputs | None = None,
        packing: Packing | None = None,
    ) -> PolicyOutput | tuple[torch.Tensor, Head]:
        """Log-prob and entropy of each target, and what ``teacher`` asks for.

        No attention mask: rows are padded on the right, and under causal attention no token sees what is to its right;
        or they are packed into one, and the attention function keeps them apart.

        Args:
            input_ids: [b, T] int64, right-padded with any valid id; with ``packing`` [1, T] or this rank's slice.
            positions: [K] int64 into the b·T inputs: the one after which each target comes.
            targets: [K] int64; None: the hidden states at ``positions`` [K, H] and the head come back, whose weight is
                whole until the next reshard.
            entropy_gradient: whether the entropy carries a gradient.
            packing: of a packed row; only where ``packs(self.lm)`` holds.

        Returns:
            PolicyOutput, float32.
        """
        hidden = _hidden(self.lm.base_model, input_ids, packing).index_select(0, positions)
        head = self.lm.get_output_embeddings()
        if targets is None:  # detached: an engine that lets go of its weights after the pass leaves these alone
            return hidden, Head(head.weight.detach(), None if head.bias is None else head.bias.detach())
        logprobs, entropy = token_logprobs(
            hidden,
            head.weight,
            head.bias,
            targets,
            temperature=self._temperature,
            entropy_gradient=entropy_gradient,
        )
        if teacher is None:
            return PolicyOutput(logprobs, entropy)
        own = Head(head.weight.detach(), None if head.bias is None else head.bias.detach())
        result = token_divergence(
            hidden.index_select(0, teacher.student),
            Head(head.weight, head.bias),
            [TeacherPart(mix, states, other or own) for mix, states, other in teacher.parts],
            teacher.spec.divergence,
            teacher.spec.options,
            targets=targets[teacher.student],
            t=teacher.spec.t,
            temperature=self._temperature,
            top_k=teacher.spec.top_k,
            tail=teacher.spec.tail,
        )
        return PolicyOutput(logprobs, entropy, result.loss, result.teacher_logprobs, result.teacher_entropy)


class ValueModel(nn.Module):
    """A language model's body and a linear head that says what a state is worth; it starts at 0 everywhere."""

    def __init__(self, lm: PreTrainedModel):
        super().__init__()
        self.lm = lm.base_model
        self.value_head = nn.Linear(lm.config.get_text_config().hidden_size, 1, bias=False)
        nn.init.zeros_(self.value_head.weight)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, packing: Packing | None = None) -> torch.Tensor:
        """Values [K], float32, of the states after which the tokens at ``positions`` come; arguments as PolicyModel."""
        hidden = _hidden(self.lm, input_ids, packing).index_select(0, positions)
        # A copy: what a sharded module returns must not be a view.
        return self.value_head(hidden).squeeze(-1).to(torch.float32, copy=True)


def _hidden(body: nn.Module, input_ids: torch.Tensor, packing: Packing | None) -> torch.Tensor:
    """[b·T, H] last hidden states."""
    if packing is None:
        output = body(input_ids=input_ids, use_cache=False)
    else:
        output = body(input_ids=input_ids, position_ids=packing.own_position_ids, use_cache=False, packing=packing)
        if not packing.seen:
            raise RuntimeError(f"{type(body).__name__} does not tell its attention where sequences end")
    return output.last_hidden_state.flatten(0, 1)


def load_causal_lm(
    model: ModelConfig,
    dtype: torch.dtype,
    *,
    packing: bool = False,
    longest: int | None = None,
    mapped: bool = False,
) -> PreTrainedModel:
    """The model at ``model.path`` (a folder or a hub id) on the CPU, in ``dtype``, without dropout, in evaluation mode.

    Args:
        packing: with attention over packed rows, if its family allows.
        mapped: its weights may be of their file's dtype until ``rlsys.engines.train.held.hold`` is called with them.
        longest: see ``freeze_rotation``.

    Raises:
        UserError: no such folder, no config, no or incomplete weights, an architecture whose log-probs would be wrong,
            attention that is not to be had here.
    """
    transformers.utils.logging.disable_progress_bar()
    config = load_config(model)
    folder = Path(model.path).expanduser()
    try:
        stored = file_dtype(folder) if mapped else None
        lm, report = AutoModelForCausalLM.from_pretrained(
            model.path,
            config=config,
            dtype=stored or dtype,
            attn_implementation="eager",  # what every family has; set_attention says what it gets
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # RuntimeError: shapes differ
        raise UserError(
            f"no model can be loaded from {model.path}: {error}",
            where="model.path",
            fix="a Hugging Face folder has config.json and model.safetensors (or its parts and their index)",
        ) from error
    if report["missing_keys"]:
        names = sorted(report["missing_keys"])
        raise UserError(
            f"the weights at {model.path} lack {len(names)} tensors: {', '.join(names[:5])}" + " …" * (len(names) > 5),
            where="model.path",
            fix="the folder's config.json and its weights do not belong together, or a part of the weights is missing",
        )
    check_head(lm, model.path)
    promise(lm, dtype)
    freeze_rotation(lm, longest)
    half = getattr(torch, model.dtype)  # of the forward pass, whatever the weights are held in
    set_attention(lm, model.attention, packing=packing, device=training_device(), dtype=half)
    return lm.eval()


def context_length(lm: PreTrainedModel) -> int:
    """Longest prompt and response together that the model takes, in tokens: by its config, and as its positions are
    rotated in this run."""
    limit: int | None = getattr(lm, "rotation_limit", None)
    return limit or getattr(lm.config, "max_position_embeddings", None) or 1 << 30


def load_config(model: ModelConfig) -> PretrainedConfig:
    """What ``model.path`` says of the model, without dropout.

    Raises:
        UserError: no such folder, no config, no weights.
    """
    folder = Path(model.path).expanduser()
    looks_like_path = folder.is_absolute() or model.path.startswith((".", "~")) or model.path.count("/") > 1
    if looks_like_path and not folder.is_dir():
        raise UserError(f"there is no folder {folder}", where="model.path", fix="check the path")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} has no config.json",
            where="model.path",
            fix="give the Hugging Face folder of a causal language model",
        )
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder} has no weights (*.safetensors)",
            where="model.path",
            fix="give a folder with model.safetensors; weights in pickle files (*.bin) are not read, convert them",
        )
    try:
        config = AutoConfig.from_pretrained(model.path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"no model config can be read at {model.path}: {error}", where="model.path") from error
    return _without_dropout(config)


def _without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """The log-probs that are trained on are those of the policy that was sampled, and sampling drops nothing."""
    changes: dict[str, Any] = {
        name: 0.0
        for name, value in config.to_dict().items()
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float)
    }
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def check_head(lm: PreTrainedModel, path: str) -> None:
    """That log-probs can be computed from hidden states and the head's weights alone.

    Raises:
        UserError: the model does something else to its logits, or has no linear head.
    """
    transforms = [name for name in _LOGIT_TRANSFORMS if getattr(lm.config, name, None) not in (None, 1, 1.0)]
    if transforms:
        raise UserError(
            f"the model at {path} changes its logits after the head ({', '.join(transforms)}), which is not supported",
            where="model.path",
            fix="use a model of another family (Qwen2, Qwen3, Llama, …)",
        )
    if not isinstance(lm.get_output_embeddings(), nn.Linear):
        raise UserError(f"the model at {path} has no linear language-model head", where="model.path")
