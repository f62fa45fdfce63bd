"""What a sweep shows while it runs: a line on a terminal, lines in a log, JSON lines on request. No Ray here."""

from __future__ import annotations

import json
import math
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from tune.history import Evaluation
from tune.race import paired_interval
from tune.request import SweepRequest
from tune.schedulers import ETA, MIN_PAIRS, spearman


class Progress:
    """`watch(event)` for every new event, `say(text)` for what else is worth a line."""

    def __init__(self, as_json: bool = False):
        self.as_json = as_json
        self.console = Console(stderr=True, soft_wrap=True)
        self.live = self.console.is_terminal and not as_json
        self._bar = Bar(
            TextColumn("{task.fields[counts]}"), BarColumn(bar_width=20), TextColumn("{task.fields[best]}"),
            TextColumn("{task.fields[left]}"), console=self.console,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=1.0, counts="", best="", left="")
        self._running: set[str] = set()
        self._done = self._failed = 0
        self._shares, self._total, self._began = 0.0, 1.0, time.monotonic()
        self._metrics: dict[int, list[float]] = {}
        self._rungs: tuple[float, ...] = (1.0,)
        self._seen: dict[Evaluation, float] = {}
        self._doubted: set[int] = set()

    def expect(self, request: SweepRequest) -> None:
        """How much there is to do, in evaluations at the full budget: about so much under successive halving."""
        self._rungs = request.rungs
        halving = request.scheduler in ("asha", "hyperband")
        each = sum(share / ETA**rung for rung, share in enumerate(request.rungs)) if halving else 1.0
        if request.scheduler == "pbt":
            each = 1.0 / len(request.rungs)
        self._total = request.trials * each + halving + 4 * (request.seeds - 1)

    def __enter__(self) -> Progress:
        self._began = time.monotonic()
        if self.live:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live:
            self._bar.stop()

    def say(self, text: str) -> None:
        (self._bar.console if self.live else self.console).print(text, highlight=False, markup=False)

    def watch(self, event: dict[str, Any]) -> None:
        if self.as_json:
            sys.stdout.write(json.dumps(event) + "\n")
            sys.stdout.flush()
        kind = event["event"]
        if kind == "started":
            self._running.add(event["evaluation"])
        elif kind == "ended":
            self._ended(event)
        elif kind == "decided" and event["decision"] in ("promote", "beaten", "explore") and not self.as_json:
            self.say(f"trial {event['trial']:<4} {event['decision']}: {event['why']}")
        elif kind == "lost":
            self.say(f"{event['evaluation']} lost, attempt {event['attempt']}: {event['reason']}")
        counts = f"{len(self._running)} running, {self._done} done, {self._failed} failed"
        self._bar.update(
            self._task, completed=min(1.0, self._shares / self._total), counts=counts, best=self.best, left=self.left
        )

    @property
    def best(self) -> str:
        """The lowest mean at the full budget, with its 95 % interval where it has several seeds."""
        if not self._metrics:
            return ""
        trial = min(self._metrics, key=lambda t: sum(self._metrics[t]) / len(self._metrics[t]))
        mean, low, high = paired_interval(self._metrics[trial])
        interval = f" [{low:.4f}, {high:.4f}]" if math.isfinite(low) else ""
        return f"best {mean:.4f}{interval}, trial {trial}"

    @property
    def left(self) -> str:
        """An estimate from what this sitting has done so far."""
        if not self._shares:
            return ""
        seconds = (time.monotonic() - self._began) / self._shares * max(0.0, self._total - self._shares)
        return f"about {seconds:.0f} s left" if seconds < 120 else f"about {seconds / 60:.0f} min left"

    def _ended(self, event: dict[str, Any]) -> None:
        self._running.discard(event["evaluation"])
        evaluation = Evaluation.parse(event["evaluation"])
        self._shares += self._rungs[evaluation.rung]
        if event["status"] == "done":
            self._done += 1
            self._compare(evaluation, event["metric"])
            if evaluation.rung == len(self._rungs) - 1:
                self._metrics.setdefault(evaluation.trial, []).append(event["metric"])
            told = f"{event['metric']:.4f}"
        else:
            self._failed += 1
            told = f"failed: {event['reason']}"
        if not self.as_json:
            more = "" if self.live else "; ".join(["", *filter(None, (self.best, self.left))])
            self.say(f"{event['evaluation']}  {told}{more}")

    def _compare(self, evaluation: Evaluation, metric: float) -> None:
        """Say once when the results of a rung do not tell those of the next one."""
        rung = evaluation.rung
        if evaluation.seed:
            return
        self._seen[evaluation] = metric
        below = {e.trial: m for e, m in self._seen.items() if e.rung == rung - 1}
        pairs = [(below[e.trial], m) for e, m in self._seen.items() if e.rung == rung and e.trial in below]
        if len(pairs) >= MIN_PAIRS and rung not in self._doubted:
            r, low, high = spearman(pairs)
            if low <= 0:
                self._doubted.add(rung)
                told = f"rank correlation {r:+.2f} [{low:+.2f}, {high:+.2f}] of {len(pairs)} trials"
                self.say(f"rungs {rung - 1} and {rung}: {told}; the lower one does not tell who is better")
