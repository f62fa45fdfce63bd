"""constellation targets"""

from __future__ import annotations

import json
from pathlib import Path

import click

from constellation.commands import options
from constellation.errors import ConfigError


@click.command()
@click.option("--run", type=click.Path(path_type=Path), default=None, metavar="DIR", help="the run folder")
@options.address
@click.option(
    "--out", type=click.Path(path_type=Path), default=None, metavar="FILE", help="written whole or not at all"
)
def command(run: Path | None, address: str | None, out: Path | None) -> None:
    """What a Prometheus asks, as its file_sd_configs reads it: Ray nodes, with the kernels' gauges, and fronts.

    Say it again when fronts or nodes have come or gone; Prometheus reads FILE anew by itself.
    """
    if (run is None) == (address is None):
        raise ConfigError("name what is up by --run DIR, or everything in a Ray by --address A")
    from actors.targets import targets
    from constellation.storage.atomic import write_json

    found = targets(run, address=address)
    if out is None:
        click.echo(json.dumps(found, indent=2))
    else:
        write_json(out, found)
        click.echo(f"{sum(len(group['targets']) for group in found)} targets in {out}")
