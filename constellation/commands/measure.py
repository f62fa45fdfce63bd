"""constellation measure"""

from __future__ import annotations

from pathlib import Path

import click

from constellation.commands import options
from constellation.errors import ConfigError


@click.group()
def command() -> None:
    """Measure a trained run: studies with controls, intervals and a rule that is written before the numbers."""


@command.command()
@click.argument("run", type=options.RunPlace(), metavar="RUN")
@click.option("--kernel", "role", default="ocean", show_default=True, metavar="ROLE", help="which of its models")
@click.option("--lengths", default="128,256,512,1024,2048", show_default=True, metavar="L,L,...", help="tokens")
@click.option("--documents", default=16, show_default=True, type=click.IntRange(2), help="of held-out text")
@click.option("--interventions", default=8, show_default=True, type=click.IntRange(1), help="of a document and length")
@click.option(
    "--controls", default="untrained,plain,beta_zero,shuffled", show_default=True, metavar="A,B", help="or none"
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=None,
    metavar="DIR",
    help="trained controls; default: RUN/measure",
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=None, metavar="FILE", help="the raw result; plots beside it"
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
def beta(
    run: Path, role: str, lengths: str, documents: int, interventions: int, controls: str, work: Path | None,
    out: Path | None, seed: int,
) -> None:  # fmt: skip
    """How coupling J and curvature kappa of a kernel run with the context length: beta, its interval, its controls.

    beta = 0.44 is passed only where its interval lies within 0.34 .. 0.54 and every control's excludes 0.44. The
    controls plain and beta_zero are trained first, as long as OCEAN was.
    """
    from constellation.pipeline.request import open_plan

    open_plan(run)
    try:
        chosen = [int(word) for word in lengths.split(",")]
    except ValueError:
        raise ConfigError(f"--lengths {lengths}: whole numbers with commas, such as 128,256,512") from None
    if out is not None:
        options.check_writable(out.parent)
    from constellation.experiments import beta_study

    names = [] if controls == "none" else controls.split(",")
    beta_study.run(
        run, role=role, lengths=chosen, documents=documents, draws=interventions, controls=names, work=work, out=out,
        seed=seed, say=click.echo,
    )  # fmt: skip
