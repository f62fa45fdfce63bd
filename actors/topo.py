"""Seeds of a TopoEncoder side by side on Ray: an actor each, told what to do as plain data, asked for what it did."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray

from actors.connect import connected
from constellation.config import Config, override
from constellation.errors import ConstellationError, RunError
from constellation.topo.request import preset


class TopoMailbox:
    """One training at a time; its folder is all it remembers."""

    def train(self, run: Path, source: str | None, config: Config | None, resume: bool) -> dict[str, Any] | str:
        """The run's summary, or why there is none; a run that is killed goes on when this is asked again."""
        from constellation.storage.atomic import read_object
        from constellation.storage.exclusive import exclusive
        from constellation.topo.readers import read_images
        from constellation.topo.request import REQUEST, request
        from constellation.topo.train import fit

        try:
            with exclusive(run):
                again = resume or (run / REQUEST).exists()  # an actor that was restarted is told its job again
                chosen, own = request(run, source, config, again, lambda name: read_images(name).digest)
                for _ in fit(own, read_images(chosen), run):
                    pass
            return read_object(run / "summary.json")
        except ConstellationError as error:
            return str(error)


def train_seeds(
    run: Path, source: str | None, config: Config | None, jobs: int, resume: bool, address: str | None,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """`jobs` seeds in run/seed-0 ...: the configuration's own and those after it; their summaries, in order."""
    base = config or (None if resume else preset("digits"))
    with connected(address, num_cpus=jobs):
        actor = ray.remote(num_cpus=1, max_restarts=2, max_task_retries=2)(TopoMailbox)
        asked = []
        for seed in range(jobs):
            own = None if base is None else override(base, {"topo.train.seed": base.topo.train.seed + seed})
            mailbox = actor.remote()
            asked.append((mailbox, mailbox.train.remote((run / f"seed-{seed}").resolve(), source, own, resume)))
        for seed, (_, answer) in enumerate(asked):
            found = ray.get(answer)
            if isinstance(found, str):
                raise RunError(f"seed-{seed}: {found}")
            say(f"seed-{seed} of {jobs} is done")
            yield found
