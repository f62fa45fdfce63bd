"""constellation route"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from constellation.commands import options


@click.command()
@options.run
@options.as_json
def command(run: Path, as_json: bool) -> None:
    """Explain who would answer each line of standard input: one text a line in, one decision a line out.

    With --json: counts used, basin coordinates z, distance to every centre, posterior, kernel, E8 root and
    neighbours.
    """
    from actors.plan import open_request
    from router.route import Router

    open_request(run)
    router = Router.load(run / "router")
    for line in sys.stdin.buffer:
        text = line.rstrip(b"\r\n")
        (choice,) = router.route([text])
        if as_json:
            options.print_json(choice.to_json(router.names))
        else:
            why = f" ({choice.reason})" if choice.abstained else ""
            likely = sorted(zip(choice.posterior.tolist(), router.names, strict=True), reverse=True)[:3]
            shown = ", ".join(f"{name} {p:.2f}" for p, name in likely)
            click.echo(f"{choice.kernel:<12}{why} {choice.counts_used} trigrams; {shown}; next {choice.neighbours[0]}")
