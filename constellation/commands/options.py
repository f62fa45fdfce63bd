"""Options that several commands share."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from msgspec import inspect

from constellation import roster
from constellation.decoding.sampling import Sampling
from constellation.errors import ConfigError
from constellation.settings import settings_of
from router.decide.modes import MIXED, MODES


class RunPlace(click.Path):
    """A folder, or a URL such as s3://bucket/run: then the local folder that is in step with it."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        if not isinstance(value, str) or "://" not in value:
            return super().convert(value, parameter, context)
        from constellation.storage.mirror import resolve

        return resolve(value, say(True))


run = click.option(
    "--run", "run", type=RunPlace(), required=True, metavar="DIR", help="the run: a folder, or a URL (s3://bucket/run)"
)
corpus = click.option(
    "--corpus", type=click.Path(path_type=Path), default=None, metavar="DIR",
    help="of txt, md, source, jsonl (.gz, .zst), Parquet, saved datasets; default: Python's own documentation",
)  # fmt: skip
address = click.option("--address", default=None, metavar="A", help="join this Ray cluster (host:port or auto)")
as_json = click.option("--json", "as_json", is_flag=True, help="print JSON")
overrides = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")


name = click.option(
    "--name", default=None, metavar="NAME", help="of the constellation on Ray; default: the run folder's"
)
telemetry = click.option(
    "--telemetry", is_flag=True, help="phi, kappa, regime and basin distance of the answer, read again here"
)
local = click.option("--local", is_flag=True, help="in this process, whatever is up; the tokens are the same")


def _known_mode(context: click.Context, parameter: click.Parameter, value: str) -> str:
    modes = (*MODES, roster.OCEAN, *roster.ROLES)
    if value not in modes and not roster.is_kernel(value):
        raise click.BadParameter(f"{value!r} is not one of {', '.join(map(repr, modes))}, or a kernel of this run.")
    return value


mode = click.option(
    "--mode", callback=_known_mode, default="route", show_default=True,
    metavar="|".join((*MODES, roster.OCEAN, "KERNEL")), help="who answers",
)  # fmt: skip
top_k_kernels = click.option(
    "--top-k-kernels", default=3, show_default=True, type=click.IntRange(1), metavar="K",
    help="kernels that answer together in the modes " + " and ".join(MIXED),
)  # fmt: skip


def setting(record: type, name: str, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The option --name of a field of `record`: its range, meaning and, unless `options` say another, its default."""
    field = settings_of(record)[name]
    above, low, below = (getattr(field.kind, bound, None) for bound in ("gt", "ge", "lt"))
    range_of: Any = click.IntRange if isinstance(field.kind, inspect.IntType) else click.FloatRange
    low, high = (a if b is None else b for a, b in ((low, above), (field.high, below)))
    bounds = range_of(low, high, min_open=above is not None, max_open=below is not None)
    options = {"default": field.default, "help": field.meaning, "type": bounds, **options}
    return click.option(f"--{name.replace('_', '-')}", **options)


def sampling(command: Callable[..., Any]) -> Callable[..., Any]:
    """The sampler's options, fields of its record."""
    some = (
        setting(Sampling, "max_new_tokens", show_default=True, metavar="N"),
        setting(Sampling, "temperature", default=0.8, show_default=True),
        setting(Sampling, "top_k"),
        setting(Sampling, "top_p", default=0.95, show_default=True),
        setting(Sampling, "min_p"),
        setting(Sampling, "repetition_penalty"),
        setting(Sampling, "basin_weight"),
        setting(Sampling, "distance_weight"),
        setting(Sampling, "transition_weight"),
        setting(Sampling, "seed", show_default=True, metavar="S"),
        click.option("--stop", multiple=True, metavar="TEXT", help="end before this text; may be given again"),
    )
    for option in reversed(some):
        command = option(command)
    return command


def run_or_name(command: Callable[..., Any]) -> Callable[..., Any]:
    """--run DIR, or --name NAME in the Ray at --address."""
    path = click.option("--run", type=RunPlace(), default=None, metavar="DIR", help="the run: a folder, or a URL")
    return path(name(command))


def check_run_or_name(run: Path | None, name: str | None) -> None:
    if (run is None) == (name is None):
        raise ConfigError("name the constellation by --run DIR, or by --name NAME and --address A")
    if run is not None:
        from constellation.pipeline.request import open_request

        open_request(run)


def say_unfinished(run: Path, *roles: str) -> dict[str, dict[str, int | None]]:
    """Which models of `run`, or of its `roles`, are used before they are trained to their end; told in one line."""
    from constellation.pipeline.status import unfinished, unfinished_line

    left = {role: steps for role, steps in unfinished(run).items() if not roles or role in roles}
    if left:
        click.echo(unfinished_line(run, left), err=True)
    return left


def say(as_json: bool) -> Callable[[str], None]:
    """Where progress lines go: standard error when JSON is printed."""
    return lambda text: click.echo(text, err=as_json)


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
