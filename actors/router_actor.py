"""RouterActor: the fitted router behind a mailbox; it computes with numpy and needs neither torch nor a GPU."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from actors.messages import ActorReport

if TYPE_CHECKING:
    from router.decide.policy import RouteChoice


class RouterMailbox:
    """Answers who should answer."""

    def __init__(self, run: Path | str):
        from constellation.storage.mirror import resolve
        from router.decide.fisher_rao import FisherRaoRouter

        self._router = FisherRaoRouter.load(resolve(run, parts=("router",)) / "router")

    def __repr__(self) -> str:
        return "router"

    async def route(self, texts: list[bytes]) -> list[RouteChoice]:
        """One decision per text; ask for many at once."""
        return await asyncio.to_thread(self._router.route, texts)

    @ray.method(concurrency_group="control")
    async def report(self, since: int, patience_s: float = 0.0) -> ActorReport:
        await asyncio.sleep(patience_s)
        node = ray.get_runtime_context().get_node_id()
        return ActorReport(
            role="router", state="serving", pid=os.getpid(), node=ray.util.get_node_ip_address(), node_id=node
        )


RouterActor: Any = ray.remote(num_cpus=0, concurrency_groups={"control": 4}, max_restarts=0, max_task_retries=0)(
    RouterMailbox
)
