"""A preconditioner on disk: precond.npz, whole in itself, and precond.json beside it for readers.

Arrays by parameter number i: curvature.i, stderr.i, lr.i and, of an average, second.i and fourth.i; `meta` is the
text of the JSON: kind and unit, each block's exponent, floors and clips, probes and seed, the layout with its hash,
and a checksum of all arrays. `lr` are the very rates of the next step, so a trace can be replayed from them.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from constellation.errors import ArtifactError, ConfigError
from constellation.optim.curvature import UNITS
from constellation.optim.natural import NaturalOptimizer, state_like
from constellation.storage.atomic import write_bytes, write_json

SCHEMA = 1
SETTINGS = (
    "exponent", "damping", "floor", "trust", "lr", "lr_min", "lr_max", "refresh", "smooth", "probes", "seed",
)  # fmt: skip


class Scaled(NaturalOptimizer):
    """What of an optimizer is saved: per parameter a curvature, its standard error, and the rate that follows."""

    def learning_rates(self) -> list[torch.Tensor]:
        """lr_i of every parameter in order."""
        raise NotImplementedError

    def held(self, group: dict[str, Any], params: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(curvature, standard error) of `params`."""
        raise NotImplementedError

    def rescale(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        """The rates of `params` from the curvature that is held."""
        raise NotImplementedError


def save(optimizer: Scaled, path: str | Path) -> Path:
    """Write `path`, an .npz, or precond.npz in the folder `path`; ConfigError before the first look."""
    path = _file(path)
    arrays: dict[str, np.ndarray] = {}
    looks: list[int] = []
    rates = iter(optimizer.learning_rates())
    for group in optimizer.param_groups:
        for p in group["params"]:
            s = optimizer.state.get(p, {})
            if "scale" not in s:
                raise ConfigError("save_preconditioner: a parameter has no curvature yet; take a step first")
            ((curvature, stderr),) = optimizer.held(group, [p])
            held = {"curvature": curvature, "stderr": stderr, "lr": next(rates)}
            held |= {name: s[name] for name in _names(group)}
            arrays |= {f"{name}.{len(looks)}": t.detach().cpu().numpy() for name, t in held.items()}
            looks.append(int(s["looks"]))
    layout = layout_of(optimizer)
    meta = {
        "schema": SCHEMA,
        "blocks": [_block(group) for group in optimizer.param_groups],
        "looks": looks,
        "layout": layout,
        "layout_sha256": hashlib.sha256(json.dumps(layout).encode()).hexdigest(),
        "arrays_sha256": _checksum(arrays),
    }
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8), **arrays)
    write_bytes(path, buffer.getvalue())
    write_json(path.with_suffix(".json"), meta)
    return path


def load(optimizer: Scaled, path: str | Path) -> None:
    """The inverse of `save`; ArtifactError where the file is damaged or foreign, the optimizer then unchanged."""
    path = _file(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        meta = json.loads(arrays.pop("meta").tobytes())
        if meta["schema"] != SCHEMA:
            raise ArtifactError(f"{path}: schema {meta['schema']!r}, this version reads {SCHEMA}")
        intact = _checksum(arrays) == meta["arrays_sha256"]
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing") from None
    except ArtifactError:
        raise
    except Exception as error:  # whatever the parsers of zip, numpy and JSON make of a damaged file
        raise ArtifactError(f"{path} is damaged: {error}; save it anew") from None
    if not intact:
        raise ArtifactError(f"{path} is damaged: its checksum differs; save it anew")
    ours, theirs = layout_of(optimizer), meta["layout"]
    if ours != theirs:
        odd = next((pair for pair in zip(theirs, ours, strict=False) if pair[0] != pair[1]), (len(theirs), len(ours)))
        raise ArtifactError(f"{path} belongs to other parameters: it has {odd[0]}, this optimizer {odd[1]}")
    for block, (saved, group) in enumerate(zip(meta["blocks"], optimizer.param_groups, strict=True)):
        if saved["kind"] != group["source"]:
            raise ArtifactError(f"{path}: block {block} holds {saved['kind']}, this optimizer wants {group['source']}")
    i = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            s = optimizer.state[p]
            s.setdefault("step", torch.zeros((), dtype=torch.float32))
            s["looks"] = torch.tensor(float(meta["looks"][i]))
            s |= {name: torch.from_numpy(arrays[f"{name}.{i}"]).to(state_like(p), copy=True) for name in _names(group)}
            i += 1
        if group["params"]:
            optimizer.rescale(group, group["params"])


def layout_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Name, block, shape and dtype of every parameter in order; numbers where the optimizer was given no names."""
    return [
        {"name": name, "block": block, "shape": list(p.shape), "dtype": str(p.dtype)}
        for block, group in enumerate(optimizer.param_groups)
        for name, p in zip(
            group.get("param_names") or map(str, range(len(group["params"]))), group["params"], strict=True
        )
    ]


def _block(group: dict[str, Any]) -> dict[str, Any]:
    """Kind, unit and settings of a group; null for no upper clip, which JSON cannot say."""
    settings = {name: float(group[name]) for name in SETTINGS}
    kind = {"kind": group["source"], "units": UNITS[group["source"]]}
    return kind | {name: value if value < math.inf else None for name, value in settings.items()}


def _names(group: dict[str, Any]) -> tuple[str, str]:
    """The state that is the curvature."""
    return ("second", "fourth") if group["source"] == "ema_grad2" else ("curvature", "stderr")


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".npz" else path / "precond.npz"


def _checksum(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape} ".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
