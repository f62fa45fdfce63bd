"""constellation up"""

from __future__ import annotations

from pathlib import Path

import click

from constellation.commands import options
from constellation.config import parse_assignments


@click.command()
@options.run
@options.address
@options.name
@options.as_json
@options.overrides
def command(run: Path, address: str | None, name: str | None, as_json: bool, overrides: tuple[str, ...]) -> None:
    """Keep a trained constellation alive on Ray, so that queries find loaded kernels.

    Without --address a Ray head is started on this machine, on loopback, and `constellation down` stops it.
    KEY=VALUE may change cluster.* and decode.* settings, such as decode.precision=int8.
    """
    changes = parse_assignments(overrides)
    from constellation.pipeline.serving import servable

    servable(run, changes)
    options.say_unfinished(run)
    from actors import lifecycle
    from constellation.commands.display import status_table

    found = lifecycle.up(run, address=address, name=name, changes=changes, say=options.say(as_json))
    options.print_json(found.to_json()) if as_json else status_table(found)
