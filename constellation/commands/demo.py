"""constellation demo"""

from __future__ import annotations

import time
from pathlib import Path

import click

import constellation
from constellation.commands import options
from constellation.presets import preset as make_preset
from constellation.roster import OCEAN

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
    from constellation.data.cache import open_cache
    from constellation.pipeline.prepare import document_bytes, open_plan

    with constellation.open(run, local=True) as asked:
        texts = document_bytes(open_cache(open_plan(run).dev), asked.service.tokenizer)
        cut = [text[:PROMPT_BYTES].decode("utf-8", "ignore") for text in texts if len(text) > 4 * PROMPT_BYTES]
        first: dict[str, str] = {}
        for prompt, choice in zip(cut, asked.route(cut), strict=True):
            first.setdefault(choice.kernel, prompt)
        prompts = [first[name] for name in (*asked.kernels[1:], OCEAN) if name in first]
        answers = asked.generate(prompts, SAMPLE_TOKENS, temperature=0.7, top_p=0.9)
        for prompt, answer in zip(prompts, answers, strict=True):
            click.secho(f"\n{' -> '.join(answer.kernels)}", bold=True)
            click.echo(click.style(prompt, dim=True) + answer.text)
    click.echo()
