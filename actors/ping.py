"""Does a Ray start here, place an actor and let it answer?"""

from __future__ import annotations

import os
import time

import ray

from actors.connect import connected

ANSWER_S = 300.0


class Echo:
    def pid(self) -> int:
        return os.getpid()


def ping() -> str:
    """Start a Ray, call an actor, stop it; one line about it. Raises what went wrong."""
    began = time.perf_counter()
    with connected(None):
        started = time.perf_counter()
        actor = ray.remote(Echo).options(num_cpus=0).remote()
        pid = ray.get(actor.pid.remote(), timeout=ANSWER_S)
        answered = time.perf_counter()
    return f"Ray up in {started - began:.1f} s, an actor (process {pid}) answered after {answered - started:.1f} s more"
