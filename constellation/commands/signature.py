"""constellation signature"""

from __future__ import annotations

from pathlib import Path

import click

from constellation.commands import options


@click.command()
@click.argument("run", type=options.RunPlace())
@click.option("--other", "others", multiple=True, type=options.RunPlace(), metavar="RUN", help="another seed's; repeat")
@options.as_json
def command(run: Path, others: tuple[Path, ...], as_json: bool) -> None:
    """Write the basin signature of every model of RUN (2 to 4 KB), and how well such signatures tell models apart."""
    from constellation.pipeline.signatures import sign

    found = sign(run, others)
    if as_json:
        options.print_json(found)
        return
    for row in found["signatures"]:
        click.echo(f"{row['role']:<12} {row['bytes']} bytes  {row['file']}")
    if found["auroc"] is None:
        click.echo("AUROC: one model alone cannot be told from another; name other runs with --other")
        return
    low, high = found["interval"]
    verdict = "identifies a model" if found["identifies"] else "does not identify a model (interval not above 0.95)"
    click.echo(f"AUROC, one model's halves against two models: {found['auroc']:.3f} [{low:.3f}, {high:.3f}]; {verdict}")
