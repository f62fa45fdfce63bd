"""constellation down"""

from __future__ import annotations

from pathlib import Path

import click

from constellation.commands import options


@click.command()
@options.run_or_name
@options.address
def command(run: Path | None, name: str | None, address: str | None) -> None:
    """Stop what `constellation up` started; a constellation that is not up is left as it is."""
    options.check_run_or_name(run, name)
    from actors import lifecycle

    lifecycle.down(run, name=name, address=address, say=click.echo)
