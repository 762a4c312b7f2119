"""A seeded order of 0 … n-1 in which every place can be computed by itself.

A Feistel network over the next power of four, walked until it lands inside (Black and Rogaway, "Ciphers with Arbitrary
Finite Domains", 2002). Nothing is stored, so an order of a hundred million rows costs nothing, and the numbers
depend on no library's generator: an order written down today is the same under every later version of Python and NumPy.
"""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 8


class Permutation:
    """A bijection of 0 … size-1, uniform to the eye over its keys.

    Args:
        size: at least 1.
        key: numbers and words that select the bijection; any difference gives an unrelated one.
    """

    def __init__(self, size: int, *key: int | str):
        if size < 1:
            raise ValueError(f"there is no order of {size} things")
        self.size = size
        self._half = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
        self._mask = np.uint64((1 << int(self._half)) - 1)
        digest = hashlib.blake2b(repr((size, *key)).encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """What stands at ``places`` [b]: [b] int64."""
        return self._walk(places, self._keys, inverse=False)

    def inverse(self, values: np.ndarray) -> np.ndarray:
        """At which places ``values`` [b] stand: [b] int64."""
        return self._walk(values, self._keys[::-1], inverse=True)

    def _walk(self, numbers: np.ndarray, keys: np.ndarray, *, inverse: bool) -> np.ndarray:
        numbers = np.asarray(numbers, dtype=np.int64)
        if len(numbers) and not (numbers.min() >= 0 and numbers.max() < self.size):
            raise IndexError(f"{numbers.min()} or {numbers.max()} is not one of {self.size} places")
        result = self._network(numbers.astype(np.uint64), keys, inverse)
        while (outside := result >= self.size).any():
            result[outside] = self._network(result[outside], keys, inverse)
        return result.astype(np.int64)

    def _network(self, numbers: np.ndarray, keys: np.ndarray, inverse: bool) -> np.ndarray:
        left, right = numbers >> self._half, numbers & self._mask
        if inverse:
            left, right = right, left
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & self._mask)
        if inverse:
            left, right = right, left
        return left << self._half | right


def _mix(x: np.ndarray) -> np.ndarray:
    """A 64-bit finaliser in which every input bit reaches every output bit (splitmix64's)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
