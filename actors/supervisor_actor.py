"""A Supervisor in an actor of its own, which keeps a constellation up after everybody has left.

It is the one actor that Ray itself restarts, for nobody watches it; it finds the others by their names
and goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from pathlib import Path
from typing import Any

import ray

from actors.placement import reserve, share
from actors.specs import servers
from actors.supervisor import Supervisor
from constellation.config import Config
from constellation.errors import ConstellationError
from constellation.pipeline.status import ClusterStatus, KernelStatus, roots
from constellation.storage.mirror import resolve

SUPERVISOR = "supervisor"  # its name; the others are named by their roles


def namespace_of(name: str) -> str:
    """Ray namespace of a constellation's actors; in it they are named by role."""
    return f"constellation.{name}"


class SupervisorMailbox:
    """A Supervisor at work in a thread of an actor of its own."""

    def __init__(self, run: Path | str, name: str, config: Config):
        self._run, self._name, self._config = run, name, config
        self._detail, self._failure = "starting", ""
        self._supervisor: Supervisor | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"supervisor of {self._name}"

    async def status(self) -> ClusterStatus:
        kernels = self._supervisor.status() if self._supervisor else ()
        state, detail = "starting", self._detail
        if self._failure:
            state, detail = "failed", self._failure
        elif kernels and all(k.state == "serving" for k in kernels):
            state, detail = "up", "all actors serve"
        here = ray.get_runtime_context()
        node = f"{ray.util.get_node_ip_address()} {here.get_node_id()[:8]}"
        me = KernelStatus(
            SUPERVISOR, None, "failed" if self._failure else "serving", "ok", 0, None, None, node, os.getpid()
        )
        return ClusterStatus(str(self._run), self._name, state, here.gcs_address, detail, (me, *kernels))

    async def shutdown(self) -> None:
        """End all actors, then give their room back."""
        self._end.set()
        await asyncio.to_thread(self._thread.join)

    def _watch(self) -> None:
        try:
            with contextlib.ExitStack() as stack:
                bundles = [share(self._config)] * len(self._config.kernels)
                timeout_s = self._config.cluster.placement_timeout_s
                placement = reserve(bundles, timeout_s, self._say, namespace_of(self._name))
                stack.callback(placement.release)
                supervisor = Supervisor(
                    self._config, placement, self._say, roots(resolve(self._run, parts=("router",)))
                )
                stack.callback(supervisor.dismiss)
                supervisor.start(servers(placement, self._run, self._config, namespace_of(self._name)))
                self._supervisor = supervisor
                while not self._end.is_set():
                    supervisor.beat()
        except BaseException as error:
            self._failure = str(error) if isinstance(error, ConstellationError) else repr(error)
            raise  # into the actor's log

    def _say(self, text: str) -> None:
        self._detail = text
        print(text, flush=True)


SupervisorActor: Any = ray.remote(max_restarts=-1, max_task_retries=0)(SupervisorMailbox)
