"""constellation data"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from constellation.commands import options
from constellation.config import override, parse_assignments
from constellation.errors import ConfigError
from constellation.presets import small


@click.group()
def command() -> None:
    """Make a corpus fit for training, or say what is wrong with it."""


def sifting(function: Callable[..., Any]) -> Callable[..., Any]:
    """What both say of the documents they want."""
    some = (
        options.corpus,
        click.option("--against", type=click.Path(path_type=Path), default=None, metavar="DIR",
                     help="held-out text, none of whose words may be trained on; default: the corpus' own dev"),
        click.option("--resemblance", default=0.8, show_default=True, type=float,
                     help="a document as near to an earlier one repeats it; 1: equal texts alone do"),
        click.option("--licences", default="", metavar="A,B", help="of the metadata, that are wanted; default: all"),
        click.option("--min-phi", default=0.0, show_default=True, type=click.FloatRange(0, 1),
                     help="off: it would be circular, for it chooses what a model integrates already"),
        click.option("--run", type=options.RunPlace(), default=None, metavar="DIR",
                     help="a run: how the text covers its basins, and its tokenizer counts"),
        options.as_json,
        options.overrides,
    )  # fmt: skip
    for option in reversed(some):
        function = option(function)
    return function


@command.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="a new folder, a corpus")
@sifting
def prepare(out: Path, as_json: bool, **asked: Any) -> None:
    """Leave out repeats, what is held out, other licences; cut, count, and write OUT/{train,dev} and a report."""
    from constellation.pipeline import preparation

    if out.exists():
        raise ConfigError(f"--out {out} exists already; choose another")
    options.check_writable(out)
    found, about = _sifted(asked)
    preparation.prepare(found, out, about)
    _tell({"out": str(out), **found.report(), **about}, as_json)


@command.command()
@sifting
def validate(as_json: bool, **asked: Any) -> None:
    """The same report without writing; exit status 1 when anything would be left out."""
    from constellation.pipeline import preparation

    found, about = _sifted(asked)
    _tell({**found.report(), **about}, as_json)
    preparation.refuse_unclean(found)


def _sifted(asked: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    from constellation.pipeline import preparation
    from constellation.pipeline.status import check_complete

    config = override(small(), parse_assignments(asked["overrides"]))
    run, min_phi = asked["run"], asked["min_phi"]
    if run is not None:
        check_complete(run)
    if min_phi:
        click.echo(preparation.PHI, err=True)
    licences = tuple(name.strip() for name in asked["licences"].split(",") if name.strip())
    wanted = preparation.Wanted(asked["resemblance"], licences, min_phi)
    found = preparation.sift(asked["corpus"], asked["against"], config, wanted, run)
    about = {
        "wanted": vars(wanted),
        "tokens": preparation.tokens_of(found, config, run and run / "tokenizer.json"),
        "coverage": preparation.coverage(found, run) if run is not None else None,
    }
    return found, about


def _tell(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        options.print_json(report)
        return
    for line in report["read"]:
        click.echo(line)
    for reason, count in report["left_out"].items():
        first = next(row for row in report["left_out_documents"] if row["reason"] == reason)
        detail = f" ({first['detail']})" if first["detail"] else ""
        click.echo(f"left out, {reason}: {count}, such as {first['source']}{detail}")
    for part in ("train", "dev"):
        row, tokens = report[part], report["tokens"][part]
        licences = ", ".join(f"{name} {count}" for name, count in row["licences"].items())
        click.echo(f"{part}: {row['documents']} documents, {row['bytes']:,} bytes, {tokens:,} tokens; {licences}")
        for domain, size in row["domains"].items():
            click.echo(f"  {domain or '(no domain)'}: {size:,} bytes")
    if covered := report["coverage"]:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in covered["shares"].items())
        click.echo(f"basins: spread over {covered['effective']:.2f} kernels; {shares}")
    if "out" in report:
        click.echo(f"wrote {report['out']}: constellation train --corpus {report['out']}")
