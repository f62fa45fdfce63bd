"""A sweep on Ray: Ray Tune runs the evaluations, the sweep (run.py) says which.

A searcher of ours hands what the sweep begins to Ray Tune, and hears from it what has ended; results themselves lie in
the evaluations' folders. What Ray Tune remembers is disposable: it is written into a temporary folder and removed. One
Tune trial is one evaluation, of the same name; a process that is free takes the next one, with torch imported.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray import tune as ray_tune
from ray.tune.search import Searcher

from actors.placement import Resources, check_cluster, share
from constellation.config import Config
from constellation.errors import RunError
from tune.evaluate import evaluate, full
from tune.run import STOP, Nothing, SweepRun
from tune.work import Stopped, Work

EVER = 1_000_000_000  # Ray Tune wants a number of samples
HEAD = {"CPU": 0.05}  # of a trial whose actors have bundles of their own


def room(kind: str, config: Config) -> list[Resources]:
    """The bundles of one evaluation: the trial's own first, then one a kernel."""
    own = share(config)
    if kind == "model":
        return [own or {"CPU": 0.0}]
    return [dict(HEAD), *[own] * config.constellation.kernels]


def fits(bundles: list[Resources]) -> int:
    """How many evaluations of these bundles the cluster holds at once; PlacementError if not one."""
    check_cluster(bundles)
    have = ray.cluster_resources()
    need = {kind: sum(bundle.get(kind, 0.0) for bundle in bundles) for kind in ("CPU", "GPU")}
    counts = [int(have.get(kind, 0.0) / amount + 1e-9) for kind, amount in need.items() if amount]
    return max(1, min(counts, default=1))


def compute(run: SweepRun, jobs: int) -> None:
    """Evaluate on the Ray that this process is connected to, `jobs` at a time, until the sweep has finished.

    Ctrl-C stops all evaluations after their step, with a checkpoint, and raises KeyboardInterrupt; a second one ends
    at once. RunError when the disk is full: what was told before is in the log.
    """
    kind, base = run.request.space.evaluates, run.request.base
    bundles = room(kind, base)
    check_cluster(bundles)
    os.environ.update(
        TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1", TUNE_DISABLE_SIGINT_HANDLER="1", TUNE_GLOBAL_CHECKPOINT_S="86400",
        RAY_AIR_NEW_OUTPUT="0",  # prints on standard output, whatever the verbosity
        TUNE_MAX_PENDING_TRIALS_PG=str(jobs), TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S="86400",
    )  # fmt: skip
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what is lost is told by the sweep, in a line
    with tempfile.TemporaryDirectory(prefix="constellation-tune-") as scratch, _ctrl_c(run.out / STOP) as pressed:
        hand_over = HandOver(run, pressed)
        tuner = ray_tune.Tuner(
            ray_tune.with_resources(_evaluation, ray_tune.PlacementGroupFactory(bundles, strategy="PACK")),
            tune_config=ray_tune.TuneConfig(
                search_alg=hand_over, num_samples=EVER, max_concurrent_trials=jobs, reuse_actors=kind == "model",
                trial_name_creator=_name, trial_dirname_creator=_name,
            ),
            run_config=ray_tune.RunConfig(
                name="sweep", storage_path=scratch, verbose=0, failure_config=ray_tune.FailureConfig(max_failures=0)
            ),
        )  # fmt: skip
        tuner.fit()
    if hand_over.error is not None:
        raise hand_over.error
    if pressed.is_set():
        raise KeyboardInterrupt
    if not run.sweep.finished:
        raise RunError(f"Ray ended before the sweep in {run.out} did; go on with --resume")


class HandOver(Searcher):  # type: ignore[misc,unused-ignore]
    """Between Ray Tune, which asks what to run, and the sweep, which knows."""

    def __init__(self, run: SweepRun, pressed: threading.Event):
        super().__init__(metric=None, mode=None)
        self.error: BaseException | None = None
        self._run, self._pressed = run, pressed
        self._names: dict[str, str] = {}  # Tune's trial -> evaluation

    def suggest(self, trial_id: str) -> Any:
        if self.error is not None or self._pressed.is_set():
            return Searcher.FINISHED
        try:
            work = self._run.advance()
        except BaseException as error:  # Ray Tune would wrap it, or go on
            self._end(error)
            return Searcher.FINISHED
        if isinstance(work, Work):
            self._names[trial_id] = work.evaluation
            return {"work": work}
        return None if work is Nothing.YET else Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        name = self._names.pop(trial_id)
        result = result or {}
        if result.get("full"):
            self._end(RunError(result["full"]))
        elif self.error is None and not result.get("stopped"):
            if error and self._pressed.is_set():
                return
            try:
                lost = "its process or node was lost, or memory ran out" if error else None
                self._run.landed(name, result.get("raised", lost))
            except BaseException as found:
                self._end(found)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        pass

    def set_search_properties(self, metric: str | None, mode: str | None, config: Any, **spec: Any) -> bool:
        return True

    def save(self, checkpoint_path: str) -> None:
        """The log is the truth."""

    def restore(self, checkpoint_path: str) -> None:
        """Never restored."""

    def __getstate__(self) -> dict[str, Any]:
        """Ray Tune writes its searcher down; the log is the truth."""
        return {}

    def _end(self, error: BaseException) -> None:
        self.error = self.error or error
        with contextlib.suppress(OSError):
            (self._run.out / STOP).touch()


def _evaluation(config: dict[str, Any]) -> None:
    """What a Tune trial does."""
    try:
        evaluate(config["work"])
        ray_tune.report({"done": 1})
    except Stopped:
        ray_tune.report({"stopped": 1})
    except MemoryError:
        raise
    except Exception as error:
        told = f"{type(error).__name__}: {error}".partition("\n")[0]
        ray_tune.report({"full": f"the disk is full: {told}; go on with --resume"} if full(error) else {"raised": told})


def _name(trial: Any) -> str:
    return str(trial.config["work"].evaluation)


@contextlib.contextmanager
def _ctrl_c(stop: Path) -> Iterator[threading.Event]:
    """The first Ctrl-C makes the file `stop`; the next one does what it did before."""
    pressed, before = threading.Event(), signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return

    def note(number: int, frame: Any) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, before)
        with contextlib.suppress(OSError):
            stop.touch()

    signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
