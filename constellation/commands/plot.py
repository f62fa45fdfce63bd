"""constellation plot"""

from __future__ import annotations

from pathlib import Path

import click

from constellation.errors import ConfigError

NAMED = ("kernels", "constellations", "optimizers", "routers", "sweeps")
ALONG = ("step", "tokens", "wall_s")


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option(
    "--panel", "panels", multiple=True, metavar="SIGNAL[:MODE],...",
    help="signals of one panel; of a vector components, summary, hybrid=N or residual; may be given again",
)  # fmt: skip
@click.option("--recipe", type=click.Choice(NAMED), default=None, help="the panels of a usual question")
@click.option("--x", "axis", type=click.Choice(ALONG), default="step", show_default=True, help="what runs to the right")
@click.option("--log-y", is_flag=True, help="logarithmic")
@click.option("--list", "list_", is_flag=True, help="name the signals there are")
@click.option("--out", type=click.Path(path_type=Path), default=Path("plot.png"), show_default=True, metavar="FILE")
def command(
    folders: tuple[Path, ...],
    panels: tuple[str, ...],
    recipe: str | None,
    axis: str,
    log_y: bool,
    list_: bool,
    out: Path,
) -> None:
    """Draw the signals of runs as PNG or SVG: of models, constellations, experiments, or a sweep.

    Without --panel and --recipe the recipe is kernels.
    """
    if panels and recipe:
        raise ConfigError("--panel and --recipe exclude each other; leave one out")
    from constellation.plots.figure import draw
    from constellation.plots.panel import panel
    from constellation.plots.recipes import RECIPES, panels_of, runs_in

    if list_:
        for name, run in runs_in(folders):
            click.echo(f"{name or run.path}: {', '.join(sorted(run.signals))}")
        return
    shown = [panel(words) for words in panels]
    if shown:
        runs = runs_in(folders)
        drawn = [panels_of(runs, one, axis, log_y) for one in shown]
    else:
        drawn = RECIPES[recipe or "kernels"](folders, axis)
    title = ", ".join(folder.name or str(folder) for folder in folders[:4])
    click.echo(draw(drawn, out, f"{recipe}: {title}" if recipe else title))
