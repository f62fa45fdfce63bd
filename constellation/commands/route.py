"""constellation route"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from constellation.commands import options
from constellation.errors import ArtifactError, ConfigError, RunError

if TYPE_CHECKING:
    from router.route import Router


@click.command()
@options.run
@options.as_json
@click.option(
    "--verify",
    default=None,
    metavar="FILE",
    help="check a certificate, or an answer in JSON that holds one; - is stdin",
)
def command(run: Path, as_json: bool, verify: str | None) -> None:
    """Explain who would answer each line of standard input: one text a line in, one decision a line out.

    With --json: counts used, basin coordinates z, distance to every centre, posterior, kernel, E8 root and
    neighbours. With --verify: replay the decisions of an answer from the counts in its certificate; status 0
    when they hold, 1 when they do not.
    """
    from actors.plan import open_request
    from router.route import Router

    open_request(run)
    router = Router.load(run / "router")
    if verify is not None:
        check(verify, router, as_json)
        return
    for line in sys.stdin.buffer:
        text = line.rstrip(b"\r\n")
        (choice,) = router.route([text])
        if as_json:
            options.print_json(choice.to_json(router.names))
        else:
            why = f" ({choice.reason})" if choice.abstained else ""
            likely = sorted(zip(choice.posterior.tolist(), router.names, strict=True), reverse=True)[:3]
            shown = ", ".join(f"{name} {p:.2f}" for p, name in likely)
            click.echo(f"{choice.kernel:<12}{why} {choice.counts_used} trigrams; {shown}; next {choice.neighbours[0]}")


def check(source: str, router: Router, as_json: bool) -> None:
    """Replay the certificate in `source` and say what it holds; RunError when it does not."""
    from router.certificate import replay

    try:
        found = replay(certificate_of(sys.stdin.read() if source == "-" else read(source)), router)
    except ArtifactError as error:
        raise RunError(str(error)) from None
    if as_json:
        options.print_json(asdict(found))
    else:
        click.echo(f"holds: {found}; mode {found.mode}, router {found.router_hash[:12]}")


def read(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--verify {path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def certificate_of(text: str) -> str:
    """The certificate in `text`: the text itself, or that of an answer in JSON."""
    text = text.strip()
    if not text.startswith("{"):
        return text
    try:
        answer = json.loads(text)
    except json.JSONDecodeError as error:
        raise ArtifactError(f"certificate: the answer is no JSON ({error})") from None
    inner = answer.get("constellation")
    found = answer.get("certificate") or (inner.get("certificate") if isinstance(inner, dict) else None)
    if not isinstance(found, str):
        raise ArtifactError('certificate: the answer has no field "certificate", at the top or under "constellation"')
    return found
