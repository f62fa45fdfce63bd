"""Metrics: what is exported is what happened, by hand-made times."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from router.answer.query import Answer, HandOff
from router.answer.view import Look
from router.http.metrics import CLIENT_LEFT, SECONDS, Metrics


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def samples(metrics: Metrics, engines: dict[str, dict[str, Any]] | None = None) -> dict[tuple[str, ...], float]:
    """(name, label values in the order of their names) -> value, read as a Prometheus would."""
    body, content_type = metrics.render(engines)
    assert content_type.startswith("text/plain")
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def test_times_of_a_stream_are_those_between_its_pieces(clock: Clock) -> None:
    metrics = Metrics(clock)
    watch = metrics.watch("/v1/completions", "route")
    for seconds, tokens in ((0.25, 4), (0.5, 0), (0.5, 10), (2.0, 5)):  # the second piece holds no token
        clock.now += seconds
        watch.piece("heart", tokens)
    watch.ended()
    found = samples(metrics)
    assert found["constellation_time_to_first_token_seconds_sum", "route"] == pytest.approx(0.25)
    assert found["constellation_time_to_first_token_seconds_count", "route"] == 1
    assert found["constellation_inter_token_seconds_count", "route"] == 15  # once per token
    assert found["constellation_inter_token_seconds_sum", "route"] == pytest.approx(1.0 + 2.0)
    assert found["constellation_inter_token_seconds_bucket", "0.1", "route"] == 10
    assert found["constellation_request_seconds_sum", "route"] == pytest.approx(3.25)
    assert found["constellation_tokens_total", "heart"] == 19


def test_streams_of_one_request_do_not_mix(clock: Clock) -> None:
    metrics = Metrics(clock)
    watch = metrics.watch("/v1/completions", "route")
    for stream in (0, 1):
        clock.now += 1
        watch.piece("heart", 1, stream)
    found = samples(metrics)
    assert found["constellation_time_to_first_token_seconds_sum", "route"] == 3  # 1 s and 2 s
    assert ("constellation_inter_token_seconds_count", "route") not in found


def test_requests_end_once_and_by_status(clock: Clock) -> None:
    metrics = Metrics(clock)
    watches = [metrics.watch("/v1/completions") for _ in range(3)]
    assert samples(metrics)["constellation_in_flight", "/v1/completions"] == 3
    for watch, status in zip(watches, (200, 429, CLIENT_LEFT)):
        watch.ended(status)
        watch.ended(500)
    found = samples(metrics)
    assert found["constellation_in_flight", "/v1/completions"] == 0
    ended = {key[2]: value for key, value in found.items() if key[0] == "constellation_requests_total"}
    assert ended == {"200": 1, "429": 1, "499": 1}


def test_tokens_per_second_are_those_of_the_last_ten_seconds(clock: Clock) -> None:
    metrics = Metrics(clock)
    watch = metrics.watch("/v1/completions")
    watch.piece("heart", 50)
    clock.now += 6
    watch.piece("heart", 20)
    watch.piece("ocean", 10)
    assert metrics.tokens_per_second() == {"heart": 7.0, "ocean": 1.0}
    clock.now += 5
    assert samples(metrics)["constellation_tokens_per_second", "heart"] == 2.0
    clock.now += 5
    assert metrics.tokens_per_second() == {"heart": 0.0, "ocean": 0.0}


def test_an_answer_tells_of_its_looks_and_hand_offs() -> None:
    looks = tuple(Look(64 * i, k, k, p, 0.5, False, "") for i, (k, p) in enumerate([("ocean", 0.1), ("heart", 0.85)]))
    answer = Answer(
        0, "x", (1,), "stop", 7, 1, "route", ("ocean", "heart"), looks, (HandOff(64, "ocean", "heart"),), 1, 1
    )
    metrics = Metrics()
    metrics.answered(answer)
    metrics.answered(answer)
    metrics.refused("queue_full")
    found = samples(metrics)
    assert found["constellation_looks_total", "heart"] == found["constellation_looks_total", "ocean"] == 2
    assert found["constellation_look_posterior_bucket", "0.125"] == 2
    assert found["constellation_look_posterior_bucket", "0.9"] == 4
    assert found["constellation_hand_offs_total", "ocean", "heart"] == 2
    assert found["constellation_prompt_tokens_total",] == 14
    assert found["constellation_refused_total", "queue_full"] == 1


def test_engines_are_reported_as_they_are_now() -> None:
    metrics = Metrics()
    found = samples(metrics, {"heart": {"slots": 8, "occupancy": 0.5, "state": "up"}, "ocean": {"slots": 4}})
    assert found["constellation_kernel_slots", "heart"] == 8 and found["constellation_kernel_occupancy", "heart"] == 0.5
    assert not [key for key in found if key[0] == "constellation_kernel_state"]
    assert ("constellation_kernel_slots", "heart") not in samples(metrics)


def test_two_fronts_in_one_process_do_not_see_each_other() -> None:
    one, two = Metrics(), Metrics()
    one.watch("/").ended()
    assert ("constellation_requests_total", "/", "200") not in samples(two)


def test_buckets_rise_from_below_a_millisecond_to_most_of_a_minute() -> None:
    assert list(SECONDS) == sorted(set(SECONDS)) and SECONDS[0] <= 5e-5 and SECONDS[-1] == 50
    assert all(b / a <= 2.5 + 1e-9 for a, b in itertools.pairwise(SECONDS))


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(0, 9)), max_size=12))
def test_the_mean_over_tokens_is_the_time_after_the_first_piece(pieces: list[tuple[float, int]]) -> None:
    clock = Clock()
    metrics = Metrics(clock)
    watch = metrics.watch("/v1/completions", "route")
    came = []
    for seconds, tokens in pieces:
        clock.now += seconds
        watch.piece("heart", tokens)
        if tokens:
            came.append((clock.now, tokens))
    if len(came) > 1:
        found = samples(metrics)
        assert found["constellation_inter_token_seconds_sum", "route"] == pytest.approx(came[-1][0] - came[0][0])
        assert found["constellation_inter_token_seconds_count", "route"] == sum(n for _, n in came[1:])
