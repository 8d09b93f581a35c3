"""Random choices as pure functions of (seed, index): no generator, so no generator's state to save.

The n-th choice is a hash of the seed and n (SplitMix64's finaliser on a counter). It can be computed anywhere, in any
order, by any process, and stays the same for all versions of numpy and torch, which promise no such thing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_BLOCK = 1 << 20


def derive_key(*parts: int | str) -> np.uint64:
    """Hash a purpose and its numbers, as in ``derive_key("order", seed, domain, epoch)``, to 64 bits."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def scramble(values: npt.NDArray[np.uint64], key: np.uint64) -> npt.NDArray[np.uint64]:
    """Map each 64-bit value to a random-looking one; for a fixed key no two values meet."""
    # Wrapping around 2**64 is what arrays of uint64 do.
    x = values * _GOLDEN + key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permuted(index: int, size: int, key: np.uint64) -> int:
    """Return where a random-looking permutation of 0 .. size - 1 takes ``index``, without making the permutation.

    A Feistel network permutes the next power of 4; what falls outside ``size`` is sent through again.

    >>> sorted(permuted(i, 10, derive_key("example")) for i in range(10))
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & mask
        for turn in range(4):
            value = np.array([(turn << 62) | right], dtype=np.uint64)
            left, right = right, left ^ (int(scramble(value, key)[0]) & mask)
        index = (left << half_bits) | right
        if index < size:
            return index


class Mixture:
    """Draws a domain for every sample of the training stream, independently and with fixed weights.

    Args:
        weights: Not negative; normalised here.
        seed: Another seed gives other draws.

    >>> Mixture([0.5, 0.5], seed=0).domains(0, 8)
    array([1, 1, 0, 0, 0, 0, 1, 0])
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        shares = np.asarray(weights, dtype=np.float64)
        self._edges = np.cumsum(shares / shares.sum())[:-1]
        self._key = derive_key("mixture", seed)
        self.num_domains = len(shares)

    def domains(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return the domains of samples start .. stop - 1: int64 [stop - start]."""
        bits = scramble(np.arange(start, stop, dtype=np.uint64), self._key)
        # The upper 53 bits are a float64 in [0, 1).
        uniform = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return np.searchsorted(self._edges, uniform, side="right").astype(np.int64)

    def counts(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return how many of samples start .. stop - 1 each domain has: int64 [domains]."""
        counts = np.zeros(self.num_domains, dtype=np.int64)
        for begin in range(start, stop, _BLOCK):
            domains = self.domains(begin, min(begin + _BLOCK, stop))
            counts += np.bincount(domains, minlength=self.num_domains)
        return counts
