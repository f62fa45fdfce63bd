"""A fitted policy on disk: arrays in one .npz, everything else in one JSON file that names it by content hash.

    folder/<kind>.json                    {"kind", "schema", "hash", "header": {...}}
    folder/<kind>-<hash, 16 digits>.npz   the arrays; never a pickle

The arrays are written first and the JSON last, each by rename, so a killed writer leaves the old policy or the new
one. The hash covers header and arrays; what does not match it is refused.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from constellation.errors import ArtifactError
from constellation.storage.atomic import write_bytes

SCHEMA = 1


def content_hash(header: Mapping[str, Any], arrays: Mapping[str, NDArray]) -> str:
    """SHA-256 over the header's canonical JSON and every array's name, type, shape and bytes; 64 hex digits."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.data if array.size else b"")
    return digest.hexdigest()


def write(folder: Path, kind: str, header: Mapping[str, Any], arrays: Mapping[str, NDArray]) -> str:
    """Saves and returns the hash; another policy of this kind in the folder is replaced."""
    digest = content_hash(header, arrays)
    held = io.BytesIO()
    np.savez(held, allow_pickle=False, **dict(arrays))
    name = f"{kind}-{digest[:16]}.npz"
    write_bytes(folder / name, held.getvalue())
    text = json.dumps({"kind": kind, "schema": SCHEMA, "hash": digest, "header": dict(header)}, indent=1)
    write_bytes(folder / f"{kind}.json", text.encode() + b"\n")
    for stale in folder.glob(f"{kind}-*.npz"):
        if stale.name != name:
            stale.unlink(missing_ok=True)
    return digest


def read(folder: Path, kind: str) -> tuple[dict[str, Any], dict[str, NDArray]]:
    """Header and arrays (read-only); ArtifactError unless they are exactly what was written."""
    page = folder / f"{kind}.json"
    try:
        top = json.loads(page.read_bytes())
        if not isinstance(top, dict) or top.get("kind") != kind:
            raise ArtifactError(f"{page}: is not a saved {kind}")
        if top.get("schema") != SCHEMA:
            raise ArtifactError(f"{page}: schema {top.get('schema')!r}, this version reads {SCHEMA}; fit again")
        digest, header = str(top["hash"]), dict(top["header"])
        with np.load(folder / f"{kind}-{digest[:16]}.npz", allow_pickle=False) as held:
            arrays = {name: held[name] for name in held.files}
    except FileNotFoundError as missing:
        raise ArtifactError(f"{missing.filename}: no such file; fit the router again") from None
    except ArtifactError:
        raise
    except Exception as broken:  # whatever the parsers of JSON, zip and numpy make of a damaged file
        raise ArtifactError(f"{page}: damaged ({type(broken).__name__}); fit the router again") from None
    if content_hash(header, arrays) != digest:
        raise ArtifactError(f"{page}: does not match its content hash; fit the router again")
    for array in arrays.values():
        array.setflags(write=False)
    return header, arrays
