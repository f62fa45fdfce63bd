"""Where a service's processor time goes: samples of its Python stacks (py-spy, which comes with Ray), by part.

A sample of a thread that works counts for the part of its innermost frame that belongs to one: numpy's work inside a
look is the look's, a socket's write inside a response is the socket's.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

PARTS = (  # name, files whose frames are its own
    ("kernels in C", ("decoding/native.py",)),
    ("batch", ("/decoding/", "answer/turn.py")),
    ("looks", ("router/decide/", "answer/view.py", "answer/certificate.py", "answer/count_codec.py")),
    ("packets", ("answer/packet.py",)),
    ("lives", ("router/answer/", "coordizer/tokenizer.py")),
    ("requests and JSON", ("http/render.py", "http/responses.py", "http/requests.py", "http/translate.py")),
    ("metrics", ("http/metrics.py", "prometheus_client/")),
    ("sockets", ("asyncio/selector_events.py", "asyncio/sslproto.py")),
    ("SSE and HTTP", ("router/http/", "starlette/", "fastapi/", "uvicorn/", "h11/", "httptools/")),
    ("event loop", ("asyncio/", "concurrent/futures/", "uvloop/", "threading.py")),
)  # fmt: skip
REST = "rest"
WAITING = ("select (selectors.py", "_work (constellation/decoding/engine.py", "_worker (concurrent/futures/thread.py",
           "wait (threading.py")  # fmt: skip  # innermost frames of threads that wait, whatever the sampler thinks
RATE = 100  # samples a second


def part_of(frames: Sequence[str]) -> str | None:
    """The part of a stack, outermost frame first; None of a thread that waits."""
    if any(frame.startswith(WAITING) for frame in frames[-1:]):
        return None
    for frame in reversed(frames):
        for name, files in PARTS:
            if any(file in frame for file in files):
                return name
    return REST


def shares(folded: str) -> dict[str, float]:
    """Each part's share of the samples in lines "frame;frame;... count"; they sum to 1. Empty without samples."""
    counts: Counter[str] = Counter()
    for line in folded.splitlines():
        stack, _, count = line.rpartition(" ")
        if (part := part_of(stack.split(";"))) is not None:
            counts[part] += int(count)
    return {name: count / counts.total() for name, count in counts.most_common()}


@contextlib.contextmanager
def sampled(pid: int | None) -> Iterator[dict[str, float]]:
    """The shares of process `pid`, filled in when the block ends; empty when it cannot be looked into."""
    found: dict[str, float] = {}
    spy = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if pid is None or spy is None:
        yield found
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "stacks"
        words = [spy, "record", "--pid", str(pid), "--format", "raw", "--output", str(out), "--rate", str(RATE),
                 "--nonblocking", "--duration", "unlimited"]  # fmt: skip
        sampler = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield found
        finally:
            sampler.send_signal(signal.SIGINT)  # it writes what it has
            try:
                sampler.wait(30)
            except subprocess.TimeoutExpired:
                sampler.kill()
                sampler.wait()
        if out.exists():
            found.update(shares(out.read_text()))
