"""constellation down"""

from __future__ import annotations

from pathlib import Path

import click

from constellation.commands import options


@click.command()
@options.run
def command(run: Path) -> None:
    """Stop what `constellation up` started; a constellation that is not up is left as it is."""
    from actors.plan import open_plan

    open_plan(run)
    from actors import launch

    click.echo(launch.down(run))
