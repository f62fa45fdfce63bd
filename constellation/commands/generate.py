"""constellation generate"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import constellation
from constellation.commands import options


@click.command()
@options.run
@click.option("--prompt", required=True, metavar="TEXT")
@options.sampling
@options.mode
@options.top_k_kernels
@options.telemetry
@options.local
@options.address
@options.as_json
def command(
    run: Path,
    prompt: str,
    mode: str,
    top_k_kernels: int,
    telemetry: bool,
    local: bool,
    address: str | None,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Answer a prompt: route it, decode on the kernel it belongs to, look again every W bytes, hand off.

    The kernels of a constellation that is `up` answer, else this process does; with --address actors in that Ray. The
    tokens are the same. --json prints text, tokens and the route, with a certificate of it, which reveals prompt and
    answer: `constellation route --verify`.
    """
    with constellation.open(run, local=local, address=address) as asked:
        stream = asked.stream(prompt, mode=mode, top_k_kernels=top_k_kernels, telemetry=as_json, **sampling)
        for piece in stream:
            if not as_json:
                click.echo(piece.text, nl=False)
    answer = stream.answer
    assert answer is not None
    measured: dict[str, Any] = {}
    if telemetry:
        from constellation.pipeline.answered import telemetry_of_answer

        measured = {"telemetry": telemetry_of_answer(run, prompt, answer.token_ids, answer.kernels[-1])}
    if as_json:
        options.print_json({"prompt": prompt, **answer.to_json(), **measured, "unfinished": asked.unfinished})
    else:
        click.echo()
        route = " -> ".join(answer.kernels)
        click.echo(f"[{route}; {answer.completion_tokens} tokens, {answer.finish_reason}]", err=True)
        if measured:
            from constellation.pipeline.answered import told_line

            click.echo(told_line(measured["telemetry"]), err=True)
