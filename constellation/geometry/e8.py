"""The root system E8: 240 vectors of R^8, used as addresses of kernels and as a graph of neighbours.

The roots are the shortest vectors (norm^2 2) of the lattice E8: 112 of the form +-e_i +- e_j and 128 of the form
(+-1, ..., +-1) / 2 with an even number of minus signs. Each has 56 neighbours at 60 degrees, and no more than 240
points of S^7 can keep that distance from each other (Conway & Sloane 1999, chapters 4.8 and 14).

What they are good for: an address of a fixed format that a kernel keeps when it is retrained, 56 neighbours that need
no search (prefetch, hand-off, a free place for a split), a lookup in O(8), and symmetry: every root sees the same
picture. What they are not good for: cluster centres. Text is not spread evenly over S^7, so fixed roots overload some
kernels and starve others: in the prototype they tied with k-means at 8 centres and lost at 240 (18-fold overload, 61 %
of the roots dead). Centres are therefore fitted, and `match_roots` gives each fitted centre its address.

Tables are numpy arrays, read-only, built at the first call; `nearest_root` and `reflect` work on torch tensors, and on
numpy arrays without a copy through `nearest_root(torch.from_numpy(u)).numpy()`.

Order of the roots: root 4 k + 2 a + b is (-1)^a e_i + (-1)^b e_j for the k-th pair i < j in dictionary order; root
112 + sum_{i < 7} 2^i n_i is ((-1)^n_0, ..., (-1)^n_7) / 2, n_7 making the number of minus signs even.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from constellation import roster
from constellation.errors import ConfigError

_PAIRS = 112  # roots of the first form


@functools.cache
def roots() -> NDArray[np.float64]:
    """All 240 roots, (240, 8), norm^2 2, in the order the module docstring gives; sum r r^T = 60 I."""
    return _frozen(np.array([roster.root(index) for index in range(roster.ROOTS)]))


@functools.cache
def simple_roots() -> NDArray[np.float64]:
    """Simple roots 1..8 in Bourbaki's numbering, (8, 8): an integer basis, Gram matrix = Cartan matrix, det 1.

    1 = (e1 + e8 - e2 - ... - e7) / 2, 2 = e1 + e2, k = e_{k-1} - e_{k-2} for k = 3..8. In the Dynkin diagram
    1 - 3 - 4 - 5 - 6 - 7 - 8 is a chain and 2 hangs on 4 (Bourbaki, Lie IV-VI, plate VII).
    """
    table = np.zeros((8, 8))
    table[0] = 0.5 * np.array([1, -1, -1, -1, -1, -1, -1, 1])
    table[1, :2] = 1
    for k in range(2, 8):
        table[k, k - 1], table[k, k - 2] = 1, -1
    return _frozen(table)


@functools.cache
def simple_indices() -> NDArray[np.int64]:
    """Where the simple roots stand in `roots()`, (8,)."""
    return _frozen(nearest_root(torch.from_numpy(simple_roots().copy())).numpy())


@functools.cache
def neighbours() -> NDArray[np.int64]:
    """The 56 roots at 60 degrees (inner product 1) of every root, (240, 56), rising. A relation: symmetric."""
    gram = roots() @ roots().T
    return _frozen(np.argwhere(gram == 1)[:, 1].reshape(240, 56))


@functools.cache
def reflections() -> NDArray[np.int64]:
    """Entry (i, j): index of root i reflected in the mirror of root j, (240, 240). Columns are permutations."""
    r = torch.from_numpy(roots().copy())
    return _frozen(nearest_root(reflect(r[:, None], r[None, :])).numpy())


def reflect(x: Tensor, root: Tensor) -> Tensor:
    """Weyl reflection x - <x, r> r of points x in the mirror orthogonal to a root r, (..., 8); an isometry."""
    return x - (x * root).sum(-1, keepdim=True) * root


def nearest_root(x: Tensor) -> Tensor:
    """Index into `roots()` of the root nearest to x, exactly, in O(8), (..., 8) -> (...) int64.

    All roots are equally long, so the nearest has the largest <x, r>. Best of the first form: the sum of the two
    largest |x_i|. Best of the second: (sum |x_i|) / 2, less min |x_i| if the minus signs are odd and the cheapest one
    must flip. The larger wins. On a tie (x = 0, the middle of two roots) one of the nearest is given. Scale of x
    does not matter.
    """
    size = x.abs()
    minus = (x < 0).long()
    top, where = size.topk(2, dim=-1)
    odd = minus.sum(-1) % 2
    least, cheapest = size.min(-1)
    half = size.sum(-1) / 2 - odd * least

    first, last = where.amin(-1), where.amax(-1)
    pair = first * (15 - first) // 2 + last - first - 1  # rank of (first, last) in dictionary order
    sign = 2 * minus.gather(-1, first.unsqueeze(-1)) + minus.gather(-1, last.unsqueeze(-1))
    flipped = minus.scatter_add(-1, cheapest.unsqueeze(-1), odd.unsqueeze(-1)) % 2
    code = (flipped[..., :7] << torch.arange(7, device=x.device)).sum(-1)
    return torch.where(top.sum(-1) >= half, 4 * pair + sign.squeeze(-1), _PAIRS + code)


@dataclass(frozen=True)
class Match:
    """Addresses of K fitted centres: rotation @ centre_k lies near root roots[k]."""

    roots: NDArray[np.int64]  # (K,), distinct
    rotation: NDArray[np.float64]  # (8, 8), orthogonal, det +1 or -1
    angles_rad: NDArray[np.float64]  # (K,), between each turned centre and its root

    @property
    def residual_rad(self) -> float:
        """Root mean square of the angles: 0 when the centres are arranged like roots."""
        return float(np.sqrt(np.mean(self.angles_rad**2)))


def match_roots(centres: ArrayLike, among: ArrayLike | None = None, starts: int | None = None, seed: int = 0) -> Match:
    """Gives each of K centres (K, 8) on S^7 a root of its own, under the best common rotation.

    Maximises sum_k <R c_k, r_pi(k)> over orthogonal R and one-to-one pi by turns: the assignment for a fixed R
    (Hungarian; Kuhn 1955), the rotation for a fixed pi (Procrustes; Schonemann 1966). Each turn can only gain, so it
    ends, at a local optimum: the best of `starts` is kept, the identity and seeded random rotations (default
    16384 / K of them, 0.2 to 0.5 s). `among` limits the choice to some indices, such as `simple_indices()` for one
    root per role. How well an arrangement fits is `residual_rad`, to be read beside its null: random centres leave
    about 14 degrees at K = 8, 27 at K = 64 and 33 at K = 240.
    """
    from scipy.optimize import linear_sum_assignment

    found = np.asarray(centres, dtype=np.float64)
    choice = np.arange(240) if among is None else np.unique(np.asarray(among, dtype=np.int64))
    if found.ndim != 2 or found.shape[1] != 8 or not 1 <= len(found) <= len(choice):
        raise ConfigError(f"centres of shape {found.shape}: 1 to {len(choice)} rows of 8 coordinates can be matched")
    length = np.linalg.norm(found, axis=1, keepdims=True)
    if not np.all(np.isfinite(length) & (length > 0)):
        raise ConfigError(f"centre {int(np.argmin(np.isfinite(length) & (length > 0)))}: must be finite and not zero")
    found = found / length
    target = roots()[choice] / np.sqrt(2)
    draw = np.random.default_rng(seed)
    starts = 16384 // len(found) if starts is None else starts
    best_gain, best_rotation, best_pick = -np.inf, np.eye(8), np.arange(len(found))
    for start in range(starts):
        rotation = np.eye(8) if start == 0 else np.linalg.qr(draw.standard_normal((8, 8)))[0]
        gain, before = 0.0, -np.inf
        while gain > before + 1e-12:
            pick = linear_sum_assignment(found @ rotation.T @ target.T, maximize=True)[1]
            left, stretch, right = np.linalg.svd(target[pick].T @ found)
            rotation, before, gain = left @ right, gain, float(stretch.sum())
        if gain > best_gain + 1e-12:
            best_gain, best_rotation, best_pick = gain, rotation, pick
    turned, root = found @ best_rotation.T, target[best_pick]
    apart = 2 * np.arctan2(np.linalg.norm(turned - root, axis=1), np.linalg.norm(turned + root, axis=1))
    return Match(choice[best_pick], best_rotation, apart)


def _frozen(table: NDArray) -> NDArray:
    table.setflags(write=False)
    return table
