"""Fitting the router: from training texts to centres, addresses and a calibrated posterior.

    texts -> random-length prefixes -> x = sqrt(p) -> Karcher mean m -> log map -> 64 principal directions -> chart u
          -> balanced spherical k-means (several starts) -> balanced EM on the running text, the best start kept
          -> beginnings count for where their text goes
          -> E8 addresses and roles -> temperatures on validation text -> log pi for equal loads -> abstention distance

Torch and the geometry are used here only; routing is numpy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from constellation import config, roster
from constellation.errors import ConfigError, DataError
from constellation.geometry import e8, sphere
from router.decide import counts
from router.decide.calibrate import abstention, calibrate
from router.decide.clustering import SAMPLE_BYTES, anticipate, pool, refine, sample, spherical, window_weights
from router.decide.fisher_rao import CHART, Calibration, FisherRaoRouter, corpus_mean, log_ratio
from router.decide.partition import balanced

STARTS = 5  # k-means starts that are refined, the best division kept; two above 32 kernels
_TABLE = 1 << 23  # entries of a score table, at most: many kernels read fewer windows
_PREFIXES = 4096  # random-length prefixes, at least one of every section while they last
_GEODESIC = 2048  # of them, for the Karcher mean and the principal directions


def fit(
    texts: Sequence[bytes],
    settings: config.Router,
    *,
    seed: int,
    names: Sequence[str] = roster.ROLES,
    validation: Sequence[bytes],
) -> FisherRaoRouter:
    """A router of `len(names)` kernels for text like `texts`; temperatures come from `validation`.

    Kernels of the roster get their own roots, others distinct roots among the 240. Same input, same
    router, bit for bit (on one machine).
    """  # fmt: skip
    k, rng = len(names), np.random.default_rng(seed)
    _check(texts, settings, names)
    texts = sample(texts, min(SAMPLE_BYTES, _TABLE // k * settings.every), rng)
    cut = counts.windows(texts, settings.every, settings.bins)
    matrix_WB = cut.matrix(settings.bins)
    total_B = window_weights(cut) @ matrix_WB
    pseudo_B = settings.smoothing * corpus_mean(total_B)

    some = prefixes(texts, settings, rng)
    matrix_PB = counts.count(some, settings.bins)
    weight_P = np.array([len(prefix) for prefix in some], dtype=np.float64)
    tangent = _tangent_space(matrix_PB, pseudo_B, settings.dims, rng)
    chart_P8 = _chart(tangent.coordinates(matrix_PB, pseudo_B), tangent.spread)

    starts = []
    for _ in range(1 if k == 1 else STARTS if k <= 32 else 2):
        label_P = spherical(chart_P8, weight_P, k, rng)
        starts.append(refine(matrix_WB, cut, pool(matrix_PB, label_P, k), pseudo_B))
    division = max(starts, key=lambda start: start.gain_nats)
    horizon = -(-settings.max_prefix // settings.every)
    counts_KB = anticipate(matrix_WB, cut, division.counts_KB, pseudo_B, horizon)

    centres, charts = _centres(counts_KB, matrix_PB, weight_P, pseudo_B, tangent, chart_P8)
    order, roots = _addresses(charts, names, seed)
    router = FisherRaoRouter(
        names=tuple(names),
        config=settings,
        calibration=Calibration(1.0, 0.0, 1.0, 0.0, 0.0, 0.0),
        kernel_counts=counts_KB[order],
        mean=tangent.mean,
        directions=tangent.directions,
        spread=tangent.spread,
        centres=centres[order],
        charts=charts[order],
        roots=roots,
        log_prior=np.full(k, -np.log(k)),
        limit_bytes=np.array([1.0]),
        limit_rad=np.array([np.pi]),
    )
    router = dataclasses.replace(router, calibration=calibrate(router, validation))
    router = balanced(router, texts, settings.every)
    limit_bytes, limit_rad = abstention(router, texts, rng)
    return dataclasses.replace(router, limit_bytes=limit_bytes, limit_rad=limit_rad)


class _Tangent(NamedTuple):
    """The tangent space at the Karcher mean."""

    mean: NDArray[np.float64]  # (B,)
    directions: NDArray[np.float64]  # (n, B)
    spread: NDArray[np.float64]  # (n,)

    def coordinates(self, matrix_PB: sparse.csr_matrix, pseudo_B: NDArray[np.float64]) -> NDArray[np.float64]:
        """z, (P, n)."""
        m = torch.from_numpy(self.mean)
        found = []
        for begin in range(0, matrix_PB.shape[0], _GEODESIC):
            points = _points(matrix_PB[begin : begin + _GEODESIC], pseudo_B)
            found.append(sphere.log(m, points).numpy() @ self.directions.T)
        return np.concatenate(found)


def _tangent_space(
    matrix_PB: sparse.csr_matrix, pseudo_B: NDArray[np.float64], dims: int, rng: np.random.Generator
) -> _Tangent:
    some = rng.permutation(matrix_PB.shape[0])[:_GEODESIC]
    points = _points(matrix_PB[np.sort(some)], pseudo_B)
    m = sphere.mean(points).point
    found = sphere.principal_directions(sphere.log(m, points), dims)
    return _Tangent(m.numpy(), found.directions.numpy(), found.variance.sqrt().numpy())


def _points(matrix_PB: sparse.csr_matrix, pseudo_B: NDArray[np.float64]) -> torch.Tensor:
    """x = sqrt((h + mu p0) / (n + mu)), (P, B)."""
    smooth = matrix_PB.toarray() + pseudo_B
    return torch.from_numpy(np.sqrt(smooth / smooth.sum(axis=1, keepdims=True)))


def _chart(z_Pn: NDArray[np.float64], spread: NDArray[np.float64]) -> NDArray[np.float64]:
    """u, (P, 8): leading coordinates whitened and normalised; a direction without spread counts nothing."""
    white = z_Pn[:, :CHART] / np.where(spread[:CHART] > 0, spread[:CHART], np.inf)
    return sphere.normalise(torch.from_numpy(white)).numpy()


def _centres(
    counts_KB: NDArray[np.int64],
    matrix_PB: sparse.csr_matrix,
    weight_P: NDArray[np.float64],
    pseudo_B: NDArray[np.float64],
    tangent: _Tangent,
    chart_P8: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Frechet mean of each kernel's prefixes in tangent coordinates, (K, n), and its place in the chart, (K, 8).

    A kernel that no prefix goes to (there may be more kernels than kinds of beginning) takes the point of its text.
    """  # fmt: skip
    label_P = (matrix_PB @ log_ratio(counts_KB, pseudo_B).T).argmax(axis=1)
    m = torch.from_numpy(tangent.mean)
    centres, charts = [], []
    for k in range(len(counts_KB)):
        mine = np.flatnonzero(label_P == k)
        if len(mine):
            weight = torch.from_numpy(weight_P[mine])
            point = sphere.mean(_points(matrix_PB[mine], pseudo_B), weight, tolerance=1e-9).point
            chart = weight_P[mine] @ chart_P8[mine]
        else:
            point = _points(sparse.csr_matrix(counts_KB[k : k + 1].astype(np.float64)), pseudo_B)[0]
            chart = np.zeros(CHART)
        centre = sphere.log(m, point).numpy() @ tangent.directions.T
        if not np.linalg.norm(chart) > 0:
            chart = _chart(centre[None], tangent.spread)[0]
        centres.append(centre)
        charts.append(chart / max(float(np.linalg.norm(chart)), 1e-300))
    return np.array(centres), np.array(charts)


def _addresses(
    charts: NDArray[np.float64], names: Sequence[str], seed: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Which cluster each name gets, (K,), and the names' roots, (K, 8).

    Kernels of the roster keep their roots: Procrustes and assignment decide which cluster is HEART. Other names take
    what the match gives them.
    """
    known = all(map(roster.is_kernel, names))
    among = np.array([roster.root_index(name) for name in names]) if known else None
    placed = np.where(np.linalg.norm(charts, axis=1, keepdims=True) > 0, charts, np.eye(CHART)[0])
    found = e8.match_roots(placed, among=among, seed=seed)
    if among is None:
        return np.arange(len(names)), e8.roots()[found.roots]
    order = np.array([int(np.flatnonzero(found.roots == root)[0]) for root in among])
    return order, e8.roots()[among]


def prefixes(texts: Sequence[bytes], settings: config.Router, rng: np.random.Generator) -> list[bytes]:
    """Random-length prefixes, log-uniform in bytes. A long text counts as several that begin 8 longest prefixes apart,
    or a corpus of a few books would be known by its title pages alone."""
    apart = 8 * settings.max_prefix
    begins = [(i, b) for i, text in enumerate(texts) for b in range(0, max(len(text) - settings.min_prefix, 1), apart)]
    chosen = [begins[j] for j in rng.permutation(len(begins))[:_PREFIXES].tolist()]
    each = max(1, _PREFIXES // len(chosen))
    low, high = np.log(settings.min_prefix), np.log(settings.max_prefix)
    sizes = np.rint(np.exp(rng.uniform(low, high, (len(chosen), each)))).astype(int).tolist()
    return [texts[i][b : b + size] for (i, b), some in zip(chosen, sizes) for size in some]


def _check(texts: Sequence[bytes], settings: config.Router, names: Sequence[str]) -> None:
    if not 1 <= len(names) <= 240 or len(set(names)) < len(names):
        raise ConfigError(f"{len(names)} kernels: 1 to 240 distinct names are possible, one E8 root each")
    if settings.dims < CHART:
        raise ConfigError(f"router.dims={settings.dims}: must be at least {CHART}, the dimension of E8")
    if not 64 <= settings.bins <= 65_536:
        raise ConfigError(f"router.bins={settings.bins}: must lie in 64..65536")
    if settings.min_prefix < counts.SPAN:
        raise ConfigError(f"router.min_prefix={settings.min_prefix}: must be at least {counts.SPAN}, one trigram")
    usable = sum(max(1, len(t) // (8 * settings.max_prefix)) for t in texts if len(t) >= settings.min_prefix)
    if usable < len(names):
        raise DataError(
            f"the router needs at least {len(names)} texts of {settings.min_prefix} bytes for {len(names)} kernels, "
            f"there are {usable}: give a larger corpus"
        )
