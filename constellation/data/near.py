"""Texts that are nearly the same, and texts that share a run of words with held-out ones: by hashes of runs of bytes.

A text is read in lower case with single spaces. `runs` are the hashes of all its runs of n bytes, A its set of them:

    resemblance   J(A, B) = |A and B| / |A or B|, in [0, 1], estimated from the `SKETCH` smallest hashes of each: the
                  share in both of the smallest of A or B (Broder 1997); deviation at most 0.5 / sqrt(SKETCH)
    contaminated  a run of `SHARED` bytes, some 13 words, is in a held-out text too (as Brown et al. 2020 by words)
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
RUN = 24  # bytes of a run, for resemblance
SHARED = 64  # bytes, for contamination
SKETCH = 256
_P = 0x9E3779B97F4A7C15
_INVERSE = pow(_P, -1, 2**64)


def runs(text: str, size: int) -> Hashes:
    """A 64-bit hash of every run of `size` bytes, (bytes - size + 1,); of a shorter text its own, (1,).

    The sum of b_j P^j over the run, j counted from its start, modulo 2^64, then mixed.
    """
    plain = np.frombuffer(" ".join(text.lower().split()).encode("utf-8", "surrogatepass"), np.uint8)
    size = min(size, len(plain))
    if not size:
        return np.zeros(0, np.uint64)
    up, down = (_powers(base, len(plain)) for base in (_P, _INVERSE))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum((plain.astype(np.uint64) + np.uint64(1)) * up)])
    return _mixed((sums[size:] - sums[:-size]) * down[: len(plain) - size + 1])


def sketch(text: str) -> Hashes:
    """The smallest hashes of the text's runs, at most SKETCH, rising."""
    return np.unique(runs(text, RUN))[:SKETCH]


def resemblance(a: Hashes, b: Hashes) -> float:
    """J of two texts by their sketches; 1 for equal ones, 0 where one is empty."""
    smallest = np.union1d(a, b)[:SKETCH]
    return float(np.isin(smallest, np.intersect1d(a, b)).mean()) if len(smallest) else 0.0


def repeats(texts: Sequence[str], threshold: float) -> dict[int, tuple[int, float]]:
    """Of each text that resembles an earlier one that stays by at least `threshold`: that one, and by how much."""
    having: dict[int, list[int]] = defaultdict(list)
    sketches: dict[int, Hashes] = {}
    found: dict[int, tuple[int, float]] = {}
    for at, text in enumerate(texts):
        own = sketch(text)
        shared = Counter(other for h in own.tolist() for other in having[h])
        for other, _ in shared.most_common(8):
            if (close := resemblance(own, sketches[other])) >= threshold:
                found[at] = other, close
                break
        else:
            sketches[at] = own
            for h in own.tolist():
                having[h].append(at)
    return found


def contaminated(texts: Sequence[str], held_out: Sequence[str]) -> list[bool]:
    """Whether each text has a run of SHARED bytes, or all of a shorter one, in common with any held-out text."""
    known = np.unique(np.concatenate([np.zeros(0, np.uint64), *(runs(text, SHARED) for text in held_out)]))
    return [bool(np.isin(runs(text, SHARED), known).any()) for text in texts]


def _powers(base: int, count: int) -> Hashes:
    steps = np.full(count, np.uint64(base))
    steps[0] = 1
    powers: Hashes = np.cumprod(steps, dtype=np.uint64)
    return powers


def _mixed(x: Hashes) -> Hashes:
    """splitmix64's last steps: a bijection that spreads the low bits."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
