"""Everything that can be said of a sweep, computed once: report.py writes it, plots.py draws it. No Ray here."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tune.analysis import PairedDifference, RungCorrelation, Standings, differences, rung_correlations, spent
from tune.history import History
from tune.importance import Importance, importances, searched
from tune.transfer import TransferRule, transfer


@dataclass(frozen=True)
class SweepReport:
    """Everything that is known of a sweep; `best` and `default` are rows of `standings`."""

    history: History
    standings: Standings
    best: int | None
    default: int | None
    to_best: dict[int, PairedDifference]  # by row: trial - best
    to_default: dict[int, PairedDifference]  # by row: trial - default
    importance: list[Importance]
    rungs: list[RungCorrelation]
    transfer: list[TransferRule]
    spent: dict[str, dict[str, float]]

    @property
    def metric(self) -> str:
        return str(self.history.request.get("metric", "metric"))

    @property
    def beats_default(self) -> PairedDifference | None:
        """Best minus default; None when one of them is missing or they are the same trial."""
        return None if self.best is None else self.to_default.get(self.best)

    def mean(self, row: int) -> float:
        """Mean over its seeds at the highest rung."""
        return float(np.nanmean(self.standings.loss_TS[row]))


def analyse(history: History) -> SweepReport:
    """The report of a history, written nowhere."""
    standings = Standings.of(history)
    best = standings.best()
    rows = [t for t, n in enumerate(standings.numbers) if history.trials[n].origin == "default"]
    default = rows[0] if rows and np.isfinite(standings.loss_TS[rows[0]]).any() else None
    settings = [history.trials[n].settings for n in standings.numbers]
    return SweepReport(
        history, standings, best, default,
        {} if best is None else differences(standings, best),
        {} if default is None else differences(standings, default),
        importances(searched(history.request), settings, standings.order_T()),
        rung_correlations(standings), transfer(history, standings), spent(history, standings),
    )  # fmt: skip


def ranked(found: SweepReport) -> list[int]:
    """Rows that finished at the highest rung: the best, then more seeds before fewer, then by mean."""
    loss = found.standings.loss_TS
    count = np.isfinite(loss).sum(1)
    rows = np.flatnonzero(count)
    mean = {int(t): found.mean(int(t)) for t in rows}
    return sorted(mean, key=lambda t: (t != found.best, -int(count[t]), mean[t]))
