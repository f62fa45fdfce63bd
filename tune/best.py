"""OUT/best.toml: the winner as a preset that `constellation train --preset` takes. No Ray here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from constellation.config import Config, difference
from constellation.presets import PRESETS, preset
from constellation.storage.atomic import write_bytes

BEST = "best.toml"


def write_best(out: Path, config: Config, words: str) -> Path:
    """Write `config` as what it changes of the preset it began as; `words` is a comment in the first line."""
    base = config.preset if config.preset in PRESETS else "small"
    changed = {
        name: now for name, (_, now) in difference(preset(base), config).items() if name != "roles" and now is not None
    }
    roles = {f"{role}.{name}": value for role, own in config.roles.items() for name, value in own.items()}
    lines = [f"# {' '.join(words.split())}", f"preset = {_toml(base)}", "", "[settings]"]
    lines += [f"{_toml(name)} = {_toml(value)}" for name, value in {**changed, **roles}.items()]
    write_bytes(out / BEST, ("\n".join(lines) + "\n").encode())
    return out / BEST


def _toml(value: Any) -> str:
    """A text, number or truth value as TOML has it."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps(value)
