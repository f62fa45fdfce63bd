"""A whole constellation as an evaluation: OCEAN, router and kernels, in the placement group that the trial holds."""

from __future__ import annotations

from actors.launch import train
from constellation.config import override
from constellation.pipeline.evaluation import evaluate_run
from tune.work import StopFile, Stopped, Work


def train_whole(work: Work) -> dict[str, float]:
    """`tokens` read by all models together, bits per byte of the held-out text as routed and by OCEAN alone."""
    config = override(work.config, {"train.tokens": round(work.tokens)})
    run, stop = work.folder / "run", StopFile(work.stop)
    for _ in train(run, work.corpus, config, resume=True, say=_silent):
        stop.judge({})
        if stop.seen:
            raise Stopped  # closing the iterator stops every actor after its step
    found = evaluate_run(run, None)["answers"]
    return {
        "tokens": work.tokens,
        "routed_bits_per_byte": found["routed"]["bits_per_byte"],
        "ocean_bits_per_byte": found["ocean"]["bits_per_byte"],
    }


def _silent(text: str) -> None:
    pass
