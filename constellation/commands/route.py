"""constellation route"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from constellation.commands import options
from constellation.errors import ArtifactError, ConfigError, RunError

if TYPE_CHECKING:
    from router.decide.fisher_rao import FisherRaoRouter
    from router.decide.policy import RouteChoice


@click.command()
@options.run
@options.address
@options.as_json
@click.option(
    "--verify",
    default=None,
    metavar="FILE",
    help="check a certificate, or an answer in JSON that holds one; - is stdin",
)
def command(run: Path, address: str | None, as_json: bool, verify: str | None) -> None:
    """Explain who would answer each line of standard input: one text a line in, one decision a line out.

    With --json: counts used, basin coordinates z, distance to every centre, posterior, kernel, E8 root and
    neighbours. With --address the run's router actor in that Ray decides, else this process; the decisions are the
    same. With --verify: replay the decisions of an answer from the counts in its certificate, and hold text,
    tokens and kernels of the answer against it; status 0 when all agree, 1 when not. A certificate reveals its text.
    """
    from constellation.pipeline.request import open_plan

    plan = open_plan(run)
    if not (plan.router / "router.json").exists():
        raise ConfigError(f"{run} is not trained yet; constellation train --run {run} --resume")
    text = None if verify is None else sys.stdin.read() if verify == "-" else read(verify)
    options.say_unfinished(run)
    from router.decide.fisher_rao import FisherRaoRouter

    router = FisherRaoRouter.load(plan.router)
    if text is not None:
        check(text, router, plan.tokenizer, as_json)
        return
    with _decider(run, router, address) as route:
        for line in sys.stdin.buffer:
            (choice,) = route([line.rstrip(b"\r\n")])
            if as_json:
                options.print_json(choice.to_json(router.names))
                continue
            why = f" ({choice.reason})" if choice.abstained else ""
            likely = sorted(zip(choice.posterior.tolist(), router.names, strict=True), reverse=True)[:3]
            shown = ", ".join(f"{name} {p:.2f}" for p, name in likely)
            click.echo(f"{choice.kernel:<12}{why} {choice.counts_used} trigrams; {shown}; next {choice.neighbours[0]}")


@contextlib.contextmanager
def _decider(
    run: Path, router: FisherRaoRouter, address: str | None
) -> Iterator[Callable[[list[bytes]], list[RouteChoice]]]:
    """What decides: `router`, or the router actor of `run` in the Ray at `address`."""
    if address is None:
        yield router.route
        return
    from actors.remote import open_kernels

    with open_kernels(run, address=address, say=options.say(True)) as kernels:
        yield lambda texts: asyncio.run(kernels.route(texts))


def check(text: str, router: FisherRaoRouter, tokenizer: Path, as_json: bool) -> None:
    """Replay the certificate in `text`, or those of the answers in it, and say what holds; RunError when not."""
    from constellation.coordizer.tokenizer import Tokenizer
    from router.answer.certificate import replay
    from router.answer.verify import told_in, verify

    try:
        if not text.lstrip().startswith("{"):
            found, of = [replay(text.strip(), router)], "no answer beside it"
        else:
            words = Tokenizer.load(tokenizer)
            found = [verify(told, router, words) for told in told_in(parsed(text), words)]
            of = "it is this answer's"
    except ArtifactError as error:
        raise RunError(str(error)) from None
    for one in found:
        if as_json:
            options.print_json(one.to_json())
        else:
            click.echo(f"holds: {one}; mode {one.mode}, router {one.router_hash[:12]}; {of}")


def read(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--verify {path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def parsed(text: str) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"certificate: the answer is no JSON ({error})") from None
    return answer
