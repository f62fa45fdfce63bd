"""One evaluation: a configuration trained in a folder of its own, and its metric.

    OUT/trials/0007-r0-s0/    ocean/ (a run folder of one model) or run/ (a constellation)
                              result.json, written last, whole or absent: the evaluation is finished
    OUT/shared/DIGEST/        what evaluations have in common (sharing.py)

Stopped or killed, an evaluation goes on from its newest checkpoint when it is run again, to the same bits on a CPU.
No Ray here, but for constellations and their routers (whole.py).
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path

from constellation.errors import ArtifactError, ConstellationError
from constellation.storage.atomic import read_json, read_object, write_json
from constellation.storage.exclusive import exclusive
from tune.cost import flops_per_token, steps_of, tokens_per_step
from tune.history import Cost, Outcome
from tune.sharing import SPENT, Used, own_run, prepared, spent
from tune.work import StopFile, Stopped, Work

RESULT = "result.json"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
FULL_WORDS = ("requested and", *map(os.strerror, FULL))  # of numpy and safetensors, whose errors have no number
LOCK_WAIT_S = 120.0  # for the process that a killed driver left behind


def evaluate(work: Work) -> Outcome:
    """Do `work`, or find that it is done; the outcome is in its folder when this returns.

    Divergence and impossible configurations are outcomes (`failed`). Raised are Stopped, what may pass when it is tried
    again (out of memory), and RunError when the disk does not take what is written.
    """
    with exclusive(work.folder, LOCK_WAIT_S):
        if (found := finished(work.folder)) is not None:
            return found
        wall, cpu = time.perf_counter(), time.process_time()
        before, elsewhere = spent(work.folder), {"cpu_s": 0.0, "wall_s": 0.0}

        def used() -> Used:
            return {
                "cpu_s": before["cpu_s"] + time.process_time() - cpu - elsewhere["cpu_s"],
                "wall_s": before["wall_s"] + time.perf_counter() - wall - elsewhere["wall_s"],
            }

        status, metric, reason, tokens = "done", None, "", work.tokens
        try:
            if work.kind == "model":
                values = _model(work)
            else:
                from tune.whole import fit_again, train_whole

                values = (fit_again if work.kind == "router" else train_whole)(work, elsewhere)
            tokens = values["tokens"]
            metric = used()["wall_s"] if work.metric == "train_seconds" else values[work.metric]
            if not math.isfinite(metric):
                status, reason, metric = "failed", f"{work.metric} is {metric}", None
        except Stopped:
            write_json(work.folder / SPENT, used())
            raise
        except ConstellationError as error:
            if full(error):
                raise
            status, reason = "failed", str(error)
            tokens = _tokens_so_far(work)
        flops = tokens * flops_per_token(work.config.kernel)
        cost = used()
        if work.first and work.kind != "model":
            cost = {kind: value + spent(own_run(work)[0])[kind] for kind, value in cost.items()}
        outcome = Outcome(status, metric, reason, Cost(float(tokens), flops, **cost))
        write_json(work.folder / RESULT, asdict(outcome), sealed=True)
        return outcome


def finished(folder: Path) -> Outcome | None:
    """The outcome in an evaluation's folder, None before it is finished."""
    if not (folder / RESULT).exists():
        return None
    try:
        found = read_object(folder / RESULT)
        return Outcome(**{**found, "cost": Cost(**found["cost"])})
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{folder / RESULT} is damaged ({error!r}); remove it to evaluate again") from None


def full(error: BaseException) -> bool:
    """Whether `error` says that the disk is full or cannot be written: no trial's fault."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in FULL:
            return True
        if any(words in str(seen) for words in FULL_WORDS):
            return True
        seen = seen.__cause__
    return False


def _model(work: Work) -> dict[str, float]:
    """OCEAN alone: `tokens` read, bits per byte and nats per token of the held-out text."""
    import torch  # noqa: F401

    from constellation.data.cache import open_cache
    from constellation.roster import OCEAN
    from constellation.train import checkpoint
    from constellation.train.job import Job
    from constellation.train.loop import fit
    from constellation.train.score import evaluate as score

    plan = prepared(work.corpus, work.config, work.shared)
    steps = steps_of(work.config, work.tokens)
    branch = None
    if work.parent is not None:
        done = checkpoint.steps_on_disk(work.parent / OCEAN)
        if not done:
            raise ArtifactError(f"{work.parent / OCEAN} has no checkpoint to go on from")
        branch = checkpoint.folder_of(work.parent / OCEAN, done[-1])
    folder = work.folder / OCEAN
    job = Job(OCEAN, folder, work.config, steps, plan.train, plan.dev, branch=branch)
    stop, bits = StopFile(work.stop), None
    for step in fit(job, regime=stop, recovery=stop):
        bits = step.dev_bits_per_byte if step.step == steps else None
    if bits is None and stop.seen:
        raise Stopped
    dev = open_cache(plan.dev)
    if bits is None:  # killed between the last checkpoint and the result
        model = checkpoint.load_model(folder)
        bits = score(model, dev, work.config.train.eval_bytes, work.config.train.precision)
    scored = min(len(dev.byte_length), int((dev.byte_length.cumsum() < work.config.train.eval_bytes).sum()) + 1)
    per_token = float(dev.byte_length[:scored].sum()) / float(dev.offsets[scored] - dev.offsets[0])
    return {
        "tokens": float(steps * tokens_per_step(work.config)),
        "dev_bits_per_byte": bits,
        "dev_loss_nats": bits * math.log(2) * per_token,
    }


def _tokens_so_far(work: Work) -> float:
    """What a failed run had read, as its summary says; 0 when it never began."""
    summary = work.folder / "ocean" / "summary.json"
    return float(read_json(summary).get("tokens", 0)) if summary.exists() else 0.0


def prune(folder: Path) -> None:
    """Remove the checkpoints of a finished evaluation; its result and its log stay."""
    for root, folders, _ in os.walk(folder):
        if "checkpoints" in folders:
            shutil.rmtree(Path(root) / "checkpoints", ignore_errors=True)
