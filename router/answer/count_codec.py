"""Counts in few bytes, exactly: Rice codes of a histogram, with a bound that no text can break.

Rice code with parameter k: v >= 0 is v >> k ones, a zero, and the k low bits of v (Golomb 1966; Rice 1979). N values
that sum to S take at most N (k + 1) + S / 2^k bits. A histogram of n counts in B bins is coded in one of two ways,
whichever is shorter: dense, its B counts (N = B, S = n), for long texts; or sparse, the gaps between its n sorted
entries (N = n, S < B), for short ones. At 4096 bins: 62 counts take 63 bytes or fewer, 1000 take 503, 32 768 take 2560.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

_MOST = 16  # largest k
_K = np.arange(_MOST + 1)


@functools.lru_cache(maxsize=1 << 12)
def bound_bytes(n: int, bins: int) -> int:
    """Bytes that `pack` takes at most for n counts in `bins` bins, whatever the counts are."""
    either = ((bins, n), (n, bins - 1))
    return min(-(-(values * (k + 1) + (total >> k)) // 8) for values, total in either for k in range(_MOST + 1))


def pack(counts_B: NDArray[np.int64]) -> tuple[int, bytes]:
    """(code, data): code = 2 k + (1 if sparse), the shortest of all."""
    full = counts_B.nonzero()[0]
    some = counts_B[full]  # zeros add nothing to the sums of v >> k
    entries = full.repeat(some)
    gaps = entries.copy()
    gaps[1:] -= entries[:-1]
    n, bins = len(entries), len(counts_B)
    sizes = np.empty((_MOST + 1, 2), np.int64)
    for way, (count, v) in enumerate(((bins, some), (n, gaps))):
        sizes[:, way] = count * (_K + 1) + (v[:, None] >> _K).sum(axis=0)
    code = int(sizes.argmin())
    assert -(-int(sizes.flat[code]) // 8) <= bound_bytes(n, bins)
    return code, _write(gaps if code % 2 else counts_B, code // 2)


def unpack(code: int, data: bytes, n: int, bins: int) -> NDArray[np.int64]:
    """The counts, (B,) int64; ValueError unless `data` is what `pack` makes of n counts in `bins` bins."""
    if not 0 <= code < 2 * len(_K):  # it comes from outside, and sizes follow from it
        raise ValueError(f"code {code}; there are 0 to {2 * len(_K) - 1}")
    values = _read(data, n if code % 2 else bins, code // 2)
    if code % 2:
        entries = np.cumsum(values)
        if n and entries[-1] >= bins:
            raise ValueError("a bin beyond the last")
        values = np.bincount(entries, minlength=bins)
    if values.sum() != n:
        raise ValueError("counts that do not add up")
    return values


def _write(values_N: NDArray[np.int64], k: int) -> bytes:
    ends = ((values_N >> k) + 1).cumsum()
    unary = int(ends[-1]) if len(ends) else 0
    bits = np.ones(unary + k * len(values_N), np.uint8)
    bits[ends - 1] = 0
    np.bitwise_and(values_N[:, None] >> _K[:k], 1, out=bits[unary:].reshape(len(values_N), k), casting="unsafe")
    return np.packbits(bits).tobytes()


def _read(data: bytes, num_values: int, k: int) -> NDArray[np.int64]:
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    zeros = np.flatnonzero(bits == 0)[:num_values]
    end = int(zeros[-1]) + 1 if num_values and len(zeros) == num_values else 0
    low = bits[end : end + num_values * k]
    if len(zeros) < num_values or len(low) < num_values * k or len(data) != -(-(end + num_values * k) // 8):
        raise ValueError("too few or too many bits")
    quotient = np.diff(zeros, prepend=-1) - 1
    return (quotient << k) + (low.reshape(num_values, k).astype(np.int64) << np.arange(k)).sum(axis=1)
