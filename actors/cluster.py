"""Where Ray is: an embedded one for this process, one that exists already, or a local head that outlives us.

    connected(address)   with it: Ray for as long as the block runs
    start_head()         a head on this machine that stays until stop_head()

Whoever reaches a Ray port can run code as you. Hence: the dashboard is off, everything that is started
here listens on 127.0.0.1 alone, and RAY_AUTH_MODE is set on every path (left unset, Ray decides by
whether a token file happens to lie in the home folder).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from constellation.errors import ConfigError, RunError

NAMESPACE = "constellation"
OBJECT_STORE_BYTES = 100 * 2**20  # packets are small, weights travel as files
HEAD_START_S = 60.0
ANSWER_S = 5.0  # a Ray that exists answers within


def machine(num_cpus: int | None = None) -> dict[str, float]:
    """Logical resources of a Ray started here: at least 2 CPUs, for nobody else counts on this Ray's accounts."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"CPU": num_cpus or max(2, cores), "GPU": torch.cuda.device_count()}


def where(address: str | None) -> str | None:
    """The address to join: the one given, else Ray's own RAY_ADDRESS, which a submitted job finds set."""
    return address or os.environ.get("RAY_ADDRESS") or None


def inside() -> bool:
    """Whether this process has a Ray already: a notebook, a sweep's trial, an actor."""
    import ray

    return bool(ray.is_initialized())


@contextlib.contextmanager
def connected(
    address: str | None = None,
    *,
    num_cpus: int | None = None,
    namespace: str = NAMESPACE,
    token: Path | None = None,
) -> Iterator[None]:
    """Ray inside the block; one that this process has already is used and left as it is."""
    import ray

    if inside():
        there = ray.get_runtime_context().gcs_address
        if address is not None and find(address)[1] != find(there)[1]:  # hosts have several names
            raise ConfigError(f"this process is connected to the Ray at {there}, not at {address}; use another process")
        yield
        return
    connect(address, num_cpus=num_cpus, namespace=namespace, token=token)
    try:
        yield
    finally:
        ray.shutdown()


def connect(
    address: str | None = None,
    *,
    num_cpus: int | None = None,
    namespace: str = NAMESPACE,
    token: Path | None = None,
) -> None:
    """Join the Ray at `address` (host:port or "auto"), or start an embedded one when it is None.

    ConfigError within seconds when nothing answers there; left to itself `ray.init` tries for minutes.
    """
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    common: dict[str, Any] = {"namespace": namespace, "log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        _authenticate(os.environ.get("RAY_AUTH_MODE", "token"))
        size = machine(num_cpus)
        with _loopback():
            ray.init(
                "local", num_cpus=int(size["CPU"]), num_gpus=int(size["GPU"]), include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES, **common,
            )  # fmt: skip
        return
    _authenticate(_mode_of_others() if token is None else "token", token)
    host, port = find(address)
    with _loopback() if host in ("127.0.0.1", "localhost") else contextlib.nullcontext():
        answer(host, port)
        try:
            ray.init(f"{host}:{port}", **common)
        except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
            first = str(error).strip().splitlines()[0]
            raise ConfigError(f"--address {address}: {first}; the same Ray, Python and token are needed") from None


def find(address: str) -> tuple[str, int]:
    """(host, port) behind `address`."""
    if address == "auto":
        from ray._private.services import canonicalize_bootstrap_address

        found = canonicalize_bootstrap_address(address)
        if found is None:
            raise ConfigError("--address auto: no Ray runs on this machine; start one: ray start --head")
        address = found
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "/" in host:
        raise ConfigError(f"--address {address}: host:port or auto is wanted, such as 10.0.0.5:6379")
    return host, int(port)


def answer(host: str, port: int) -> None:
    """ConfigError unless a Ray answers at host:port within seconds."""
    way_out = "start one: ray start --head, or leave out --address"
    try:
        socket.create_connection((host, port), timeout=ANSWER_S).close()
    except OSError as error:
        raise ConfigError(f"no Ray at {host}:{port} ({error.strerror or error}); {way_out}") from None
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    # GcsClient retries for ever; the thread is left behind when it does
    greeting = threading.Thread(target=lambda: GcsClient(address=f"{host}:{port}"), daemon=True)
    greeting.start()
    greeting.join(ANSWER_S)
    if greeting.is_alive():
        raise ConfigError(f"something at {host}:{port} is not a Ray, or hangs; {way_out}")


def _mode_of_others() -> str:
    """How to authenticate with a cluster that somebody else started: as told, else by whether a token is at hand."""
    default = Path.home() / ".ray" / "auth_token"
    has_token = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ or default.exists()
    return os.environ.get("RAY_AUTH_MODE") or ("token" if has_token else "disabled")


def _authenticate(mode: str, token: Path | None = None) -> None:
    os.environ["RAY_AUTH_MODE"] = mode
    if token is not None:
        os.environ["RAY_AUTH_TOKEN"] = token.read_text()
    elif mode == "token" and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # never on disk; children inherit it
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")  # this process may have talked to another Ray: forget how
    AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def _loopback() -> Iterator[None]:
    """Ray started or joined inside knows this machine as 127.0.0.1 and listens there alone.

    The switch is the one that macOS and Windows have by default; elsewhere Ray takes the address of the
    network card, listens on all of them, and turns a given 127.0.0.1 into that address.
    """
    from ray._private import ray_constants

    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before, attribute = os.environ.get(name), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = attribute
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@dataclass(frozen=True)
class Head:
    """A Ray head on this machine, as `start_head` left it; plain values for up.json."""

    address: str
    host: str
    pid: int  # of `ray start --block`, the parent and session leader of all its processes
    started: float  # when that process began: a pid alone may belong to somebody else by now
    folder: str  # its temporary folder: sessions, logs and token

    @property
    def token(self) -> Path:
        return Path(self.folder) / "token"

    def alive(self) -> bool:
        return socket.gethostname() == self.host and _started(self.pid) == self.started

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def start_head(num_cpus: int | None = None) -> Head:
    """Start Ray on this machine so that it outlives this process; RunError with its own words when it does not come up.

    Its temporary folder is its own, so that nobody's `ray.init()` joins it by accident.
    """
    size = machine(num_cpus)
    folder = Path(tempfile.mkdtemp(prefix="constellation-", dir="/tmp" if os.path.isdir("/tmp") else None))
    token = os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)
    (folder / "token").touch(mode=0o600)
    (folder / "token").write_text(token)
    environment = {
        **os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port=0",
        "--include-dashboard=false", f"--num-cpus={int(size['CPU'])}", f"--num-gpus={int(size['GPU'])}",
        f"--object-store-memory={OBJECT_STORE_BYTES}", f"--temp-dir={folder}", "--disable-usage-stats",
        f"--ray-client-server-port={_free_port()}",
    ]  # fmt: skip
    log = folder / "start.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                                   stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
    where = folder / "ray_current_cluster"
    until = time.monotonic() + HEAD_START_S
    try:
        while not (where.exists() and where.read_text().strip()):
            if process.poll() is not None or time.monotonic() > until:
                last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
                raise RunError(f"Ray did not start on this machine: {last[0]}")
            time.sleep(0.1)
    except BaseException:
        process.kill()
        _kill_session(process.pid)
        shutil.rmtree(folder, ignore_errors=True)
        raise
    started = _started(process.pid)
    assert started is not None
    return Head(where.read_text().strip(), socket.gethostname(), process.pid, started, str(folder))


def stop_head(head: Head) -> None:
    """End all processes of `head` and remove its folder; nothing happens when it is gone already."""
    if head.alive():
        with contextlib.suppress(ProcessLookupError):
            os.kill(head.pid, signal.SIGTERM)
        until = time.monotonic() + 10
        while head.alive() and time.monotonic() < until:
            _reap(head.pid)
            time.sleep(0.05)
        _kill_session(head.pid)
    shutil.rmtree(head.folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _started(pid: int) -> float | None:
    """When process `pid` began, seconds since 1970; None when there is none."""
    import ray  # noqa: F401 - brings its psutil onto the path
    import psutil  # type: ignore[import-untyped]  # isort: skip

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else round(process.create_time(), 1)
    except psutil.NoSuchProcess:
        return None


def _kill_session(leader: int) -> None:
    """SIGKILL for whatever is left of the session that `leader` led: Ray's workers have process groups of their own."""
    import psutil

    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == leader:
                os.kill(process.pid, signal.SIGKILL)
    _reap(leader)


def _reap(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
