"""Causal attention over packed rows, in which no sequence sees another, by what is installed.

transformers' models run as they are: their attention layers look an implementation up by name, and ours are registered
beside transformers' own. A model call hands a ``Packing`` down to them as a keyword argument. No [T, T] mask is made.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from rlsys.config.errors import UserError
from rlsys.engines.train.blocks import block_mask

if TYPE_CHECKING:
    from rlsys.engines.train.ulysses import SequenceRanks

_LOG = logging.getLogger(__name__)

# Names that transformers knows ours by. (It takes any name with "flash" in it for its own wrapper of flash-attn.)
_REGISTERED = {name: f"rlsys_{name}" for name in ("sdpa", "eager", "varlen", "flex")} | {"flash": "rlsys_fa"}
_OF_TRANSFORMERS = {"sdpa": "sdpa", "eager": "eager", "flex": "flex_attention", "flash": "flash_attention_2"}
_HALF = (torch.bfloat16, torch.float16)
# What some families ask of an attention function and ours do not do.
_UNKNOWN = ("softcap", "s_aux", "position_bias", "cache")


class Packing:
    """Where the sequences of a packed row [1, T] lie. Not a dataclass: FSDP would copy one for every layer, and with it
    what layers share.

    lengths: tokens of each segment, in the order of the row, none of them 0; Σ = T.
    position_ids: [1, T].
    contexts: for each segment, which segment it sees as a whole in front of its own tokens, −1: none. A context has
        none itself. None: no segment has one.
    ranks: those that hold the row together, each T / size of its tokens, which is what the model's layers see; None:
        the whole row is here.
    """

    def __init__(
        self,
        lengths: tuple[int, ...],
        position_ids: torch.Tensor,
        contexts: tuple[int, ...] | None = None,
        ranks: SequenceRanks | None = None,
    ) -> None:
        self.lengths, self.position_ids, self.contexts, self.ranks = lengths, position_ids, contexts, ranks
        self._made: dict[Any, Any] = {}

    @property
    def own_position_ids(self) -> torch.Tensor:
        """Of the tokens that are here."""
        return self.position_ids if self.ranks is None else self.ranks.own(self.position_ids)

    @cached_property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """(how many, tokens of each) of neighbouring segments of equal length."""
        return tuple((len(list(same)), length) for length, same in groupby(self.lengths))

    @cached_property
    def queries(self) -> tuple[torch.Tensor, int]:
        """Where each segment starts, [segments + 1] int32, and the longest."""
        return self._cumulative(self.lengths), max(self.lengths)

    @cached_property
    def keys(self) -> tuple[torch.Tensor, int]:
        """The same of what each segment sees: context and own tokens."""
        if self.contexts is None:
            return self.queries
        seen = [n + (self.lengths[c] if c >= 0 else 0) for n, c in zip(self.lengths, self.contexts, strict=True)]
        return self._cumulative(seen), max(seen)

    @cached_property
    def key_index(self) -> torch.Tensor | None:
        """[Σ seen] which of the T tokens the segments see, one after the other; None: each its own."""
        if self.contexts is None:
            return None
        starts = [0, *accumulate(self.lengths)]
        parts = []
        for own, context in enumerate(self.contexts):
            for segment in (context, own) if context >= 0 else (own,):
                parts.append(torch.arange(starts[segment], starts[segment + 1]))
        return torch.cat(parts).to(self.position_ids.device)

    def mask(self, queries: int, keys: int, window: int | None) -> torch.Tensor:
        """[queries, keys] bool: the last ``queries`` of ``keys`` tokens, each of which sees itself and what is before
        it, with a window itself and so many less one."""
        key = ("mask", queries, keys, window)
        if key not in self._made:
            device = self.position_ids.device
            place = torch.arange(keys - queries, keys, device=device)[:, None]
            other = torch.arange(keys, device=device)
            seen = other <= place
            self._made[key] = seen if window is None else seen & (other > place - window)
        return self._made[key]

    def block_mask(self, window: int | None) -> Any:
        """Flex attention's."""
        key = ("blocks", window)
        if key not in self._made:
            self._made[key] = block_mask(self.lengths, self.position_ids, self.contexts, window)
        return self._made[key]

    @property
    def seen(self) -> bool:
        """Whether an attention function was given this."""
        return "seen" in self._made

    def see(self) -> None:
        self._made["seen"] = True

    def _cumulative(self, lengths: Any) -> torch.Tensor:
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=self.position_ids.device)


Back = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Packing, float | None, int | None], torch.Tensor]


def _sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, scale: float | None, window: int | None
) -> torch.Tensor:
    """One call a segment, or a run of segments of equal length, whose queries, keys and values are views."""
    dtype = q.dtype
    if q.device.type == "cpu" and dtype in _HALF:  # torch's kernel for CPUs takes twice as long backwards in bfloat16
        q, k, v = q.float(), k.float(), v.float()
    grouped = q.shape[1] != k.shape[1]
    parts = []
    if packing.contexts is not None:
        for own, keys, values in _segments(q, k, v, packing):
            mask = packing.mask(own.shape[2], keys.shape[2], window)
            part = scaled_dot_product_attention(own, keys, values, attn_mask=mask, scale=scale, enable_gqa=grouped)
            parts.append(part[0].transpose(0, 1))
        return torch.cat(parts)[None].to(dtype)
    sizes = [count * length for count, length in packing.runs]
    pieces = zip(packing.runs, *(x[0].split(sizes, dim=1) for x in (q, k, v)), strict=True)
    for (count, length), *run in pieces:
        a, b, c = (x.unflatten(1, (count, length)).transpose(0, 1) for x in run)
        mask = packing.mask(length, length, window) if window is not None and window < length else None
        part = scaled_dot_product_attention(
            a, b, c, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
        )
        parts.append(part.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[None].to(dtype)


def _eager(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, scale: float | None, window: int | None
) -> torch.Tensor:
    """Matrix products and a softmax in float32, a segment at a time."""
    groups, parts = q.shape[1] // k.shape[1], []
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    for own, keys, values in _segments(q, k, v, packing):
        keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
        scores = (own @ keys.transpose(2, 3) * scale).float()
        hidden = ~packing.mask(own.shape[2], keys.shape[2], window)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).to(q.dtype)
        parts.append((weights @ values)[0].transpose(0, 1))
    return torch.cat(parts)[None]


def _flex(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, scale: float | None, window: int | None
) -> torch.Tensor:
    function = _compiled_flex() if q.is_cuda else _plain_flex()
    output = function(q, k, v, block_mask=packing.block_mask(window), scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return output.transpose(1, 2)


def _varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, scale: float | None, window: int | None
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = _rows(q, k, v, packing)
    (starts_q, longest_q), (starts_k, longest_k) = packing.queries, packing.keys
    sight = (-1 if window is None else window - 1, 0)
    output = varlen_attn(
        q, k, v, starts_q, starts_k, longest_q, longest_k,
        scale=scale, window_size=sight, enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return output[None]


def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, scale: float | None, window: int | None
) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found, unused-ignore]

    q, k, v = _rows(q, k, v, packing)
    (starts_q, longest_q), (starts_k, longest_k) = packing.queries, packing.keys
    sight = (-1, -1) if window is None else (window - 1, 0)
    output = flash_attn_varlen_func(
        q, k, v, starts_q, starts_k, longest_q, longest_k, softmax_scale=scale, causal=True, window_size=sight
    )
    return output[None]


_BACK_ENDS: dict[str, Back] = {"sdpa": _sdpa, "eager": _eager, "flex": _flex, "varlen": _varlen, "flash": _flash}


def _segments(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Each segment's queries, and the keys and values that it sees, all [1, heads, tokens, D]."""
    queries, keys, values = (x.split(packing.lengths, dim=2) for x in (q, k, v))
    for own, context in enumerate(packing.contexts or [-1] * len(packing.lengths)):
        if context < 0:
            yield queries[own], keys[own], values[own]
        else:
            yield queries[own], *(torch.cat([x[context], x[own]], dim=2) for x in (keys, values))


def _rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[1, heads, T, D] as [tokens, heads, D], keys and values repeated where several segments see them."""
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    index = packing.key_index
    return (q, k, v) if index is None else (q, k.index_select(0, index), v.index_select(0, index))


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(_plain_flex(), dynamic=True)


def _plain_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


def _attention(back: Back) -> Callable[..., tuple[torch.Tensor, None]]:
    """As transformers calls it: query [b, H, T, D], key and value [b, H_kv, T, D] → [b, T, H, D]."""

    @torch.compiler.disable
    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        packing: Packing | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        unknown = [name for name in _UNKNOWN if others.get(name) is not None]
        causal = others.get("is_causal", getattr(module, "is_causal", True)) is not False
        if unknown or dropout or attention_mask is not None or not causal:
            what = ", ".join(unknown) or ("dropout" if dropout else "another mask than the causal one")
            raise UserError(
                f"{type(module).__name__} asks for {what}, which attention over packed rows does not know",
                where="trainer.rows",
                fix="set trainer.rows=padded",
            )
        if packing is None:  # rows of a [b, T] matrix; they may be padded on the right
            packing = _whole_rows(query.shape[0], query.shape[2], query.device)
            query, key, value = (x.transpose(0, 1).flatten(1, 2)[None] for x in (query, key, value))
            rows = len(packing.lengths)
            output = back(query, key, value, packing, scaling, sliding_window)
            return output[0].unflatten(0, (rows, -1)), None
        packing.see()
        if packing.ranks is None:
            return back(query, key, value, packing, scaling, sliding_window), None
        query, key, value = packing.ranks.heads(query, key, value)
        return packing.ranks.tokens(back(query, key, value, packing, scaling, sliding_window)), None

    return attend


def _whole_rows(count: int, length: int, device: torch.device) -> Packing:
    return Packing((length,) * count, torch.arange(length, device=device).repeat(count)[None])


def _no_mask(
    *_: Any, attention_mask: torch.Tensor | None = None, use_vmap: bool = False, **__: Any
) -> torch.Tensor | None:
    """Which token sees which follows from the packing and a layer's window."""
    if attention_mask is not None or use_vmap:
        raise UserError(
            "attention over packed rows takes no mask",
            where="trainer.rows",
            fix="set trainer.rows=padded; the model's family makes masks of its own",
        )
    return None


for _name, _back in _BACK_ENDS.items():
    AttentionInterface.register(_REGISTERED[_name], _attention(_back))
    AttentionMaskInterface.register(_REGISTERED[_name], _no_mask)


def packs(lm: PreTrainedModel) -> bool:
    """Whether the model takes packed rows: it has one of our attention functions."""
    return lm.base_model.config._attn_implementation in _REGISTERED.values()


def unpackable(lm: PreTrainedModel) -> str | None:
    """Why sequences of this model cannot lie behind each other in one row; None: they can."""
    config = lm.config.get_text_config()
    strange = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if strange:
        return f"it has layers of the kind {', '.join(sorted(strange))}"
    mixing = {type(m).__name__ for m in lm.modules() if isinstance(m, nn.Conv1d | nn.RNNBase)}
    if mixing:
        return f"its {', '.join(sorted(mixing))} layers carry one token into the next"
    if getattr(config, "attn_logit_softcapping", None):
        return "its attention caps its scores"
    if any(name.endswith("sinks") for name, _ in lm.named_parameters()):
        return "its attention has sinks"
    arguments = inspect.signature(lm.base_model.forward).parameters
    takes_more = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in arguments.values())
    if not lm._can_set_attn_implementation() or "position_ids" not in arguments or not takes_more:
        return "its attention cannot be exchanged"
    return None


def available(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a back end cannot be used for models of ``dtype`` on ``device``; None: it can."""
    if name in ("sdpa", "eager"):
        return None
    if device.type != "cuda":
        return "it needs a GPU"
    if name == "flex":
        return None if importlib.util.find_spec("triton") else "it needs the package triton"
    if dtype not in _HALF:
        return "it computes in bfloat16: set model.dtype=bfloat16"
    if name == "flash":
        return None if importlib.util.find_spec("flash_attn") else "the package flash-attn is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or more"
    return None


def set_attention(lm: PreTrainedModel, asked: str, *, packing: bool, device: torch.device, dtype: torch.dtype) -> str:
    """Gives the model the attention function that was asked for, and says which in the log.

    Args:
        asked: ``model.attention``; ``auto``: the first of flash, varlen, flex and sdpa that works here.
        packing: for packed rows, if the model's family allows; otherwise transformers' own for padded rows.
        device, dtype: of the forward pass.

    Returns:
        The back end's name.

    Raises:
        UserError: it is not available here.
    """
    obstacle = unpackable(lm) if packing else None
    if obstacle is not None:
        _warn(f"rows are padded and not packed: {type(lm).__name__} cannot be packed, {obstacle}")
    packed = packing and obstacle is None
    if asked == "auto":
        order = ("flash", "varlen", "flex", "sdpa") if packed else ("sdpa",)
        chosen = next(name for name in order if available(name, device, dtype) is None)
    else:
        chosen = asked
        why = available(chosen, device, dtype)
        if why is None and not packed and chosen not in _OF_TRANSFORMERS:
            why = "it is for packed rows"
        if why is not None:
            raise UserError(f"attention '{chosen}' cannot be used: {why}", where="model.attention", fix="use auto")
    try:
        lm.set_attn_implementation((_REGISTERED if packed else _OF_TRANSFORMERS)[chosen])
    except (ImportError, ValueError) as error:
        what = f"attention '{chosen}' cannot be used: {error}"
        raise UserError(what, where="model.attention", fix="use auto") from error
    _tell(f"attention: {chosen}, {'packed' if packed else 'padded'} rows, {dtype} on {device.type}")
    return chosen


@lru_cache(maxsize=32)
def _tell(message: str) -> None:
    _LOG.info(message)


@lru_cache(maxsize=32)
def _warn(message: str) -> None:
    _LOG.warning(message)
