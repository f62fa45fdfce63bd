"""What happened in a sweep, read from its event log: trials, their evaluations, decisions. No Ray here.

A *trial* is a point of the space: settings by dotted name. It is *evaluated* at a rung (rung r trains for `rungs[r]`
of the budget, each a complete run) with a seed; trials are compared on the same seeds. An evaluation has one
*outcome*, whatever became of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from constellation.errors import ArtifactError
from tune.events import LOG, SCHEMA, Event, read_events


@dataclass(frozen=True)
class Trial:
    """A point of the space."""

    number: int
    settings: dict[str, Any]
    origin: str  # who suggested it: random, grid, tpe, cmaes, pbt, default
    parent: int | None = None  # the trial whose state it goes on from (pbt)


@dataclass(frozen=True, order=True)
class Evaluation:
    """A trial at a rung with a seed."""

    trial: int
    rung: int = 0
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.trial:04d}-r{self.rung}-s{self.seed}"

    @classmethod
    def parse(cls, text: str) -> Evaluation:
        trial, rung, seed = text.split("-")
        return cls(int(trial), int(rung[1:]), int(seed[1:]))


@dataclass(frozen=True)
class Cost:
    """What an evaluation took, all attempts together."""

    tokens: float = 0.0
    flops: float = 0.0
    cpu_s: float = 0.0  # CPU-seconds of the processes that trained
    wall_s: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """How an evaluation ended. `metric` is None unless it is done."""

    status: str  # done | failed
    metric: float | None
    reason: str = ""  # why it failed, one line
    cost: Cost = Cost()
    attempts: int = 1  # 2 and more: a node or process was lost on the way
    started: float = 0.0  # on the sweep's clock
    ended: float = 0.0


@dataclass(frozen=True)
class Decision:
    """What the sweep concluded about a trial, and why."""

    trial: int
    decision: str  # promote | stop | more_seeds | beaten | explore
    to: Evaluation | None
    why: str


@dataclass
class History:
    """A sweep as its log tells it; `request` is what was asked for, as plain data."""

    request: dict[str, Any]
    trials: dict[int, Trial] = field(default_factory=dict)
    running: dict[Evaluation, float] = field(
        default_factory=dict
    )  # started, not ended: since when on the sweep's clock
    outcomes: dict[Evaluation, Outcome] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)
    finished: bool = False

    @property
    def seeds(self) -> list[int]:
        return sorted({evaluation.seed for evaluation in self.outcomes})

    @property
    def rungs(self) -> list[float]:
        """Shares of the full budget, the last is 1."""
        return list(self.request.get("rungs", [1.0]))

    def apply(self, event: Event) -> None:
        kind = event["event"]
        if kind == "suggested":
            number = event["trial"]
            self.trials[number] = Trial(number, event["settings"], event["origin"], event.get("parent"))
        elif kind == "started":
            self.running[Evaluation.parse(event["evaluation"])] = event["clock"]
        elif kind == "ended":
            evaluation = Evaluation.parse(event["evaluation"])
            self.outcomes[evaluation] = Outcome(
                event["status"], event["metric"], event["reason"], Cost(**event["cost"]), event["attempts"],
                self.running.pop(evaluation, event["clock"]), event["clock"],
            )  # fmt: skip
        elif kind == "decided":
            to = Evaluation.parse(event["to"]) if event.get("to") else None
            self.decisions.append(Decision(event["trial"], event["decision"], to, event["why"]))
        elif kind == "finished":
            self.finished = True


def read_history(out: Path) -> History:
    """The history in the folder `out`; ArtifactError when there is no readable one."""
    events = read_events(out)
    first = next(events, None)
    if first is None or first["event"] != "begun":
        raise ArtifactError(f"{out / LOG} does not begin as a sweep's log; was it written by constellation tune?")
    if first.get("schema") != SCHEMA:
        raise ArtifactError(f"{out / LOG} has schema {first.get('schema')!r}; this version reads {SCHEMA}")
    history = History(first["request"])
    for number, event in enumerate(events, start=2):
        try:
            history.apply(event)
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{out / LOG}:{number} is damaged ({error!r})") from None
    return history
