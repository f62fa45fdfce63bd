"""A connection: how many of them one peer may have, and how long it may take its time.

    head_s     until the line and the headers of a request are there: from its first byte, or from the connection's
    body_s     from then until its body is there too; whoever is late with either is told 408, and the connection ends
    write_s    in which a peer reads `STEP_BYTES` of what waits for it, or all of it; else the connection is cut
    idle       between two requests: uvicorn's own `timeout_keep_alive`

uvicorn's protocol over h11, which waits for ever in each of these. What is said here is an OpenAI error object too.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from router.http.failures import error_json, later
from router.http.limits import Front
from router.http.requests import Refusal

STEP_BYTES = 1 << 16  # of an answer, as much as asyncio keeps before it says that a peer is slow


class Wire(H11Protocol):
    """One connection, under the limits of `front`."""

    def __init__(self, front: Front, **others: Any):
        super().__init__(**others)
        self.front = front
        self._awaited = ""  # "head" | "body" of a request, whatever is not there yet
        self._late: asyncio.TimerHandle | None = None
        self._unread = 0  # bytes that waited for the peer when they were last looked at; 0: it has read enough since
        self._slow: asyncio.TimerHandle | None = None

    # -- coming and going

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        peers = [other.client and other.client[0] for other in self.connections]
        if self.client and peers.count(self.client[0]) > self.front.connections:
            most = f"more than {self.front.connections} connections of one peer"
            self._refuse(later(most, 429, "too_many_connections", 1))
        else:
            self._await("head", self.front.head_s)

    def connection_lost(self, error: Exception | None) -> None:
        self._await("")
        if self._slow:
            self._slow.cancel()
        super().connection_lost(error)

    # -- what the peer sends

    def handle_events(self) -> None:
        super().handle_events()
        state = self.conn.their_state
        if state is h11.SEND_BODY:
            self._await("body", self.front.body_s)
        elif state is h11.IDLE and self.conn.trailing_data[0]:
            self._await("head", self.front.head_s)
        else:
            self._await("")

    def _await(self, what: str, seconds: float = 0.0) -> None:
        """`what` has to be there in so many seconds, counted from the first time that it is said."""
        if what == self._awaited:
            return
        if self._late:
            self._late.cancel()
        self._awaited, self._late = what, self.loop.call_later(seconds, self._is_late) if what else None

    def _is_late(self) -> None:
        began = self.cycle is not None or self.conn.trailing_data[0]
        within = self.front.body_s if self._awaited == "body" else self.front.head_s
        if began and not self.transport.is_closing():
            self._refuse(Refusal(f"the {self._awaited} of the request did not come within {within:g} s", status=408))
        else:
            self.transport.abort()

    def send_400_response(self, message: str) -> None:
        self._refuse(Refusal("this is not an HTTP request"))

    def _refuse(self, refusal: Refusal) -> None:
        """Say so, unless an answer has begun, and end the connection; whoever works for it hears that the peer left."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body, status = error_json(refusal), refusal.http_status
            told = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
            head = h11.Response(status_code=status, headers=list({**told, **refusal.headers}.items()))
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._watch()
        self.transport.close()

    # -- what it reads

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread = 0

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def _watch(self) -> None:
        """Look in a while at what the peer has read, if anything waits for it."""
        unread = self.transport.get_write_buffer_size()
        if unread and self._slow is None:
            self._unread, self._slow = unread, self.loop.call_later(self.front.write_s, self._look)

    def _look(self) -> None:
        self._slow = None
        unread = self.transport.get_write_buffer_size()
        if unread and self._unread and unread > self._unread - STEP_BYTES:
            self.transport.abort()
        else:
            self._watch()
