"""constellation eval"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from constellation.commands import options
from constellation.errors import ConfigError


@click.command()
@options.run
@options.corpus
@click.option("--top-k", default=3, show_default=True, type=click.IntRange(1, 240), help="kernels of the mixture")
@options.as_json
def command(run: Path, corpus: Path | None, top_k: int, as_json: bool) -> None:
    """Causal bits per byte of every way to answer held-out text, in this process.

    Documents that the run was trained on are left out and counted. Without --corpus the run's own held-out
    documents are scored.
    """
    from constellation.pipeline.status import check_complete

    check_complete(run)
    if corpus is not None and not corpus.exists():
        raise ConfigError(f"corpus {corpus} does not exist")
    left = options.say_unfinished(run)
    from constellation.pipeline.evaluation import evaluate_run

    result = {**evaluate_run(run, corpus, top_k), "unfinished": left}
    if as_json:
        options.print_json(result)
    else:
        show(result)


def show(result: dict[str, Any]) -> None:
    from rich.console import Console

    from constellation.commands.display import table_of

    arms = result["answers"]
    base = arms["ocean"]["bits_per_byte"]
    title = f"causal bits per byte, {result['documents']} documents, {result['bytes']:,} bytes"
    columns = ("bits/byte", "- ocean", "after byte 64")
    table = table_of(title, ("answer", *columns), columns)
    for name, row in arms.items():
        late = "-" if row["after_64_bytes"] is None else f"{row['after_64_bytes']:.3f}"
        table.add_row(name, f"{row['bits_per_byte']:.3f}", f"{row['bits_per_byte'] - base:+.3f}", late)
    shown = [n for n in arms if not n.startswith("alone:")]
    by_domain = table_of("\nby domain", ("domain", *shown), tuple(shown))
    for domain in arms["routed"]["domains"]:
        by_domain.add_row(domain, *(f"{arms[n]['domains'][domain]:.3f}" for n in shown))
    console = Console()
    console.print(table, by_domain)
    if result["excluded_documents"]:
        console.print(f"{result['excluded_documents']} documents were part of the training text and left out")
