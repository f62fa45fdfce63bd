"""constellation up"""

from __future__ import annotations

from pathlib import Path

import click

from constellation.commands import options


@click.command()
@options.run
@options.address
@click.option("--name", default=None, metavar="NAME", help="name of the constellation; default: the run folder's")
def command(run: Path, address: str | None, name: str | None) -> None:
    """Keep a trained constellation alive on Ray, so that queries find loaded kernels.

    Without --address a Ray head is started on this machine, on loopback; `constellation down` stops it.
    """
    from actors.plan import open_plan

    open_plan(run)
    from actors import launch

    click.echo(launch.up(run, address=address, name=name))
