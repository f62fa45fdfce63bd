"""constellation chat"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

import constellation
from constellation.commands import options


@click.command()
@options.run
@options.sampling
@options.mode
@options.telemetry
@options.local
@options.address
def command(
    run: Path,
    seed: int,
    mode: str,
    telemetry: bool,
    local: bool,
    address: str | None,
    **sampling: Any,
) -> None:
    """Prompt after prompt: everything said so far is the context of the next answer.

    The kernels are trained on text, not on dialogue: they continue what stands there. An empty line
    begins anew, end of input (Ctrl-D) leaves. From a pipe a line in gives an answer out, and nothing else.
    """
    with constellation.open(run, local=local, address=address) as asked:
        said, turn, terminal = "", 0, sys.stdin.isatty()
        for line in _typed() if terminal else _piped():
            if not line:
                said = ""
                click.echo("[a new text]", err=True)
                continue
            said += line + "\n"
            shown, answer = None, ""
            stream = asked.stream(said, mode=mode, seed=seed + turn, **sampling)
            for piece in stream:
                if terminal and piece.text and piece.kernel != shown:
                    click.secho(f"{piece.kernel}> ", nl=False, bold=True)
                    shown = piece.kernel
                click.echo(piece.text, nl=False)
                answer += piece.text
            click.echo()
            if telemetry and stream.answer is not None:
                from constellation.pipeline.answered import telemetry_of_answer, told_line

                last = stream.answer
                click.echo(told_line(telemetry_of_answer(run, said, last.token_ids, last.kernels[-1])), err=True)
            said += answer + "\n"
            turn += 1


def _typed() -> Iterator[str]:
    """Lines typed on a terminal, each after a prompt mark."""
    while True:
        try:
            yield click.prompt("you", default="", show_default=False, prompt_suffix="> ")
        except click.Abort:
            click.echo()
            return


def _piped() -> Iterator[str]:
    for line in sys.stdin.buffer:
        yield line.decode("utf-8", "replace").rstrip("\r\n")
