"""Coordinates of tokens, learnt from which tokens they stand near: PPMI and its singular vectors.

    M_ab = max(0, ln n_ab n / (n_a n_b))      n_ab how often b stands at most WINDOW tokens from a (Church & Hanks 1990)
    M ~ U S V^T,  z_a = U_a sqrt(S)            the best 64 dimensions in least squares (Levy & Goldberg 2014)
    p_a = softmax(z_a / rms(z_a))              the same on the simplex, where Fisher-Rao affinity compares tokens

Two tokens are near when they stand in like company. Whether that holds on other text is measured: `neighbours`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

DIMS, WINDOW = 64, 4
GRID = 2.0**-12  # coordinates are multiples of it, so that the rounding of a product decides nothing
NEAREST, OFTEN = 10, 20  # neighbours looked at, and how often a token must stand in a text to be judged by it


@dataclass(frozen=True)
class Neighbours:
    """Mean cosine of the company that a token and its ten nearest keep in other text; both in [0, 1]."""

    learned: float
    shuffled: float  # the control: the same coordinates, each of another token
    tokens: int  # judged


def coordinates(documents: Sequence[NDArray[np.integer]], vocabulary: int) -> NDArray[np.float32]:
    """z (V, 64) of the tokens of `documents`; zeros for a token that is in none of them, and beyond the rank."""
    ppmi = company(documents, vocabulary)
    dims = min(DIMS, vocabulary - 1)
    out = np.zeros((vocabulary, DIMS), np.float32)
    if ppmi.nnz <= dims:
        return out
    left, size = _singular(ppmi, dims)
    out[:, :dims] = np.round(left * np.sqrt(size) / GRID) * GRID
    return out


def _singular(matrix: scipy.sparse.csr_array, count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The largest `count` singular values of a symmetric matrix and their left vectors (Halko et al. 2011).

    From a fixed start in a fixed number of steps; each vector's largest entry is positive.
    """
    size = len(matrix.indptr) - 1
    basis = np.random.default_rng(0).standard_normal((size, min(size, count + 16)))
    for _ in range(8):
        basis, _ = np.linalg.qr(matrix @ basis)
    inner, values, _ = np.linalg.svd((matrix @ basis).T, full_matrices=False)
    left = basis @ inner[:, :count]
    left *= np.where(left[np.abs(left).argmax(0), np.arange(count)] < 0, -1, 1)
    return left, values[:count]


def on_simplex(z: NDArray[np.floating]) -> NDArray[np.float64]:
    """p (..., 64) of coordinates z; uniform for z = 0."""
    z = np.asarray(z, np.float64)
    rms = np.sqrt(np.mean(z * z, -1, keepdims=True))
    z = z / np.where(rms > 0, rms, 1)
    p: NDArray[np.float64] = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def affinity(p: NDArray[np.floating], q: NDArray[np.floating]) -> NDArray[np.float64]:
    """Bhattacharyya's sum_i sqrt(p_i q_i) = cos(d_FR / 2), (..., n) -> (...), in [0, 1]; 1 for equal ones.

    >>> float(affinity(np.array([1.0, 0]), np.array([0, 1.0]))), float(affinity(np.ones(4) / 4, np.ones(4) / 4))
    (0.0, 1.0)
    """
    found: NDArray[np.float64] = np.sqrt(np.asarray(p) * np.asarray(q)).sum(-1).clip(0, 1)
    return found


def company(documents: Sequence[NDArray[np.integer]], vocabulary: int) -> scipy.sparse.csr_array:
    """PPMI (V, V) of tokens at most WINDOW apart in one document."""
    text = np.concatenate([np.append(d, np.full(WINDOW, -1)) for d in documents]) if documents else np.zeros(0, int)
    counts = scipy.sparse.csr_array((vocabulary, vocabulary), dtype=np.float64)
    for apart in range(1, WINDOW + 1):
        a, b = text[:-apart], text[apart:]
        both = (a >= 0) & (b >= 0)
        part = _counted(a[both].astype(np.int64) * vocabulary + b[both], vocabulary)
        counts = counts + part + part.T
    sums, found = np.asarray(counts.sum(1)).ravel(), counts.tocoo()
    value = np.log(found.data * sums.sum() / (sums[found.row] * sums[found.col]))
    kept = value > 0
    return scipy.sparse.csr_array((value[kept], (found.row[kept], found.col[kept])), shape=counts.shape)


def _counted(keys_N: NDArray[np.int64], vocabulary: int) -> scipy.sparse.csr_array:
    """How often each key a V + b is there, (V, V)."""
    if vocabulary**2 <= len(keys_N) * 16:
        return scipy.sparse.csr_array(
            np.bincount(keys_N, minlength=vocabulary**2).reshape(vocabulary, -1).astype(float)
        )
    key, count = np.unique(keys_N, return_counts=True)
    return scipy.sparse.coo_array((count.astype(float), np.divmod(key, vocabulary)), shape=(vocabulary,) * 2).tocsr()


def neighbours(z: NDArray[np.floating], held: Sequence[NDArray[np.integer]]) -> Neighbours:
    """How alike in the documents `held`, which the coordinates have not seen, a token and its nearest are."""
    vocabulary = len(z)
    seen = np.bincount(np.concatenate(held), minlength=vocabulary) if held else np.zeros(vocabulary, int)
    often = np.flatnonzero((seen >= OFTEN) & (np.abs(z).sum(1) > 0))
    if len(often) <= NEAREST:
        return Neighbours(float("nan"), float("nan"), len(often))
    rows = company(held, vocabulary)[often]
    norm = np.sqrt(rows.multiply(rows).sum(1)).ravel()
    rows = scipy.sparse.diags_array(1 / np.where(norm > 0, norm, 1)) @ rows
    alike = np.asarray((rows @ rows.T).todense())
    shuffled = np.random.default_rng(0).permutation(len(often))
    learned, control = (_nearest(on_simplex(z[at]), alike) for at in (often, often[shuffled]))
    return Neighbours(learned, control, len(often))


def _nearest(p: NDArray[np.float64], alike: NDArray[np.float64]) -> float:
    """Mean of `alike` between each of N tokens and its nearest by `p`."""
    root = np.sqrt(p)
    near = root @ root.T
    np.fill_diagonal(near, -1)
    nearest = np.argpartition(-near, NEAREST, axis=1)[:, :NEAREST]
    return float(np.take_along_axis(alike, nearest, 1).mean())
