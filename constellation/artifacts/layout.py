"""Layout: which part of the flat vector theta is which parameter, so that a saved theta can be read without the model.

    [{"name", "shape", "dtype", "unit", "start", "stop", "hash"}]     theta[start:stop] in C order is the block

A block's hash is of its name, shape, type and unit, the layout's of all blocks: two runs whose layouts have the same
hash can be compared entry by entry.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from constellation.errors import ArtifactError

Blocks = Sequence[Mapping[str, Any]]


def layout_of(entries: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The layout of blocks that follow each other: name, shape, dtype, and a unit where it is not "1"."""
    blocks, start = [], 0
    for entry in entries:
        stop = start + math.prod(entry["shape"])
        own = {"unit": "1", **{k: entry[k] for k in ("name", "shape", "dtype", "unit") if k in entry}}
        blocks.append({**own, "shape": list(own["shape"]), "start": start, "stop": stop, "hash": _hash(own)})
        start = stop
    return blocks


def layout_hash(blocks: Blocks) -> str:
    """16 hexadecimal digits over all blocks, in order."""
    return hashlib.sha256("\n".join(str(block["hash"]) for block in blocks).encode()).hexdigest()[:16]


def cut(theta: NDArray[Any], blocks: Blocks) -> dict[str, NDArray[Any]]:
    """theta (..., P) as its blocks by name, (..., *shape), views; ArtifactError when P is not the layout's."""
    size = blocks[-1]["stop"] if blocks else 0
    if theta.shape[-1] != size:
        raise ArtifactError(f"theta has {theta.shape[-1]} entries, its layout {size}; they are of different runs")
    lead = theta.shape[:-1]
    return {b["name"]: theta[..., b["start"] : b["stop"]].reshape(*lead, *b["shape"]) for b in blocks}


def _hash(own: Mapping[str, Any]) -> str:
    said = json.dumps([own["name"], list(own["shape"]), own["dtype"], own["unit"]])
    return hashlib.sha256(said.encode()).hexdigest()[:16]
