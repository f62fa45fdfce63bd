"""Who is let in now, and who is told to come back: rates per key, a cap on the whole front, sizes.

    level(t) = min(burst, level(s) + (t - s) rate);    an ask of n is let in iff n <= level, which it lowers by n

hence in any span of t seconds at most burst + rate t is let in, and who waits as told is let in if nobody else took it.
Both hold exactly: time is in whole nanoseconds and levels are whole, in units of 1 / (60 x 10^9).
Rates are per minute and a minute's worth is the burst, so that a key which was silent may send its minute at once.

Work is counted before it is done: answers when the request has been read, tokens of prompts once they are tokenised.
Tokens of answers are not known beforehand: an ask reserves its prompt and the most it may be answered with, and what
was not used goes back when it ends. So the bound holds for the tokens really used, whatever the answers' lengths, over
every span that begins with nothing of the key under way. A request that is refused for its prompt's tokens, or that
nobody could understand, has been read and counts as a request; any other that is refused takes nothing.

Refusals are data, not exceptions. Time is an argument. Everything here belongs to one front; F fronts let in F times as
much together, which is said where fronts are started.
"""

from __future__ import annotations

from collections.abc import AsyncIterable
from dataclasses import dataclass, field
from typing import Annotated

from constellation.settings import Count, Positive, check, says
from router.http.keys import Key

_MINUTE_NS = 60 * 10**9
_PAST = 9  # weight of the past in the mean time an answer takes, beside 1 of the latest


@dataclass(frozen=True)
class Front:
    """How one front is offered, whoever asks."""

    answers: Annotated[Count, says("under way or waiting at once; prompts x n of a request")] = 256
    biases: Annotated[Count, says("of tokens, in all answers of one request")] = 1 << 14
    body_bytes: Annotated[Count, says("of a request")] = 4 * 1024 * 1024
    bodies_bytes: Annotated[Count, says("of bodies that are being read at once")] = 64 * 1024 * 1024
    connections: Annotated[Count, says("of one peer at once; a proxy is one peer")] = 512
    head_s: Annotated[Positive, says("until a request's line and headers are there, from where they may begin")] = 20.0
    body_s: Annotated[Positive, says("until its body is there too")] = 60.0
    write_s: Annotated[Positive, says("in which a peer has to read some of what waits for it")] = 30.0
    hosts: Annotated[tuple[str, ...] | None, says("names by which it may be asked, header Host; None: any")] = None
    access_log: Annotated[bool, says("a line for every request")] = False

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Refused:
    """A request that is not let in: the parts of its error object and headers."""

    status: int  # 400 never possible | 413 too large | 415 of a kind that is not read | 429 not now
    code: str  # "rate_limit_exceeded" | "queue_full" | "request_too_large" | "unsupported_media_type"
    message: str
    retry_after_s: int | None = None  # whole seconds, >= 1; None: never

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}


@dataclass
class Bucket:
    """A token bucket that starts full; `per_minute` is both its rate and its burst."""

    per_minute: int
    level: int = field(init=False)  # units of 1 / _MINUTE_NS: what flows in within a nanosecond is `per_minute` units
    at_ns: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.level = self.per_minute * _MINUTE_NS

    def wait_ns(self, amount: int, now_ns: int) -> int | None:
        """Nanoseconds until `amount` can be taken; 0: now, None: never, it is more than the burst."""
        if amount > self.per_minute:
            return None
        self._fill(now_ns)
        return max(0, -((self.level - amount * _MINUTE_NS) // self.per_minute))

    def move(self, amount: int, now_ns: int) -> None:
        """Takes `amount` out, or puts it back when negative."""
        self._fill(now_ns)
        self.level = min(self.per_minute * _MINUTE_NS, self.level - amount * _MINUTE_NS)

    def _fill(self, now_ns: int) -> None:
        """What flowed in since the last time; a clock that steps back earns nothing."""
        if self.at_ns is not None and now_ns > self.at_ns:
            self.level = min(self.per_minute * _MINUTE_NS, self.level + (now_ns - self.at_ns) * self.per_minute)
        self.at_ns = now_ns if self.at_ns is None else max(now_ns, self.at_ns)


@dataclass
class _Account:
    """What one key has taken."""

    key: Key | None = None
    requests: Bucket | None = None
    tokens: Bucket | None = None
    under_way: int = 0


@dataclass
class Ticket:
    """A request that was let in; `leave` it exactly once, whatever became of it."""

    admission: Admission
    account: _Account
    answers: int
    reserved_tokens: int
    at_ns: int
    left: bool = False

    def more(self, tokens: int, now_ns: int) -> Refused | None:
        """Reserve so many tokens more, which were not known before; none are taken when that is refused."""
        return self.admission._more(self, tokens, now_ns)

    def leave(self, used_tokens: int, now_ns: int) -> None:
        """The request ended, having used so many tokens of prompt and answers. A second call changes nothing."""
        if not self.left:
            self.left = True
            self.admission._leave(self, used_tokens, now_ns)


class Admission:
    """The gate of one front."""

    def __init__(self, front: Front | None = None):
        self.front = front or Front()
        self.under_way = 0  # answers that were let in and have not left
        self.reading_bytes = 0  # of bodies that are not whole yet
        self._accounts: dict[str, _Account] = {}
        self._mean_ns = 10**9  # time an answer stays, forgetting the past

    def admit(self, key: Key, now_ns: int, answers: int = 1, tokens: int = 0, biases: int = 0) -> Ticket | Refused:
        """Let a request in that makes `answers` (prompts x n) and may use `tokens` in all, or say why not.

        A refused request takes nothing from anybody.
        """
        account = self._account(key)
        limits = key.limits
        if answers > self.front.answers:
            return Refused(
                400, "request_too_large",
                f"{answers} answers in one request; this service makes {self.front.answers} at once: send fewer",
            )  # fmt: skip
        if biases > self.front.biases:
            return Refused(
                400, "request_too_large",
                f"{biases} token biases in all answers of one request; {self.front.biases} are allowed: send fewer",
            )  # fmt: skip
        most = limits.concurrent
        if most is not None and answers > most:
            return _never(key, f"{answers} answers", f"{most} at once", "send fewer prompts or a smaller n")
        if most is not None and account.under_way + answers > most:
            return self._later(
                "rate_limit_exceeded", f"key {key.name!r} has {account.under_way} of {most} answers under way",
                self._mean_ns / most,
            )  # fmt: skip
        if refused := self._requests(account, answers, now_ns) or self._tokens(account, tokens, now_ns):
            return refused
        if self.under_way + answers > self.front.answers:  # by how much is others' affair
            full = "this service is as busy as it may be"
            return self._later("queue_full", full, self._mean_ns / self.front.answers)  # one leaves so often
        if account.requests:
            account.requests.move(answers, now_ns)
        if account.tokens:
            account.tokens.move(tokens, now_ns)
        account.under_way += answers
        self.under_way += answers
        return Ticket(self, account, answers, tokens, now_ns)

    def hears(self, key: Key, now_ns: int) -> Refused | None:
        """Whether a request of `key` is not even read: the key has none left."""
        return self._requests(self._account(key), 1, now_ns)

    def charge(self, key: Key, now_ns: int) -> None:
        """A request was read in vain: nobody could understand it."""
        if bucket := self._account(key).requests:
            bucket.move(1, now_ns)

    def too_long(self, body_bytes: int) -> Refused | None:
        """Whether a body of that size is refused."""
        if body_bytes <= self.front.body_bytes:
            return None
        return Refused(413, "request_too_large", f"the body is larger than {self.front.body_bytes} bytes: send less")

    async def body(self, chunks: AsyncIterable[bytes], declared_bytes: int | None = None) -> bytes | Refused:
        """A request's body, read no further than is allowed; `declared_bytes` is its Content-Length, if it has one."""
        if declared_bytes is not None and (refused := self.too_long(declared_bytes)):
            return refused
        read = bytearray()
        try:
            async for chunk in chunks:
                read += chunk
                self.reading_bytes += len(chunk)
                if refused := self.too_long(len(read)):
                    return refused
                if self.reading_bytes > self.front.bodies_bytes:
                    return self._later("queue_full", "too many large requests are being read", 10**9)
            return bytes(read)
        finally:
            self.reading_bytes -= len(read)

    def _requests(self, account: _Account, answers: int, now_ns: int) -> Refused | None:
        advice = "send fewer prompts or a smaller n"
        return self._wait(account, account.requests, answers, answers, "requests", advice, now_ns)

    def _tokens(self, account: _Account, more: int, now_ns: int, reserved: int = 0) -> Refused | None:
        advice = "shorten the prompt or lower max_tokens"
        return self._wait(account, account.tokens, more, reserved + more, "tokens", advice, now_ns)

    def _wait(
        self, account: _Account, bucket: Bucket | None, more: int, whole: int, what: str, advice: str, now_ns: int
    ) -> Refused | None:
        """Why `more` cannot be taken out of a bucket now, for a request that takes `whole` in all."""
        if bucket is None:
            return None
        assert account.key
        if whole > bucket.per_minute:
            return _never(account.key, f"{whole} {what}", f"{bucket.per_minute} a minute", advice)
        if not (wait_ns := bucket.wait_ns(more, now_ns)):
            return None
        rate = f"key {account.key.name!r} may use {bucket.per_minute} {what} a minute"
        return self._later("rate_limit_exceeded", f"{rate}, this request needs {whole}", wait_ns)

    def _more(self, ticket: Ticket, tokens: int, now_ns: int) -> Refused | None:
        account = ticket.account
        refused = self._tokens(account, tokens, now_ns, ticket.reserved_tokens)
        if refused is None:
            ticket.reserved_tokens += tokens
            if account.tokens:
                account.tokens.move(tokens, now_ns)
        return refused

    def _leave(self, ticket: Ticket, used_tokens: int, now_ns: int) -> None:
        account = ticket.account
        account.under_way -= ticket.answers
        self.under_way -= ticket.answers
        if account.tokens:
            account.tokens.move(used_tokens - ticket.reserved_tokens, now_ns)
        self._mean_ns = (_PAST * self._mean_ns + max(0, now_ns - ticket.at_ns)) // (_PAST + 1)

    def _account(self, key: Key) -> _Account:
        """The account of a key; one whose limits were changed has full buckets again."""
        account = self._accounts.setdefault(key.name, _Account())
        if account.key != key:
            requests, tokens = key.limits.requests_per_minute, key.limits.tokens_per_minute
            account.key = key
            account.requests, account.tokens = (
                Bucket(requests) if requests else None,
                Bucket(tokens) if tokens else None,
            )
        return account

    def _later(self, code: str, why: str, wait_ns: float) -> Refused:
        seconds = max(1, -int(-wait_ns // 10**9))
        return Refused(429, code, f"{why}; try again in {seconds} s", seconds)


def _never(key: Key, asked: str, most: str, advice: str) -> Refused:
    return Refused(400, "request_too_large", f"key {key.name!r} may have {most}, this asks for {asked}: {advice}")
