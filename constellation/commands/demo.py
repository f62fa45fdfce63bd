"""constellation demo"""

from __future__ import annotations

import time
from pathlib import Path

import click

from constellation.commands import options
from constellation.presets import preset as make_preset

PROMPT_BYTES = 96
SAMPLE_TOKENS = 64


@click.command()
@options.run
@click.option("--preset", default="small", show_default=True, metavar="NAME", help="tiny | small | 23m | 100m")
def command(run: Path, preset: str) -> None:
    """Train on the documentation and library of this Python, show who answers what, and score every way to answer.

    Called again, it goes on with the same run.
    """
    config = make_preset(preset)
    options.check_writable(run)
    began = time.perf_counter()

    from actors import launch
    from constellation.commands.display import Display, result_table
    from constellation.commands.eval import show
    from constellation.pipeline.evaluation import evaluate_run

    with Display() as display:
        resume = (run / "constellation.json").exists()
        for step in launch.train(run, None, config, resume=resume, say=display.say):
            display.show(step)
    result_table(launch.summary(run))
    trained = time.perf_counter()
    _samples(run)
    show(evaluate_run(run, None))
    ended = time.perf_counter()
    click.echo(f"\ntrained in {trained - began:.0f} s, sampled and scored in {ended - trained:.0f} s. Now ask it:")
    click.echo(f"  constellation generate --run {run} --prompt 'def read(path):'")


def _samples(run: Path) -> None:
    """For each kernel the beginning of a held-out document that is routed to it, and how it goes on."""
    from constellation.commands.answering import Answering
    from constellation.data.cache import open_cache
    from constellation.pipeline.prepare import document_bytes, open_plan
    from router.answer.session import Answer, Request

    plan = open_plan(run)
    with Answering(run, local=True, address=None) as constellation:
        texts = [t for t in document_bytes(open_cache(plan.dev), constellation.tokenizer) if len(t) > 4 * PROMPT_BYTES]
        cut = [t[:PROMPT_BYTES].decode("utf-8", "ignore") for t in texts]
        requests: dict[str, Request] = {}
        settings = options.Settings(SAMPLE_TOKENS, 0.7, 0, 0.9, 0.0, 1.0, 0, ()).sampling()
        for prompt, choice in zip(cut, constellation.router.route([c.encode() for c in cut]), strict=True):
            requests.setdefault(choice.kernel, Request(prompt, settings))
        names = sorted(requests, key=lambda n: (*constellation.router.names, n).index(n))
        answers = [p for p in constellation.ask_all([requests[n] for n in names]) if isinstance(p, Answer)]
        for name, answer in zip(names, sorted(answers, key=lambda a: a.request), strict=True):
            click.secho(f"\n{' -> '.join(answer.kernels)}", bold=True)
            click.echo(click.style(str(requests[name].prompt), dim=True) + answer.text)
    click.echo()
