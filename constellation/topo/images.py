"""Images with their official split: what is trained on, what is held out, and what may be wrong with them.

Shapes: x (M, C, H, W) uint8 or float32 in [0, 1], channels first whatever the file's order; y (M,) int64 or None.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from constellation.errors import DataError

HELD = 6  # every so-manieth image, at random, where a data set has no split of its own


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a data set."""

    x: NDArray[np.float32]
    y: NDArray[np.int64] | None

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True, eq=False)
class Images:
    """A data set; `official` where the split is its own."""

    name: str
    train: Split
    test: Split
    official: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H, W."""
        c, h, w = self.train.x.shape[1:]
        return int(c), int(h), int(w)

    @property
    def classes(self) -> int:
        """Number of classes, 0 without labels."""
        return (
            0
            if self.train.y is None
            else int(max(self.train.y.max(), 0 if self.test.y is None else self.test.y.max())) + 1
        )

    @property
    def digest(self) -> str:
        """16 hexadecimal digits over all pixels and labels: the same images are the same run."""
        found = hashlib.sha256()
        for part in (self.train.x, self.train.y, self.test.x, self.test.y):
            found.update(b"-" if part is None else f"{part.shape}".encode() + np.ascontiguousarray(part).tobytes())
        return found.hexdigest()[:16]


def channels_first(x: NDArray, where: str) -> NDArray:
    """(M, H, W), (M, H, W, C) or (M, C, H, W) as (M, C, H, W); C is 1 or 3. DataError for another shape."""
    if x.ndim == 2 and math.isqrt(x.shape[1]) ** 2 == x.shape[1]:
        side = math.isqrt(x.shape[1])
        return x.reshape(-1, 1, side, side)
    if x.ndim == 3:
        return x[:, None]
    if x.ndim == 4 and x.shape[1] in (1, 3):
        return x
    if x.ndim == 4 and x.shape[3] in (1, 3):
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    raise DataError(f"{where}: images of shape {x.shape}; (M, H, W), (M, H, W, C) or (M, C, H, W) are wanted, C 1 or 3")


def scaled(x: NDArray, where: str) -> NDArray[np.float32]:
    """Pixels in [0, 1]: whole numbers over 255, others as they are; DataError for NaN or another range."""
    if x.dtype == bool or np.issubdtype(x.dtype, np.integer):
        low, high = (int(x.min()), int(x.max())) if x.size else (0, 0)
        if low < 0 or high > 255:
            raise DataError(f"{where}: pixels from {low} to {high}; 0 to 255 are wanted")
        return np.asarray(x, np.float32) / (1.0 if x.dtype == bool else 255.0)
    if not np.issubdtype(x.dtype, np.floating):
        raise DataError(f"{where}: pixels of type {x.dtype}; numbers are wanted")
    bad = int((~np.isfinite(x)).sum())
    if bad:
        raise DataError(f"{where}: {bad} pixels are NaN or infinite; mend them first")
    if x.size and (x.min() < 0 or x.max() > 1):
        raise DataError(f"{where}: pixels from {x.min():g} to {x.max():g}; scale them to 0 to 1")
    return np.asarray(x, np.float32)


def labelled(x: NDArray, y: NDArray | None, where: str) -> Split:
    """Images and their labels, checked against each other."""
    images = scaled(channels_first(x, where), where)
    if not len(images):
        raise DataError(f"{where}: no image in it")
    if y is None:
        return Split(images, None)
    labels = np.asarray(y).reshape(-1)
    if len(labels) != len(images):
        raise DataError(f"{where}: {len(images)} images and {len(labels)} labels; one for each is wanted")
    if not np.issubdtype(labels.dtype, np.integer) or (labels < 0).any():
        raise DataError(f"{where}: labels must be whole numbers from 0 on, these are {labels.dtype}")
    return Split(images, labels.astype(np.int64))


def divided(name: str, whole: Split) -> Images:
    """Every sixth image held out, at random but always the same ones."""
    order = np.random.default_rng(0).permutation(len(whole))
    held = len(whole) // HELD
    if not held:
        raise DataError(f"{name}: {len(whole)} images; at least {HELD} are needed to hold one out")
    parts = [
        Split(whole.x[np.sort(part)], None if whole.y is None else whole.y[np.sort(part)])
        for part in (order[held:], order[:held])
    ]
    return Images(name, parts[0], parts[1], False)


def checked(images: Images, codes: int, supervised: bool) -> Images:
    """`images`, or a DataError where a model of so many codes cannot be trained on them."""
    x, name = images.train.x, images.name
    if images.test.x.shape[1:] != x.shape[1:]:
        raise DataError(f"{name}: training images are {x.shape[1:]}, held-out ones {images.test.x.shape[1:]}")
    if float(x.std()) == 0.0:
        raise DataError(f"{name}: every pixel is {x.flat[0]:g}; there is nothing to learn from constant images")
    if len(x) > 1 and float(np.abs(x - x[:1]).max()) == 0.0:
        raise DataError(f"{name}: all {len(x)} images are the same one; there is nothing to tell apart")
    if codes > len(x):
        raise DataError(
            f"{name}: {codes} codes for {len(x)} images; lower topo.model.charts or topo.model.codes, or add images"
        )
    if supervised:
        if images.train.y is None or images.test.y is None:
            raise DataError(
                f"{name}: topo.loss.supervised needs labels and there are none; set it to 0, or give labels"
            )
        if len(np.unique(images.train.y)) < 2:
            raise DataError(f"{name}: one class alone ({images.train.y[0]}); supervision needs two, or set it to 0")
    return images
