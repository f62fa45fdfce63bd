"""constellation bench"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from constellation.commands import options
from constellation.config import override, parse_assignments
from constellation.errors import ConfigError
from constellation.presets import preset as make_preset

out = click.option("--out", type=click.Path(path_type=Path), default=None, metavar="FILE", help="write the raw result")


@click.group()
def command() -> None:
    """Measure, side by side with the named peers, and print ratios."""


@command.command()
@click.option("--centres", default=240, show_default=True, type=click.IntRange(1, 240))
@out
def route(centres: int, out: Path | None) -> None:
    """The router: milliseconds a query, a batch, a streamed byte; against tf-idf in the same run."""
    from constellation.experiments import bench_route

    bench_route.run(centres=centres, out=out)


@command.command()
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(1), help="of each contestant, in turns")
@out
def decode(repeats: int, out: Path | None) -> None:
    """Decoding: tokens per second against transformers and CTranslate2 with equal weights, memory, cold start."""
    from constellation.experiments import bench_decode

    bench_decode.run(repeats=repeats, out=out)


@command.command()
@click.option("--seconds", default=6.0, show_default=True, type=click.FloatRange(1), help="CPU-seconds of a run")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1), help="paired")
@click.option("--arms", default=None, metavar="A,B", help="default: all of them")
@click.option("--corpus", type=click.Path(path_type=Path, exists=True), default=None, metavar="DIR")
@click.option("--digits", type=click.Path(path_type=Path, exists=True), default=None, metavar="DIR", help="IDX images")
@click.option("--work", type=click.Path(path_type=Path), required=True, metavar="DIR", help="prepared data")
@click.option("--workers", type=click.IntRange(1), default=None, help="default: one a core")
@out
def gating(
    seconds: float, seeds: int, arms: str | None, corpus: Path | None, digits: Path | None, work: Path,
    workers: int | None, out: Path | None,
) -> None:  # fmt: skip
    """Natural steps never, always, or behind the gate and its phases: at equal CPU time, on three kinds of problem."""
    from constellation.experiments import bench_gating as bench

    chosen = tuple(arms.split(",")) if arms else bench.ARMS
    bench.run(
        seconds=seconds, seeds=seeds, arms=chosen, corpus=corpus, digits=digits, work=work, workers=workers, out=out
    )


@command.command()
@click.option("--seconds", default=20.0, show_default=True, type=click.FloatRange(1), help="of each measurement")
@click.option("--preset", default="small", show_default=True)
@out
def train(seconds: float, preset: str, out: Path | None) -> None:
    """Training: tokens per second against a nanoGPT-style loop, two kernels against one, Ray's overhead."""
    from constellation.experiments import bench_train

    bench_train.run(make_preset(preset), seconds=seconds, out=out)


@command.command()
@click.option("--turns", default=15, show_default=True, type=click.IntRange(2), help="of each pair")
@click.option("--preset", default="small", show_default=True)
@out
def kernels(turns: int, preset: str, out: Path | None) -> None:
    """Kinds of kernel: metrics, couplings, shared keys and recursion, training and decoding, each beside its peer."""
    from constellation.experiments import bench_kernels

    bench_kernels.run(make_preset(preset), turns=turns, out=out)


@command.command()
@options.corpus
@click.option("--work", type=click.Path(path_type=Path), required=True, metavar="DIR", help="models; reused")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1, 100), help="paired")
@click.option("--arms", default=None, metavar="A,B", help="metric/recursion/temperature; default: one of them changed")
@click.option("--full", is_flag=True, help="all 36 arms")
@click.option("--preset", default="small", show_default=True)
@out
@options.overrides
def recursion(
    corpus: Path | None, work: Path, seeds: int, arms: str | None, full: bool, preset: str, out: Path | None,
    overrides: tuple[str, ...],
) -> None:  # fmt: skip
    """Metric, recursion and temperature at equal FLOPs: bits per byte, also at 4 x the context; loops; an adapter."""
    if corpus is not None and not corpus.exists():
        raise ConfigError(f"corpus {corpus} does not exist")
    config = override(make_preset(preset), parse_assignments(overrides))
    from constellation.experiments import bench_recursion as bench

    chosen = bench.ALL if full else tuple(arms.split(",")) if arms else bench.ONE_CHANGED
    bench.run(corpus, work, config, seeds=range(seeds), arms=chosen, out=out, say=click.echo)


@command.command()
@click.option("--corpus", type=click.Path(path_type=Path, exists=True), required=True, metavar="DIR")
@click.option(
    "--work", type=click.Path(path_type=Path), required=True, metavar="DIR", help="models; reused when called again"
)
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1, 100))
@click.option("--arms", default=None, metavar="A,B", help="a part of the arms")
@click.option("--preset", default="small", show_default=True)
@click.option("--dense", "dense_words", multiple=True, metavar="KEY=VALUE", help="a setting of the dense arms alone")
@click.option("--workers", default=None, type=click.IntRange(1), help="processes; default: one a core")
@out
@options.overrides
def dense(
    corpus: Path,
    work: Path,
    seeds: int,
    arms: str | None,
    preset: str,
    dense_words: tuple[str, ...],
    workers: int | None,
    out: Path | None,
    overrides: tuple[str, ...],
) -> None:
    """Routed kernels against dense kernels at equal tokens and FLOPs, over seeds, with intervals and kill rules."""
    from constellation.experiments import bench_dense, dense_report

    config = override(make_preset(preset), parse_assignments(overrides))
    chosen = tuple(arms.split(",")) if arms else ("dense", "dense_token", *bench_dense.ROUTED)
    unknown = set(chosen) - {"dense", "dense_token", *bench_dense.ROUTED}
    if unknown or "dense" not in chosen:
        raise ConfigError(f"--arms {arms}: dense and any of dense_token, {', '.join(bench_dense.ROUTED)}")
    result = bench_dense.run(
        corpus, work, config, seeds=range(seeds), dense=parse_assignments(dense_words), arms=chosen, workers=workers,
        say=click.echo,
    )  # fmt: skip
    click.echo(dense_report.markdown(result))
    if out:
        dense_report.save(result, out)
        click.echo(f"raw result: {out}")


@command.command()
@click.option(
    "--full", is_flag=True, help="all of it: about an hour of CPU time; default: a part, under ten minutes on two cores"
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path("runs/bench-optim"),
    show_default=True,
    metavar="DIR",
    help="finished trials; reused when called again",
)
@options.corpus
@click.option(
    "--digits",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=None,
    metavar="DIR",
    help="folder of MNIST's IDX image files; default: scikit-learn's digits",
)
@click.option("--tasks", default=None, metavar="A,B", help="a part of the tasks")
@click.option("--optimizers", default=None, metavar="A,B", help="a part of the rows; AdamW is always among them")
@click.option("--scale", default=None, type=click.FloatRange(0, 1, min_open=True), help="of every run's length")
@click.option("--workers", default=None, type=click.IntRange(1), help="processes; default: one a core")
@click.option(
    "--table",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    default=None,
    metavar="FILE",
    help="run nothing: make README's table, and the files beside FILE, from this raw result",
)
@click.option(
    "--readme",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("README.md"),
    show_default=True,
    help="where --table writes, between <!-- optim --> and <!-- /optim -->",
)
@out
def optim(
    full: bool,
    work: Path,
    corpus: Path | None,
    digits: Path | None,
    tasks: str | None,
    optimizers: str | None,
    scale: float | None,
    workers: int | None,
    table: Path | None,
    readme: Path,
    out: Path | None,
) -> None:
    """Natural-gradient optimizers against tuned AdamW, Muon, SOAP, PSGD and schedule-free: steps and CPU-seconds."""
    import dataclasses

    if corpus is not None and not corpus.exists():
        raise ConfigError(f"corpus {corpus} does not exist")
    from constellation.experiments import bench_optim, optim_report
    from constellation.storage.atomic import read_json

    if table is not None:
        result = read_json(table)
        result |= optim_report.analyse(result)
        files = optim_report.save(result, table)
        optim_report.rewrite(readme, result)
        click.echo(f"{readme}, {', '.join(map(str, files))}")
        return
    profile = bench_optim.FULL if full else bench_optim.QUICK
    changes: dict[str, Any] = {"tasks": tasks and tuple(tasks.split(",")), "scale": scale}
    changes["rows"] = optimizers and tuple(optimizers.split(","))
    profile = dataclasses.replace(profile, **{k: v for k, v in changes.items() if v})
    result = bench_optim.run(
        profile, work, corpus=corpus, digits=digits, workers=workers, say=click.echo, live=sys.stderr.isatty()
    )
    click.echo(optim_report.markdown(result))
    for file in optim_report.save(result, out or work / "optim.json"):
        click.echo(f"wrote {file}")


@command.command()
@click.option("--url", default=None, metavar="URL", help="a service that runs")
@click.option(
    "--run",
    default=None,
    type=click.Path(path_type=Path, exists=True),
    metavar="DIR",
    help="start a service of this run, and end it",
)
@click.option("--streams", default=64, show_default=True, type=click.IntRange(1), help="answers under way at once")
@click.option("--seconds", default=300.0, show_default=True, type=click.FloatRange(0, min_open=True))
@click.option("--tokens", default=64, show_default=True, type=click.IntRange(1), help="of an answer")
@click.option(
    "--rate",
    default=None,
    type=click.FloatRange(0, min_open=True),
    metavar="R",
    help="requests a second, at random times; default: each stream asks again at once",
)
@click.option("--leave", default=0.0, type=click.FloatRange(0, 1), help="part of the clients that leave in the middle")
@click.option("--mode", default="", metavar="route|ocean|KERNEL|...", help="who answers; default: the service's")
@click.option("--seed", default=0, type=int)
@click.option("--api-key", default="", envvar="CONSTELLATION_API_KEY", metavar="KEY", help="or CONSTELLATION_API_KEY")
@out
def serve(
    url: str | None,
    run: Path | None,
    streams: int,
    seconds: float,
    tokens: int,
    rate: float | None,
    leave: float,
    mode: str,
    seed: int,
    api_key: str,
    out: Path | None,
) -> None:
    """The service under load: errors, leaks, fairness; times to the first token and between tokens, p50 and p99."""
    from constellation.experiments import bench_serve
    from constellation.experiments.load import Load

    bench_serve.run(url, Load(streams, seconds, tokens, rate, leave, mode, seed), run=run, key=api_key, out=out)


@command.command()
@options.run
@click.option("--corpus", type=click.Path(path_type=Path, exists=True), default=None, metavar="DIR",
              help="default: the run's own held-out documents")  # fmt: skip
@click.option(
    "--bytes", "most_bytes", default=30_000, show_default=True, type=click.IntRange(1), help="of held-out text"
)
@click.option("--answers", default=8, show_default=True, type=click.IntRange(1), help="of each mode, one after another")
@click.option("--tokens", default=128, show_default=True, type=click.IntRange(1), help="of each answer")
@options.local
@out
def modes(
    run: Path, corpus: Path | None, most_bytes: int, answers: int, tokens: int, local: bool, out: Path | None
) -> None:
    """Ways to answer: held-out bits per byte beside tokens per second; what HTTP and Ray cost a token."""
    from constellation.pipeline.status import check_complete

    check_complete(run)
    from constellation.experiments import bench_modes, harness

    result = bench_modes.run(
        run, corpus=corpus, most_bytes=most_bytes, answers=answers, tokens=tokens, over_ray=not local, say=click.echo
    )
    if out:
        harness.save(result, out)
        click.echo(f"raw result: {out}")


@command.command()
@click.option("--model", type=click.Path(path_type=Path, exists=True), required=True, metavar="DIR",
              help="a run's model that judges, such as RUN/ocean; not trained on the text")  # fmt: skip
@options.corpus
@click.option("--documents", default=0, show_default=True, type=click.IntRange(0), help="at most; 0: all held-out ones")
@click.option("--orders", default=8, show_default=True, type=click.IntRange(1), help="shuffles that a text is held to")
@out
@options.overrides
def coherence(
    model: Path, corpus: Path | None, documents: int, orders: int, out: Path | None, overrides: tuple[str, ...]
) -> None:
    """The coherence score: does it rank real text above shuffled sentences and above repetition? AUROCs."""
    config = override(make_preset("small"), parse_assignments(overrides))
    from constellation.experiments import bench_coherence
    from constellation.experiments.harness import finish

    result = bench_coherence.run(model, corpus, config.data, most=documents, orders=orders, say=click.echo)
    finish(result, bench_coherence.lines(result), out)


@command.command()
@options.corpus
@click.option("--vocab", default=32_000, show_default=True, type=click.IntRange(272), metavar="N")
@click.option(
    "--bytes", "most_bytes", default=1e8, show_default=True, type=click.FloatRange(1), help="of text, at most"
)
@click.option("--encode-bytes", default=2e6, show_default=True, type=click.FloatRange(1), help="of it, encoded")
@out
def merging(corpus: Path | None, vocab: int, most_bytes: float, encode_bytes: float, out: Path | None) -> None:
    """Learning merges by frequency and encoding, beside the library `tokenizers`: CPU-seconds and ratios."""
    from constellation.data.corpus import read_corpus
    from constellation.experiments import bench_merging
    from constellation.experiments.harness import finish

    texts, size = [], 0
    for document in read_corpus(corpus, make_preset("small").data).documents:
        if size < most_bytes:
            texts.append(document.text)
            size += document.num_bytes
    result = bench_merging.run(texts, vocab, int(encode_bytes))
    finish(result, bench_merging.lines(result), out)


@command.command()
@options.corpus
@click.option(
    "--work", type=click.Path(path_type=Path), required=True, metavar="DIR", help="models; reused when called again"
)
@click.option("--scores", default="frequency,pmi,unigram_gain,parity,superword,basin,attention,kernel", metavar="A,B")
@click.option("--vocabs", default="512,1024,2048", show_default=True, metavar="N,N", help="each score chooses one")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1, 100))
@click.option("--preset", default="small", show_default=True)
@out
@options.overrides
def coordizer(
    corpus: Path | None, work: Path, scores: str, vocabs: str, seeds: int, preset: str, out: Path | None,
    overrides: tuple[str, ...],
) -> None:  # fmt: skip
    """What each merge is chosen by: bits per byte at equal FLOPs and at equal bytes, vocabulary re-optimised."""
    if corpus is not None and not corpus.exists():
        raise ConfigError(f"corpus {corpus} does not exist")
    config = override(make_preset(preset), parse_assignments(overrides))
    sizes = [int(word) for word in vocabs.split(",") if word.strip().isdecimal() and int(word) >= 272]
    if len(sizes) != len(vocabs.split(",")):
        raise ConfigError(
            f"--vocabs {vocabs}: whole numbers of at least 272 with commas between them, such as 512,1024"
        )
    from constellation.coordizer.scores import score_of
    from constellation.experiments import bench_coordizer
    from constellation.experiments.harness import finish

    names = [score_of(name).name for name in scores.split(",")]
    work.mkdir(parents=True, exist_ok=True)
    result = bench_coordizer.run(
        corpus, work, config, scores=names, vocabularies=sizes, seeds=range(seeds), say=click.echo
    )
    finish(result, bench_coordizer.markdown(result).splitlines(), out)


@command.command()
@options.corpus
@click.option("--preset", default="tiny", show_default=True)
@click.option("--tokens", default=1e6, show_default=True, type=click.FloatRange(1), help="of an evaluation of OCEAN")
@click.option("--trials", default=4, show_default=True, type=click.IntRange(1), help="evaluations of a turn")
@click.option("--turns", default=1, show_default=True, type=click.IntRange(1), help="of each way, alternating")
@out
@options.overrides
def tune(
    corpus: Path | None, preset: str, tokens: float, trials: int, turns: int, out: Path | None,
    overrides: tuple[str, ...],
) -> None:  # fmt: skip
    """A sweep on Ray against the plain loop: seconds of the same evaluations, and the ratio."""
    if corpus is not None and not corpus.exists():
        raise ConfigError(f"corpus {corpus} does not exist")
    config = override(make_preset(preset), parse_assignments(overrides))
    from constellation.experiments import bench_tune

    bench_tune.run(config, corpus=corpus, tokens=tokens, trials=trials, turns=turns, out=out)


@command.command()
@click.option("--steps", default=300, show_default=True, type=click.IntRange(60), help="of each run")
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(2), help="paired")
@click.option("--faults", default=None, metavar="A,B", help="default: all of them")
@click.option("--arms", default=None, metavar="A,B", help="default: all of them")
@options.corpus
@click.option("--work", type=click.Path(path_type=Path), required=True, metavar="DIR", help="prepared data")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="processes")
@out
def recovery(
    steps: int, seeds: int, faults: str | None, arms: str | None, corpus: Path | None, work: Path, workers: int,
    out: Path | None,
) -> None:  # fmt: skip
    """Recoveries against injected faults: steps to recover and final loss, beside doing nothing."""
    from constellation.experiments import bench_recovery as bench

    chosen = _some("--faults", faults, bench.FAULTS), _some("--arms", arms, bench.ARMS)
    bench.run(
        steps=steps, seeds=seeds, faults=chosen[0], arms=chosen[1], corpus=corpus, work=work, workers=workers, out=out
    )


def _some(option: str, words: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    """What "a,b" names of `known`, None: all; ConfigError for another name."""
    names = known if words is None else tuple(words.split(","))
    for name in names:
        if name not in known:
            raise ConfigError(f"{option} {words}: {name!r} is none of {', '.join(known)}")
    return names


@command.command()
@click.option("--preset", default="small", show_default=True, help="whose training the cost is a share of")
@click.option("--cost-steps", default=160, show_default=True, type=click.IntRange(51), help="of the run that is timed")
@click.option("--steps", default=300, show_default=True, type=click.IntRange(100), help="of each studied run")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(2))
@options.corpus
@click.option("--work", type=click.Path(path_type=Path), required=True, metavar="DIR", help="prepared data")
@out
def telemetry(
    preset: str, cost_steps: int, steps: int, seeds: int, corpus: Path | None, work: Path, out: Path | None
) -> None:
    """Telemetry: its share of the training time, whether emotions differ, what predicts the loss beyond the loss."""
    from constellation.experiments import bench_telemetry as bench

    bench.run(make_preset(preset), cost_steps=cost_steps, steps=steps, seeds=seeds, corpus=corpus, work=work, out=out)


@command.command()
@click.option(
    "--from", "source", type=click.Path(path_type=Path, exists=True), default=Path("results/optim.json"),
    show_default=True, metavar="FILE", help="raw result of bench optim: the settings that it chose",
)  # fmt: skip
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(2), help="paired")
@click.option("--steps", default=None, type=click.IntRange(4), help="default: the task's")
@options.corpus
@click.option("--work", type=click.Path(path_type=Path), required=True, metavar="DIR", help="prepared data")
@out
def geometry(source: Path, seeds: int, steps: int | None, corpus: Path | None, work: Path, out: Path | None) -> None:
    """Optimizers: basin distance and phi of what they trained, beside AdamW's and the original design's claims."""
    from constellation.experiments import bench_geometry as bench

    bench.run(source=source, seeds=seeds, steps=steps, corpus=corpus, work=work, out=out)
