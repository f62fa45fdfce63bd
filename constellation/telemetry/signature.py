"""Basin signature: a model in 2 to 4 KB, by where its predictions lie and along which directions they vary.

A prediction's basin is its mass in 64 bins of the next byte, a point of the 63-simplex. On a probe set in classes:

    means        Frechet mean basin of each class, square roots (C, 64)
    spectrum     the 32 largest variances of Log at the mean of all, rad^2
    directions   the 8 leading tangent directions, each times the root of its variance (8, 64)
    regimes      share of the classes in which phi is linear, geometric, breakdown (3,)

as float16, with the hash of the probe set, the seed of the training, a version and a checksum. Two are as far apart as

    d(a, b) = sqrt(mean_c d_FR(mean_c)^2 + |B_a - B_b|^2)        radians; B the covariance of rank 8, in rad^2 per rad

0 for equal ones. Only signatures of the same version are compared, and of the same probe set unless it is said that
halves of one are meant. A signature says which model it is only as well as `constellation signature` finds: its AUROC.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from constellation.errors import ArtifactError, ConfigError
from constellation.geometry import sphere

VERSION = 1
BINS, SPECTRUM, DIRECTIONS = 64, 32, 8
SMALLEST, LARGEST = 1024, 4096  # bytes
MOST_CLASSES = 16
CHECKSUM = 16  # bytes of sha256


@dataclass(frozen=True)
class Signature:
    """What one model looks like on one probe set."""

    probe: str  # hash of the probe set
    classes: tuple[str, ...]
    means_CB: NDArray[np.float16]
    spectrum: NDArray[np.float16]
    directions: NDArray[np.float16]
    regimes: tuple[float, float, float]
    seed: int

    def to_bytes(self) -> bytes:
        """At most 4 KB: msgpack, then 16 bytes of its sha256."""
        body = msgspec.msgpack.encode({
            "version": VERSION, "probe": self.probe, "classes": self.classes, "seed": self.seed,
            "means": self.means_CB.tobytes(), "spectrum": self.spectrum.tobytes(),
            "directions": self.directions.tobytes(), "regimes": self.regimes,
        })  # fmt: skip
        return body + hashlib.sha256(body).digest()[:CHECKSUM]

    @classmethod
    def from_bytes(cls, data: bytes) -> Signature:
        """ArtifactError for one that is damaged, or of another version."""
        body, checksum = data[:-CHECKSUM], data[-CHECKSUM:]
        if hashlib.sha256(body).digest()[:CHECKSUM] != checksum:
            raise ArtifactError(
                "the signature is damaged (its checksum differs); make it anew: constellation signature"
            )
        page = msgspec.msgpack.decode(body)
        if page["version"] != VERSION:
            raise ArtifactError(f"the signature is of version {page['version']}, this program reads {VERSION}")
        means, spectrum, directions = (
            np.frombuffer(page[name], np.float16) for name in ("means", "spectrum", "directions")
        )
        return cls(
            page["probe"], tuple(page["classes"]), means.reshape(-1, BINS), spectrum, directions.reshape(-1, BINS),
            tuple(page["regimes"]), page["seed"],
        )  # fmt: skip


def signature(
    basins: Sequence[Tensor], classes: Sequence[str], probe: str, regimes: Sequence[str], seed: int
) -> Signature:
    """Of the basins (N_c, 64) of each class; ConfigError for an empty class, too few basins or too many classes."""
    if not basins or any(len(b) == 0 for b in basins):
        raise ConfigError("signature: the probe set is empty, or one of its classes is; every class needs text")
    if len(basins) > MOST_CLASSES:
        raise ConfigError(f"signature: {len(basins)} classes, at most {MOST_CLASSES} fit; group the probe set")
    total = sum(len(b) for b in basins)
    if total < BINS + 2:
        raise ConfigError(f"signature: {total} predictions are too few, at least {BINS + 2} are needed")
    roots = [b.double().sqrt() for b in basins]
    means = [sphere.mean(r).point for r in roots]
    everything = torch.cat(roots)
    centre = sphere.mean(everything).point
    v_NB = sphere.log(centre, everything)
    values, vectors = torch.linalg.eigh(v_NB.mT @ v_NB / len(v_NB))
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    leading = (vectors * values.sqrt())[:, :DIRECTIONS].mT
    histogram = tuple(sum(r == name for r in regimes) / max(1, len(regimes))
                      for name in ("linear", "geometric", "breakdown"))  # fmt: skip
    return Signature(
        probe, tuple(classes), torch.stack(means).numpy().astype(np.float16),
        values[:SPECTRUM].numpy().astype(np.float16), leading.numpy().astype(np.float16),
        (histogram[0], histogram[1], histogram[2]), seed,
    )  # fmt: skip


def separation(a: Signature, b: Signature, halves: bool = False) -> float:
    """d(a, b) of the module's text; ConfigError for signatures of different probe sets, unless they are `halves`."""
    if a.classes != b.classes or (a.probe != b.probe and not halves):
        raise ConfigError(
            f"these signatures are of different probe sets ({a.probe}, {b.probe}); make both on the same one"
        )
    ma, mb = (torch.from_numpy(s.means_CB.astype(np.float64)) for s in (a, b))
    far = 2 * sphere.angle(sphere.normalise(ma), sphere.normalise(mb))
    ba, bb = (s.directions.astype(np.float64).T @ s.directions.astype(np.float64) for s in (a, b))
    return math.sqrt(float(far.square().mean()) + float(np.square(ba - bb).sum()))
