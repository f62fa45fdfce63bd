"""The log of a sweep that may go on: what it says already is held against what the sweep says now. No Ray here.

A sweep that is resumed runs again over the outcomes in its log. Every event it emits must be the next one there, until
the log is at its end; from then on events are appended. So a difference (another version of Optuna, an edited file)
is told, and never goes unnoticed into the decisions.
"""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any

from constellation.errors import ArtifactError
from tune.events import LOG, Event, EventLog, read_events
from tune.history import Cost, Evaluation, Outcome

SAID_ONLY = ("resumed", "lost")  # lines that decide nothing


class Journal:
    """`emit` for a Sweep over the log in folder `out`; `known` are the outcomes that it holds."""

    def __init__(self, out: Path):
        self._log = EventLog(out)
        self.path = out / LOG
        self._recorded: deque[tuple[int, Event]] = deque()
        self.known: dict[Evaluation, Outcome] = {}
        for number, event in enumerate(read_events(out), start=1):
            if event["event"] in SAID_ONLY:
                continue
            self._recorded.append((number, event))
            if event["event"] == "ended":
                try:
                    self.known[Evaluation.parse(event["evaluation"])] = outcome_of(event)
                except (KeyError, TypeError, ValueError) as error:
                    raise ArtifactError(f"{self.path}:{number} is damaged ({error!r})") from None

    @property
    def replaying(self) -> bool:
        """Whether the log says more than was emitted so far."""
        return bool(self._recorded)

    def emit(self, event: str, **values: Any) -> None:
        """Append an event, or find it as the next one of the log; ArtifactError names the first difference."""
        if not self._recorded:
            self._log.append(event, **values)
            return
        number, recorded = self._recorded.popleft()
        now = json.loads(json.dumps({"event": event, **values}))
        if now != recorded:
            key = next((k for k in {**recorded, **now} if recorded.get(k) != now.get(k)), "event")
            raise ArtifactError(
                f"{self.path}:{number}: the log says {recorded['event']} {key}={recorded.get(key)!r}, this sweep "
                f"{event} {key}={now.get(key)!r}; was it begun with another version of constellation or optuna?"
            )

    def note(self, event: str, **values: Any) -> None:
        """A line that decides nothing, of SAID_ONLY; it waits for no other."""
        self._log.append(event, **values)

    def close(self) -> None:
        self._log.close()


def outcome_of(event: Event) -> Outcome:
    """The outcome in an `ended` event."""
    return Outcome(event["status"], event["metric"], event["reason"], Cost(**event["cost"]), event["attempts"])
