"""The event log of a sweep, OUT/events.jsonl: append-only, and the truth. No Ray here.

    {"event": "begun",     "schema": 1, "request": {...}}                 first line: what was asked for
    {"event": "suggested", "trial": 7, "settings": {"optim.lr": 0.01}, "origin": "tpe", "parent": null}
    {"event": "started",   "evaluation": "0007-r0-s0", "clock": 12.0}     clock: the sweep's own time, not the wall's
    {"event": "ended",     "evaluation": "0007-r0-s0", "clock": 24.0, "status": "done", "metric": 1.93, "reason": "",
                           "cost": {"tokens": 65536, "flops": 1.2e12, "cpu_s": 3.1, "wall_s": 1.6}, "attempts": 1}
    {"event": "decided",   "trial": 7, "decision": "promote", "to": "0007-r1-s0", "why": "best 1 of 3 at rung 0"}
    {"event": "finished"}

Lines that say what happened on the machine and decide nothing (`resumed`, `lost`) may stand anywhere. A line counts
when it ends in a newline: the torn last line of a killed writer is dropped when the log is opened again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from constellation.errors import ArtifactError
from constellation.storage.atomic import no_link

SCHEMA = 1
LOG = "events.jsonl"
Event = dict[str, Any]


class EventLog:
    """Appends events to the log in folder `out`; each is on disk when `append` returns."""

    def __init__(self, out: Path):
        self.path = out / LOG
        out.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            whole = _whole_length(self.path)
            if whole < self.path.stat().st_size:
                os.truncate(self.path, whole)
        self._file = open(self.path, "ab", buffering=0, opener=no_link)  # noqa: SIM115

    def append(self, event: str, **values: Any) -> None:
        line = json.dumps({"event": event, **values}, allow_nan=False).encode() + b"\n"
        before = self.path.stat().st_size
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(f"{self.path}: {written} of {len(line)} bytes written, the disk is full")
            os.fsync(self._file.fileno())
        except OSError:
            os.truncate(self.path, before)
            raise

    def close(self) -> None:
        self._file.close()


def read_events(out: Path) -> Iterator[Event]:
    """Every whole event in the order written; ArtifactError names a line that is none."""
    path = out / LOG
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}; constellation tune writes it into --out") from None
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            event = msgspec.json.decode(line)
            if not isinstance(event, dict) or not isinstance(event.get("event"), str):
                raise ValueError("no event")
        except (ValueError, msgspec.DecodeError) as error:
            raise ArtifactError(f"{path}:{number} is damaged ({error})") from None
        yield event


def _whole_length(path: Path) -> int:
    """Bytes up to and with the last newline."""
    with open(path, "rb") as file:
        at = file.seek(0, os.SEEK_END)
        while at:
            start = max(0, at - 65536)
            file.seek(start)
            found = file.read(at - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            at = start
    return 0
