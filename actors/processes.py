"""Processes of this machine: Linux and macOS alike."""

from __future__ import annotations

import contextlib
import os

import psutil


def of_session(leader: int) -> dict[int, str]:
    """Living processes of the session that `leader` led, a driver, its Ray and their descendants: pid, command.

    One that ended and was not reaped does not live: a container may reap nobody.
    """
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, PermissionError, psutil.Error):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = " ".join(process.cmdline())
    return found


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and all its descendants."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += one.memory_info().rss
    return total
