"""constellation status"""

from __future__ import annotations

from pathlib import Path

import click

from constellation.commands import options


@click.command()
@options.run
@options.as_json
def command(run: Path, as_json: bool) -> None:
    """Kernels, roles, E8 roots, nodes, steps, loss and health of a run, alive or on disk."""
    from actors.plan import open_request

    open_request(run)
    from actors import launch

    found = launch.status(run)
    if as_json:
        options.print_json(found)
    else:
        from constellation.commands.display import status_table

        status_table(found)
