"""A whole constellation as an evaluation, in the placement group that the trial holds; or its router alone.

Whatever comes before the branch point as the sweep's own settings have it is trained once (sharing.py): OCEAN where a
trial changes nothing that it depends on, the router where a trial changes nothing of it either. Same bits as alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.launch import train
from constellation.artifacts import segments
from constellation.config import Config, override
from constellation.pipeline.evaluation import evaluate_run, read_scores
from constellation.pipeline.prepare import fit_policy
from constellation.pipeline.request import REQUEST
from constellation.pipeline.status import done, finished
from constellation.roster import OCEAN
from constellation.storage import array_file
from router.decide.evaluate import Scores
from router.decide.fit import fit
from tune.sharing import Used, begun, once, own_run, same_ocean, same_router
from tune.work import StopFile, Stopped, Work

ROUTER = "router"
SCORES = "scores"  # of the held-out text under every model of the shared run


def train_whole(work: Work, elsewhere: Used) -> dict[str, float]:
    """`tokens` read by all models together, bits per byte of the held-out text as routed and by OCEAN alone."""
    config = override(work.config, {"train.tokens": round(work.tokens)})
    shared, own = own_run(work)
    run, tokens, parts = work.folder / "run", work.tokens, list[str]()
    if same_ocean(config, own):

        def there() -> bool:
            return done(shared / OCEAN) and (shared / ROUTER / segments.LISTING).exists()

        once(shared, work, elsewhere, there, lambda stop: _train(shared, work, own, stop, roles=()))
        parts = [OCEAN, ROUTER] if same_router(config, own) else [OCEAN]
        tokens -= 0.0 if work.first else work.tokens * own.train.ocean_share
    begun(run, work, config, shared, parts)
    _train(run, work, config, StopFile(work.stop))
    return {"tokens": tokens, **_bits(evaluate_run(run, None, top_k=config.router.top_k))}


def fit_again(work: Work, elsewhere: Used) -> dict[str, float]:
    """A router of `work`'s settings over the kernels of the sweep's own: they stay those of that router's partition.

    `tokens` are what the shared constellation read, for the evaluation that is charged with it, else 0.
    """
    config = override(work.config, {"train.tokens": round(work.tokens)})
    shared, own = own_run(work)

    def there() -> bool:
        return (shared / REQUEST).exists() and finished(shared)

    once(shared, work, elsewhere, there, lambda stop: _train(shared, work, own, stop))
    plan = begun(work.folder / "run", work, config, shared, config.models)
    once(shared, work, elsewhere, (shared / SCORES / f"{SCORES}.json").exists, lambda stop: _score(shared))
    if not (plan.router / "router.json").exists():
        fit_policy(fit, plan).save(plan.router)
    found = evaluate_run(plan.run, None, top_k=config.router.top_k, scores=_scores(shared))
    return {"tokens": work.tokens if work.first else 0.0, **_bits(found)}


def _train(run: Path, work: Work, config: Config, stop: StopFile, roles: Sequence[str] | None = None) -> None:
    """All of `run`, or OCEAN and router alone for roles=(), from shared caches; Stopped when asked to stop."""
    begun(run, work, config)
    for _ in train(run, work.corpus, config, resume=True, roles=roles, say=_silent):
        if stop.asked():
            raise Stopped  # closing the iterator stops every actor after its step


def _bits(found: dict[str, Any]) -> dict[str, float]:
    """What METRICS names, of an evaluation of a run."""
    answers = found["answers"]
    (mixed,) = (name for name in answers if name.startswith("mixture_"))
    which = {"routed": "routed", "mixture": mixed, "ocean": OCEAN}
    return {f"{name}_bits_per_byte": answers[way]["bits_per_byte"] for name, way in which.items()}


def _score(run: Path) -> None:
    scores = read_scores(run)
    header = {"names": scores.names, "domains": scores.domains}
    arrays = {name: value for name, value in vars(scores).items() if name not in header}
    array_file.write(run / SCORES, SCORES, header, arrays)


def _scores(run: Path) -> Scores:
    header, arrays = array_file.read(run / SCORES, SCORES)
    return Scores(tuple(header["names"]), domains=tuple(header["domains"]), **arrays)


def _silent(text: str) -> None:
    pass
