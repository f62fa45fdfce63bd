"""The Fisher-Rao router: byte counts -> point on the sphere -> scores -> who answers. numpy only, no torch.

A text with trigram counts h, n in all, is the point x = sqrt(p), p = (h + mu p0) / (n + mu), of the Fisher-Rao sphere.

    frame    [C, X] = sum_b sqrt(h_b + mu p0_b) [m_b, V_b]      65 numbers: x sqrt(n + mu) along m and 64 directions
    basin    cos theta = C / sqrt(n + mu),   z = (theta / sin theta) X / sqrt(n + mu)        tangent coordinates at m
    chart    u = (z_1..8 / spread_1..8), normalised                                          a point of S^7
    KL       L_k = sum_b h_b log (P_kb / p0_b) = n (KL(h/n || p0) - KL(h/n || P_k))
    score    s_k = w beta(n) <u, c_k> + (1 - w) gamma(n) L_k + log pi_k;  posterior = softmax(s)

2 KL -> d_FR^2 locally (Rao 1945), so both scores read the same geometry. One new trigram changes one h_b, hence one
term of the frame and one of L: O(64) + O(K) a byte (stream.py).

**The sums are exact.** sqrt(.), m, V and log P are rounded to multiples of 2^-20, 2^-22 and 2^-24 when the tables are
built; with fewer than 2^22 trigrams every partial sum then fits the 53 bits of a double. Integer-like addition has no
order, so stream = trajectory = whole text, batch = single, and resumed = uninterrupted, bit for bit, on any machine's
matrix product. The price is 1e-7 rad in z.

Shapes: P looks, K kernels, B bins, n basin coordinates, F = 1 + n.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from constellation import config
from constellation.errors import ArtifactError
from constellation.storage import array_file
from constellation.storage.atomic import read_object
from router.decide import counts
from router.decide.policy import ABSTAINED, RouteChoice, Trajectory, even, kernel_name, look_often_at_first

KIND = "router"
INTEGRATION = "integration.json"  # beside the router: {"phi": {kernel: phi}}
CHART = 8  # coordinates of u: E8 lives in R^8
NEIGHBOURS = 8  # kernels a RouteChoice names at most
SHORT_BYTES = 128  # the blend has one weight below, one from here on
_ROOT, _FRAME, _LOG = 2.0**20, 2.0**22, 2.0**24  # grids of the exact sums
_PIECE = 1 << 20  # bytes of text, or entries of a table, in the air at once


@dataclass(frozen=True)
class Calibration:
    """How far each score is believed, fitted on held-out text (fit.py). n trigrams; factors are x (n / 126)^slope."""

    kl_scale: float  # gamma at 126 trigrams (128 bytes), posterior nats per nat
    kl_slope: float  # exponent; -1 would mean that a longer text adds nothing
    tangent_scale: float  # beta at 126 trigrams
    tangent_slope: float
    tangent_weight_short: float  # w below 128 bytes, [0, 1]
    tangent_weight_long: float  # w from 128 bytes on

    def gamma(self, n: NDArray[np.float64]) -> NDArray[np.float64]:
        return self.kl_scale * (np.maximum(n, 1) / (SHORT_BYTES - 2)) ** self.kl_slope

    def beta(self, n: NDArray[np.float64]) -> NDArray[np.float64]:
        return self.tangent_scale * (np.maximum(n, 1) / (SHORT_BYTES - 2)) ** self.tangent_slope

    def weight(self, n: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.where(n + 2 < SHORT_BYTES, self.tangent_weight_short, self.tangent_weight_long)


@dataclass(frozen=True, eq=False)
class Looks:
    """P looks at texts, judged."""

    n: NDArray[np.float64]  # (P,) trigrams counted
    z: NDArray[np.float64]  # (P, n) basin coordinates
    distances_rad: NDArray[np.float64]  # (P, K) d_FR to the centres, [0, pi]
    posterior: NDArray[np.float32]  # (P, K)
    too_short: NDArray[np.bool_]  # (P,)
    far: NDArray[np.bool_]  # (P,)
    unsure: NDArray[np.bool_]  # (P,)

    @property
    def abstain(self) -> NDArray[np.bool_]:
        return self.too_short | self.far | self.unsure


@dataclass(frozen=True, eq=False)
class FisherRaoRouter:
    """A fitted router (fit.fit); implements policy.Policy. Arrays are float64 unless said otherwise."""

    names: tuple[str, ...]  # K kernels
    config: config.Router
    calibration: Calibration
    kernel_counts: NDArray[
        np.int64
    ]  # (K, B) trigrams of each kernel's text, beginnings weighted; their sum is the corpus
    mean: NDArray[np.float64]  # (B,) m, Karcher mean of training prefixes, |m| = 1
    directions: NDArray[np.float64]  # (n, B) V, principal tangent directions at m; rows beyond the rank are zero
    spread: NDArray[np.float64]  # (n,) standard deviation along each, radians of the sphere
    centres: NDArray[np.float64]  # (K, n) Frechet mean of each kernel's texts, tangent coordinates at m
    charts: NDArray[np.float64]  # (K, 8) c_k, unit vectors: centres in the chart u
    roots: NDArray[np.float64]  # (K, 8) E8 addresses, norm^2 2, distinct
    log_prior: NDArray[np.float64]  # (K,) log pi_k, the balance of loads
    limit_bytes: NDArray[np.float64]  # (G,) rising: lengths at which the abstention distance is known
    limit_rad: NDArray[np.float64]  # (G,) and that distance
    integration: NDArray[np.float64] | None = None  # (K,) phi of the kernels, measured after they were trained

    # -- Policy ------------------------------------------------------------------------------------------------------

    def route(self, texts: Sequence[bytes]) -> list[RouteChoice]:
        """One choice per text, from all its bytes."""
        return [choice for some in _pieces(texts) for choice in self.choices(self.judge(*self.sums(some)))]

    def trajectories(self, texts: Sequence[bytes], every: int) -> list[Trajectory]:
        """The looks at each text, all bytes so far counted."""
        return [found for some in _pieces(texts) for found in look_often_at_first(self._evenly, some, every)]

    def rebalanced(self, log_shift: ArrayLike) -> FisherRaoRouter:
        """The same router with log pi shifted, (K,), and normalised again."""
        shifted = self.log_prior + np.asarray(log_shift, dtype=np.float64)
        return dataclasses.replace(self, log_prior=shifted - np.logaddexp.reduce(shifted))

    # -- from counts to looks ----------------------------------------------------------------------------------------

    def root_count(self, h: NDArray[Any], bins: NDArray[Any]) -> NDArray[np.float64]:
        """sqrt(h + mu p0) of the given bins on its grid: the only place where a count becomes a coordinate."""
        return np.rint(np.sqrt(h + self.pseudo[bins]) * _ROOT) / _ROOT

    def judge(self, n: NDArray[np.float64], frame_PF: NDArray[np.float64], log_PK: NDArray[np.float64]) -> Looks:
        """Looks from the three sums n, [C, X] and L. Row i depends on row i alone, bit for bit."""
        frame_PF = frame_PF / np.sqrt(n + self.config.smoothing)[:, None]
        cos = frame_PF[:, 0].clip(-1, 1)
        sin = np.sqrt(1 - cos * cos)
        z_Pn = frame_PF[:, 1:] * np.where(sin > 1e-8, np.arccos(cos) / np.maximum(sin, 1e-8), 1.0)[:, None]
        distance_PK = 2 * np.arccos(_rows(frame_PF, self._points_FK).clip(-1, 1))
        weight = self.calibration.weight(n)[:, None]
        score_PK = (1 - weight) * self.calibration.gamma(n)[:, None] * log_PK + self.log_prior
        if weight.any():
            score_PK += weight * self.calibration.beta(n)[:, None] * _rows(self.chart(z_Pn), self.charts.T)
        score_PK -= score_PK.max(axis=1, keepdims=True)
        posterior_PK = np.exp(score_PK)
        posterior_PK /= posterior_PK.sum(axis=1, keepdims=True)
        limit = np.interp(np.log(n + 2), self._log_limit_bytes, self.limit_rad)
        return Looks(
            n=n,
            z=z_Pn,
            distances_rad=distance_PK,
            posterior=posterior_PK.astype(np.float32),
            too_short=n + 2 < self.config.min_prefix,
            far=distance_PK.min(axis=1) > limit,
            unsure=posterior_PK.max(axis=1) < self.config.abstain_below,
        )

    def chart(self, z_Pn: NDArray[np.float64]) -> NDArray[np.float64]:
        """u, (P, 8) on S^7; zero for a text exactly at the mean."""
        u = z_Pn[:, :CHART] * _inverse(self.spread[:CHART])
        return u * _inverse(np.sqrt((u * u).sum(axis=1, keepdims=True)))

    def choices(self, seen: Looks) -> list[RouteChoice]:
        """Looks as records for people."""
        best, abstain = seen.posterior.argmax(axis=1).tolist(), seen.abstain.tolist()
        weight = self.calibration.weight(seen.n).tolist()
        z, distance = seen.z.astype(np.float32), seen.distances_rad.astype(np.float32)
        why = zip(seen.too_short.tolist(), seen.far.tolist(), seen.unsure.tolist(), strict=True)
        reasons = ["too short" if s else "far" if f else "low posterior" if u else "" for s, f, u in why]
        return [
            RouteChoice(
                kernel=kernel_name(self.names, index := ABSTAINED if abstain[i] else k),
                index=index,
                posterior=seen.posterior[i],
                z=z[i],
                distances_rad=distance[i],
                counts_used=int(seen.n[i]),
                abstained=abstain[i],
                reason=reasons[i],
                root=self._addresses[k],
                neighbours=self._neighbours[k],
                decided_by="kl" if weight[i] == 0 else "tangent" if weight[i] == 1 else "blend",
                tangent_weight=weight[i],
            )
            for i, k in enumerate(best)
        ]

    def sums(self, texts: Sequence[bytes]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """n (P,), [C, X] (P, F) and L (P, K) of whole texts."""
        h = counts.count(texts, self.config.bins)
        moved = h.copy()
        moved.data = self.root_count(h.data, h.indices) - self.root_count(np.zeros(1), h.indices)
        return np.asarray(h.sum(axis=1)).ravel(), moved @ self.frame + self.origin, h @ self.log_ratio

    def _evenly(self, texts: Sequence[bytes], every: int) -> list[Trajectory]:
        cut = counts.windows(texts, every, self.config.bins)
        before = np.concatenate([counts.ranks(part) for part in _per_text(cut)] or [np.zeros(0, np.int64)])
        moved = self.root_count(before + 1.0, cut.bins) - self.root_count(before, cut.bins)
        frame_WF = cut.running(cut.matrix(self.config.bins, moved) @ self.frame)
        log_WK = cut.running(cut.matrix(self.config.bins) @ self.log_ratio)
        n_W = cut.running(np.diff(cut.start).astype(np.float64))
        blind = self.judge(np.zeros(1), self.origin[None], np.zeros((1, len(self.names))))  # a look at nothing
        seen = self.judge(n_W, frame_WF + self.origin, log_WK)
        found = []
        for i, text in enumerate(texts):
            at = even(len(text), every)
            view, rows = (seen, slice(cut.first[i], cut.first[i] + len(at))) if len(text) else (blind, slice(0, 1))
            nearest = view.distances_rad[rows].min(axis=1).astype(np.float32)
            found.append(Trajectory(at, view.posterior[rows], nearest, view.abstain[rows]))
        return found

    # -- tables, built once ------------------------------------------------------------------------------------------

    @functools.cached_property
    def pseudo(self) -> NDArray[np.float64]:
        """mu p0, (B,): the corpus mean, half a count in every bin so that none is empty, as pseudo-counts."""
        return self.config.smoothing * corpus_mean(self.kernel_counts.sum(axis=0))

    @functools.cached_property
    def frame(self) -> NDArray[np.float64]:
        """[m, V^T], (B, F), on its grid."""
        return np.ascontiguousarray(np.rint(np.concatenate([self.mean[None], self.directions]).T * _FRAME) / _FRAME)

    @functools.cached_property
    def origin(self) -> NDArray[np.float64]:
        """Frame of the empty text, (F,)."""
        return self.root_count(np.zeros(1), np.arange(self.config.bins)) @ self.frame

    @functools.cached_property
    def log_ratio(self) -> NDArray[np.float64]:
        """log(P_kb / p0_b), (B, K), P_k = (counts + mu p0) / (sum + mu), on its grid."""
        return np.ascontiguousarray(np.rint(log_ratio(self.kernel_counts, self.pseudo).T * _LOG) / _LOG)

    @functools.cached_property
    def _points_FK(self) -> NDArray[np.float64]:
        """Centres as points of the sphere, exp_m(c_k), in the frame's coordinates, (F, K)."""
        length = np.sqrt((self.centres**2).sum(axis=1, keepdims=True))
        return np.concatenate([np.cos(length), np.sinc(length / np.pi) * self.centres], axis=1).T.copy()

    @functools.cached_property
    def _log_limit_bytes(self) -> NDArray[np.float64]:
        return np.log(self.limit_bytes)

    @functools.cached_property
    def _addresses(self) -> list[tuple[float, ...]]:
        return [tuple(row) for row in self.roots.tolist()]

    @functools.cached_property
    def _neighbours(self) -> list[tuple[str, ...]]:
        """Kernels whose roots lie at 60 degrees, then the others; each part by the angle between centres."""
        cos_KK = self.charts @ self.charts.T
        touching_KK = np.abs(self.roots @ self.roots.T - 1) < 1e-9
        order_KK = np.lexsort((-cos_KK, ~touching_KK), axis=1)
        return [tuple(self.names[j] for j in row if j != k)[:NEIGHBOURS] for k, row in enumerate(order_KK.tolist())]

    # -- on disk -----------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> str:
        """Writes arrays and JSON into `folder`, atomically; returns the content hash."""
        return array_file.write(Path(folder), KIND, self._header(), self._arrays())

    @classmethod
    def load(cls, folder: Path) -> FisherRaoRouter:
        """The router saved in `folder`; ArtifactError if it is damaged, foreign or of another schema."""
        header, arrays = array_file.read(Path(folder), KIND)
        try:
            found = cls(
                names=tuple(header["names"]),
                config=config.Router(**header["config"]),
                calibration=Calibration(**header["calibration"]),
                **arrays,
                integration=_integration(Path(folder), header["names"]),
            )
            k, b, n = len(found.names), found.config.bins, found.config.dims
            wanted = [(k, b), (b,), (n, b), (n,), (k, n), (k, CHART), (k, CHART), (k,)]
            if [array.shape for array in found._arrays().values()][: len(wanted)] != wanted:
                raise ValueError
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ArtifactError(f"{folder}: holds a router of another version; fit again") from None
        return found

    @functools.cached_property
    def hash(self) -> str:
        """Names this router in reports: SHA-256 over settings and arrays."""
        return array_file.content_hash(self._header(), self._arrays())

    def _header(self) -> dict[str, Any]:
        return {
            "names": list(self.names),
            "config": dataclasses.asdict(self.config),
            "calibration": dataclasses.asdict(self.calibration),
        }

    def _arrays(self) -> dict[str, NDArray]:
        skip = ("names", "config", "calibration", "integration")
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in skip}


def _integration(folder: Path, names: Sequence[str]) -> NDArray[np.float64] | None:
    """The kernels' phi from integration.json, which whoever measured them wrote; None without it."""
    file = folder / INTEGRATION
    if not file.exists():
        return None
    found = read_object(file).get("phi", {})
    if set(found) != set(names):
        raise ArtifactError(f"{file} is of other kernels; measure them again: constellation report RUN")
    return np.array([found[name] for name in names], np.float64)


def corpus_mean(total_B: NDArray[Any]) -> NDArray[np.float64]:
    """p0, (B,): relative counts with half a count added to each, so that no bin is impossible."""
    return (total_B + 0.5) / (total_B.sum() + 0.5 * len(total_B))


def log_ratio(counts_KB: NDArray[np.int64], pseudo_B: NDArray[np.float64]) -> NDArray[np.float64]:
    """log(P_kb / p0_b), (K, B), for P_k = (counts_k + mu p0) / (sum + mu); zero for a kernel without text."""
    mu = pseudo_B.sum()
    return np.log((counts_KB / pseudo_B * mu + mu) / (counts_KB.sum(axis=1, keepdims=True) + mu))


def _rows(a_PF: NDArray[np.float64], b_FK: NDArray[np.float64]) -> NDArray[np.float64]:
    """a @ b one row at a time (inside numpy): a product of all rows at once would round by the size of the batch."""
    return np.matmul(a_PF[:, None, :], b_FK)[:, 0]


def _inverse(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(1.0, x, out=np.zeros_like(x), where=x > 0)


def _per_text(cut: counts.Windows) -> Iterator[NDArray[np.int32]]:
    for begin, end in itertools.pairwise(cut.start[cut.first].tolist()):
        yield cut.bins[begin:end]


def _pieces(texts: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    """Runs of texts of about a mebibyte, so that memory does not grow with the corpus."""
    begin = held = 0
    for i, text in enumerate(texts):
        if held and held + len(text) > _PIECE:
            yield texts[begin:i]
            begin, held = i, 0
        held += len(text)
    if begin < len(texts):
        yield texts[begin:]
