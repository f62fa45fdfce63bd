"""constellation status"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from constellation.commands import options
from constellation.errors import ConfigError

if TYPE_CHECKING:
    from constellation.pipeline.status import ClusterStatus

WATCH_S = 2.0  # from one answer to the next question


@click.command()
@options.run_or_name
@options.address
@options.as_json
@click.option("--watch", is_flag=True, help="look again every two seconds until Ctrl-C")
def command(run: Path | None, name: str | None, address: str | None, as_json: bool, watch: bool) -> None:
    """Kernels, roles, E8 roots, nodes, steps, loss and health: of a run, alive or on disk, or by its name on Ray."""
    if watch and as_json:
        raise ConfigError("--watch is for people, --json for programs: leave one out")
    options.check_run_or_name(run, name)
    if as_json:
        options.print_json(_now(run, name, address).to_json())
    elif watch:
        _watch(run, name, address)
    else:
        from constellation.commands.display import status_table

        status_table(_now(run, name, address))


def _watch(run: Path | None, name: str | None, address: str | None) -> None:
    from constellation.commands.display import Page

    with contextlib.suppress(KeyboardInterrupt), Page() as page:
        while True:
            page.show(_now(run, name, address))
            time.sleep(WATCH_S)


def _now(run: Path | None, name: str | None, address: str | None) -> ClusterStatus:
    from actors import record
    from constellation.pipeline.status import folder_status
    from constellation.storage.mirror import spoken

    if run is not None and record.read(run) is None:  # the folder says it all, without Ray
        found = folder_status(run)
    else:
        from actors import lifecycle

        found = lifecycle.status(run, name=name, address=address)
    return dataclasses.replace(found, run=spoken(found.run), detail=spoken(found.detail))
