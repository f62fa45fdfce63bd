"""constellation export"""

from __future__ import annotations

from pathlib import Path

import click

from constellation.commands import options
from constellation.storage.objects import delivered, is_url


@click.command()
@options.run
@click.option("--kernel", required=True, metavar="ROLE", help="which of its kernels")
@click.option(
    "--format", "format_", type=click.Choice(["hf"]), default="hf", show_default=True, help="hf: transformers"
)
@click.option("--out", required=True, metavar="DIR", help="the folder to write, or a URL (s3://bucket/heart)")
def command(run: Path, kernel: str, format_: str, out: str) -> None:
    """Write a plain kernel as a LlamaForCausalLM folder, which transformers, vLLM and CTranslate2 load.

    The kernel must have been trained with kernel.metric=dot kernel.look_back=0 kernel.coupling=off, without a
    loop; every other kind is refused with the reason.
    """
    from constellation.pipeline.request import open_plan

    if kernel not in (models := open_plan(run).config.models):
        raise click.BadParameter(f"{kernel!r} is not one of {', '.join(models)}.", param_hint="'--kernel'")
    if not is_url(out):
        options.check_writable(Path(out))
    options.say_unfinished(run, kernel)
    from constellation.coordizer.tokenizer import Tokenizer
    from constellation.kernel.export import export_llama
    from constellation.train.checkpoint import load_model

    model, tokenizer = load_model(run / kernel), Tokenizer.load(run / "tokenizer.json")
    with delivered(out, last="config.json", say=options.say(True)) as folder:
        export_llama(model, folder, tokenizer.eos, tokenizer.specials[tokenizer.eos], run / "tokenizer.json")
    click.echo(f"{out}: {kernel}, {model.num_parameters():,} parameters, LlamaForCausalLM")
