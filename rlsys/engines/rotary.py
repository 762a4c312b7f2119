"""Rotary positions whose frequencies depend on how long sequences are, fixed once for a run.

LongRoPE (Ding et al. 2024, arXiv:2402.13753; Phi-3, Phi-4-mini) has one set of frequencies for sequences within the
length that the model was first trained on and one for longer ones; dynamic NTK has others for every length beyond it.
transformers looks at the longest position of each forward pass, so a sequence's log-probs depend on which others are in
the pass, and a sampler that crosses the length has keys in its cache that were rotated otherwise. vLLM looks once, at
the model length that it was started with. Here all do: trainer, reference, teacher and sampler.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from rlsys.config.errors import UserError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

_FIXED = "default"  # a kind that transformers leaves alone during a forward pass


def freeze_rotation(lm: PreTrainedModel, longest: int | None = None) -> None:
    """Has every forward pass of the model rotate by the same frequencies; models of other kinds stay as they are.

    Args:
        longest: prompt and response of the run together, in tokens, which is the sampler's model length; None: what the
            model's config allows.

    Raises:
        UserError: the kind is dynamic NTK, and sequences may be longer than the model's own length.
    """
    config = lm.config.get_text_config()
    if not _kinds(config):
        return
    longest = longest or config.max_position_embeddings
    limit = rotation_limit(config, longest)
    if limit is not None and longest > limit:
        raise UserError(
            f"prompt and response may take {longest} tokens, and beyond {limit} the model's rotary positions (dynamic "
            "NTK) are others with every token",
            where="data.max_response_tokens",
            fix=f"shorten data.max_prompt_tokens or data.max_response_tokens to {limit} together",
        )
    for module in lm.modules():
        if isinstance(kinds := getattr(module, "rope_type", None), dict):
            for layers, kind in kinds.items():
                _freeze(module, kind, config, longest, layers)
            module.rope_type = dict.fromkeys(kinds, _FIXED)
        elif isinstance(kinds, str):
            _freeze(module, kinds, config, longest)
            module.rope_type = _FIXED
    if limit is not None:
        lm.rotation_limit = limit
    if hasattr(config, "original_max_position_embeddings"):
        # Phi-3's ``generate`` drops its cache where the model would change its rotation, which this one does not.
        config.original_max_position_embeddings = sys.maxsize


def rotation_limit(config: PretrainedConfig, longest: int) -> int | None:
    """The longest sequence of a model whose rotation is frozen for those of ``longest`` tokens; None: as its config
    says. What the run's own sequences do not reach, longer ones (a teacher's) must not either."""
    config = config.get_text_config()
    limits = []
    for kind, parameters in _kinds(config):
        original = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
        if "dynamic" in kind:
            limits.append(config.max_position_embeddings)
        elif longest <= original:
            limits.append(original)
    return min(limits, default=None)


def _kinds(config: PretrainedConfig) -> list[tuple[str, dict[str, Any]]]:
    """(kind, its parameters) of the layers' rotary positions, those alone that depend on length."""
    parameters = getattr(config, "rope_parameters", None) or {}
    every = [p for p in (parameters, *parameters.values()) if isinstance(p, dict)]
    found = [(str(p.get("rope_type", p.get("type", _FIXED))), p) for p in every]
    return [(kind, p) for kind, p in found if kind == "longrope" or "dynamic" in kind]


def _freeze(module: nn.Module, kind: str, config: PretrainedConfig, longest: int, layers: str | None = None) -> None:
    """Writes the frequencies into a rotary module, or into its part for one kind of layers. Dynamic NTK's, and others',
    are there already: no sequence is longer than the model's own length."""
    if kind != "longrope":
        return
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # the driver reads this module

    options = {} if layers is None else {"layer_type": layers}
    buffer = module.get_buffer("inv_freq" if layers is None else f"{layers}_inv_freq")
    frequencies, _ = ROPE_INIT_FUNCTIONS[kind](config, buffer.device, seq_len=longest, **options)
    buffer.copy_(frequencies)
