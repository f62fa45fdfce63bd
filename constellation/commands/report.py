"""constellation report"""

from __future__ import annotations

from pathlib import Path

import click

from constellation.commands import options


@click.command()
@click.argument("run", type=options.RunPlace())
@options.as_json
def command(run: Path, as_json: bool) -> None:
    """Write RUN/report: Markdown, HTML, validation_report.json and plots; results stand beside their targets."""
    from constellation.pipeline.report import report

    found = report(run)
    if as_json:
        options.print_json(found)
        return
    for row in found["results"]:
        value = "-" if row["value"] is None else f"{row['value']:.3f}"
        click.echo(f"{row['name']:<60} {value:>8}  target {row['target']:<12} {row['verdict']}")
    click.echo(f"{run / 'report' / 'report.html'}")
