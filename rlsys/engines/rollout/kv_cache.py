"""Keys and values of the rows under way, in one buffer whose columns are a clock that all rows share."""

from __future__ import annotations

import math

import torch

from rlsys.engines.rollout.decoder import Decoder

_WHOLE_BYTES = (
    2 << 30
)  # up to here the buffer is made for the longest response at once; a CPU's unused pages cost nothing
_FIRST_COLUMNS = 64


class KVCache:
    """[layers, 2, rows, Hk, columns, D]. Every row's latest token is in the same column: a step writes one column of
    all rows, without an index. A row that begins later has its prompt right before that column, and a mask on what is
    left of it. Rows are compact, 0 … ``rows`` − 1.
    """

    def __init__(self, decoder: Decoder):
        self._shape = (decoder.layers, 2, decoder.kv_heads, decoder.head_dim)
        self._dtype, self._device = decoder.dtype, decoder.device
        self.rows = 0
        self._end = 0
        self._starts: list[int] = []  # of each row: its first column
        self._storage = torch.empty(0, dtype=self._dtype, device=self._device)
        self._lay_out(0, 0)

    def add(self, kv: torch.Tensor, source: torch.Tensor, lengths: list[int], *, most: int, response: int) -> None:
        """Appends a row for each entry of ``source``.

        Args:
            kv: [layers, 2, P, Hk, T, D] of P prompts, padded on the left.
            source: [n] int64, which prompt each row has; lengths: [n] tokens of it.
            most: rows that will ever be there at once, these included.
            response: longest response that may come.
        """
        length, rows = kv.shape[4], self.rows + len(lengths)
        if not self.rows:  # laid out as it would be in a new cache: the same calls are the same arithmetic
            self._end = length
            self._lay_out(max(rows, most), self._columns(max(rows, most), length, response))
        elif rows > self._buffer.shape[2] or length > self._end:
            self._move(max(rows, most), length, response)
        kept = slice(self._end - length, self._end)
        # A weight of 0 times what memory happens to hold may be NaN.
        self._buffer[:, :, self.rows : rows, :, : self._end - length] = 0
        for layer, prompts in zip(self._buffer, kv, strict=True):  # the copies of all layers would be a second cache
            layer[:, self.rows : rows, :, kept] = prompts[:, source]
        self._starts += [self._end - n for n in lengths]
        starts = torch.tensor(self._starts[self.rows :], device=self._device)
        columns = torch.arange(self._mask.shape[1], device=self._device)
        self._mask[self.rows : rows].zero_().masked_fill_(columns < starts[:, None], float("-inf"))
        self.rows = rows

    def advance(self, response: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Opens the next column. Returns the cache [layers, 2, B, Hk, C, D] and the mask [B, C] of a decoder's step."""
        if self._end == self._buffer.shape[4]:
            self._move(self.rows, 0, response)
        first = min(self._starts)
        self._end += 1
        window = slice(first, self._end)
        mask = self._mask[: self.rows, window] if max(self._starts) > first else None
        return self._buffer[:, :, : self.rows, :, window], mask

    def keep(self, order: list[int]) -> None:
        """Row ``order[i]`` becomes row i, the others are gone. At most those rows should move that must."""
        moved = [(to, row) for to, row in enumerate(order) if to != row]
        if moved:
            first = min(self._starts[row] for _, row in moved)
            to, rows = (torch.tensor(part, device=self._device) for part in zip(*moved, strict=True))
            window = slice(first, self._end)
            self._buffer[:, :, to, :, window] = self._buffer[:, :, rows, :, window]
            self._mask[to] = self._mask[rows]
        self._starts = [self._starts[row] for row in order]
        self.rows = len(order)

    def release(self) -> int:
        """Gives the memory back; there are no rows any more. Returns bytes."""
        self.keep([])
        nbytes = self._storage.nbytes
        self._storage = self._storage.new_empty(0)
        self._lay_out(0, 0)
        return nbytes

    def _move(self, rows: int, length: int, response: int) -> None:
        """To a buffer with so many rows, and room for a prompt of ``length`` before the clock's column."""
        first, mask, buffer = min(self._starts), self._mask, self._buffer
        old = slice(first, self._end)
        window = self._end - first
        end = max(window, length)
        self._storage = self._storage.new_empty(0)  # what lives in it is copied, not overwritten
        self._lay_out(rows, self._columns(rows, end, response))
        self._buffer[:, :, : self.rows, :, : end - window] = 0
        self._buffer[:, :, : self.rows, :, end - window : end] = buffer[:, :, : self.rows, :, old]
        self._mask[: self.rows] = float("-inf")
        self._mask[: self.rows, end - window :] = 0
        self._mask[: self.rows, end - window : end] = mask[: self.rows, old]
        self._starts = [start - self._end + end for start in self._starts]
        self._end = end

    def _columns(self, rows: int, end: int, response: int) -> int:
        layers, two, heads, dim = self._shape
        columns = end + response
        if layers * two * heads * dim * rows * columns * self._dtype.itemsize > _WHOLE_BYTES:
            columns = min(columns, end + max(_FIRST_COLUMNS, end // 2))
        return columns

    def _lay_out(self, rows: int, columns: int) -> None:
        layers, two, heads, dim = self._shape
        shape = (layers, two, rows, heads, columns, dim)
        if math.prod(shape) > self._storage.numel():
            self._storage = self._storage.new_empty(math.prod(shape))
        self._buffer = self._storage[: math.prod(shape)].view(shape)
        self._mask = torch.zeros(rows, columns, dtype=self._dtype, device=self._device)
