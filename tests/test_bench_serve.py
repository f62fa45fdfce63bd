"""The load and its verdicts: a service that holds is told to hold, each way to fail is seen."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from constellation.cli import run
from constellation.errors import ConfigError
from constellation.experiments import bench_serve
from constellation.experiments.bench_serve import jain, judge
from constellation.experiments.load import Exchange, Load, drive
from constellation.experiments.parts import shares
from constellation.experiments.served import resident_mb
from tests.listening import listening


@pytest.fixture(scope="module")
def url(micro_run: Path) -> Iterator[str]:
    """A real service of the small run, in this process."""
    from constellation.coordizer.tokenizer import Tokenizer
    from constellation.pipeline.prepare import open_plan
    from router.answer.local import LocalKernels
    from router.answer.service import Service
    from router.app import make_app
    from router.decide.fisher_rao import FisherRaoRouter

    plan = open_plan(micro_run)
    kernels = LocalKernels.from_run(micro_run)
    service = Service(plan.config, FisherRaoRouter.load(plan.router), Tokenizer.load(plan.tokenizer), kernels)
    with listening(make_app(service)) as where:
        yield where


@pytest.mark.parametrize("rate", [None, 6.0], ids=["closed", "open"])
def test_a_service_that_holds_is_told_to_hold(url: str, rate: float | None, tmp_path: Path) -> None:
    load = Load(streams=4, seconds=2.0, tokens=12, rate=rate)
    found = bench_serve.run(url, load, out=tmp_path / "raw.json")
    assert found["verdicts"]["no_error"] and found["verdicts"]["agrees"] and found["verdicts"]["idle"], found["errors"]
    assert found["right"] == found["requests"] > 1 and found["tokens"] == 12 * found["requests"]
    assert 0 < found["first_token_ms"]["p50"] <= found["first_token_ms"]["p99"] <= found["first_token_ms"]["most"]
    assert found["from_sending_ms"]["p50"] <= found["first_token_ms"]["p50"]
    assert sum(found["tokens_by_kernel"].values()) == found["tokens"] and "" not in found["tokens_by_kernel"]
    raw = json.loads((tmp_path / "raw.json").read_text())
    assert len(raw["raw"]["answers"]) == found["requests"] and raw["verdicts"] == found["verdicts"]


def test_it_starts_a_service_of_its_own_and_ends_it(micro_run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "serve", "--run", str(micro_run), "--streams", "2", "--seconds", "1", "--tokens", "6"]) == 0
    shown = capfd.readouterr().out
    assert "constellation serve --run alone --local" in shown and "in flight after" in shown
    assert 1 < float(shown.split("a CPU-second of it")[1].split()[0]) < 1e6  # a kernel of 18 thousand parameters
    assert "MISSED" not in shown.replace("memory", "").split("service counted")[1]


def test_a_run_that_cannot_be_served_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "serve", "--run", str(tmp_path)]) == 1
    told = capfd.readouterr().err
    assert len(told.splitlines()) == 1 and str(tmp_path) in told


def test_clients_that_leave_leave_nothing_behind(url: str) -> None:
    found = bench_serve.run(url, Load(streams=4, seconds=2.0, tokens=200, leave=1.0))
    assert found["verdicts"]["no_error"] and found["verdicts"]["idle"]
    assert found["left_on_purpose"] == found["requests"] >= 4
    assert found["tokens"] < 200 * found["requests"]


def test_errors_of_the_service_are_counted_by_their_message(url: str) -> None:
    found = bench_serve.run(url, Load(streams=2, seconds=0.3, tokens=5, mode="poseidon"))
    assert not found["verdicts"]["no_error"] and found["right"] == 0
    assert all("400" in message and "poseidon" in message for message in found["errors"])


CHUNK = '{{"choices": [{{"text": "x", "finish_reason": {finish}}}], "usage": {{"completion_tokens": {tokens}}}}}'


@pytest.mark.parametrize(
    ("events", "named"),
    [
        ([CHUNK.format(finish="null", tokens=2), CHUNK.format(finish='"length"', tokens=4), "[DONE]"], ""),
        ([CHUNK.format(finish='"length"', tokens=3), "[DONE]"], "3 of 4 tokens"),
        ([CHUNK.format(finish='"length"', tokens=4)], "no end mark"),
        ([CHUNK.format(finish='"stop"', tokens=4), "[DONE]"], "finish stop"),
        ([CHUNK.format(finish="null", tokens=4), '{"error": {"message": "a kernel died"}}'], "a kernel died"),
        (["{"], "JSONDecodeError"),
        ([], "0 of 4"),
    ],
)
def test_every_way_an_answer_can_be_wrong_is_an_error(events: list[str], named: str) -> None:
    """Against a server that is not ours and breaks the protocol as told."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        body = "".join(f"data: {event}\n\n" for event in events).encode()
        await send({"type": "http.response.body", "body": body})

    with listening(app) as where:
        done = asyncio.run(drive(where, Load(streams=1, seconds=0.05, tokens=4), ["x"]))
    assert done and all(named in asked.error and bool(asked.error) == bool(named) for asked in done)


def asked(stream: int, due: float, first: float, gaps: list[tuple[float, int]], error: str = "") -> Exchange:
    tokens = 1 + sum(count for _, count in gaps)
    end = first + sum(gap for gap, _ in gaps)
    return Exchange(stream, due, due, first, end, end, tokens, False, error, gaps, Counter(heart=tokens))


SEEN = {"memory_mb": [(float(i), 100.0) for i in range(8)], "tokens_before": 5.0, "tokens_after": 29.0,
        "in_flight_after": 0.0, "client_cpu_s": 0.1, "server_cpu_s": 0.5, "parts": {"looks": 0.75, "rest": 0.25},
        "warm_up_s": 1.0}  # fmt: skip


def test_numbers_follow_their_definitions() -> None:
    done = [asked(0, 1.0, 1.5, [(1.0, 10)]), asked(1, 2.0, 2.1, [(0.5, 1), (0.6, 11)])]
    found = judge(done, SEEN, Load(streams=2, seconds=3.0))
    assert found["tokens"] == 24 and found["tokens_by_stream"] == [11, 13]
    assert found["first_token_ms"]["p50"] == 100.0 and found["first_token_ms"]["most"] == 500.0
    assert found["inter_token_ms"]["p50"] == pytest.approx(600 / 11, abs=1e-3)  # 11 of 22 tokens took 0.6 / 11 s
    assert found["inter_token_ms"]["p90"] == 100.0 and found["inter_token_ms"]["most"] == 500.0
    assert found["longest_gap_ms"] == 1000.0
    assert found["tokens_per_cpu_second"] == 48.0
    assert found["parts_us_per_token"] == {"looks": 15625.0, "rest": 5208.3}
    assert found["verdicts"] == {"no_error": True, "fair": None, "no_leak": True, "agrees": True, "idle": True}


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({"tokens_after": 28.0}, "agrees"),
        ({"in_flight_after": 1.0}, "idle"),
        ({"memory_mb": [(float(i), 100.0 + 3 * i) for i in range(8)]}, "no_leak"),
    ],
)
def test_each_failure_is_seen(change: dict[str, Any], verdict: str) -> None:
    done = [asked(0, 1.0, 1.5, [(1.0, 11)]), asked(1, 2.0, 2.1, [(0.5, 11)])]
    verdicts = judge(done, {**SEEN, **change}, Load(streams=2, seconds=3.0))["verdicts"]
    assert [name for name, good in verdicts.items() if good is False] == [verdict]


def test_a_stream_that_starves_is_unfair_and_no_answer_at_all_is_no_success() -> None:
    load = Load(streams=2, seconds=3.0)
    even, starved = asked(0, 1.0, 1.5, [(1.0, 22)]), asked(1, 2.0, 2.1, [])
    assert judge([even] * 8 + [asked(1, 1.0, 1.5, [(1.0, 22)])] * 8, SEEN, load)["verdicts"]["fair"] is True
    assert judge([even] * 8 + [starved] * 8, SEEN, load)["verdicts"]["fair"] is False
    assert judge([even, starved], SEEN, load)["verdicts"]["fair"] is None  # too few to tell
    assert judge([], SEEN, load)["verdicts"]["no_error"] is False


def test_a_sample_belongs_to_its_innermost_part_and_who_waits_to_none() -> None:
    folded = """
main (cli.py:1);_look (router/answer/query.py:9);judge (router/decide/fisher_rao.py:136);where (numpy/x.py:3) 6
main (cli.py:1);_run (asyncio/events.py:84);send (uvicorn/h11_impl.py:5);write (asyncio/selector_events.py:9) 3
main (cli.py:1);_run_once (asyncio/base_events.py:1);select (selectors.py:468) 90
run (threading.py:5);_work (constellation/decoding/engine.py:99);forward (constellation/decoding/native.py:131) 2
run (threading.py:5);_work (constellation/decoding/engine.py:98) 50
main (cli.py:1) 1
""".strip()
    assert shares(folded) == {"looks": 0.5, "sockets": 0.25, "kernels in C": pytest.approx(2 / 12), "rest": 1 / 12}
    assert shares("") == {}


def test_jains_index_of_known_shares() -> None:
    assert jain([3, 3, 3]) == 1 and jain([1, 0, 0, 0]) == 0.25 and jain([0, 0]) == 1
    assert jain([1, 2, 3]) == pytest.approx(36 / 42)


def test_memory_counts_descendants() -> None:
    alone = resident_mb(os.getpid())
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    try:
        assert resident_mb(os.getpid()) > alone + 5
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


@pytest.mark.parametrize(
    ("url", "folder"), [(None, None), ("http://127.0.0.1:9", Path("x")), ("http://127.0.0.1:9", None)]
)
def test_what_cannot_be_loaded_is_one_line(url: str | None, folder: Path | None) -> None:
    with pytest.raises(ConfigError):
        bench_serve.run(url, Load(), run=folder)
