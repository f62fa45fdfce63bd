"""constellation tune"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from constellation.commands import options
from constellation.config import override, parse_assignments
from constellation.errors import ConfigError
from constellation.presets import preset as make_preset

if TYPE_CHECKING:
    from constellation.config import Config
    from tune.request import SweepRequest
    from tune.space import Space

SCHEDULERS = ("none", "asha", "hyperband", "pbt")
SEARCHES = ("random", "grid", "tpe", "cmaes")


class Sweeps(click.Group):
    """A group whose command without a name is `run`: `constellation tune --space optim ...`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or args[0] not in self.commands:
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=Sweeps)
def command() -> None:
    """Sweep over settings."""


@command.command(
    epilog="""\b
constellation tune report OUT       tables and plots from the sweep's log
constellation tune replay OUT ...   the same sweep under another scheduler, search or number of workers
constellation tune judge OUT ...    its winner against its preset, on text that it did not see"""
)
@click.option("--space", default=None, metavar="NAME|FILE", help="what is searched: a ready space, or TOML or YAML")
@options.corpus
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="the sweep's folder")
@click.option("--preset", default=None, metavar="NAME", help="tiny | small (default) | 23m | 100m | FILE.toml")
@click.option("--trials", default=16, show_default=True, type=click.IntRange(1), help="the first is the preset itself")
@click.option("--seeds", default=1, show_default=True, type=click.IntRange(1), help="of the best trials, paired")
@click.option("--search", default="tpe", show_default=True, type=click.Choice(SEARCHES))
@click.option("--scheduler", default="none", show_default=True, type=click.Choice(SCHEDULERS))
@click.option(
    "--rungs",
    default="decayed",
    show_default=True,
    type=click.Choice(["decayed"]),
    help="what a shorter run is: complete, with a learning rate that falls to its end",
)
@click.option(
    "--levels",
    default=3,
    show_default=True,
    type=click.IntRange(2),
    help="rungs of asha and hyperband, generations of pbt",
)
@click.option("--metric", default=None, metavar="NAME", help="lower is better; default: the space's")
@click.option(
    "--budget", default=None, metavar="TOKENS|SECONDS", help="of a full evaluation, 2e6 or 500s; default: the preset's"
)
@click.option("--jobs", default=None, type=click.IntRange(1), metavar="N", help="evaluations at once; default: all fit")
@click.option(
    "--keep", default=3, show_default=True, type=click.IntRange(1), help="evaluations that keep their weights"
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="of search and scheduler")
@options.address
@click.option("--resume", is_flag=True, help="go on with the sweep in DIR")
@options.as_json
@options.overrides
def run(
    space: str | None,
    corpus: Path | None,
    out: Path,
    preset: str | None,
    jobs: int | None,
    keep: int,
    address: str | None,
    resume: bool,
    as_json: bool,
    overrides: tuple[str, ...],
    **asked: Any,
) -> None:
    """Search settings for the lowest metric: trials on Ray, resumed exactly, winners on paired seeds.

    KEY=VALUE changes the preset that all trials share. Everything that is decided lies in DIR/events.jsonl; the winner
    in DIR/best.toml, which `constellation train --preset` takes.
    """
    from tune.events import LOG

    if ":/" in str(out):  # a path has one slash of a URL's two
        raise ConfigError(f"--out {out}: a sweep works in a folder that all its nodes see, not at a URL")
    there = (out / LOG).exists()
    if there and not resume:
        raise ConfigError(f"{out} holds a sweep already; go on with --resume, or choose another --out")
    if not there and out.exists() and (not out.is_dir() or any(f.name != ".lock" for f in out.iterdir())):
        raise ConfigError(f"--out {out} exists already and is no sweep; choose another")
    if not there and space is None:
        from tune.space import ready

        raise ConfigError(f"--space is missing: {', '.join(ready())}, or a file")
    if corpus is not None and not corpus.exists():
        raise ConfigError(f"corpus {corpus} does not exist")
    options.check_writable(out)
    request = None
    if not there or space is not None:
        request = _request(space or "", corpus, preset, overrides, asked)

    from constellation.storage.exclusive import exclusive
    from tune.conduct import conduct

    with exclusive(out):
        winner = conduct(out, request, jobs=jobs, address=address, keep=keep, as_json=as_json)
    if as_json:
        click.echo(json.dumps(winner))


def _request(
    name: str, corpus: Path | None, preset: str | None, overrides: tuple[str, ...], asked: dict[str, Any]
) -> SweepRequest:
    """What is asked for; `workers` and a budget in seconds are settled when the machine is known (conduct.py)."""
    from tune.request import SweepRequest
    from tune.schedulers import make_scheduler
    from tune.search import make_search
    from tune.space import read_space
    from tune.work import METRICS

    base = override(make_preset(preset or "small"), parse_assignments(overrides))
    space = read_space(name, base)
    metric, known = asked["metric"] or space.metric, METRICS[space.evaluates]
    if metric not in known:
        have = "; ".join(f"{key} ({words})" for key, words in known.items())
        raise ConfigError(f"metric {metric!r}: a {space.evaluates} has {have}")
    if asked["scheduler"] == "pbt" and (asked["seeds"] > 1 or space.evaluates != "model"):
        raise ConfigError(
            "--scheduler pbt: goes with --seeds 1 and spaces that evaluate a model; a lineage has one seed"
        )
    if asked["scheduler"] != "none" and space.evaluates == "router":
        raise ConfigError(f"--scheduler {asked['scheduler']}: a router has no shorter run; use none")
    scheduler = make_scheduler(asked["scheduler"], space, asked["trials"], asked["seed"], asked["levels"])
    make_search(asked["search"], space, asked["seed"])
    return SweepRequest(
        space, base, None if corpus is None else str(corpus.resolve()), _budget(asked["budget"], base, space),
        asked["trials"], 1, asked["seeds"], asked["seed"], asked["search"], asked["scheduler"], scheduler.rungs,
        asked["levels"], metric,
    )  # fmt: skip


def _budget(text: str | None, base: Config, space: Space) -> float:
    """Tokens; seconds as a negative number, to be measured."""
    if text is None:
        share = base.train.ocean_share if space.evaluates == "model" else 1.0
        return base.train.tokens * share
    try:
        value = float(text.removesuffix("s"))
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"--budget {text}: tokens, such as 2e6, or seconds, such as 500s")
    return -value if text.endswith("s") else value


@command.command()
@click.argument("out", type=click.Path(path_type=Path))
@options.as_json
def report(out: Path, as_json: bool) -> None:
    """Tables and plots from the log of the sweep in OUT, finished or not."""
    click.echo(importlib.import_module("tune.report").main_text(out, as_json=as_json))


@command.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--scheduler", default=None, type=click.Choice(SCHEDULERS), help="default: the sweep's own")
@click.option("--search", default=None, type=click.Choice(SEARCHES), help="default: the sweep's own")
@click.option("--workers", "--gpus", default=None, type=click.IntRange(1), metavar="N", help="default: as recorded")
@click.option("--seeds", default=10, show_default=True, type=click.IntRange(1), help="how often it is replayed")
@options.as_json
def replay(
    out: Path, scheduler: str | None, search: str | None, workers: int | None, seeds: int, as_json: bool
) -> None:
    """The finished sweep in OUT, replayed from its log under another scheduler, search or number of workers."""
    how = {"scheduler": scheduler, "search": search, "workers": workers, "seeds": seeds, "as_json": as_json}
    click.echo(importlib.import_module("tune.replay").main_text(out, **how))


@command.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--corpus", type=click.Path(path_type=Path), required=True, metavar="DIR", help="text that the sweep did not see"
)
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1), help="that the sweep did not use")
@options.as_json
def judge(out: Path, corpus: Path, seeds: int, as_json: bool) -> None:
    """Train the winner of OUT and its preset on new seeds, and compare them on text that the sweep did not see."""
    if not corpus.exists():
        raise ConfigError(f"corpus {corpus} does not exist")
    from constellation.storage.exclusive import exclusive

    if not out.is_dir():
        raise ConfigError(f"{out} does not exist")
    with exclusive(out):
        click.echo(importlib.import_module("tune.judge").main_text(out, corpus, seeds, as_json, options.say(True)))
