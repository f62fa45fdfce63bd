"""Over real sockets: who is slow, whoever it is, keeps a connection and an answer for a while and no longer."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from router.app import AppSettings, make_app
from router.http.limits import Front
from router.http.server import Server
from tests.test_app import COMPLETIONS, service

PATIENCE_S = 1000.0  # of a test that waits for what is to happen


@contextmanager
def running(**front: Any) -> Iterator[Server]:
    """A server in a thread of this process."""
    server = Server(make_app(service(), AppSettings(front=Front(**front))), port=0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server
    finally:
        server.close()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def address(server: Server) -> tuple[str, int]:
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    return host, port


def connected(server: Server, receive_bytes: int | None = None) -> socket.socket:
    made = socket.socket()
    if receive_bytes:  # before the connection is made, or it is given more
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    made.settimeout(PATIENCE_S)
    made.connect(address(server))
    return made


def until_closed(connection: socket.socket) -> bytes:
    """All that comes until the other side ends the connection."""
    got = b""
    try:
        while data := connection.recv(65536):
            got += data
    except ConnectionResetError:
        pass
    return got


def told(answer: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


def ask(body: bytes, more: str = "") -> bytes:
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{more}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


SHORT = ask(json.dumps({"prompt": "x", "max_tokens": 1}).encode())
LONG = ask(
    json.dumps({"prompt": "x", "max_tokens": 60_000, "ignore_eos": True, "stream": True, "logprobs": 20}).encode()
)


def test_a_request_whose_head_does_not_come_is_ended() -> None:
    with running(head_s=0.3) as server, connected(server) as silent:
        assert until_closed(silent) == b""  # it asked for nothing, it is told nothing
    with running(head_s=3.0) as server:  # time enough to begin with it, on a busy machine too
        with connected(server) as half:
            half.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-More: ")
            status, error = told(until_closed(half))
            assert (status, error["type"]) == (408, "invalid_request_error")
            assert "head" in error["message"]
        with connected(server) as dripping:  # a byte now and then is no head either
            for byte in b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 9999:
                try:
                    dripping.sendall(bytes([byte]))
                except OSError:
                    break
                time.sleep(0.02)
            else:
                pytest.fail("sixty thousand bytes were waited for")
        with connected(server) as again:  # the second request of a connection
            again.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\nGET /hea")
            assert until_closed(again).count(b"HTTP/1.1 408") == 1


def test_a_request_whose_body_does_not_come_is_ended_and_its_place_given_back(caplog: pytest.LogCaptureFixture) -> None:
    with running(body_s=0.3) as server:
        with connected(server) as half:
            half.sendall(SHORT[:-3])
            status, error = told(until_closed(half))
            assert status == 408 and "body" in error["message"]
        with connected(server) as refused:  # answered long before: who does not send the rest is not waited for
            refused.sendall(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n")
            assert b"404" in until_closed(refused)
        with connected(server) as whole:
            whole.sendall(SHORT)
            assert b"200 OK" in whole.recv(65536)
        while server.gate.inside:
            time.sleep(0.01)
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_readers_that_never_read_do_not_keep_others_out() -> None:
    """All places are taken by answers that nobody reads; they are free again, and the connections cut."""
    with running(answers=3, write_s=0.3) as server:
        server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        mute = [connected(server, receive_bytes=2048) for _ in range(3)]
        for one in mute:
            one.sendall(LONG)
        while server.gate.inside < 3:
            time.sleep(0.01)
        until = time.monotonic() + PATIENCE_S
        with httpx.Client(base_url="http://{}:{}".format(*address(server)), timeout=PATIENCE_S) as client:
            while (answer := client.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 1})).status_code == 429:
                assert time.monotonic() < until, "they keep everybody out"
                time.sleep(0.05)
            assert answer.status_code == 200
        while server.gate.inside:
            assert time.monotonic() < until
            time.sleep(0.01)
        for one in mute:
            one.close()


def test_a_slow_reader_gets_all_of_it() -> None:
    """Whoever reads, however slowly, is not cut: it takes longer than write_s, but some of it is read in every such."""
    body = json.dumps({"prompt": "naïve " * 200_000}).encode()
    with running(write_s=4.0) as server, connected(server, receive_bytes=4096) as slow:
        slow.sendall(ask(body, "Connection: close\r\n").replace(COMPLETIONS.encode(), b"/tokenize"))
        slow.settimeout(PATIENCE_S)
        got, until = bytearray(slow.recv(4096)), time.monotonic() + 6
        while data := slow.recv(16384 if time.monotonic() < until else 1 << 20):
            got += data
            time.sleep(0.05 * (time.monotonic() < until))
        reply = json.loads(got.partition(b"\r\n\r\n")[2])
        assert reply["count"] == len(reply["tokens"]) >= 200_000


def test_one_peer_has_so_many_connections_and_no_more() -> None:
    with running(connections=3) as server:
        held = [connected(server) for _ in range(3)]
        for one in held:  # accepted, all of them
            one.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"200 OK" in one.recv(65536)
        with connected(server) as more:
            status, error = told(until_closed(more))
            assert (status, error["code"]) == (429, "too_many_connections")
        held.pop().close()
        until = time.monotonic() + PATIENCE_S
        while True:
            with connected(server) as next_one:
                next_one.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                if b"200 OK" in until_closed(next_one):
                    break
            assert time.monotonic() < until
        for one in held:
            one.close()


@pytest.mark.parametrize(
    "sent", [b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 99 + b"\r\n"]
)
def test_what_is_no_http_is_told_so(sent: bytes) -> None:
    with running(head_s=3.0) as server, connected(server) as connection:
        connection.sendall(sent)
        status, error = told(until_closed(connection))
        assert status in (400, 408) and error["type"] == "invalid_request_error"


def test_rubbish_behind_a_request_is_no_failure_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 40, "ignore_eos": True, "stream": True}).encode()
    with running() as server, connected(server) as connection:
        connection.sendall(ask(body) + b"\x00rubbish\r\n\r\n" * 9)
        answer = until_closed(connection)
        assert b"data: [DONE]" in answer and b"HTTP/1.1 400" in answer
    assert "Traceback" not in caplog.text


def test_the_head_of_an_answer_is_that_of_get() -> None:
    with running() as server, connected(server) as connection:
        connection.sendall(b"HEAD /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        head, _, body = until_closed(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK") and b"content-length: " in head and body == b""
