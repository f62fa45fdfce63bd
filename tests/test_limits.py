"""The gate: no key gets more than its rate and burst, whatever it tries; who waits as told gets in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.http.keys import Key, Limits
from router.http.limits import Admission, Bucket, Front, Refused, Ticket

S = 10**9  # nanoseconds
TIMES = st.lists(st.tuples(st.integers(0, 40 * S), st.integers(0, 12)), min_size=1, max_size=40)


def key(owner: str = "ada", **limits: int) -> Key:
    return Key(owner, "0" * 64, 0, Limits(**limits))


def let_in(found: object) -> Ticket:
    assert isinstance(found, Ticket), found
    return found


def refused(found: object) -> Refused:
    assert isinstance(found, Refused)
    return found


@given(per_minute=st.integers(1, 500), asks=TIMES)
def test_in_any_span_no_more_than_burst_and_rate_times_its_length_is_let_in(
    per_minute: int, asks: list[tuple[int, int]]
) -> None:
    bucket, now, taken = Bucket(per_minute), 17, []
    for gap, amount in asks:
        now += gap
        if bucket.wait_ns(amount, now) == 0:
            bucket.move(amount, now)
            taken.append((now, amount))
    for i, (begin, _) in enumerate(taken):
        for j in range(i, len(taken)):
            most = per_minute + Fraction((taken[j][0] - begin) * per_minute, 60 * S)
            assert sum(amount for _, amount in taken[i : j + 1]) <= most


@given(per_minute=st.integers(1, 500), asks=TIMES)
def test_a_bucket_agrees_with_the_integral_it_stands_for(per_minute: int, asks: list[tuple[int, int]]) -> None:
    """Oracle in exact fractions: level = min(burst, level + rate dt)."""
    bucket, now, level = Bucket(per_minute), 0, Fraction(per_minute)
    for gap, amount in asks:
        now += gap
        level = min(Fraction(per_minute), level + Fraction(gap * per_minute, 60 * S))
        wait = bucket.wait_ns(amount, now)
        if amount > per_minute:
            assert wait is None
        elif amount <= level:
            assert wait == 0
            level -= amount
            bucket.move(amount, now)
        else:
            assert wait is not None and wait - 1 < (amount - level) * 60 * S / per_minute <= wait


@given(per_minute=st.integers(1, 500), asks=TIMES, more=st.integers(1, 12))
def test_who_waits_as_told_is_let_in(per_minute: int, asks: list[tuple[int, int]], more: int) -> None:
    gate, owner, now = Admission(), key(requests_per_minute=per_minute), 0
    for gap, amount in asks:
        now += gap
        gate.admit(owner, now, answers=max(1, amount))
    found = gate.admit(owner, now, answers=more)
    if isinstance(found, Refused) and found.status == 429 and found.code == "rate_limit_exceeded":
        assert found.retry_after_s is not None and found.retry_after_s >= 1
        let_in(gate.admit(owner, now + found.retry_after_s * S, answers=more))


@settings(max_examples=50)
@given(
    asks=st.lists(st.tuples(st.integers(0, 20 * S), st.integers(1, 90), st.floats(0, 1)), min_size=1, max_size=40),
    stay=st.integers(0, 5),
)
def test_tokens_really_used_stay_below_rate_and_burst(asks: list[tuple[int, int, float]], stay: int) -> None:
    """Reservations come back when answers are shorter; up to `stay` of them overlap."""
    gate, owner, now, used, open_ = Admission(), key(tokens_per_minute=100), 0, 0, []
    for gap, reserve, share in asks:
        now += gap
        found = gate.admit(owner, now, tokens=reserve)
        if isinstance(found, Ticket):
            used += (spent := int(reserve * share))
            open_.append((found, spent))
        while len(open_) > stay:
            ticket, spent = open_.pop(0)
            ticket.leave(spent, now)
        assert used <= 100 + Fraction(now * 100, 60 * S)


def test_what_was_reserved_and_not_used_can_be_used_at_once() -> None:
    gate, owner = Admission(), key(tokens_per_minute=100)
    first = let_in(gate.admit(owner, 0, tokens=100))
    told = refused(gate.admit(owner, 0, tokens=90))
    assert (told.status, told.code, told.headers) == (429, "rate_limit_exceeded", {"Retry-After": "54"})
    first.leave(10, 0)
    first.leave(10, 0)  # a second time gives nothing more
    second = let_in(gate.admit(owner, 0, tokens=90))
    refused(gate.admit(owner, 0, tokens=1))
    second.leave(90, 0)
    assert gate.under_way == 0


def test_tokens_that_are_known_later_are_reserved_then_or_not_at_all() -> None:
    gate, owner = Admission(), key(requests_per_minute=9, tokens_per_minute=100)
    first, second = let_in(gate.admit(owner, 0, tokens=40)), let_in(gate.admit(owner, 0, tokens=20))
    assert first.more(30, 0) is None
    told = refused(second.more(20, 0))  # 10 are left
    assert (told.status, told.retry_after_s) == (429, 6)
    assert second.more(10, 0) is None
    never = refused(second.more(71, 0))
    assert (never.status, never.retry_after_s) == (400, None) and "101 tokens" in never.message
    first.leave(70, 0)
    second.leave(0, 0)  # what it reserved is there again, all of it
    let_in(gate.admit(owner, 0, tokens=30))
    refused(gate.admit(owner, 0, tokens=1))


def test_a_request_that_was_read_in_vain_counts_and_a_key_without_requests_is_not_read() -> None:
    gate, owner = Admission(), key(requests_per_minute=2)
    for _ in range(2):
        assert gate.hears(owner, 0) is None
        gate.charge(owner, 0)
    told = refused(gate.hears(owner, 0))
    assert (told.status, told.code, told.retry_after_s) == (429, "rate_limit_exceeded", 30)
    assert gate.hears(owner, 30 * S) is None and gate.hears(key("bob", requests_per_minute=1), 0) is None


def test_biases_are_counted_over_all_answers() -> None:
    gate = Admission(Front(biases=600))
    let_in(gate.admit(key(), 0, answers=2, biases=600))
    told = refused(gate.admit(key(), 0, answers=3, biases=900))
    assert (told.status, told.code) == (400, "request_too_large")


def test_how_many_others_are_there_is_not_told() -> None:
    def full(others: int) -> Refused:
        gate = Admission(Front(answers=8))
        let_in(gate.admit(key("bob"), 0, answers=others))
        return refused(gate.admit(key(), 0, answers=6))

    assert full(3) == full(8) and "bob" not in full(3).message


def test_bodies_that_are_read_at_once_are_bounded_together() -> None:
    """Whoever sends slowly holds no more than its part, and gives it back."""

    async def go() -> None:
        gate, more = Admission(Front(body_bytes=8, bodies_bytes=20)), asyncio.Event()

        async def slowly() -> AsyncIterator[bytes]:
            yield b"x" * 8
            await more.wait()

        async def at_once() -> AsyncIterator[bytes]:
            yield b"x" * 8

        slow = [asyncio.ensure_future(gate.body(slowly())) for _ in range(2)]
        await asyncio.sleep(0)
        assert gate.reading_bytes == 16
        told = refused(await gate.body(at_once()))
        assert (told.status, told.code) == (429, "queue_full")
        slow[0].cancel()
        more.set()
        assert (await asyncio.gather(*slow, return_exceptions=True))[1] == b"x" * 8
        assert gate.reading_bytes == 0 and await gate.body(at_once()) == b"x" * 8

    asyncio.run(go())


def test_keys_do_not_share_their_rates() -> None:
    gate = Admission()
    let_in(gate.admit(key("ada", requests_per_minute=1), 0))
    refused(gate.admit(key("ada", requests_per_minute=1), 0))
    let_in(gate.admit(key("bob", requests_per_minute=1), 0))
    let_in(gate.admit(key("ada", requests_per_minute=2), 0))  # given another limit: a new bucket
    assert gate.under_way == 3


def test_a_full_front_says_when_one_will_probably_leave() -> None:
    gate = Admission(Front(answers=2))
    tickets = [let_in(gate.admit(key(), 0)), let_in(gate.admit(key("bob"), 0))]
    told = refused(gate.admit(key("carol"), 0))
    assert (told.status, told.code, told.retry_after_s) == (429, "queue_full", 1)
    for ticket in tickets:
        ticket.leave(0, 600 * S)
    let_in(gate.admit(key("carol"), 600 * S, answers=2))
    later = refused(gate.admit(key("carol"), 600 * S)).retry_after_s
    assert later is not None and 1 < later < 600  # answers took long, so does the wait


def test_a_refused_request_takes_nothing() -> None:
    gate, owner = Admission(Front(answers=4)), key(requests_per_minute=4, tokens_per_minute=10, concurrent=4)
    for _ in range(9):
        refused(gate.admit(owner, 0, answers=2, tokens=11))
        refused(gate.admit(owner, 0, answers=5, tokens=1))
    let_in(gate.admit(owner, 0, answers=4, tokens=10))


def test_answers_under_way_are_counted_and_given_back() -> None:
    gate, owner = Admission(), key(concurrent=3)
    ticket = let_in(gate.admit(owner, 0, answers=2))
    assert refused(gate.admit(owner, 0, answers=2)).status == 429
    let_in(gate.admit(owner, 0))
    ticket.leave(0, S)
    let_in(gate.admit(owner, S, answers=2))


@pytest.mark.parametrize(
    ("limits", "ask", "named"),
    [
        ({"requests_per_minute": 3}, {"answers": 4}, "4 requests"),
        ({"tokens_per_minute": 3}, {"tokens": 4}, "4 tokens"),
        ({"concurrent": 3}, {"answers": 4}, "4 answers"),
        ({}, {"answers": 257}, "257 answers"),
    ],
)
def test_what_can_never_be_let_in_is_not_told_to_wait(limits: dict[str, int], ask: dict[str, int], named: str) -> None:
    """A client that retries a 429 would do so for ever."""
    told = refused(Admission().admit(key("ada", **limits), 0, **ask))
    assert (told.status, told.retry_after_s, told.headers) == (400, None, {}) and named in told.message


def test_a_clock_that_steps_back_earns_nothing() -> None:
    bucket = Bucket(60)
    bucket.move(60, 10 * S)
    assert bucket.wait_ns(1, 5 * S) == S and bucket.wait_ns(1, 10 * S) == S and bucket.wait_ns(1, 11 * S) == 0


@pytest.mark.parametrize(
    ("size", "declared", "fits"), [(10, None, True), (10, 10, True), (11, None, False), (0, 11, False)]
)
def test_a_body_is_read_no_further_than_is_allowed(size: int, declared: int | None, fits: bool) -> None:
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(100 if not fits else size):
            sent += 1
            yield b"x"

    found = asyncio.run(Admission(Front(body_bytes=10)).body(chunks(), declared))
    assert found == b"x" * size if fits else refused(found).status == 413
    assert sent <= (0 if declared == 11 else 11)
