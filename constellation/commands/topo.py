"""constellation topo"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from constellation.commands import options
from constellation.config import override, parse_assignments, values
from constellation.errors import ConfigError
from constellation.topo.request import PRESETS, named, opened, preset, request
from constellation.trackers import tracker

place = click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
data = click.option(
    "--data", "source", default=None, metavar="FOLDER|FILE|digits",
    help="IDX, CIFAR binary, npz, or folders of images; default: the run's own, or scikit-learn's digits",
)  # fmt: skip
QUIET_S = 5.0  # seconds between two lines in a log


@click.group()
def command() -> None:
    """An atlas of charts over images, each with a codebook of its own."""


@command.command(epilog=f"\b\nPresets: {', '.join(PRESETS)}, or a FILE.toml such as a sweep's best.toml.")
@data
@options.run
@click.option("--preset", "name", default=None, metavar="NAME", help="digits (default) | mnist | cifar10 | FILE.toml")
@click.option("--resume", is_flag=True, help="go on with the run in DIR")
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(1), metavar="N",
              help="seeds side by side, each an actor on Ray, in DIR/seed-0 ...")  # fmt: skip
@options.address
@click.option("--log", "log", default=None, metavar="NAMES",
              help="tensorboard, mlflow, wandb, several with commas, or none; default: tensorboard")  # fmt: skip
@options.as_json
@options.overrides
def train(
    source: str | None,
    run: Path,
    name: str | None,
    resume: bool,
    jobs: int,
    address: str | None,
    log: str | None,
    as_json: bool,
    overrides: tuple[str, ...],
) -> None:
    """Train a TopoEncoder; a killed run goes on with --resume, to the same bits.

    KEY=VALUE changes one setting, such as train.lr=3e-3, model.charts=12 or control.rate=governor.
    """
    config = None
    if not (resume and not name and not overrides):
        config = override(preset(name or "digits"), named(parse_assignments(overrides)))
    trackers = tracker.named(log)
    options.check_writable(run)
    say = options.say(as_json)
    if jobs > 1:
        from actors.topo import train_seeds

        for seed, summary in enumerate(train_seeds(run, source, config, jobs, resume, address, say)):
            options.print_json(summary) if as_json else _summary(run / f"seed-{seed}", summary)
        return
    from constellation.storage.exclusive import exclusive
    from constellation.topo.readers import read_images
    from constellation.topo.train import fit

    read: dict[str, Any] = {}

    def digest(chosen: str) -> str:
        read[chosen] = read_images(chosen)
        return str(read[chosen].digest)

    with exclusive(run):  # one writer
        chosen, settings = request(run, source, config, resume, digest)
        with tracker.tracking(trackers, run, values(settings), say) as track:
            shown = 0.0
            for epoch in fit(settings, read[chosen], run):
                track(epoch)
                if as_json:
                    options.print_json(epoch.to_json())
                elif epoch.held or time.monotonic() - shown > QUIET_S:
                    shown = time.monotonic()
                    say(line(epoch))
    from constellation.storage.atomic import read_object

    summary = read_object(run / "summary.json")
    options.print_json(summary) if as_json else _summary(run, summary)


def line(epoch: Any) -> str:
    """One epoch in a log."""
    held = epoch.held or {}
    shown = {
        "reconstruction": epoch.losses.get("reconstruction"),
        **{k: held.get(k) for k in ("mse", "bits", "accuracy", "nmi")},
    }
    told = ", ".join(f"{name} {value:.4g}" for name, value in shown.items() if value is not None)
    return f"topo {epoch.epoch:>6}/{epoch.epochs}  {told}"


def _summary(run: Path, summary: dict[str, Any]) -> None:
    click.echo(f"run {run}: {summary['status']}, {summary.get('steps', 0)} steps, {summary['runtime_s']:.1f} s")
    for name, value in summary.get("held", {}).items():
        click.echo(f"  {name:<16} {value:.4g}")
    if "constraints" in summary:
        click.echo(summary["constraints"])


@command.command("eval")
@place
@data
@options.as_json
def evaluate(run: Path, source: str | None, as_json: bool) -> None:
    """Error, bits, clusters against labels, jumps and probe of the run in RUN, on held-out images."""
    opened(run)
    from constellation.topo.evaluate import evaluate as measured
    from constellation.topo.saved import load

    model, images, bias = load(run, source)
    found = measured(model, images.test, bias)
    if as_json:
        options.print_json({"data": images.name, "images": len(images.test), **found})
        return
    click.echo(f"run {run}, {len(images.test)} held-out images of {images.name}")
    for name, value in found.items():
        click.echo(f"  {name:<16} {value:.4g}")


@command.command()
@place
@click.option("--out", type=click.Path(path_type=Path), default=None, metavar="DIR", help="default: RUN/plots")
def report(run: Path, out: Path | None) -> None:
    """Draw the atlas, code usage, reconstructions, jumps, samples, and the traces of losses and controllers."""
    opened(run)
    from constellation.topo.plots import report as draw

    for file in draw(run, out or run / "plots"):
        click.echo(str(file))


@command.command()
@data
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(1), help="of every arm")
@click.option("--trials", default=2, show_default=True, type=click.IntRange(1), help="of every arm's tuning")
@click.option("--epochs", default=40, show_default=True, type=click.IntRange(1), help="of every training")
@click.option("--arms", default=None, metavar="A,B", help="default: all of them")
@click.option("--work", type=click.Path(path_type=Path), required=True, metavar="DIR", help="finished trainings")
@click.option("--out", type=click.Path(path_type=Path), default=None, metavar="FILE", help="write the raw result")
@options.overrides
def bench(
    source: str | None, seeds: int, trials: int, epochs: int, arms: str | None, work: Path,
    out: Path | None, overrides: tuple[str, ...],
) -> None:  # fmt: skip
    """Fixed against adaptive weights and rates, and every baseline, with equal trials, codes and clusters."""
    changes = named(parse_assignments(overrides))
    override(preset("digits"), changes)
    from constellation.experiments import bench_topo

    chosen = tuple(arms.split(",")) if arms else bench_topo.ARMS
    if unknown := [arm for arm in chosen if arm not in bench_topo.ARMS]:
        raise ConfigError(f"--arms {unknown[0]}: choose from {', '.join(bench_topo.ARMS)}")
    bench_topo.run(
        source or "digits", changes, seeds=seeds, trials=trials, epochs=epochs, arms=chosen, work=work, out=out,
        say=options.say(True),
    )  # fmt: skip
