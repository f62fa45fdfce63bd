"""What every bench shares: the machine it ran on, and where its result goes."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from constellation import processor
from constellation.storage.atomic import write_bytes, write_json

if TYPE_CHECKING:
    from constellation.config import Config
    from constellation.pipeline.request import Plan

HEAVY = "raw"  # of a result: written as one long line


def described(doc: str | None) -> dict[str, Any]:
    """What a result begins with: the question, a module's first line, and the machine that answered it."""
    import torch

    return {
        "question": (doc or "").partition("\n")[0],
        "machine": platform.processor() or platform.machine(),
        "instructions": processor.instructions(),
        "cores": processor.cores(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def prepared(folder: Path, corpus: Path | None, config: Config) -> Plan:
    """The run in `folder` with its tokenizer and caches, made once and found again; nothing is trained."""
    from constellation.pipeline.prepare import prepare, request

    request(folder, corpus, config, resume=folder.exists())
    return prepare(folder)


def machine_line(result: Mapping[str, Any]) -> str:
    """The same in words, for the head of a table."""
    return (
        f"{result['machine']}, {result['cores']} cores, {result['instructions']}, Python {result['python']}, "
        f"torch {result['torch']}"
    )


def finish(result: dict[str, Any], lines: Iterable[str], out: Path | None) -> dict[str, Any]:
    """Print the table, write the result to `out`."""
    for line in lines:
        print(line)
    if out:
        save(result, out)
    return result


def save(result: Mapping[str, Any], out: Path) -> None:
    """The raw result as JSON: no NaN, a part called raw as one line."""
    if HEAVY not in result:
        write_json(out, dict(result))
        return
    told = json.dumps({key: value for key, value in result.items() if key != HEAVY}, indent=1, allow_nan=False)
    raw = json.dumps(result[HEAVY], separators=(",", ":"), allow_nan=False)
    write_bytes(out, f'{told[:-2]},\n "{HEAVY}": {raw}\n}}\n'.encode())
