"""Which Ray: an embedded one for this process, or one that exists already.

    with connected(address): ...

Whoever reaches a Ray port, or may write where Ray does, can run code as you. Hence: the dashboard is off, everything
that is started here listens on 127.0.0.1 alone, writes below a private folder (private.py) and asks for a token.
RAY_AUTH_MODE is set on every path (left unset, Ray decides by whether a token file happens to lie in the home folder).
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from actors import private
from constellation.config import Cluster
from constellation.errors import ConfigError, RunError
from constellation.processor import cores

NAMESPACE = "constellation"
OBJECT_STORE_BYTES = 100 * 2**20  # packets are small, weights travel as files
ANSWER_S = 5.0  # a Ray that exists answers within
STARTS_WITHIN = "RAY_raylet_start_wait_time_s"  # Ray's own patience with its start; 30 s is short on a busy machine
START_S = 120.0
STARTS = 3  # a raylet gives up when its agents need more than 15 s, as on a busy machine, and tells nobody


def machine(num_cpus: int | None = None, kernels: int = 8) -> dict[str, float]:
    """Logical resources of a Ray started here: CPUs for `kernels` at their default share at least, 2 for eight.

    Nobody else counts on this Ray's accounts.
    """
    import torch

    needed = math.ceil(kernels * Cluster().cpus_per_kernel)
    return {"CPU": num_cpus or max(2, cores(), needed), "GPU": torch.cuda.device_count()}


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
    auth: str | None = None,
) -> Iterator[None]:
    """Ray inside the block: the one at `address` (host:port or "auto"), or an embedded one when it is None.

    One that this process has already is used and left as it is. `auth` "disabled" lets everybody on this machine use
    an embedded one. ConfigError within seconds when nothing answers; left to itself `ray.init` tries for minutes.
    """
    import ray

    if inside():
        there = ray.get_runtime_context().gcs_address
        if address is not None and find(address)[1] != find(there)[1]:  # hosts have several names
            raise ConfigError(f"this process is connected to the Ray at {there}, not at {address}; use another process")
        yield
        return
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault(STARTS_WITHIN, str(round(START_S)))
    # Ray writes of deaths on standard output, even with log_to_driver=False; the supervisor tells them elsewhere
    ray._private.worker.print_to_stdstream = lambda data, ignore_prefix=False: None
    with (
        _environment(),
        _embedded(num_cpus, namespace, auth) if address is None else _joined(address, namespace, token),
    ):
        yield


@contextlib.contextmanager
def _embedded(num_cpus: int | None, namespace: str, auth: str | None) -> Iterator[None]:
    """A Ray of this process. After an error its folder stays, for the logs in it, until another one is started."""
    import ray

    if auth is None:
        refuse_open()
    if auth != "disabled" and not _told_a_token():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # never on disk; children inherit it
    _authenticate(auth or "token")
    size, (folder, mark) = machine(num_cpus), private.make()
    logs_wanted = False
    try:
        with _loopback():
            for start in range(1, STARTS + 1):
                try:
                    ray.init(
                        "local", num_cpus=int(size["CPU"]), num_gpus=int(size["GPU"]), include_dashboard=False,
                        object_store_memory=OBJECT_STORE_BYTES, _temp_dir=str(folder / "ray"), **_common(namespace),
                    )  # fmt: skip
                    break
                except Exception as error:  # Ray raises it bare
                    ray.shutdown()
                    if start == STARTS:
                        told = str(error).strip().partition("\n")[0]
                        raise RunError(f"Ray did not start on this machine: {told} Its logs: {folder}") from None
        yield
    except Exception:
        logs_wanted = True
        raise
    finally:
        ray.shutdown()
        if not logs_wanted:
            private.remove(folder)
        os.close(mark)


@contextlib.contextmanager
def _joined(address: str, namespace: str, token: Path | None) -> Iterator[None]:
    import ray

    host, port = find(address)
    with _loopback() if host in ("127.0.0.1", "localhost") else contextlib.nullcontext():
        _answer(address, token)
        try:
            ray.init(f"{host}:{port}", **_common(namespace))
        except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
            first = str(error).strip().splitlines()[0]
            raise ConfigError(f"--address {address}: {first}; the same Ray and Python are needed") from None
    try:
        yield
    finally:
        ray.shutdown()


def _common(namespace: str) -> dict[str, Any]:
    return {"namespace": namespace, "log_to_driver": False, "logging_level": "ERROR"}


def refuse_open() -> None:
    """ConfigError when the environment wants a Ray that we start to be open to everybody on this machine."""
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        raise ConfigError(
            "RAY_AUTH_MODE=disabled: whoever is on this machine could run code as you; "
            "unset it, or say it: constellation train --ray-auth disabled"
        )


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


def answer(address: str, token: Path | None = None) -> None:
    """ConfigError unless a Ray answers at `address` within seconds."""
    with _environment():
        _answer(address, token)


def _answer(address: str, token: Path | None) -> None:
    """`answer`; from here on this process has its token."""
    host, port = find(address)
    way_out = "start one: ray start --head, or leave out --address"
    try:
        socket.create_connection((host, port), timeout=ANSWER_S).close()
    except OSError as error:
        raise ConfigError(f"no Ray at {host}:{port} ({error.strerror or error}); {way_out}") from None
    _authenticate(_mode_of_others() if token is None else "token", token)
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    refused: list[Exception] = []

    def greet() -> None:
        try:
            GcsClient(address=f"{host}:{port}")
        except Exception as error:
            refused.append(error)

    greeting = threading.Thread(target=greet, daemon=True)  # left behind if it never ends: GcsClient tries for ever
    greeting.start()
    greeting.join(ANSWER_S)
    if greeting.is_alive():
        raise ConfigError(f"something at {host}:{port} is not a Ray, or hangs; {way_out}")
    if refused:
        first = str(refused[0]).strip().partition(". ")[0]
        raise ConfigError(f"the Ray at {host}:{port} refuses: {first}; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN")


def _mode_of_others() -> str:
    """How to authenticate with a cluster that somebody else started: as told, else by whether a token is at hand."""
    has_token = _told_a_token() or (Path.home() / ".ray" / "auth_token").exists()
    return os.environ.get("RAY_AUTH_MODE") or ("token" if has_token else "disabled")


def _told_a_token() -> bool:
    return bool({"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ))


def _authenticate(mode: str, token: Path | None = None) -> None:
    """Without a `token` here or in the environment, Ray takes the one in the home folder."""
    os.environ["RAY_AUTH_MODE"] = mode
    if token is not None:
        os.environ["RAY_AUTH_TOKEN"] = token.read_text()
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")  # this process may have talked to another Ray: forget how
    AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """How this process authenticates inside is forgotten after the block, so that nobody it starts inherits it."""
    before = {name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


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
