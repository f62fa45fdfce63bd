"""Options that several commands share."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import click

from constellation.errors import ConfigError

run = click.option("--run", "run", type=click.Path(path_type=Path), required=True, metavar="DIR", help="the run folder")
corpus = click.option(
    "--corpus", type=click.Path(path_type=Path), default=None, metavar="DIR",
    help="folder or file of txt, md, source, jsonl (.gz, .zst); default: Python's own documentation",
)  # fmt: skip
address = click.option("--address", default=None, metavar="A", help="join this Ray cluster (host:port or auto)")
as_json = click.option("--json", "as_json", is_flag=True, help="print JSON")
overrides = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, default=str))


def check_writable(folder: Path) -> None:
    """ConfigError unless a run can be written to `folder`, before hours are spent; leaves nothing behind."""
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(f"--run {folder}: {nearest} is not a folder that can be written to")
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ConfigError(f"--run {folder}: {nearest} cannot be written to ({error.strerror})") from None
