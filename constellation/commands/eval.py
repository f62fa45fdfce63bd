"""constellation eval"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from constellation.commands import options


@click.command()
@options.run
@options.corpus
@click.option("--top-k", default=3, show_default=True, type=click.IntRange(1, 240), help="kernels of the mixture")
@options.as_json
def command(run: Path, corpus: Path | None, top_k: int, as_json: bool) -> None:
    """Causal bits per byte of every way to answer held-out text.

    Documents that the run was trained on are left out and counted. Without --corpus the run's own held-out
    documents are scored.
    """
    from actors.evaluation import evaluate_run

    result = evaluate_run(run, corpus, top_k)
    if as_json:
        options.print_json(result)
    else:
        show(result)


def show(result: dict[str, Any]) -> None:
    from rich.console import Console

    from constellation.commands.display import table_of

    arms = result["answers"]
    domains = list(arms["routed"]["domains"])
    title = f"causal bits per byte, {result['documents']} documents, {result['bytes']:,} bytes"
    table = table_of(title, ("answer", "all", "- ocean", *domains), ("all", "- ocean", *domains))
    base = arms["ocean"]["bits_per_byte"]
    for name, row in arms.items():
        values = [row["bits_per_byte"], row["bits_per_byte"] - base, *row["domains"].values()]
        table.add_row(name, *(f"{v:+.3f}" if i == 1 else f"{v:.3f}" for i, v in enumerate(values)))
    console = Console()
    console.print(table)
    if result["excluded_documents"]:
        console.print(f"{result['excluded_documents']} documents were part of the training text and left out")
