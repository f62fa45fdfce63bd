"""The token ranges that each role reads: <role>.npy, (S, 2) int64, and segments.json, their sizes and checksums.

segments.json is written last, so ranges are there when it is. An older one holds the sizes alone.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from constellation.errors import ArtifactError
from constellation.storage.atomic import read_object, write_bytes, write_json

LISTING = "segments.json"


def write(folder: Path, ranges: Mapping[str, NDArray[np.int64]]) -> None:
    listing = {}
    for role, own in ranges.items():
        buffer = io.BytesIO()
        np.save(buffer, own, allow_pickle=False)
        write_bytes(folder / f"{role}.npy", buffer.getvalue())
        listing[role] = {"tokens": _tokens(own), "sha256": hashlib.sha256(buffer.getvalue()).hexdigest()}
    write_json(folder / LISTING, listing, sealed=True)


def read(file: Path) -> NDArray[np.int64]:
    """The ranges in `file`, <role>.npy; ArtifactError when they are not those that the listing beside it names."""
    listing = file.with_name(LISTING)
    said = read_object(listing).get(file.stem)
    wanted = said if isinstance(said, dict) else {"tokens": said}
    try:
        data = file.read_bytes()
        own = np.load(io.BytesIO(data), allow_pickle=False)
        digest = hashlib.sha256(data).hexdigest()
        whole = own.dtype == np.int64 and own.ndim == 2 and wanted["tokens"] == _tokens(own)
        whole = whole and wanted.get("sha256", digest) == digest
    except (OSError, ValueError, KeyError, IndexError, EOFError, SyntaxError):
        whole = False
    if not whole:
        raise ArtifactError(
            f"{file} is missing or damaged (checksum differs); delete {listing}, --resume writes it anew"
        )
    return own


def _tokens(own: NDArray[np.int64]) -> int:
    return int((own[:, 1] - own[:, 0]).sum())
