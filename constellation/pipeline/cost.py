"""What a run costs: hours, money and, where the machine tells, energy, over all its sittings; and where it stops.

    hours    of the driver's clock while it trains, whatever the number of machines
    usd      hours x cluster.usd_per_hour, the price of all of them
    joules   of the processors of the driver's machine (RAPL, /sys/class/powercap), None where it does not tell

In RUN/cost.json, rewritten every `EVERY_S`. With train.budget_usd a line warns once at 80 % of it, and at 100 % no
further step is asked for: the run is stopped as by Ctrl-C, at its newest checkpoints, and goes on with a larger budget:
constellation train --resume train.budget_usd=USD. No torch and no Ray here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from constellation.config import Config
from constellation.errors import ArtifactError
from constellation.storage.atomic import read_object, write_json
from constellation.telemetry.step import Step

FILE = "cost.json"
EVERY_S = 5.0
WARN_AT = 0.8
RAPL = Path("/sys/class/powercap")


class Meter:
    """Counts what `run` costs from now on, beside what earlier sittings cost; `clock` in seconds."""

    def __init__(
        self, run: Path, config: Config, say: Callable[[str], None], *,
        clock: Callable[[], float] = time.monotonic, rapl: Path = RAPL,
    ):  # fmt: skip
        self.run, self.say, self._clock = run, say, clock
        self.budget, self.price = config.train.budget_usd, config.cluster.usd_per_hour
        before = read(run)
        self._hours, self._joules, self._usd = (float(before.get(name) or 0.0) for name in ("hours", "joules", "usd"))
        self._warned = bool(self.budget) and self._usd >= WARN_AT * self.budget
        self._energy = Energy(rapl)
        self._tick = self._written = clock()

    def until_spent(self, steps: Iterator[Step]) -> Iterator[Step]:
        """`steps`, no more of them once the budget is spent; what was counted is on disk at the end."""
        try:
            while not self.spent and (step := next(steps, None)) is not None:
                yield step
                self._count()
        finally:
            if isinstance(steps, Generator):
                steps.close()
            self._count()
            self.save()
        if self.spent:
            self.say(
                f"the budget of {self.budget:g} USD is spent ({self._hours:.2f} hours); go on: "
                f"constellation train --run {self.run} --resume train.budget_usd=USD"
            )

    @property
    def spent(self) -> bool:
        return bool(self.budget) and self._usd >= self.budget

    def save(self) -> None:
        self._written = self._clock()
        write_json(self.run / FILE, {
            "hours": self._hours, "usd": self._usd if self.price else None, "usd_per_hour": self.price or None,
            "budget_usd": self.budget or None, "joules": self._joules if self._energy.told else None,
        })  # fmt: skip

    def _count(self) -> None:
        now = self._clock()
        hours = (now - self._tick) / 3600
        self._tick = now
        self._hours += hours
        self._usd += hours * self.price
        self._joules += self._energy.since()
        if self.budget and not self._warned and self._usd >= WARN_AT * self.budget:
            self._warned = True
            self.say(f"{self._usd:.2f} USD of the budget of {self.budget:g} are spent ({self._usd / self.budget:.0%})")
        if now - self._written > EVERY_S:
            self.save()


class Energy:
    """The counters of whole processors below `root`, in joules; they begin anew at their own range."""

    def __init__(self, root: Path = RAPL):
        self._zones = [zone for zone in sorted(root.glob("intel-rapl:*")) if zone.name.count(":") == 1]
        self._last = {zone: uj for zone in self._zones if (uj := _number(zone / "energy_uj")) is not None}

    @property
    def told(self) -> bool:
        """Whether this machine tells."""
        return bool(self._last)

    def since(self) -> float:
        """Joules since the last call, or since the beginning."""
        total = 0
        for zone, before in self._last.items():
            now = _number(zone / "energy_uj")
            if now is not None:
                wrapped = (_number(zone / "max_energy_range_uj") or 0) if now < before else 0
                total += now - before + wrapped
                self._last[zone] = now
        return total / 1e6


def read(run: Path) -> dict[str, Any]:
    """What the run has cost so far; {} for one that was not metered."""
    try:
        return read_object(run / FILE)
    except ArtifactError:
        return {}


def line(cost: dict[str, Any]) -> str:
    """The same for a person, "" where there is nothing."""
    if not cost:
        return ""
    said = [f"{cost['hours']:.2f} hours"]
    if cost.get("usd") is not None:
        of = f" of {cost['budget_usd']:g}" if cost.get("budget_usd") else ""
        said.append(f"{cost['usd']:.2f}{of} USD")
    if cost.get("joules") is not None:
        said.append(f"{cost['joules'] / 3.6e6:.3f} kWh of the driver's processors")
    return "cost: " + ", ".join(said)


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
