"""Presets: functions that return a full Config; a new one changes an old one."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from constellation.config import Config, override
from constellation.errors import ConfigError


def small() -> Config:
    """The default on a CPU: 0.73 M parameters a kernel, minutes on two cores."""
    return Config()


def tiny() -> Config:
    """For tests and a first look: 42 k parameters a kernel, seconds on two cores."""
    return override(small(), {
        "preset": "tiny", "kernel.vocab_size": 512, "kernel.width": 32, "kernel.layers": 2, "kernel.heads": 2,
        "kernel.hidden": 88, "kernel.context": 64, "train.tokens": 200_000, "train.batch": 8, "train.kernel_batch": 8,
        "train.checkpoint_every": 20, "train.eval_bytes": 8192, "train.sample_bytes": 80,
    })  # fmt: skip


def m23() -> Config:
    """22.9 M parameters a kernel: 384 x 8 x 8 heads, vocabulary 32 000; for a GPU each or a share of one."""
    return override(small(), {
        "preset": "23m", "kernel.vocab_size": 32_000, "kernel.width": 384, "kernel.layers": 8, "kernel.heads": 8,
        "kernel.hidden": 640, "kernel.context": 1024, "train.tokens": 2_000_000_000, "train.batch": 64,
        "train.kernel_batch": 32, "train.checkpoint_every": 500, "train.eval_every": 1000, "train.loss_chunk": 8192,
        "optim.lr": 2e-3, "cluster.gpus_per_kernel": 1.0, "cluster.cpus_per_kernel": 1.0,
    })  # fmt: skip


def m100() -> Config:
    """100.7 M parameters a kernel: 768 x 12 x 12 heads, vocabulary 32 000."""
    return override(m23(), {
        "preset": "100m", "kernel.width": 768, "kernel.layers": 12, "kernel.heads": 12, "kernel.hidden": 1728,
        "kernel.context": 2048, "train.tokens": 10_000_000_000, "optim.lr": 1e-3,
    })  # fmt: skip


PRESETS: dict[str, Callable[[], Config]] = {"tiny": tiny, "small": small, "23m": m23, "100m": m100}


def preset(name: str) -> Config:
    """The configuration called `name`, tiny | small | 23m | 100m, or the one in a file; ConfigError for another name.

    A file, such as a sweep's best.toml, names the preset that it changes and what it changes, by dotted names:

        preset = "small"
        [settings]
        "optim.lr" = 3e-3
    """
    if name in PRESETS:
        return PRESETS[name]()
    if name.endswith(".toml"):
        return _from_file(Path(name))
    raise ConfigError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}, or a file that ends in .toml")


def _from_file(path: Path) -> Config:
    try:
        found: dict[str, Any] = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"preset {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"preset {path}: {error}") from None
    base, settings = found.get("preset"), found.get("settings", {})
    if base not in PRESETS or not isinstance(settings, dict) or set(found) - {"preset", "settings"}:
        raise ConfigError(f"preset {path}: wanted are preset = one of {', '.join(PRESETS)}, and a table [settings]")
    try:
        return override(PRESETS[base](), settings)
    except ConfigError as error:
        raise ConfigError(f"preset {path}: {error}") from None
