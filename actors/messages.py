"""What actors, supervisor and user tell each other: small frozen records of plain values.

Packets of a query are msgpack bytes and travel as they are; weights never travel, they are read from
checkpoints.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from constellation.telemetry.step import Step

# state of an actor: idle -> training -> done | stopped | failed, or idle -> serving
BUSY = ("idle", "training")


@dataclass(frozen=True)
class Report:
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


@dataclass(frozen=True)
class KernelStatus:
    """One model of a constellation, as `constellation status` shows it."""

    role: str
    root: str | None  # its E8 address, such as "e1 - e3"; None for OCEAN and before the router is fitted
    state: str  # waiting | starting | training | serving | done | stopped | failed
    health: str  # "ok", or in words what is wrong
    step: int  # steps done
    steps: int | None  # planned
    loss_nats: float | None  # of the newest step known, nats per token
    node: str | None = None  # IP address and Ray's id of the node
    pid: int | None = None
    restarts: int = 0


@dataclass(frozen=True)
class ClusterStatus:
    """A constellation as a whole."""

    run: str
    name: str
    state: str  # new | training | stopped | failed | finished | starting | up
    address: str | None  # of the Ray it is up on; None when it is not
    detail: str  # one sentence: what this means, what to do
    kernels: tuple[KernelStatus, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
