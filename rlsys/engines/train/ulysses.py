"""Sequence parallelism: neighbouring ranks hold one packed row together, each a slice of its tokens.

Everything but attention looks at one token at a time and works on the slice. In attention an all-to-all makes "my
tokens, all heads" into "all tokens, my heads", and another one turns the result back (DeepSpeed-Ulysses, Jacobs et al.
2023, arXiv:2309.14509).

A rank keeps rows of its own, as without: it alone computes their loss, so each token is counted once. Its neighbours
help with the forward and backward pass. For every pass the ranks of a group lay their micro-batches end to end in one
row, and what the slices say about the scored tokens is added up and goes back to the rank whose tokens they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from transformers import PretrainedConfig, PreTrainedModel

from rlsys.batch.balance import packed_batches
from rlsys.config.errors import UserError
from rlsys.config.schema import TrainerConfig
from rlsys.engines.train.attention import Packing, packs
from rlsys.engines.train.model import PolicyOutput
from rlsys.engines.train.rows import MicroBatch, TeacherRows

_WHERE = "trainer.sequence_ranks"
_FIELDS = 6  # of a row, as it is told the neighbours


def check_sequence_ranks(config: PretrainedConfig, trainer: TrainerConfig) -> None:
    """That ``trainer.sequence_ranks`` can hold a row of this model together; of one alone nothing is asked.

    Raises:
        UserError: rows are padded, or the model's heads cannot be divided.
    """
    size = trainer.sequence_ranks
    if size > 1 and trainer.rows == "padded":
        raise UserError(
            "ranks hold packed rows together, and rows are padded",
            where=_WHERE,
            fix="set trainer.rows=packed or shared",
        )
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", size)
    if size > 1 and heads % size:
        raise UserError(
            f"{heads} attention heads cannot be divided over {size} ranks that share a row",
            where=_WHERE,
            fix=f"choose a divisor of {heads}",
        )


def check_packs(lm: PreTrainedModel, trainer: TrainerConfig) -> None:
    """That the model, a policy or a teacher, can have slices of packed rows.

    Raises:
        UserError: see :func:`check_sequence_ranks`, or its layers carry more from token to token than attention knows.
    """
    check_sequence_ranks(lm.config, trainer)
    if trainer.sequence_ranks > 1 and not packs(lm):
        raise UserError(
            f"ranks hold packed rows together only, and {type(lm).__name__} cannot be packed",
            where=_WHERE,
            fix="leave it out: trainer.activations=recompute saves memory too",
        )


class SequenceRanks:
    """The ranks that hold a row together with this one: ``size`` neighbours, of which this is number ``rank``.

    Every method but ``own`` is a collective of theirs.
    """

    def __init__(self, size: int) -> None:
        """
        Raises:
            UserError: the ranks do not divide.
        """
        ranks = dist.get_world_size()
        if ranks % size:
            raise UserError(
                f"{ranks} trainer ranks cannot be divided into groups of {size} that share a row",
                where=_WHERE,
                fix=f"choose a divisor of {ranks}",
            )
        timeout = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout
        self._group, _ = dist.new_subgroups(size, timeout=timeout)
        self.size, self.rank = size, dist.get_rank(self._group)

    def divide(self, costs: Sequence[int], token_budget: int, parts: int | None = None) -> list[list[int]]:
        """``packed_batches`` of all the group's rows together.

        Args:
            costs: tokens of each of this rank's rows.

        Returns:
            As many lists on each rank: this rank's rows in each micro-batch, maybe none.

        Raises:
            UserError: a row of any of the ranks has more tokens than the budget.
        """
        (every,) = zip(*self._tell([torch.tensor(costs, dtype=torch.int64)]), strict=True)
        longest = max((int(theirs.max()) for theirs in every if len(theirs)), default=0)
        if longest > token_budget:
            raise UserError(
                f"a row has {longest} tokens, a micro-batch of {self.size} ranks may have {token_budget}",
                where="trainer.micro_batch_tokens",
                fix=f"set trainer.micro_batch_tokens={-(-longest // self.size)} or more",
            )
        start = sum(len(theirs) for theirs in every[: self.rank])
        mine = range(start, start + len(costs))
        batches = packed_batches(torch.cat(every).tolist(), token_budget, parts)
        return [[row - start for row in batch if row in mine] for batch in batches]

    def share(self, micro: MicroBatch) -> MicroBatch:
        """This rank's slice of the row that its micro-batch and the neighbours' make together. What is scored
        of it, and the columns, stay the rank's own."""
        told = [micro.targets, *_inputs(micro.input_ids, micro.packing, micro.positions)]
        if micro.teacher is not None:
            seen = micro.teacher
            told += [seen.student, *_inputs(seen.input_ids, seen.packing, seen.positions)]
        every = self._tell(told)
        device = micro.input_ids.device
        counts = [len(theirs[0]) for theirs in every]
        start = sum(counts[: self.rank])
        row = self._join([theirs[1:_FIELDS] for theirs in every], device)
        mine = torch.nonzero(row.home == self.rank).flatten()
        part = Part(self, mine.to(device), sum(counts), slice(start, start + counts[self.rank]))
        teacher = None
        if micro.teacher is not None:
            teacher = self._join([theirs[_FIELDS + 1 :] for theirs in every], device)
            offsets = [sum(counts[:rank]) for rank in range(self.size)]
            student = torch.cat([theirs[_FIELDS] + n for theirs, n in zip(every, offsets, strict=True)])
            part, teacher_rows = self._meet(part, micro.teacher, row, teacher, student, mine)
        return replace(
            micro,
            input_ids=row.slice,
            positions=row.local(mine).to(device),
            targets=torch.cat([theirs[0] for theirs in every])[mine].to(device),
            packing=row.packing,
            teacher=teacher_rows if teacher is not None else None,
            part=part,
        )

    def own(self, tokens: torch.Tensor) -> torch.Tensor:
        """[…, T] of a row as […, T / size] of this rank's slice."""
        return tokens.unflatten(-1, (self.size, -1))[..., self.rank, :]

    def heads(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[1, heads, T / size, D] of all heads as [1, heads / size, T, D] of this rank's. Keys and values of a
        head that several ranks need are repeated."""
        if query.shape[1] % self.size:
            raise UserError(
                f"{query.shape[1]} attention heads cannot be divided over {self.size} ranks that share a row",
                where=_WHERE,
                fix=f"choose a divisor of {query.shape[1]}",
            )
        copies = math.lcm(key.shape[1], self.size) // key.shape[1]
        if copies > 1:
            key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
        # [to whom, my tokens, their heads · D], all three in one exchange
        blocks = [x[0].unflatten(0, (self.size, -1)).transpose(1, 2).flatten(2) for x in (query, key, value)]
        sizes = [block.shape[2] for block in blocks]
        mixed = _AllToAll.apply(torch.cat(blocks, dim=2), self._group).flatten(0, 1)
        parts = zip(mixed.split(sizes, dim=1), (query, key, value), strict=True)
        q, k, v = (part.unflatten(1, (-1, x.shape[3])).transpose(0, 1)[None] for part, x in parts)
        return q, k, v

    def tokens(self, output: torch.Tensor) -> torch.Tensor:
        """[1, T, heads / size, D] of this rank's heads as [1, T / size, heads, D] of its tokens."""
        dimension = output.shape[3]
        blocks = output[0].unflatten(0, (self.size, -1)).flatten(2)  # [whose tokens, tokens, my heads · D]
        mixed = _AllToAll.apply(blocks, self._group)  # [whose heads, my tokens, their heads · D]
        return mixed.transpose(0, 1).flatten(1).unflatten(1, (-1, dimension))[None]

    def gather(self, values: torch.Tensor, index: torch.Tensor, total: int) -> torch.Tensor:
        """[k, C] values of each rank in their places ``index`` of all the ranks' [total, C]. Keeps the gradient."""
        return _Gather.apply(values, index, total, self._group)

    def _tell(self, mine: list[torch.Tensor]) -> list[list[torch.Tensor]]:
        """Each rank's tensors [n] int64, of any sizes, on the CPU; every rank has as many of them."""
        sizes = torch.tensor([len(tensor) for tensor in mine])
        every = [torch.empty_like(sizes) for _ in range(self.size)]
        dist.all_gather(every, sizes, group=self._group)
        payload = torch.zeros(max(int(theirs.sum()) for theirs in every) or 1, dtype=torch.int64)
        flat = torch.cat([tensor.cpu() for tensor in mine])
        payload[: len(flat)] = flat
        payloads = [torch.empty_like(payload) for _ in range(self.size)]
        dist.all_gather(payloads, payload, group=self._group)
        return [
            list(told[: int(theirs.sum())].split(theirs.tolist())) for told, theirs in zip(payloads, every, strict=True)
        ]

    def _join(self, pieces: list[list[torch.Tensor]], device: torch.device) -> _Row:
        """The ranks' rows end to end, padded to a multiple of their number by a sequence of its own."""
        ids, places, lengths, contexts, positions = zip(*pieces, strict=True)
        starts = torch.tensor([0, *(len(x) for x in ids)]).cumsum(0).tolist()
        segments = torch.tensor([0, *(len(x) for x in lengths)]).cumsum(0).tolist()
        padding = torch.arange(-starts[-1] % self.size)
        extra = [len(padding)] if len(padding) else []
        seen = torch.cat([torch.where(c >= 0, c + n, c) for c, n in zip(contexts, segments[:-1], strict=True)]).tolist()
        packing = Packing(
            (*torch.cat(lengths).tolist(), *extra),
            torch.cat([*places, padding])[None].to(device),
            (*seen, *(-1 for _ in extra)) if max(seen) >= 0 else None,
            self,
        )
        tokens = torch.cat([*ids, torch.zeros_like(padding)])
        at = torch.cat([x + n for x, n in zip(positions, starts[:-1], strict=True)])
        return _Row(packing, self.own(tokens)[None].to(device), at, len(tokens) // self.size)

    def _meet(
        self,
        part: Part,
        teacher: TeacherRows,
        row: _Row,
        other: _Row,
        student: torch.Tensor,
        mine: torch.Tensor,
    ) -> tuple[Part, TeacherRows]:
        """A token that the divergence is about lies in one slice of the student's row and in another of the teacher's:
        the teacher's hidden state goes to where the student's is.

        Args:
            row, other: the student's and the teacher's.
            student: [n] which of all the scored tokens the teacher's are; mine: [k] which of those are in this slice.
        """
        device = other.slice.device
        there = row.home[student]
        sent = torch.nonzero(other.home == self.rank).flatten()
        sent = sent[there[sent].argsort(stable=True)]
        taken = torch.nonzero(there == self.rank).flatten()
        taken = taken[other.home[taken].argsort(stable=True)]
        here = torch.full((part.total,), -1)
        here[mine] = torch.arange(len(mine))
        slots = here[student[taken]].to(device)
        leave = torch.bincount(there[sent], minlength=self.size).tolist()
        arrive = torch.bincount(other.home[taken], minlength=self.size).tolist()
        rows = replace(
            teacher,
            input_ids=other.slice,
            positions=other.local(sent).to(device),
            student=slots,
            packing=other.packing,
            exchange=partial(_send, leave=leave, arrive=arrive, group=self._group),
        )
        return replace(part, student=slots, own_student=teacher.student), rows


@dataclass(frozen=True)
class Part:
    """What a slice has of the scored tokens of its group.

    index: [k] which of the ``total`` tokens are in the slice. own: which of them are of the rank's own rows.
    student: [n'] which of the k the divergence is about here; own_student: [n] which of the rank's own.
    """

    ranks: SequenceRanks
    index: torch.Tensor
    total: int
    own: slice
    student: torch.Tensor | None = None
    own_student: torch.Tensor | None = None

    def output(self, output: PolicyOutput) -> PolicyOutput:
        """Of the slice's tokens as of the rank's own, which lie in any slice. One collective, so that there is one in
        the backward pass too, whatever the loss reads."""
        columns = [output.logprobs, output.entropy]
        if self.student is not None:
            size, slots = len(self.index), self.student
            columns += [v.new_zeros(size).index_copy(0, slots, v) for v in output[2:] if v is not None]
        own = self._own(torch.stack(columns, dim=1))
        entropy = own[:, 1] if output.entropy.requires_grad else own[:, 1].detach()
        if self.own_student is None:
            return PolicyOutput(own[:, 0], entropy)
        teacher = own[self.own_student]
        return PolicyOutput(own[:, 0], entropy, teacher[:, 2], teacher[:, 3].detach(), teacher[:, 4].detach())

    def values(self, values: torch.Tensor) -> torch.Tensor:
        """The same of a critic's."""
        return self._own(values[:, None])[:, 0]

    def _own(self, values: torch.Tensor) -> torch.Tensor:
        return self.ranks.gather(values, self.index, self.total)[self.own]


@dataclass(frozen=True)
class _Row:
    """A row of the group. slice: [1, length] this rank's inputs; at: [K] the input after which each scored token comes,
    in the whole row."""

    packing: Packing
    slice: torch.Tensor
    at: torch.Tensor
    length: int

    @property
    def home(self) -> torch.Tensor:
        """[K] the rank whose slice has it."""
        return self.at // self.length

    def local(self, which: torch.Tensor) -> torch.Tensor:
        """Of these, in their slices."""
        return self.at[which] % self.length


def _inputs(input_ids: torch.Tensor, packing: Packing | None, positions: torch.Tensor) -> list[torch.Tensor]:
    assert packing is not None
    contexts = packing.contexts or (-1,) * len(packing.lengths)
    lengths = torch.tensor(packing.lengths)
    return [input_ids.flatten(), packing.position_ids.flatten(), lengths, torch.tensor(contexts), positions]


def _send(hidden: torch.Tensor, *, leave: list[int], arrive: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """[Σ leave, H] → [Σ arrive, H], without gradient. leave, arrive: rows to and from each rank, in their order."""
    received = hidden.new_empty(sum(arrive), hidden.shape[1])
    dist.all_to_all_single(received, hidden.contiguous(), arrive, leave, group=group)
    return received


def _swap(blocks: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    received = torch.empty_like(blocks, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, blocks.contiguous(), group=group)
    return received


class _AllToAll(torch.autograd.Function):
    """[ranks, …]: block r goes to rank r, and what rank r sent comes to block r. It is its own inverse and adjoint."""

    @staticmethod
    def forward(ctx: Any, blocks: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _swap(blocks, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _swap(gradient, ctx.group), None


class _Gather(torch.autograd.Function):
    """See SequenceRanks.gather. Each rank's gradient is of its own rows' loss, so their sum is the gradient."""

    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, index: torch.Tensor, total: int, group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.group = group
        ctx.save_for_backward(index)
        whole = values.new_zeros(max(total, 1), values.shape[1])
        whole[index] = values
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (index,) = ctx.saved_tensors
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient[index], None, None, None
