"""constellation status"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from constellation.commands import options


@click.command()
@options.run_or_name
@options.address
@options.as_json
def command(run: Path | None, name: str | None, address: str | None, as_json: bool) -> None:
    """Kernels, roles, E8 roots, nodes, steps, loss and health: of a run, alive or on disk, or by its name on Ray."""
    options.check_run_or_name(run, name)
    from actors import record
    from constellation.commands.display import status_table
    from constellation.pipeline.status import folder_status
    from constellation.storage.mirror import spoken

    if run is not None and record.read(run) is None:  # the folder says it all, without Ray
        found = folder_status(run)
    else:
        from actors import lifecycle

        found = lifecycle.status(run, name=name, address=address)
    found = dataclasses.replace(found, run=spoken(found.run), detail=spoken(found.detail))
    options.print_json(found.to_json()) if as_json else status_table(found)
