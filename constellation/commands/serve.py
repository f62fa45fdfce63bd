"""constellation serve"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from constellation.commands import options
from constellation.config import Config, parse_assignments
from constellation.errors import ConfigError, RunError
from router.http.limits import Front

if TYPE_CHECKING:
    from router.http.listen import Place

HERE = ("localhost", "127.0.0.1", "[::1]")


@click.command()
@options.run
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0 lets other machines in")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: any free one")
@click.option(
    "--api-key-file", type=click.Path(path_type=Path), default=None, metavar="FILE",
    help="who may ask; made by constellation keys; without it everyone may",
)  # fmt: skip
@click.option("--fronts", default=1, show_default=True, type=click.IntRange(1), metavar="N", help="processes for HTTP")
@click.option("--grace", default=30.0, show_default=True, type=click.FloatRange(0), metavar="S",
              help="seconds for those who are being answered when the service ends")  # fmt: skip
@options.setting(Front, "connections", show_default=True, metavar="N")
@click.option("--allow-host", "hosts", multiple=True, metavar="NAME",
              help="be asked by this name too, and by no other than localhost and these; repeatable")  # fmt: skip
@click.option("--access-log", is_flag=True, help="a line on stderr for every request")
@options.local
@options.address
@options.overrides
def command(
    run: Path,
    host: str,
    port: int,
    api_key_file: Path | None,
    fronts: int,
    grace: float,
    connections: int,
    hosts: tuple[str, ...],
    access_log: bool,
    local: bool,
    address: str | None,
    overrides: tuple[str, ...],
) -> None:
    """Answer OpenAI clients over HTTP, until Ctrl-C or SIGTERM; those who are being answered then are answered.

    A constellation that is `up` is used, else it is brought up and taken down in the end. With --local the
    kernels run in this process, without Ray; the tokens are the same. KEY=VALUE may change cluster.* and
    decode.* settings of a constellation that is brought up here, such as decode.precision=int8.

    On a loopback address without keys it is asked as localhost alone, and by names that --allow-host adds: else any
    page in a browser on this machine could ask it under a name of its own.
    """
    if local and (address or fronts > 1):
        raise ConfigError("--local is one process without Ray; leave out --address and --fronts")
    from constellation.pipeline.serving import servable

    changes = parse_assignments(overrides)
    config = servable(run, changes)
    options.say_unfinished(run)
    from router.http.listen import Place, bind

    bind(host, port).close()  # told before anything is started
    if api_key_file is not None:
        from router.http.keys import Keys

        Keys(api_key_file)
    if api_key_file is None and not _loopback(host):
        click.echo(f"warning: whoever reaches {host}:{port} may ask; --api-key-file says who", err=True)
    named = f"[{host}]" if ":" in host else host
    known = {name.lower(): None for name in (*HERE, named, *hosts)}
    only = bool(hosts) or (_loopback(host) and api_key_file is None)
    front = Front(connections=connections, hosts=tuple(known) if only else None, access_log=access_log)
    keys = api_key_file.resolve() if api_key_file else None
    place, ends = Place(run.resolve(), "", host, port, fronts > 1, keys, grace, front), Ends(host)
    with ends.heard():
        if local:
            whole = asyncio.run(_in_this_process(place, config, ends))
        else:
            whole = _on_ray(place, fronts, address, ends, changes)
        if not whole:
            raise RunError(f"some who were being answered were cut off after {grace:g} s; --grace gives them longer")
        if ends.pressed:
            raise KeyboardInterrupt


class Ends:
    """Hears of the end: while the service starts a signal interrupts; later the first drains, a second interrupts."""

    def __init__(self, host: str):
        self.host, self.event, self.ready, self.pressed = host, threading.Event(), False, False

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self._listen()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def say_ready(self, port: int) -> None:
        from router.http.listen import url_of

        self._listen()  # Ray has handlers of its own
        self.ready = True
        click.echo(f"ready: {url_of(self.host, port)}/v1")

    def _listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.pressed |= number == signal.SIGINT
        if not self.ready or self.event.is_set():
            raise KeyboardInterrupt
        self.event.set()


def _on_ray(place: Place, fronts: int, address: str | None, ends: Ends, changes: dict[str, str]) -> bool:
    from actors.fronts import serve as serve_on_ray

    return serve_on_ray(
        place, fronts=fronts, address=address, changes=changes, ready=ends.say_ready, ended=ends.event.wait,
        say=options.say(True),
    )  # fmt: skip


async def _in_this_process(place: Place, config: Config, ends: Ends) -> bool:
    import torch

    from constellation.pipeline.serving import application
    from router.answer.local import LocalKernels
    from router.http.listen import Listener, bind

    torch.set_num_threads(config.train.threads)
    kernels = LocalKernels.from_run(place.run, decode=config.decode)
    await kernels.load()
    app = application(place.run, kernels, place.key_file, place.front)
    listener = Listener(app, bind(place.host, place.port), place.grace_s)
    await listener.start()
    ends.say_ready(listener.port)
    while not ends.event.is_set():
        await asyncio.sleep(0.1)
    click.echo("ending: nobody new is let in, those inside are answered", err=True)
    return await listener.drain()


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
