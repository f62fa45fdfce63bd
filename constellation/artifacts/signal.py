"""Signals: named arrays over the steps of a run, with unit, standard error and truth where there are any.

    signals.npz     derived from the trace (derive.py), and whatever else a researcher adds; what plots are drawn from
    curvature.npz   "curvature": values and stderr (R, P), a diagonal in the order of the layout; `about` has its kind
    grads.npz       "grads": (R, P), the gradient that the optimizer was given

One .npz a file: arrays i.values, i.step, i.stderr, i.truth of signal i, and `meta`, text of a JSON with schema, names,
units and a checksum over all arrays. It is replaced whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from constellation.errors import ArtifactError, ConfigError
from constellation.storage.atomic import write_bytes

SCHEMA = 1
_PARTS = ("values", "step", "stderr", "truth")


@dataclass(frozen=True)
class Signal:
    """`values` (R, ...) at `step` (R,), optimizer steps done; `truth` (...) or (R, ...) is what they should be."""

    values: NDArray[Any]
    step: NDArray[np.int64]
    unit: str = "1"
    stderr: NDArray[Any] | None = None  # of the values, their shape
    truth: NDArray[Any] | None = None
    meaning: str = ""

    def __post_init__(self) -> None:
        """ConfigError when the shapes do not go together."""
        shape = self.values.shape
        fits = len(shape) >= 1 and self.step.shape == shape[:1]
        fits = fits and (self.stderr is None or self.stderr.shape == shape)
        fits = fits and (self.truth is None or self.truth.shape in (shape, shape[1:]))
        if not fits:
            others = [None if a is None else a.shape for a in (self.step, self.stderr, self.truth)]
            raise ConfigError(
                f"signal: values {shape} with step, stderr, truth {others}: a step a row, and their shape, are wanted"
            )

    @property
    def is_scalar(self) -> bool:
        return self.values.ndim == 1

    def residual(self) -> Signal:
        """values - truth; ConfigError without a truth."""
        if self.truth is None:
            raise ConfigError("signal: no truth is known, so there is no residual")
        return Signal(self.values - self.truth, self.step, self.unit, self.stderr, None, f"{self.meaning} - truth")

    def until(self, step: int) -> Signal:
        """Its rows up to `step`."""
        keep = self.step <= step
        own = self.truth is not None and self.truth.shape == self.values.shape
        truth = self.truth[keep] if own and self.truth is not None else self.truth
        stderr = None if self.stderr is None else self.stderr[keep]
        return Signal(self.values[keep], self.step[keep], self.unit, stderr, truth, self.meaning)


def write_signals(file: Path, signals: Mapping[str, Signal], about: Mapping[str, Any] | None = None) -> None:
    """Replace `file` by these; `about` is whatever else a reader should know, as JSON has it."""
    arrays = {
        f"{i}.{part}": np.asarray(getattr(signal, part))
        for i, signal in enumerate(signals.values())
        for part in _PARTS
        if getattr(signal, part) is not None
    }
    meta = {
        "schema": SCHEMA, "about": dict(about or {}), "sha256": _checksum(arrays),
        "signals": [{"name": n, "unit": s.unit, "meaning": s.meaning} for n, s in signals.items()],
    }  # fmt: skip
    held = io.BytesIO()
    np.savez(held, allow_pickle=False, meta=np.array(json.dumps(meta)), **arrays)
    write_bytes(file, held.getvalue())


def read_signals(file: Path) -> dict[str, Signal]:
    """The signals of `file` by name; ArtifactError when it is missing, damaged or of another schema."""
    return _read(file)[0]


def read_about(file: Path) -> dict[str, Any]:
    """What else `file` says."""
    return _read(file)[1]


def _read(file: Path) -> tuple[dict[str, Signal], dict[str, Any]]:
    arrays = read_arrays(file)
    try:
        meta = json.loads(str(arrays.pop("meta")))
        if meta["schema"] != SCHEMA:
            raise ArtifactError(f"{file}: schema {meta['schema']!r}, this version reads {SCHEMA}; update")
        if _checksum(arrays) != meta["sha256"]:
            raise ArtifactError(f"{file} is damaged (its checksum differs)")
        found = {}
        for i, said in enumerate(meta["signals"]):
            parts = {part: arrays.get(f"{i}.{part}") for part in _PARTS}
            found[str(said["name"])] = Signal(**parts, unit=str(said["unit"]), meaning=str(said["meaning"]))  # type: ignore[arg-type]
        return found, dict(meta["about"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{file} is damaged ({type(error).__name__}: {error})") from None


def read_arrays(file: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz; ArtifactError when it is missing or damaged: zip has a checksum of each."""
    try:
        with np.load(file, allow_pickle=False) as held:
            return dict(held)
    except FileNotFoundError:
        raise ArtifactError(f"{file} is missing") from None
    except (OSError, ValueError, EOFError, KeyError, SyntaxError, NotImplementedError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{file} is damaged ({type(error).__name__})") from None


def _checksum(arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.data if array.size else b"")
    return digest.hexdigest()
