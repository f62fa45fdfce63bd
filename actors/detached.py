"""A constellation that stays up: actors that outlive the command that started them.

    up(run)       a supervisor actor (keeper.py) keeps router, OCEAN and kernels alive
    status(run)   what there is: up, in training, finished, stopped
    down(run)     actors first, then their room, then the Ray, if `up` started it

RUN/up.json says where it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import get_placement_group, remove_placement_group

from actors.application import servable
from actors.cluster import answer, connected, inside, machine, where
from actors.exclusive import exclusive
from actors.head import Head, start_head, stop_head
from actors.hire import ROUTER, options_of
from actors.keeper import SUPERVISOR, SupervisorActor, namespace_of
from actors.messages import ClusterStatus
from actors.placement import check, check_cluster, share
from actors.status import folder_status
from constellation.atomic import read_json, write_json
from constellation.config import OCEAN, ROLES
from constellation.errors import ConfigError, RunError

SCHEMA = 1
RECORD, LOCK = "up.json", ".up.lock"
UP_S, ASK_S, DOWN_S = 600.0, 10.0, 30.0
Say = Callable[[str], None]


@dataclass(frozen=True)
class Record:
    """What up.json says."""

    name: str
    address: str
    head: Head | None  # the Ray that `up` started

    def unreachable(self) -> str:
        """Why nobody answers there, found out within seconds; "" if somebody does."""
        if self.head is not None and not self.head.here():
            return f"it is up on {self.head.host}, which that machine alone can reach"
        if self.head is not None and not self.head.alive():
            return "its Ray has ended"
        try:
            answer(self.address, self.head.token if self.head else None)
        except ConfigError as error:
            return str(error)
        return ""

    def connected(self) -> contextlib.AbstractContextManager[None]:
        return connected(self.address, token=self.head.token if self.head else None)


def read_record(run: Path) -> Record | None:
    if not (run / RECORD).exists():
        return None
    found = read_json(run / RECORD)
    return Record(found["name"], found["address"], Head(**found["head"]) if found["head"] else None)


def up(
    run: Path,
    *,
    address: str | None = None,
    name: str | None = None,
    changes: Mapping[str, Any] | None = None,
    num_cpus: int | None = None,
    say: Say = print,
) -> ClusterStatus:
    """Let the constellation in `run` stay up, in the Ray at `address` or in one on this machine that stays too.

    `changes` may override cluster.*, such as {"cluster.gpus_per_kernel": 0}; `name` None is the folder's.
    Up already is no error. A failure on the way leaves nothing behind.
    """
    config = servable(run, changes)
    name, bundles = name or run.resolve().name, [share(config)] * len(ROLES)
    with exclusive(run, name=LOCK):
        now = status(run)
        if now.state in ("up", "starting"):
            say(f"{run} is up already, as {now.name} at {now.address}")
            return now
        _forget(run)
        head, address = None, where(address)
        if address is None and not inside():
            check(bundles, [machine(num_cpus)], "this machine")
            say("starting a Ray on this machine that stays")
            head = start_head(num_cpus)
        record = None
        try:
            with connected(head.address if head else address, token=head.token if head else None):
                check_cluster(bundles)
                if _supervisor(name) is not None:
                    raise ConfigError(f"a constellation named {name} is up in this cluster; choose another --name")
                record = Record(name, ray.get_runtime_context().gcs_address, head)
                # private: it holds Ray's token
                write_json(run / RECORD, {"schema": SCHEMA, **dataclasses.asdict(record)}, private=True)
                options = options_of({}, 1, "DEFAULT") | {"name": SUPERVISOR, "namespace": namespace_of(name)}
                actor = SupervisorActor.options(**options, lifetime="detached").remote(run.resolve(), name, config)
                return _until_up(actor, run, say)
        except BaseException:
            if record is not None:
                _take_down(record)
            elif head is not None:
                stop_head(head)
            (run / RECORD).unlink(missing_ok=True)
            raise


def status(run: Path | None = None, *, name: str | None = None, address: str | None = None) -> ClusterStatus:
    """The constellation in the folder `run`, or the one called `name` in the Ray at `address`. Answers in seconds."""
    if run is None:
        with connected(where(address)):
            actor = _supervisor(name or "")
            if actor is None:
                raise ConfigError(f"no constellation named {name} is up in this cluster")
            return _ask(actor)
    folder, record = folder_status(run), read_record(run)
    if record is None:
        return folder
    if why := record.unreachable():
        return dataclasses.replace(folder, detail=f"{why}; {folder.detail}")
    with record.connected():
        actor = _supervisor(record.name)
        if actor is None:
            return dataclasses.replace(folder, detail=f"its actors are gone; {folder.detail}")
        live = _ask(actor)
    trained = {kernel.role: kernel for kernel in folder.kernels}
    kernels = [
        dataclasses.replace(kernel, steps=known.steps, loss_nats=known.loss_nats)
        if (known := trained.get(kernel.role))
        else kernel
        for kernel in live.kernels
    ]
    return dataclasses.replace(live, run=str(run), kernels=tuple(kernels))


def down(run: Path | None = None, *, name: str | None = None, address: str | None = None, say: Say = print) -> bool:
    """End what `up` began: actors, then their room, then the Ray if it was ours. False if there was nothing."""
    if run is None:
        with connected(where(address)):
            return _end_actors(name or "")
    with exclusive(run, wait_s=DOWN_S, name=LOCK):
        record = read_record(run)
        if record is None:
            say(f"{run} is not up")
            return False
        if why := record.unreachable():
            say(f"{run} was up, but {why}; forgotten")
            _forget(run)
            return True
        _take_down(record)
        (run / RECORD).unlink()
        say(f"{run} is down")
        return True


def _until_up(actor: Any, run: Path, say: Say) -> ClusterStatus:
    began, said = time.monotonic(), ""
    while True:
        now = _ask(actor)
        if now.state == "up":
            return dataclasses.replace(now, run=str(run))
        if now.state == "failed":
            raise RunError(now.detail)
        if time.monotonic() - began > UP_S:
            raise RunError(f"not up within {UP_S:g} s: {now.detail}")
        if now.detail != said:
            said = now.detail
            say(said)
        time.sleep(0.25)


def _supervisor(name: str) -> Any:
    try:
        return ray.get_actor(SUPERVISOR, namespace=namespace_of(name))
    except ValueError:
        return None


def _ask(actor: Any) -> ClusterStatus:
    """The supervisor's status; Ray restarts it if it died, which takes a moment."""
    until = time.monotonic() + DOWN_S
    while True:
        try:
            found: ClusterStatus = ray.get(actor.status.remote(), timeout=ASK_S)
            return found
        except RayTaskError as error:
            raise RunError(f"supervisor: {error.cause!r}") from None
        except RayError as error:
            if time.monotonic() > until:
                raise RunError(f"the supervisor does not answer ({type(error).__name__}); constellation down") from None
            time.sleep(0.5)


def _take_down(record: Record) -> None:
    """End actors, room and our own Ray; the Ray is ended even if the actors cannot be reached."""
    try:
        with contextlib.suppress(ConfigError, RayError), record.connected():
            _end_actors(record.name)
    finally:
        if record.head is not None:
            stop_head(record.head)


def _end_actors(name: str) -> bool:
    """Through the supervisor, and whatever it leaves by hand."""
    supervisor = _supervisor(name)
    if supervisor is not None:
        with contextlib.suppress(RayError):
            ray.get(supervisor.shutdown.remote(), timeout=DOWN_S)
        ray.kill(supervisor)
    for role in (ROUTER, OCEAN, *ROLES):
        with contextlib.suppress(ValueError):
            ray.kill(ray.get_actor(role, namespace=namespace_of(name)))
    with contextlib.suppress(ValueError):
        remove_placement_group(get_placement_group(namespace_of(name)))
    return supervisor is not None


def _forget(run: Path) -> None:
    """Remove a record whose Ray does not answer, and what is left of that Ray if it was ours."""
    record = read_record(run)
    if record is not None and record.head is not None and record.head.here():
        stop_head(record.head)
    (run / RECORD).unlink(missing_ok=True)
