"""What a command left running."""

from __future__ import annotations

import contextlib
from pathlib import Path


def processes_of(session: int) -> dict[int, str]:
    """Living processes of the session that `session` leads, a driver, its Ray and their descendants: pid, command.

    One that ended and was not reaped does not live: a container may reap nobody.
    """
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, _, sid = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(sid) == session and state != "Z":
                found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ").strip()
    return found
