"""The loss as a weighted sum of channels, each of which returns sums and counts and never a mean.

The normaliser of a channel is fixed over the global batch before the first micro-batch, so the gradient is the same
however the batch is cut into micro-batches or spread over ranks:

    loss = Σ_channels weight · (Σ_micro-batches Σ_ranks loss_sum) / normaliser

A row of the batch has up to four sequences, any of which may be empty: its prompt and response, the same response
behind a teacher's prompt, and a chosen and a rejected sequence. All of a row's sequences go through the model in one
micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from rlsys.algorithms.aggregation import live_rows
from rlsys.algorithms.collective import Alone, Collective

SumCount = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class ResponseBatch:
    """Rows of a batch with their tokens laid end to end.

    columns: by name; a ``[B, j:response]`` column is [N], one value a response token, ``[B, j:chosen]`` ones are [C];
        a ``[B]`` column is [B].
    rows: [N] int64, the row that each response token belongs to.
    num_rows: B. Both B and N may be 0: a rank that has run out of rows still takes part in every collective.
    pair_rows: ``chosen`` and ``rejected``: [C] int64, the row that each token of those sequences belongs to.
    """

    columns: dict[str, torch.Tensor]
    rows: torch.Tensor
    num_rows: int
    pair_rows: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TeacherOutput:
    """What the teacher says about response tokens; 0 off ``teacher_mask``.

    divergence: [N] of student and teacher, in nats, with gradient to the student.
    logprobs, entropy: [N] the teacher's, without gradient.
    """

    divergence: torch.Tensor
    logprobs: torch.Tensor
    entropy: torch.Tensor


@dataclass(frozen=True)
class ForwardOutput:
    """What one forward pass over a micro-batch gives; 0 off the masks.

    logprobs: [N], with gradient; entropy: [N], with gradient where a channel asks for it.
    pair_logprobs: ``chosen`` and ``rejected``: [C], with gradient.
    teacher: where a channel asks for one. values: [N], of a critic.
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor
    pair_logprobs: dict[str, torch.Tensor] = field(default_factory=dict)
    teacher: TeacherOutput | None = None
    values: torch.Tensor | None = None


@dataclass(frozen=True)
class ChannelSums:
    """loss_sum: scalar with gradient, not normalised; totals: metrics that are added up; sums: metrics as (sum, count);
    maxima: reduced by maximum."""

    loss_sum: torch.Tensor
    totals: dict[str, torch.Tensor] = field(default_factory=dict)
    sums: dict[str, SumCount] = field(default_factory=dict)
    maxima: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """What a channel fixed over the global batch.

    normaliser: what the loss is divided by; None: the sum is the loss.
    columns: by name, [N] values of this rank's response tokens.
    """

    normaliser: float | None
    columns: dict[str, torch.Tensor] = field(default_factory=dict)

    def at(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """The columns at these of the rank's response tokens ([n] int64)."""
        return {name: column.to(tokens.device)[tokens] for name, column in self.columns.items()}


@dataclass(frozen=True)
class DivergencePass:
    """What the forward pass computes from student and teacher (see ``rlsys.algorithms.divergences``).

    divergence, options: name or import path, and keyword options; t: of a divergence that follows a schedule.
    top_k, tail: only the student's likeliest words, and whether the rest counts as one more.
    """

    divergence: str
    options: dict[str, Any] = field(default_factory=dict)
    t: float | None = None
    top_k: int | None = None
    tail: bool = True


class Channel(Protocol):
    """One term of the loss.

    reads: the batch's columns that it needs.
    sequences: which of ``response``, ``chosen``, ``rejected`` it needs log-probs of.
    entropy_gradient: whether the entropy that it is given must carry a gradient.
    divergence: what it wants to know about a teacher; None: nothing.
    """

    @property
    def reads(self) -> tuple[str, ...]: ...

    @property
    def sequences(self) -> tuple[str, ...]: ...

    @property
    def entropy_gradient(self) -> bool: ...

    @property
    def divergence(self) -> DivergencePass | None: ...

    def prepare(self, batch: ResponseBatch, collective: Collective) -> Prepared:
        """Fixes what depends on the whole batch. A collective: called on every rank with its rows, also with none."""
        ...

    def loss(self, batch: ResponseBatch, output: ForwardOutput, columns: Mapping[str, torch.Tensor]) -> ChannelSums:
        """Sums over one micro-batch, of whole rows. Metric names must not depend on the data.

        Args:
            columns: what :meth:`prepare` gave for these tokens.
        """
        ...


@dataclass(frozen=True)
class ObjectiveSums:
    """What one micro-batch adds. loss: scalar with gradient, normalised; totals: metrics that are added up; sums and
    maxima: as in ChannelSums, names prefixed by the channel's."""

    loss: torch.Tensor
    totals: dict[str, torch.Tensor]
    sums: dict[str, SumCount]
    maxima: dict[str, torch.Tensor]


@dataclass(frozen=True)
class StepSettings:
    """What changes from step to step.

    weights: of channels, by name, in place of the objective's own; fields: by channel, dataclass fields to replace.
    """

    weights: dict[str, float] = field(default_factory=dict)
    fields: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Objective:
    """channels: by name, (channel, its weight in the loss). A channel of weight 0 is not computed."""

    channels: dict[str, tuple[Channel, float]]

    def __post_init__(self) -> None:
        if not self.channels:
            raise ValueError("an objective needs a channel")

    def at(self, settings: StepSettings) -> Objective:
        """The objective of one step."""
        channels = {}
        for name, (channel, weight) in self.channels.items():
            changed = replace(channel, **settings.fields[name]) if name in settings.fields else channel  # type: ignore[type-var]
            channels[name] = (changed, settings.weights.get(name, weight))
        return Objective(channels)

    def only(self, name: str) -> Objective:
        """The same with every other channel switched off."""
        return Objective({key: (channel, w if key == name else 0.0) for key, (channel, w) in self.channels.items()})

    @property
    def live(self) -> dict[str, tuple[Channel, float]]:
        return {name: pair for name, pair in self.channels.items() if pair[1]}

    @property
    def reads(self) -> tuple[str, ...]:
        """Columns that any channel reads, each once."""
        return tuple(dict.fromkeys(column for channel, _ in self.live.values() for column in channel.reads))

    @property
    def sequences(self) -> tuple[str, ...]:
        """Sequences that any channel needs log-probs of, each once, in the order response, chosen, rejected."""
        wanted = {sequence for channel, _ in self.live.values() for sequence in channel.sequences}
        return tuple(sequence for sequence in ("response", "chosen", "rejected") if sequence in wanted)

    @property
    def entropy_gradient(self) -> bool:
        return any(channel.entropy_gradient for channel, _ in self.live.values())

    @property
    def divergence(self) -> DivergencePass | None:
        """What is to be computed from student and teacher. Where one channel only needs the teacher's log-probs and
        another a divergence, the divergence gives both."""
        wanted = [channel.divergence for channel, _ in self.live.values() if channel.divergence is not None]
        full = [w for w in wanted if w.divergence != "sampled_token"]
        return next(iter(full or wanted), None)

    def prepare(self, batch: ResponseBatch, collective: Collective | None = None) -> dict[str, Prepared]:
        """What each channel fixes over the global batch: called once, with all rows of this rank."""
        ranks = collective if collective is not None else Alone()
        return {name: channel.prepare(batch, ranks) for name, (channel, _) in self.live.items()}

    def loss(
        self,
        batch: ResponseBatch,
        output: ForwardOutput,
        prepared: Mapping[str, Prepared],
        tokens: torch.Tensor | None = None,
    ) -> ObjectiveSums:
        """Loss and metrics of one micro-batch.

        Args:
            prepared: over the global batch. A channel whose normaliser is 0 has no token anywhere and adds 0.
            tokens: [N] which of the rank's response tokens these are; None: all of them, in order.
        """
        loss = output.logprobs.new_zeros(())
        totals: dict[str, torch.Tensor] = {}
        sums: dict[str, SumCount] = {}
        maxima: dict[str, torch.Tensor] = {}
        for name, (channel, weight) in self.live.items():
            fixed = prepared[name]
            result = channel.loss(batch, output, fixed.columns if tokens is None else fixed.at(tokens))
            total = fixed.normaliser
            term = result.loss_sum if total is None else result.loss_sum / max(total, 1.0)
            loss = loss + weight * term
            totals[f"{name}/loss"] = term.detach()
            totals |= {f"{name}/{key}": value for key, value in result.totals.items()}
            sums |= {f"{name}/{key}": value for key, value in result.sums.items()}
            maxima |= {f"{name}/{key}": value for key, value in result.maxima.items()}
        totals["loss"] = loss.detach()
        return ObjectiveSums(loss, totals, sums, maxima)


def live_fraction(mask: torch.Tensor, batch: ResponseBatch) -> SumCount:
    """(rows with a token on ``mask``, rows with a response)."""
    live = (live_rows(mask, batch.rows, batch.num_rows) > 0).sum()
    return live, (live_rows(torch.ones_like(mask), batch.rows, batch.num_rows) > 0).sum()
