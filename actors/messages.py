"""What actors and supervisor tell each other: small frozen records of plain values.

Packets of a query are msgpack bytes and travel as they are; weights never travel, they are read from
checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

from constellation.telemetry.step import Step

# state of an actor: idle -> training -> done | stopped | failed, or idle -> serving
BUSY = ("idle", "training")


@dataclass(frozen=True)
class ActorReport:
    """An actor's answer to "what is new?"; asking twice gives the same answer."""

    role: str
    state: str  # idle | training | done | stopped | failed | serving
    pid: int
    node: str  # IP address
    node_id: str
    step: int = 0  # newest step done, 0 before the first
    checkpoint: str | None = None  # newest complete checkpoint: what a restart goes on from
    error: str | None = None  # why it failed, one line
    steps: tuple[Step, ...] = ()  # those after the step that was asked about
    notes: tuple[str, ...] = ()  # what the user should read, such as of a damaged checkpoint; all so far
