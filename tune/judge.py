"""Is a sweep's winner better on text that the sweep did not see? It and the preset, on new seeds. No Ray here.

Both are trained at the sweep's full budget on seeds that it did not use, in folders of their own, and read text that
was part neither of training nor of what trials were compared on. The difference is paired by seed.

    OUT/judged/best-s3/, OUT/judged/preset-s3/     as evaluate.py has them: killed, they go on
    OUT/judged.json                                the result, written last

Constellations and routers are trained by actors, on a Ray of this machine.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from constellation.errors import ConfigError
from constellation.storage.atomic import write_json
from tune.analysis import Standings
from tune.evaluate import evaluate
from tune.history import Evaluation, Trial, read_history
from tune.race import paired_interval
from tune.request import SweepRequest
from tune.sharing import prepared
from tune.work import Work

if TYPE_CHECKING:
    from constellation.data.document import Document

JUDGED = "judged"
WAY = {"routed_bits_per_byte": "routed", "ocean_bits_per_byte": "ocean"}  # the others answer by mixture


@dataclass(frozen=True)
class Judgement:
    """Bits per byte of the text that was not seen, of each seed in order; the interval is Student's, at 95 %."""

    trial: int
    settings: dict[str, Any]
    corpus: str
    documents: int
    seeds: tuple[int, ...]
    preset: tuple[float, ...]
    best: tuple[float, ...]

    @property
    def difference(self) -> tuple[float, float, float]:
        """Mean and interval of best - preset."""
        return paired_interval([b - p for b, p in zip(self.best, self.preset)])

    @property
    def verdict(self) -> str:
        """better, worse, or no difference shown at this number of seeds."""
        _, low, high = self.difference
        return "better" if high < 0 else "worse" if low > 0 else "no difference shown"

    def to_json(self) -> dict[str, Any]:
        middle, low, high = self.difference
        finite = [x if math.isfinite(x) else None for x in (middle, low, high)]
        return {**asdict(self), "difference": finite, "verdict": self.verdict}

    def __str__(self) -> str:
        head = f"trial {self.trial} against the preset, {self.documents} documents of {self.corpus}, bits per byte"
        rows = [f"{'seed':>6}{'preset':>10}{'best':>10}{'difference':>12}"]
        rows += [f"{s:>6}{p:>10.4f}{b:>10.4f}{b - p:>+12.4f}" for s, p, b in zip(self.seeds, self.preset, self.best)]
        middle, low, high = self.difference
        return "\n".join([head, *rows, f"{middle:+.4f} [{low:+.4f}, {high:+.4f}]: {self.verdict}"])


def judge(out: Path, corpus: Path, seeds: int = 3, say: Callable[[str], None] = lambda text: None) -> Judgement:
    """Train the winner of the sweep in `out` and its preset on `seeds` new seeds, and read `corpus` with both.

    ConfigError when there is no winner but the preset itself, a run fails, or the sweep has seen some of the text.
    """
    history = read_history(out)
    request = SweepRequest.from_json(history.request)
    standings = Standings.of(history)
    row = standings.best()
    if row is None or standings.rung is None:
        raise ConfigError(f"{out}: no trial has finished, so there is no winner to judge; go on with --resume")
    best = history.trials[standings.numbers[row]]
    if best.origin == "default":
        raise ConfigError(f"{out}: the preset itself won; there is nothing to judge")
    preset, new = Trial(0, request.space.default, "default"), range(request.seeds, request.seeds + seeds)
    found: dict[str, list[float]] = {"preset": [], "best": []}
    works = [(name, seed, _work(out, request, name, trial, Evaluation(trial.number, standings.rung, seed)))
             for seed in new for name, trial in (("preset", preset), ("best", best))]  # fmt: skip
    documents = _unseen([work for _, _, work in works[:2]], corpus)
    for name, seed, work in works:
        say(f"{name}, seed {seed}")
        outcome = evaluate(work)
        if outcome.metric is None:
            raise ConfigError(f"{name}, seed {seed}: {outcome.reason}")
        found[name].append(_read(work, corpus, documents))
    result = Judgement(
        best.number,
        best.settings,
        str(corpus),
        len(documents),
        tuple(new),
        tuple(found["preset"]),
        tuple(found["best"]),
    )
    write_json(out / f"{JUDGED}.json", result.to_json())
    return result


def main_text(out: Path, corpus: Path, seeds: int, as_json: bool, say: Callable[[str], None]) -> str:
    """What `constellation tune judge OUT` prints: a table, or JSON."""
    found = judge(out, corpus, seeds, say)
    return json.dumps(found.to_json(), allow_nan=False) if as_json else str(found)


def _work(out: Path, request: SweepRequest, name: str, trial: Trial, evaluation: Evaluation) -> Work:
    default = request.config(Trial(0, request.space.default, "default"), evaluation)
    label = f"{name}-s{evaluation.seed}"
    return Work(
        label, request.space.evaluates, request.config(trial, evaluation), default, request.budget,
        out / JUDGED / label, out / "shared", None if request.corpus is None else Path(request.corpus), request.metric,
    )  # fmt: skip


def _unseen(works: Sequence[Work], corpus: Path) -> list[Document]:
    """The documents of `corpus`; ConfigError where any of `works` trains on, or is compared on, one of them."""
    from constellation.data.cache import open_cache
    from constellation.data.corpus import read_corpus

    documents = read_corpus(corpus, works[0].config.data).documents
    for work in works:
        plan = prepared(work.corpus, work.config, work.shared)
        seen = {*open_cache(plan.train).ids, *open_cache(plan.dev).ids}
        if known := sum(d.id in seen for d in documents):
            raise ConfigError(
                f"{corpus}: the sweep has seen {known} of {len(documents)} documents; name text it has not"
            )
    return documents


def _read(work: Work, corpus: Path, documents: Sequence[Document]) -> float:
    """Bits per byte of `documents`, which are those of `corpus`."""
    from constellation.coordizer.tokenizer import Tokenizer
    from constellation.data.cache import build_cache
    from constellation.pipeline.evaluation import evaluate_run
    from constellation.train.checkpoint import load_model
    from constellation.train.score import bits_per_byte, score

    if work.kind != "model":
        answers = evaluate_run(work.folder / "run", corpus, top_k=work.config.router.top_k)["answers"]
        way = WAY.get(work.metric) or next(name for name in answers if name.startswith("mixture_"))
        return float(answers[way]["bits_per_byte"])
    plan = prepared(work.corpus, work.config, work.shared)
    with tempfile.TemporaryDirectory() as scratch:
        cache = build_cache(documents, Tokenizer.load(plan.tokenizer), Path(scratch))
        model = load_model(work.folder / "ocean")
        nats = score(model, cache, precision=work.config.train.precision)
        return bits_per_byte(nats, cache.byte_length)
