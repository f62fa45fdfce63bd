"""constellation keys"""

from __future__ import annotations

import datetime
from pathlib import Path

import click

from constellation.commands import options
from router.http import keys

file = click.option(
    "--file", type=click.Path(path_type=Path, dir_okay=False), required=True, metavar="FILE", help="the key file"
)
name = click.option("--name", required=True, metavar="NAME", help="whose key it is")


@click.group()
def command() -> None:
    """API keys of `constellation serve --api-key-file FILE`; the file holds hashes, never keys."""


@command.command()
@file
@name
@options.setting(keys.Limits, "requests_per_minute", metavar="N")
@options.setting(keys.Limits, "tokens_per_minute", metavar="N")
@options.setting(keys.Limits, "concurrent", metavar="N")
@click.option("--metrics", is_flag=True, help="it opens /metrics, which tells how much all keys use")
def add(
    file: Path,
    name: str,
    requests_per_minute: int | None,
    tokens_per_minute: int | None,
    concurrent: int | None,
    metrics: bool,
) -> None:
    """Make a key and print it: this once. The file is made when it is not there, with mode 0600."""
    limits = keys.Limits(requests_per_minute, tokens_per_minute, concurrent)
    click.echo(keys.add(file, name, limits, metrics=metrics))
    click.echo(f"the key of {name}: write it down, it cannot be shown again", err=True)


@command.command(name="list")
@file
@options.as_json
def list_(file: Path, as_json: bool) -> None:
    """Names, dates and limits."""
    found = keys.read(file)
    if as_json:
        options.print_json([{k: v for k, v in key.to_json().items() if k != "sha256"} for key in found])
        return
    for key in found:
        limits = {k: v for k, v in vars(key.limits).items() if v is not None}
        said = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in limits.items()) or "no limits"
        said += ", metrics" if key.metrics else ""
        day = datetime.datetime.fromtimestamp(key.created, datetime.UTC).date()
        click.echo(f"{key.name:<24} {day}  {said}")


@command.command()
@file
@name
def remove(file: Path, name: str) -> None:
    """Remove a key; a service that runs refuses it from then on."""
    keys.remove(file, name)
    click.echo(f"removed the key of {name}", err=True)
