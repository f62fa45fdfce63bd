"""The Supervisor: only it starts, restarts and kills actors.

A death, a hang and a lost node all end in the same way: the old actor is killed, a new one is created
in the same bundle and goes on from the newest checkpoint. Ray's own `max_restarts` stays at 0:

  - a hung process is alive to Ray, so somebody has to watch anyway, and one way of restarting is enough;
  - `ray.kill(no_restart=False)` returns at once, and calls still reach the old incarnation (measured: 3 of 8);
    a new actor has a new handle, so nothing it says can come from the old one;
  - after a lost node the group's bundle moves to another node and the new actor waits for it, while Ray's
    restart belongs to the old one (and stays pending for ever if the group is removed first);
  - deaths are counted and named here, so a run that dies too often ends with the reason.

The lock of exclusive.py keeps an old actor that is cut off but alive from writing beside its replacement.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayError, RayTaskError, RuntimeEnvSetupError

from actors.messages import BUSY, ActorReport
from actors.placement import Placement, nodes, total
from actors.specs import ActorSpec, trainer
from constellation.config import Config
from constellation.errors import ConstellationError, PlacementError, RunError
from constellation.pipeline.status import KernelStatus
from constellation.telemetry.step import Step
from constellation.train.loop import Job

BEAT_S = 1.0  # how long an actor collects news before it answers
HEALTH_S = 5.0  # a question this old is asked again
SILENCE_S = 6 * HEALTH_S  # no answer for so long is a hang: a busy machine is slow for longer than one thinks
START_S = 300.0  # for process, imports and the first answer
CALM_S = 600.0  # an actor that served for so long starts its count of deaths anew
SAY_EVERY_S = 10.0
STOP_S = 10.0  # for the steps in progress to end


@dataclass
class Member:
    """One actor and what is known of it. Times in seconds of time.monotonic()."""

    spec: ActorSpec
    actor: Any = None
    asked: Any = None  # the answer that is awaited
    asked_at: float = 0.0
    heard_at: float = 0.0
    born_at: float = 0.0
    restarts: int = 0
    started: bool = False  # it has answered its first call
    report: ActorReport | None = None
    step: Step | None = None  # newest
    noted: int = 0  # of its notes, said already

    @property
    def role(self) -> str:
        return self.spec.role

    @property
    def state(self) -> str:
        if not self.started:
            return "starting"
        return self.report.state if self.report else "idle"

    @property
    def seen(self) -> int:
        return self.step.step if self.step else 0

    @property
    def at_work(self) -> bool:
        return self.state in ("starting", "serving", *BUSY)

    def start(self) -> None:
        self.actor = self.spec.create()
        self.started, self.report, self.noted = False, None, 0
        self.born_at = self.heard_at = time.monotonic()
        self.ask()

    def take(self, spec: ActorSpec) -> None:
        """Let the actor that is done with its job begin that of `spec`."""
        self.spec, self.report, self.step, self.restarts, self.noted = spec, None, None, 0, 0
        self.asked, self.asked_at = spec.begin(self.actor), time.monotonic()

    def ask(self) -> None:
        self.asked = self.actor.report.remote(self.seen, BEAT_S) if self.started else self.spec.begin(self.actor)
        self.asked_at = time.monotonic()

    def status(self, root: str | None) -> KernelStatus:
        report, step = self.report, self.step
        silent = time.monotonic() - self.heard_at
        return KernelStatus(
            role=self.role, root=root, state=self.state,
            health=f"silent for {silent:.0f} s" if self.started and self.at_work and silent > HEALTH_S else "ok",
            step=max(self.seen, report.step if report else 0), steps=self.spec.steps,
            loss_nats=step.loss_nats if step else None,
            node=f"{report.node} {report.node_id[:8]}" if report else None, pid=report.pid if report else None,
            restarts=self.restarts,
        )  # fmt: skip


@dataclass
class Supervisor:
    """Keeps the actors of one constellation at work inside `placement`."""

    config: Config
    placement: Placement
    say: Callable[[str], None] = print
    roots: dict[str, str] = field(default_factory=dict)  # E8 addresses, for status()
    after_beat: Callable[[Supervisor], None] = lambda supervisor: None
    members: dict[str, Member] = field(default_factory=dict)
    said_at: float = 0.0

    def start(self, specs: Sequence[ActorSpec]) -> None:
        """Create actors and let them begin."""
        for one in specs:
            member = Member(one)
            member.start()
            self.members[one.role] = member  # started: another thread may be at beat()

    def train(self, jobs: Sequence[Job]) -> Iterator[Step]:
        """Train every job in an actor, as many at once as there are bundles; one that is done takes the next.

        Yields every step of each once and in order. RunError, with the reason, when one of them fails or dies more
        than `cluster.max_restarts` times.
        """
        waiting, place = deque(jobs), {}
        for number in range(min(len(waiting), len(self.placement.bundles))):
            first = waiting.popleft()
            place[first.role] = number
            self.start([trainer(self.placement, number, first)])
        while self.members:
            for member, report in self.beat():
                for step in report.steps:
                    if step.step > member.seen:
                        member.step = step
                        yield step
                if report.state == "failed":
                    raise RunError(f"{report.error}")
                if member.at_work:
                    continue
                del self.members[member.role]
                number = place.pop(member.role)
                if not waiting:
                    ray.kill(member.actor)
                    continue
                following = waiting.popleft()
                place[following.role] = number
                spec = trainer(self.placement, number, following)
                if spec.options["runtime_env"] == member.spec.options["runtime_env"]:  # the room is the same
                    member.take(spec)
                    self.members[spec.role] = member
                else:
                    ray.kill(member.actor)
                    self.start([spec])

    def beat(self, wait_s: float = BEAT_S) -> list[tuple[Member, ActorReport]]:
        """News of the next `wait_s` seconds; whoever died, hangs or lost its node is replaced on the way."""
        waiting = {member.asked: member for member in self._crew() if member.asked is not None}
        if waiting:
            ray.wait(list(waiting), num_returns=1, timeout=wait_s)
        else:
            time.sleep(wait_s)
        ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0) if waiting else ([], [])
        news = []
        for member in self._crew():
            if member.asked not in ready:
                self._look_after(member)
            elif (report := self._hear(member)) is not None:
                news.append((member, report))
        self._say_who_starts()
        self.after_beat(self)
        return news

    def status(self) -> tuple[KernelStatus, ...]:
        """Every actor as it was when it was heard last."""
        return tuple(member.status(self.roots.get(member.role)) for member in self._crew())

    def dismiss(self, grace_s: float = STOP_S) -> None:
        """Let every actor finish the step it is in, then kill all of them."""
        stopping = [m.actor.stop.remote() for m in self.members.values() if m.state == "training"]
        try:
            if stopping:
                ray.wait(stopping, num_returns=len(stopping), timeout=grace_s)
        finally:
            for member in self.members.values():
                ray.kill(member.actor)
            self.members.clear()

    def _crew(self) -> list[Member]:
        return list(self.members.values())  # a copy: start() may be called meanwhile

    def _hear(self, member: Member) -> ActorReport | None:
        """The answer that has come: news, or a reason to replace the actor."""
        role = member.role
        try:
            answer = ray.get(member.asked, timeout=HEALTH_S)
        except RayTaskError as error:  # it ran, and raised: it would again
            cause = error.cause if isinstance(error.cause, ConstellationError) else RunError(f"{role}: {error.cause!r}")
            raise cause from None
        except RuntimeEnvSetupError as error:
            raise RunError(f"{role}: its environment cannot be set up: {_first_line(error)}") from None
        except ActorDiedError as error:
            if error.actor_init_failed:
                raise RunError(f"{role}: its actor cannot start: {_last_line(error)}") from None
            self._replace(member, "its process died")
            return None
        except (RayError, GetTimeoutError) as error:  # out of reach, perhaps for a moment
            member.asked = None
            if time.monotonic() - member.heard_at > SILENCE_S:
                self._replace(member, f"out of reach for {SILENCE_S:g} s ({_first_line(error)})")
            return None
        member.started, member.heard_at = True, time.monotonic()
        member.asked = None
        if isinstance(answer, ActorReport):
            member.report = answer
            for note in answer.notes[member.noted :]:
                self.say(f"{role}: {note}")
            member.noted = len(answer.notes)
        if member.at_work:
            member.ask()
        return member.report

    def _look_after(self, member: Member) -> None:
        """No answer yet: fine for a while."""
        now = time.monotonic()
        if member.asked is None:
            if member.at_work and now - member.asked_at > BEAT_S:
                member.ask()
        elif member.started:
            if now - member.heard_at > SILENCE_S:
                self._replace(member, f"no answer for {SILENCE_S:g} s")
            elif now - member.asked_at > HEALTH_S:
                member.ask()  # the question may have been lost
        elif now - member.born_at > START_S:
            self._replace(member, f"not started within {START_S:g} s")

    def _say_who_starts(self) -> None:
        starting = [m for m in self._crew() if m.state == "starting"]
        now = time.monotonic()
        waited = max((now - m.born_at for m in starting), default=0.0)
        if waited < SAY_EVERY_S or now - self.said_at < SAY_EVERY_S:
            return
        self.said_at = now
        self.say(f"waiting for {', '.join(m.role for m in starting)} to start ({waited:.0f} s)")
        if waited > self.config.cluster.placement_timeout_s and not self.placement.still_fits():
            raise PlacementError(
                f"a node went away and what is left ({total(nodes())}) is too little for the constellation; "
                "bring it back, then constellation train --resume"
            )

    def _replace(self, member: Member, why: str) -> None:
        if member.state == "serving" and time.monotonic() - member.born_at > CALM_S:
            member.restarts = 0
        member.restarts += 1
        limit = self.config.cluster.max_restarts
        if member.restarts > limit:
            raise RunError(f"{member.role}: {why}, after {limit} restarts; cluster.max_restarts={limit}, then --resume")
        self.say(f"{member.role}: {why}; restarting from its last checkpoint ({member.restarts} of {limit})")
        ray.kill(member.actor)
        until = time.monotonic() + HEALTH_S
        while not member.spec.name_is_free() and time.monotonic() < until:
            time.sleep(0.05)
        member.start()


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _last_line(error: BaseException) -> str:
    return str(error).strip().rpartition("\n")[2]
