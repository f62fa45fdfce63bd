"""A sweep that is really computed: the machine, its log, and what is to be evaluated next. No Ray here.

    sweep = SweepRun.begin(out, request)         or SweepRun.resume(out)
    while (work := sweep.advance()) is not FINISHED: ...

Who evaluates is somebody else's affair: `alone` in this process, engine.py on Ray.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

from constellation.config import Config
from constellation.errors import ConfigError
from tune.evaluate import evaluate, finished, prune
from tune.events import LOG, SCHEMA, read_events
from tune.history import Evaluation, Outcome, Trial
from tune.journal import Journal
from tune.request import SweepRequest
from tune.sharing import same_ocean
from tune.sweep import Start, Wait
from tune.work import Stopped, Work

ATTEMPTS = 3  # of an evaluation whose process or node is lost
STOP = ".stop"
Watch = Callable[[dict[str, Any]], None]


class Nothing(Enum):
    """What `advance` says when there is no work to begin."""

    YET = "before another outcome"
    FINISHED = "ever"


class SweepRun:
    """A sweep in the folder `out`. `watch` hears every event that was not in the log before."""

    def __init__(self, out: Path, request: SweepRequest, watch: Watch = lambda event: None, keep: int = 3):
        self.out, self.request, self.keep = out, request, keep
        self._watch = watch
        self._journal = Journal(out)
        self._emit("begun", schema=SCHEMA, request=request.to_json())
        self.sweep = request.sweep(self._emit)
        self.outcomes: dict[Evaluation, Outcome] = {}  # computed, by evaluation; told or not
        self._again: list[Work] = []
        self._attempts: Counter[Evaluation] = Counter()
        self._work: dict[Evaluation, Work] = {}
        self._kept: list[tuple[float, Evaluation]] = []
        self._sharing: set[tuple[float, int]] = set()  # share of the budget and seed of what is charged already
        (out / STOP).unlink(missing_ok=True)

    @classmethod
    def resume(cls, out: Path, watch: Watch = lambda event: None, keep: int = 3) -> SweepRun:
        """The sweep that was begun in `out`."""
        run = cls(out, recorded_request(out), watch, keep)
        run._journal.note("resumed", at=time.time())
        return run

    def advance(self) -> Work | Nothing:
        """The next evaluation to begin, as far as the outcomes that are known lead."""
        if self._again:
            return self._again.pop(0)
        while action := self.sweep.next():
            if isinstance(action, Start):
                work = self._begin(action)
                if work is not None:
                    return work
            elif action.evaluation in self.outcomes:
                self._tell(action)
            else:
                return Nothing.YET
        return Nothing.FINISHED

    def landed(self, name: str, lost: str | None = None) -> None:
        """An evaluation has ended: its result is in its folder, or it was lost, for the reason given."""
        evaluation = Evaluation.parse(name)
        self._attempts[evaluation] += 1
        work = self._work[evaluation]
        found = finished(work.folder)
        if found is not None:
            self.outcomes[evaluation] = dataclasses.replace(found, attempts=self._attempts[evaluation])
            return
        reason = lost or "ended without a result"
        self._say("lost", evaluation=name, attempt=self._attempts[evaluation], reason=reason)
        if self._attempts[evaluation] < ATTEMPTS:
            self._again.append(work)
        else:
            told = f"lost {ATTEMPTS} times: {reason}"
            self.outcomes[evaluation] = Outcome("failed", None, told, attempts=self._attempts[evaluation])

    def close(self) -> None:
        self._journal.close()

    def _begin(self, start: Start) -> Work | None:
        """The work of `start`, None when its outcome is known already."""
        evaluation, trial = start.evaluation, start.trial
        first = self._is_first(start)
        if (known := self._journal.known.pop(evaluation, None)) is not None:
            self.outcomes[evaluation] = known
            return None
        folder = self.out / "trials" / str(evaluation)
        if (found := finished(folder)) is not None:
            self.outcomes[evaluation] = found
            return None
        try:
            config = self.request.config(trial, evaluation)
        except ConfigError as error:
            self.outcomes[evaluation] = Outcome("failed", None, str(error))
            return None
        parent = None
        if trial.parent is not None and evaluation.rung:
            parent = self.out / "trials" / str(Evaluation(trial.parent, evaluation.rung - 1, evaluation.seed))
        work = Work(
            str(evaluation), self.request.space.evaluates, config, self._default(evaluation),
            start.share * self.request.budget, folder,
            self.out / "shared", None if self.request.corpus is None else Path(self.request.corpus),
            self.request.metric, parent, self.out / STOP, first,
        )  # fmt: skip
        self._work[evaluation] = work
        return work

    def _default(self, evaluation: Evaluation) -> Config:
        return self.request.config(Trial(0, self.request.space.default, "default"), evaluation)

    def _is_first(self, start: Start) -> bool:
        """Whether no evaluation before uses what this one shares with others (sharing.py), if it does."""
        kind = self.request.space.evaluates
        if kind == "model" or (start.share, start.evaluation.seed) in self._sharing:
            return kind == "model"
        try:
            config = self.request.config(start.trial, start.evaluation)
        except ConfigError:
            return False
        if kind == "constellation" and not same_ocean(config, self._default(start.evaluation)):
            return False
        self._sharing.add((start.share, start.evaluation.seed))
        return True

    def _tell(self, wait: Wait) -> None:
        outcome = self.outcomes.pop(wait.evaluation)
        self._work.pop(wait.evaluation, None)
        self.sweep.tell(wait.evaluation, outcome)
        if self.request.scheduler != "pbt":  # there the next generation starts from these weights
            self._prune(wait.evaluation, outcome)

    def _prune(self, evaluation: Evaluation, outcome: Outcome) -> None:
        """Of all evaluations that were told the best `keep` at the top rung have their checkpoints."""
        if outcome.metric is None or evaluation.rung < self.sweep.top:
            prune(self.out / "trials" / str(evaluation))
            return
        self._kept.append((outcome.metric, evaluation))
        self._kept.sort()
        for _, worse in self._kept[self.keep :]:
            prune(self.out / "trials" / str(worse))
        del self._kept[self.keep :]

    def _emit(self, event: str, **values: Any) -> None:
        told = not self._journal.replaying
        self._journal.emit(event, **values)
        if told:
            self._watch({"event": event, **values})

    def _say(self, event: str, **values: Any) -> None:
        self._journal.note(event, **values)
        self._watch({"event": event, **values})


def alone(run: SweepRun) -> None:
    """Evaluate one after another in this process: the oracle of what Ray does."""
    while (work := run.advance()) is not Nothing.FINISHED:
        assert isinstance(work, Work)
        try:
            evaluate(work)
        except Stopped:
            raise KeyboardInterrupt from None
        run.landed(work.evaluation)


def recorded_request(out: Path) -> SweepRequest:
    """What the sweep in `out` was asked for; ArtifactError when there is none."""
    first = next(read_events(out), None)
    if first is None or first["event"] != "begun" or first.get("schema") != SCHEMA:
        raise ConfigError(f"{out / LOG} does not begin as a sweep's log; leave out --resume to start one")
    return SweepRequest.from_json(first["request"])
