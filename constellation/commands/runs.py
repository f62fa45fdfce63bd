"""constellation runs"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from constellation.commands import options
from constellation.errors import ConfigError

META = "meta.json"  # with the configuration, for --diff
SHOWN = ("run", "status", "steps", "tokens", "first_loss_nats", "last_loss_nats", "best_dev_bits_per_byte", "runtime_s")


@click.command()
@click.argument("place", metavar="DIR")
@click.option("--filter", "filters", multiple=True, metavar="NAME=VALUE", help="also != < <= > >= and ~; all must hold")
@click.option("--sort", default=None, metavar="NAME", help="by a column or a setting, smallest first")
@click.option("--reverse", is_flag=True, help="largest first")
@click.option("--limit", type=click.IntRange(1), default=None, metavar="N", help="the first N only")
@click.option("--columns", default=None, metavar="A,B", help="which columns, or settings; all: every one")
@click.option("--compare", default=None, metavar="RUN,RUN", help="what these runs' rows differ in, side by side")
@click.option("--diff", default=None, metavar="RUN,RUN", help="the settings in which two runs differ")
@click.option("--write", is_flag=True, help="write DIR/table.parquet and DIR/table.csv")
@options.as_json
def command(
    place: str, filters: tuple[str, ...], sort: str | None, reverse: bool, limit: int | None, columns: str | None,
    compare: str | None, diff: str | None, write: bool, as_json: bool,
) -> None:  # fmt: skip
    """The runs in DIR, a row each, from their summaries: list, filter, sort, compare, and diff configurations.

    DIR is an experiment, a constellation, or any folder that holds some; or a URL, such as s3://bucket/runs.
    """
    from constellation.artifacts import table
    from constellation.storage.mirror import excerpt
    from constellation.storage.objects import is_url

    if write and is_url(place):
        raise ConfigError("--write: a table is written into a folder; take --json, or a folder's runs")
    with excerpt(place, {table.SUMMARY, META}, options.say(True)) as folder:
        rows = table.rows_of(folder)
        if diff is not None:
            _differ(diff.split(","), _pick(rows, diff, 2, 2, folder), folder, as_json)
            return
        if compare is not None:
            rows = _pick(rows, compare, 2, None, folder)
            found = table.compared(rows)
            names = [row["run"] for row in rows]
            if as_json:
                options.print_json({name: dict(zip(names, values)) for name, values in found.items()})
            else:
                _print("what differs", ["", *found.pop("run")], [[name, *values] for name, values in found.items()])
            return
        rows = table.select(rows, filters)
        rows = table.ordered(rows, sort, reverse) if sort and rows else rows
        rows = rows[:limit]
        if write:
            for file in table.write(rows, folder):
                click.echo(f"{file}: {len(rows)} runs", err=as_json)
            if not as_json:
                return
        if as_json:
            options.print_json(rows)
            return
        names = _columns(rows, columns, [sort] if sort else [])
        _print(f"{len(rows)} runs in {place}", names, [[row.get(name) for name in names] for row in rows])


def _columns(rows: list[dict[str, Any]], asked: str | None, besides: list[str]) -> list[str]:
    from constellation.artifacts import table

    known = table.columns(rows)
    if asked == "all":
        return known
    if asked is not None:
        names = ["run", *(name.strip() for name in asked.split(","))]
        if unknown := [name for name in names if rows and name not in known]:
            raise ConfigError(f"--columns: no run has {unknown[0]!r}; there is {', '.join(known)}")
        return list(dict.fromkeys(names))
    return list(dict.fromkeys([*(name for name in SHOWN if name in known or name == "run"), *besides]))


def _pick(rows: list[dict[str, Any]], words: str, least: int, most: int | None, folder: Path) -> list[dict[str, Any]]:
    """The rows that `words` name, by folder or run id."""
    names = [name.strip() for name in words.split(",") if name.strip()]
    if len(names) < least or (most and len(names) > most):
        raise ConfigError(f"{words!r}: {'two runs are' if most else 'at least two runs are'} wanted, such as a,b")
    found = []
    for name in names:
        own = [row for row in rows if name in (row["run"], row.get("run_id"))]
        if len(own) != 1:
            some = ", ".join(row["run"] for row in rows[:8]) or "none"
            raise ConfigError(
                f"{folder} has {len(own)} runs {name!r}; there is {some}{', ...' if len(rows) > 8 else ''}"
            )
        found += own
    return found


def _differ(words: list[str], rows: list[dict[str, Any]], folder: Path, as_json: bool) -> None:
    from constellation.artifacts.saved import open_run
    from constellation.config import difference, from_json

    old, new = (from_json(open_run(folder / row["run"]).meta["config"]) for row in rows)
    found = difference(old, new)
    if as_json:
        options.print_json(found)
    else:
        title = f"{len(found)} settings differ" if found else "no setting differs"
        _print(title, ["setting", *(word.strip() for word in words)], [[n, a, b] for n, (a, b) in found.items()])


def _print(title: str, names: list[str], rows: list[list[Any]]) -> None:
    from rich.console import Console

    from constellation.commands.display import table_of

    numeric = [name for i, name in enumerate(names) if any(isinstance(row[i], (int, float)) for row in rows)]
    shown = table_of(title, tuple(names), tuple(numeric))
    for row in rows:
        shown.add_row(*(_text(value) for value in row))
    Console(soft_wrap=False).print(shown, markup=False)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
