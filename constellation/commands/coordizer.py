"""constellation coordizer"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from constellation.commands import options
from constellation.config import Coordizer, override, parse_assignments
from constellation.errors import ConfigError
from constellation.presets import preset as make_preset
from constellation.settings import settings_of

SCORES = tuple(settings_of(Coordizer)["score"].kind.values)


@click.group()
def command() -> None:
    """Learn a tokenizer with coordinates of its tokens, and judge tokenizers."""


@command.command()
@options.corpus
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="the coordizer's folder")
@click.option(
    "--vocab", default=32_000, show_default=True, type=click.IntRange(272), metavar="N",
    help="tokens: 256 bytes, 16 special ones and merges",
)  # fmt: skip
@click.option("--score", default=None, type=click.Choice(SCORES), help="what the next merge is chosen by")
@click.option("--resume", is_flag=True, help="go on with the training in DIR")
@options.as_json
@options.overrides
def train(
    corpus: Path | None, out: Path, vocab: int, score: str | None, resume: bool, as_json: bool,
    overrides: tuple[str, ...],
) -> None:  # fmt: skip
    """Learn merges by a score, and coordinates of the tokens: DIR/tokenizer.json, coordinates.npy, coordizer.json.

    `constellation train --tokenizer DIR` uses it. KEY=VALUE changes a setting coordizer.* or data.*.
    """
    changes = parse_assignments(overrides)
    if wrong := [name for name in changes if not name.startswith(("coordizer.", "data."))]:
        raise ConfigError(f"{wrong[0]}: a coordizer is trained with settings coordizer.* and data.* alone")
    if score is not None and changes.setdefault("coordizer.score", score) != score:
        raise ConfigError(f"--score {score} and coordizer.score={changes['coordizer.score']}: say one of them")
    config = override(make_preset("small"), changes)
    if corpus is not None and not corpus.exists():
        raise ConfigError(f"corpus {corpus} does not exist")
    from constellation.coordizer import trainer
    from constellation.data.corpus import read_corpus
    from constellation.decoding.compiled import Unavailable, library
    from constellation.storage.exclusive import exclusive

    trainer.check(out, resume)
    options.check_writable(out)
    say = options.say(as_json)
    try:
        library()
    except Unavailable as reason:
        say(f"merging in Python, many times slower: {reason}")
    documents = read_corpus(corpus, config.data)
    learnt, _ = documents.split(config.data.dev_fraction)
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out):
        if not (resume and (out / trainer.MANIFEST).exists()):
            last = -1.0
            for now in trainer.train(learnt, documents.hash, out, vocab, config.coordizer):
                done = now.tokens / now.vocabulary
                if now.words != "merging" or done - last >= 0.05:
                    say(f"{now.words:<21} {now.tokens:>7,} of {now.vocabulary:,} tokens")
                    last = done
    made = trainer.load(out)
    if made.tokenizer.vocab_size < vocab:
        say(f"no pair is left to merge after {made.tokenizer.vocab_size:,} of {vocab:,} tokens")
    _tell(made.manifest, as_json)


def _tell(manifest: dict[str, Any], as_json: bool) -> None:
    if as_json:
        options.print_json(manifest)
        return
    near = manifest["neighbours"]
    if near["learned"] is not None:
        click.echo(
            f"coordinates: cosine of the company that neighbours keep in other text {near['learned']:.3f}, "
            f"of shuffled ones {near['shuffled']:.3f} ({near['tokens']:,} tokens)"
        )


@command.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="DIR...")
@options.corpus
@click.option("--work", type=click.Path(path_type=Path), required=True, metavar="DIR", help="for caches and kernels")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(0), help="of every kernel; 0: train none")
@click.option("--preset", default="small", show_default=True, metavar="NAME", help="of the kernels")
@click.option("--out", type=click.Path(path_type=Path), default=None, metavar="FILE", help="write the raw result")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="a setting of the kernels")
def eval(
    folders: tuple[Path, ...], corpus: Path | None, work: Path, seeds: int, preset: str, out: Path | None,
    assignments: tuple[str, ...],
) -> None:  # fmt: skip
    """Judge coordizers on held-out text: what they are like, and bits per byte of kernels that are trained on them.

    One kernel for each, at equal FLOPs (head charged) and at equal bytes, as many as train.tokens tokens of the first
    one cost and hold; differences from the first, paired by seed and document. Folders of the same score choose their
    vocabulary on half of the documents and are reported on the other.
    """
    if corpus is not None and not corpus.exists():
        raise ConfigError(f"corpus {corpus} does not exist")
    config = override(make_preset(preset), parse_assignments(assignments))
    from constellation.coordizer.trainer import load
    from constellation.data.corpus import read_corpus
    from constellation.experiments import bench_coordizer
    from constellation.experiments.harness import finish

    made = [(folder, load(folder)) for folder in folders]
    candidates = [bench_coordizer.Candidate(str(m.manifest["score"]), f, m.tokenizer) for f, m in made]
    work.mkdir(parents=True, exist_ok=True)
    documents = read_corpus(corpus, config.data)
    result = bench_coordizer.judge(documents, work, config, candidates, seeds=range(seeds), say=options.say(False))
    finish(result, bench_coordizer.markdown(result).splitlines(), out)
