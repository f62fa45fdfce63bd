"""One progress display for all models of a constellation: bars of those at work on a terminal, lines in a log."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from constellation.pipeline import cost
from constellation.telemetry.step import Step

if TYPE_CHECKING:
    from constellation.pipeline.status import ClusterStatus

MEASURED = ("phi", "kappa", "D to OCEAN", "regime", "mood")
QUIET_S = 5.0  # seconds between two lines of one model in a log


class Display:
    """`show(step)` for every Step, `say(text)` for what else is worth a line."""

    def __init__(self, as_json: bool = False):
        self.as_json = as_json
        self.console = Console(stderr=as_json, soft_wrap=True)
        self.live = self.console.is_terminal and not as_json
        self._tasks: dict[str, TaskID] = {}
        self._next: dict[str, float] = {}
        columns = ("{task.description:<12}", "{task.completed:>6}/{task.total}", "{task.fields[note]}")
        name, count, note = map(TextColumn, columns)
        left = TimeRemainingColumn(compact=True)
        self._progress = Progress(name, BarColumn(bar_width=None), count, note, left, console=self.console)

    def __enter__(self) -> Display:
        if self.live:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live:
            self._progress.stop()

    def say(self, text: str) -> None:
        (self._progress.console if self.live else self.console).print(text, highlight=False, markup=False)

    def show(self, step: Step) -> None:
        if self.as_json:
            sys.stdout.write(json.dumps(step.to_json()) + "\n")
            sys.stdout.flush()
            return
        note = f"loss {step.loss_nats:.3f} nats/token"
        if step.dev_bits_per_byte is not None:
            note += f", dev {step.dev_bits_per_byte:.3f} bits/byte"
        if self.live:
            if step.role not in self._tasks:
                self._tasks[step.role] = self._progress.add_task(step.role, total=step.steps, note="")
            self._progress.update(self._tasks[step.role], completed=step.step, note=note)
        now = time.monotonic()
        last = step.step == step.steps
        if last or (not self.live and now >= self._next.get(step.role, 0.0)):
            self._next[step.role] = now + QUIET_S
            self.say(f"{step.role:<12} {step.step:>6}/{step.steps}  {note}")
        if last and self.live:  # 24 models are more bars than lines of a terminal
            self._progress.remove_task(self._tasks.pop(step.role))


def result_table(summary: dict[str, Any]) -> None:
    """The table that ends `constellation train`: a row per model."""
    left, right = ("model", "E8 root", "status"), ("tokens", "steps", "nats/token", "dev bits/byte")
    table = table_of(f"run {summary['run']}", left[:2] + right + left[2:], right)
    for row in summary["models"]:
        bits, loss = row.get("dev_bits_per_byte"), row.get("loss_nats")
        table.add_row(
            row["role"], row.get("root") or "-", f"{row.get('tokens') or 0:,}", str(row.get("steps") or 0),
            "-" if loss is None else f"{loss:.3f}", "-" if bits is None else f"{bits:.3f}", row["status"],
        )  # fmt: skip
    Console().print(table)
    if said := cost.line(summary.get("cost") or {}):
        Console().print(said, highlight=False)


def status_table(found: ClusterStatus) -> None:
    """The page of `constellation status`."""
    Console().print(_rows(found))


def _rows(found: ClusterStatus) -> Table:
    """A row per model."""
    right: tuple[str, ...] = ("steps", "nats/token", "pid", "restarts")
    names: tuple[str, ...] = ("model", "E8 root", "state", "steps", "nats/token", "node", "pid", "restarts", "health")
    measured = any(k.telemetry for k in found.kernels)
    if measured:
        names, right = (*names, *MEASURED), (*right, *MEASURED)
    table = table_of(f"{found.name}: {found.state}; {found.detail}", names, right)
    for k in found.kernels:
        steps = f"{k.step}/{k.steps}" if k.steps else str(k.step)
        loss = "-" if k.loss_nats is None else f"{k.loss_nats:.3f}"
        pid = "-" if k.pid is None else str(k.pid)
        row = [k.role, k.root or "-", k.state, steps, loss, k.node or "-", pid, str(k.restarts), k.health]
        table.add_row(*row, *(measured_row(k.telemetry or {}) if measured else ()))
    return table


def measured_row(telemetry: Mapping[str, Any]) -> list[str]:
    """The values of MEASURED as they are shown, "-" for what was not measured."""
    values = [telemetry.get(name) for name in ("phi", "kappa_eff", "basin_distance", "regime", "curiosity_regime")]
    return ["-" if v is None else f"{v:.3g}" if isinstance(v, float) else str(v).lower() for v in values]


class Page:
    """A table shown anew again and again: in place on a terminal, elsewhere a line for each model that has moved."""

    def __init__(self) -> None:
        self.console = Console(soft_wrap=True)
        self._live = Live(console=self.console, auto_refresh=False, screen=False) if self.console.is_terminal else None
        self._said: dict[str, str] = {}

    def __enter__(self) -> Page:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, found: ClusterStatus) -> None:
        if self._live:
            self._live.update(_rows(found), refresh=True)
            return
        lines = {"": f"{found.name}: {found.state}; {found.detail}"}
        for k in found.kernels:
            loss = "" if k.loss_nats is None else f"  loss {k.loss_nats:.3f} nats/token"
            lines[k.role] = f"{k.role:<12} {k.state:<9} {k.step:>6}/{k.steps or '-'}{loss}  {k.health}"
            if k.telemetry:
                told = zip(MEASURED, measured_row(k.telemetry), strict=True)
                lines[k.role] += "  " + ", ".join(f"{name} {value}" for name, value in told)
        for role, line in lines.items():
            if self._said.get(role) != line:
                self.console.print(line, highlight=False, markup=False)
        self._said = lines


def table_of(title: str, names: tuple[str, ...], right: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in names:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return table
