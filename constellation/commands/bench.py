"""constellation bench"""

from __future__ import annotations

from pathlib import Path

import click

from constellation.commands import options
from constellation.config import override, parse_assignments
from constellation.errors import ConfigError
from constellation.presets import preset as make_preset

out = click.option("--out", type=click.Path(path_type=Path), default=None, metavar="FILE", help="write the raw result")


@click.group()
def command() -> None:
    """Measure, side by side with the named peers, and print ratios."""


@command.command()
@click.option("--centres", default=240, show_default=True, type=click.IntRange(1, 240))
@out
def route(centres: int, out: Path | None) -> None:
    """The router: milliseconds a query, a batch, a streamed byte; against tf-idf in the same run."""
    from constellation.experiments import bench_route

    bench_route.run(centres=centres, out=out)


@command.command()
@click.option("--seconds", default=20.0, show_default=True, type=click.FloatRange(1), help="of each measurement")
@click.option("--preset", default="small", show_default=True)
@out
def train(seconds: float, preset: str, out: Path | None) -> None:
    """Training: tokens per second against a nanoGPT-style loop, two kernels against one, Ray's overhead."""
    from constellation.experiments import bench_train

    bench_train.run(make_preset(preset), seconds=seconds, out=out)


@command.command()
@click.option("--corpus", type=click.Path(path_type=Path, exists=True), required=True, metavar="DIR")
@click.option(
    "--work", type=click.Path(path_type=Path), required=True, metavar="DIR", help="models; reused when called again"
)
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1, 100))
@click.option("--arms", default=None, metavar="A,B", help="a part of the arms")
@click.option("--preset", default="small", show_default=True)
@click.option("--dense", "dense_words", multiple=True, metavar="KEY=VALUE", help="a setting of the dense arms alone")
@click.option("--workers", default=None, type=click.IntRange(1), help="processes; default: one a core")
@out
@options.overrides
def dense(
    corpus: Path,
    work: Path,
    seeds: int,
    arms: str | None,
    preset: str,
    dense_words: tuple[str, ...],
    workers: int | None,
    out: Path | None,
    overrides: tuple[str, ...],
) -> None:
    """Routed kernels against dense kernels at equal tokens and FLOPs, over seeds, with intervals and kill rules."""
    from constellation.experiments import bench_dense, dense_report

    config = override(make_preset(preset), parse_assignments(overrides))
    chosen = tuple(arms.split(",")) if arms else ("dense", "dense_token", *bench_dense.ROUTED)
    unknown = set(chosen) - {"dense", "dense_token", *bench_dense.ROUTED}
    if unknown or "dense" not in chosen:
        raise ConfigError(f"--arms {arms}: dense and any of dense_token, {', '.join(bench_dense.ROUTED)}")
    result = bench_dense.run(
        corpus, work, config, seeds=range(seeds), dense=parse_assignments(dense_words), arms=chosen, workers=workers,
        say=click.echo,
    )  # fmt: skip
    click.echo(dense_report.markdown(result))
    if out:
        dense_report.save(result, out)
        click.echo(f"raw result: {out}")
