"""Routers to compare with, in the same interface: tf-idf clusters, and chance.

`TfidfRouter` is that of c-BTM (Gururangan et al. 2023): tf-idf of words, truncated SVD, normalised, balanced k-means;
the posterior is softmax(-|x - c_k|^2 / T). Where we leave the paper, so that it can look again every W bytes like the
others: words are found in latin-1 (bytes), a word counts once the byte after it was seen, term frequencies are linear
(then the projection of a text is the sum of its windows'), and there is no stop-word list (code has other ones).
`RandomRouter` sends a text where a hash of its first bytes points.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from constellation.config import Router as Settings
from constellation.errors import ArtifactError, ConfigError
from constellation.roster import ROLES
from constellation.storage import array_file
from router.decide.clustering import SAMPLE_BYTES, sample, spherical
from router.decide.partition import balanced
from router.decide.policy import RouteChoice, Trajectory, even, look_often_at_first

KIND = "tfidf"
TERMS = 20_000  # words of highest document frequency
DIMS = 100  # of the SVD, as in the paper
TEMPERATURE = 0.1  # T, as in the paper
_WORD = re.compile(r"\w\w+")


@dataclass(frozen=True, eq=False)
class TfidfRouter:
    """c-BTM's router; implements policy.Policy. V terms, D dimensions, K kernels."""

    names: tuple[str, ...]
    config: Settings
    terms: tuple[str, ...]
    projection: NDArray[np.float64]  # (V, D) idf x SVD components
    centres: NDArray[np.float64]  # (K, D) unit vectors
    log_prior: NDArray[np.float64]  # (K,) for balance

    @classmethod
    def fit(
        cls,
        texts: Sequence[bytes],
        settings: Settings,
        *,
        seed: int,
        names: Sequence[str] = ROLES,
        validation: Sequence[bytes] = (),
    ) -> TfidfRouter:
        """c-BTM's router for text like `texts`, its clusters of whole documents; `validation` is not needed."""
        try:
            from sklearn.decomposition import TruncatedSVD
        except ImportError:
            raise ConfigError("the tf-idf router needs scikit-learn: pip install 'constellation[bench]'") from None
        rng = np.random.default_rng(seed)
        texts = sample(texts, SAMPLE_BYTES, rng)
        words = [Counter(_WORD.findall(text.decode("latin-1").lower())) for text in texts]
        documents = Counter(itertools.chain.from_iterable(words))
        terms = tuple(sorted(sorted(documents), key=documents.__getitem__, reverse=True)[:TERMS])
        if len(terms) <= len(names):
            raise ConfigError(f"the tf-idf router needs words, and these {len(texts)} texts have {len(terms)}")
        index = {term: i for i, term in enumerate(terms)}
        entries = [(i, index[w], c) for i, some in enumerate(words) for w, c in some.items() if w in index]
        rows, columns, counts = (np.array(part) for part in zip(*entries))
        frequency = np.bincount(columns, minlength=len(terms))
        inverse = np.log((1 + len(texts)) / (1 + frequency)) + 1
        weighted_NV = sparse.csr_matrix((counts * inverse[columns], (rows, columns)), shape=(len(texts), len(terms)))
        norm = np.sqrt(np.asarray(weighted_NV.multiply(weighted_NV).sum(axis=1)))
        svd = TruncatedSVD(min(DIMS, len(terms) - 1, len(texts)), random_state=seed)
        svd.fit(sparse.diags(1 / np.maximum(norm.ravel(), 1e-300)) @ weighted_NV)
        point_ND = _unit(weighted_NV @ svd.components_.T)
        size_N = np.array([len(text) for text in texts], dtype=np.float64)
        label_N = max(
            (spherical(point_ND, size_N, len(names), rng) for _ in range(5)),
            key=lambda label: float(np.linalg.norm(_sums(point_ND, size_N, label, len(names)), axis=1).sum()),
        )
        centres = _unit(_sums(point_ND, size_N, label_N, len(names)))
        fitted = cls(tuple(names), settings, terms, inverse[:, None] * svd.components_.T, centres, np.zeros(len(names)))
        return balanced(fitted, texts, settings.every)

    def route(self, texts: Sequence[bytes]) -> list[RouteChoice]:
        return [
            _choice(self.names, t.posterior[-1], bool(t.abstain[-1]), "too short", max(len(text) - 2, 0), "tfidf")
            for text in texts
            for t in self._evenly([text], max(len(text), 1))
        ]

    def trajectories(self, texts: Sequence[bytes], every: int) -> list[Trajectory]:
        return look_often_at_first(self._evenly, texts, every)

    def _evenly(self, texts: Sequence[bytes], every: int) -> list[Trajectory]:
        found = []
        for text in texts:
            at = even(len(text), every)
            rows, columns = [], []
            for word in _WORD.finditer(text.decode("latin-1").lower()):
                term = self._index.get(word.group())
                if term is not None and word.end() < at[-1]:  # seen by the first look after the byte that ends it
                    rows.append(word.end() // every)
                    columns.append(term)
            counts = sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(at), len(self.terms)))
            found.append(self._judge(at, np.cumsum(counts @ self.projection, axis=0)))
        return found

    def rebalanced(self, log_shift: ArrayLike) -> TfidfRouter:
        return dataclasses.replace(self, log_prior=self.log_prior + np.asarray(log_shift, dtype=np.float64))

    def _judge(self, at: NDArray[np.int64], sum_PD: NDArray[np.float64]) -> Trajectory:
        score_PK = 2 * _unit(sum_PD) @ self.centres.T / TEMPERATURE + self.log_prior
        posterior_PK = np.exp(score_PK - np.logaddexp.reduce(score_PK, axis=1, keepdims=True)).astype(np.float32)
        return Trajectory(at, posterior_PK, np.full(len(at), np.nan, np.float32), at < self.config.min_prefix)

    @functools.cached_property
    def _index(self) -> dict[str, int]:
        return {term: i for i, term in enumerate(self.terms)}

    def save(self, folder: Path) -> str:
        header = {"names": list(self.names), "config": dataclasses.asdict(self.config), "terms": list(self.terms)}
        arrays = {"projection": self.projection, "centres": self.centres, "log_prior": self.log_prior}
        return array_file.write(Path(folder), KIND, header, arrays)

    @classmethod
    def load(cls, folder: Path) -> TfidfRouter:
        header, arrays = array_file.read(Path(folder), KIND)
        try:
            settings = Settings(**header["config"])
            return cls(tuple(header["names"]), settings, tuple(header["terms"]), **arrays)
        except (KeyError, TypeError):
            raise ArtifactError(f"{folder}: holds a tf-idf router of another version; fit again") from None


@dataclass(frozen=True)
class RandomRouter:
    """Texts sent by chance: the kernel is a hash of the seed and a text's first 64 bytes (all, if shorter).

    It looks at even steps alone: of fewer bytes many texts share the same ones.
    """

    names: tuple[str, ...] = ROLES
    seed: int = 0

    def route(self, texts: Sequence[bytes]) -> list[RouteChoice]:
        return [
            _choice(self.names, self._posterior(text), False, "", max(len(text) - 2, 0), "random") for text in texts
        ]

    def trajectories(self, texts: Sequence[bytes], every: int) -> list[Trajectory]:
        found = []
        for text in texts:
            at = even(len(text), every)
            rows = np.stack([self._posterior(text[:b]) for b in np.minimum(at, 64).tolist()])
            found.append(Trajectory(at, rows, np.full(len(at), np.nan, np.float32), np.zeros(len(at), bool)))
        return found

    def _posterior(self, text: bytes) -> NDArray[np.float32]:
        digest = hashlib.blake2b(text[:64], digest_size=8, salt=self.seed.to_bytes(8, "little")).digest()
        return np.eye(len(self.names), dtype=np.float32)[int.from_bytes(digest, "little") % len(self.names)]


def _choice(
    names: Sequence[str], posterior: NDArray[np.float32], abstained: bool, reason: str, counts: int, how: str
) -> RouteChoice:
    best = int(posterior.argmax())
    order = np.argsort(-posterior, kind="stable").tolist()
    return RouteChoice(
        kernel="ocean" if abstained else names[best],
        index=-1 if abstained else best,
        posterior=posterior,
        z=np.zeros(0, np.float32),
        distances_rad=np.full(len(names), np.nan, np.float32),
        counts_used=counts,
        abstained=abstained,
        reason=reason if abstained else "",
        root=(),
        neighbours=tuple(names[k] for k in order if k != best),
        decided_by=how,
        tangent_weight=0.0,
    )


def _sums(point_ND: NDArray[Any], weight_N: NDArray[Any], label_N: NDArray[Any], k: int) -> NDArray[np.float64]:
    member_KN = sparse.csr_matrix((weight_N, (label_N, np.arange(len(label_N)))), shape=(k, len(label_N)))
    total: NDArray[np.float64] = member_KN @ point_ND
    return total


def _unit(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows of length 1; zero rows stay zero."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300)
