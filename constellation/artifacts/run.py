"""The run folder of one model: what is left on disk for people, plots and tables.

    meta.json         identity: schema, run id, time, git, versions, seeds, configuration, layout of theta
    trace.npz         T+1 states: step, tokens, loss_nats, grad_norm, lr (and theta when it is small)
    signals.npz, curvature.npz, precond.npz, grads.npz    where record.* asks for them (signal.py, train/recording.py)
    diag_steps.jsonl  one line per logged Step
    training_telemetry.jsonl  of those steps at which telemetry.* measured: its numbers, regime and mood by name
    summary.json      status, failure reason, first / last / best loss, runtime, tokens, convergence

Trace is what the optimizer produced; nothing derived is in it. loss_nats[t] is the loss of theta[t]
on batch t, so there is one more state than steps. Every file is replaced whole. schema.py has their versions and reads
the older ones, saved.py reads a run.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import json
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from constellation.artifacts import schema
from constellation.artifacts.layout import layout_hash, layout_of
from constellation.artifacts.signal import read_arrays
from constellation.config import Config, difference, from_json
from constellation.errors import ArtifactError
from constellation.regime.words import words
from constellation.storage.atomic import no_link, read_object, write_bytes, write_json
from constellation.telemetry.step import STEPS, TELEMETRY, Step

CHANNELS = {"step": np.int64, "tokens": np.int64, "loss_nats": np.float64, "grad_norm": np.float64, "lr": np.float64}
THETA_UP_TO = 4096  # parameters; a larger theta is not traced


class Trace:
    """The channels of a run, grown a state at a time; `arrays()` is what trace.npz holds."""

    def __init__(self, arrays: dict[str, np.ndarray] | None = None):
        self._rows: dict[str, list[Any]] = {name: list(arrays[name]) if arrays else [] for name in CHANNELS}
        self._theta: list[np.ndarray] = list(arrays["theta"]) if arrays and "theta" in arrays else []

    def last(self) -> dict[str, float]:
        """The newest state; {} before the first."""
        return {name: rows[-1] for name, rows in self._rows.items() if rows}

    def append(self, theta: np.ndarray | None = None, **state: float) -> None:
        for name in CHANNELS:
            self._rows[name].append(state[name])
        if theta is not None:
            self._theta.append(theta)

    def arrays(self) -> dict[str, np.ndarray]:
        out = {name: np.asarray(self._rows[name], dtype) for name, dtype in CHANNELS.items()}
        if self._theta:
            out["theta"] = np.stack(self._theta)
        return out


class RunFolder:
    """Writes the files above into `path`."""

    def __init__(self, path: Path):
        self.path = path
        self._steps = path / STEPS
        self._telemetry = path / TELEMETRY

    def begin(self, config: Config, role: str, layout: list[dict[str, Any]], extra: dict[str, Any]) -> None:
        """meta.json, once: a resumed run keeps its identity. `layout` is name, shape and dtype of every block."""
        file = self.path / "meta.json"
        with contextlib.suppress(ArtifactError):
            read_object(file)
            return
        blocks = layout_of(layout)
        plain = config.to_json()
        digest = hashlib.sha256(json.dumps([plain, role, extra], sort_keys=True, default=str).encode()).hexdigest()
        write_json(file, {
            "schema": schema.NEWEST["meta"], "run_id": f"{role}-{digest[:12]}", "role": role,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "git": _git(), "versions": _versions(),
            "seed": config.train.seed, "config": plain, "layout": blocks,
            "layout_hash": layout_hash(blocks), **extra,
        }, sealed=True)  # fmt: skip

    def is_done(self) -> bool:
        return self._summary().get("status") == "done"

    def truncate(self, step: int) -> None:
        """Forget the logged steps after `step`: a resumed run writes them again."""
        for log in (self._steps, self._telemetry):
            if log.exists():
                kept = [line for line in log.read_bytes().splitlines(keepends=True) if _step_of(line) <= step]
                write_bytes(log, b"".join(kept))

    def log(self, steps: Iterable[Step]) -> None:
        pages = [step.to_json() for step in steps]
        rows = [row for page in pages if (row := telemetry_row(page))]
        for log, lines in ((self._steps, pages), (self._telemetry, rows)):
            if lines:
                with open(log, "a", opener=no_link) as file:
                    file.write("".join(json.dumps(line) + "\n" for line in lines))

    def write_trace(self, arrays: dict[str, np.ndarray]) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        write_bytes(self.path / "trace.npz", buffer.getvalue())

    def summarise(self, **values: Any) -> dict[str, Any]:
        """Merge `values` into summary.json; the runtime of earlier sittings adds up."""
        old = self._summary()
        values["runtime_s"] = round(values.get("runtime_s", 0.0) + old.get("runtime_s", 0.0), 3)
        summary = {**self._identity(), **old, **values, "schema": schema.NEWEST["summary"]}
        write_json(self.path / "summary.json", summary)
        return summary

    def _identity(self) -> dict[str, Any]:
        """What a table of summaries tells runs apart by: run_id, and the settings that differ from the defaults."""
        with contextlib.suppress(ArtifactError):
            meta = schema.read(self.path / "meta.json", "meta")
            changes = difference(Config(), from_json(meta["config"]))
            return {"run_id": meta["run_id"], "changes": {name: new for name, (_, new) in changes.items()}}
        return {"run_id": None, "changes": {}}

    def _summary(self) -> dict[str, Any]:
        """What earlier sittings wrote; a damaged one is written anew."""
        with contextlib.suppress(ArtifactError):
            found = read_object(self.path / "summary.json")
            if isinstance(found.get("runtime_s", 0.0), float | int):
                return found
        return {}


def telemetry_row(page: Mapping[str, Any]) -> dict[str, Any]:
    """A line of training_telemetry.jsonl, of a step's `to_json`; {} where telemetry was not measured."""
    measured = page.get("measured") or {}
    if not measured.keys() & {"phi", "telemetry_nan"}:
        return {}
    own = {name: page[name] for name in ("role", "step", "tokens", "loss_nats", "grad_norm", "lr")}
    return {**own, **measured, **words(measured), **({"advice": page["advice"]} if page.get("advice") else {})}


def read_telemetry(path: Path) -> list[dict[str, Any]]:
    """The whole lines of `path`/training_telemetry.jsonl, oldest first; [] for a run without telemetry."""
    try:
        lines = (path / TELEMETRY).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if _step_of(line) < float("inf")]


def read_trace(path: Path) -> dict[str, np.ndarray]:
    """The arrays of `path`/trace.npz; ArtifactError when it is missing or damaged."""
    return read_arrays(path / "trace.npz")


def _step_of(line: bytes) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # the torn last line of a killed writer


def _git() -> str | None:
    """Commit of the code when it runs from a checkout, with "+" when files differ from it."""
    here = Path(__file__).parent
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _versions() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in ("constellation", "torch", "numpy")}
    return {"python": platform.python_version(), "platform": platform.platform(), **versions}
