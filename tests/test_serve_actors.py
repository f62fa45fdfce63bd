"""The service on Ray: fronts over HTTP, kernels killed in the middle of a stream, clients that leave."""

import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from constellation.decoding.sample import Sampling
from constellation.pipeline.serving import service_of
from constellation.roster import OCEAN, ROLES
from router.answer.local import LocalKernels
from router.answer.packet import Packet
from router.answer.query import Answer, Ask, Piece
from router.answer.service import Service
from tests.asking import untimed
from tests.waiting import wait_for

pytestmark = pytest.mark.ray
HOW = Sampling(temperature=0.9, top_p=0.95, seed=7, max_new_tokens=120)
ASKS = [
    Ask("The import statement binds", HOW), Ask("Operators: << and", HOW, "mixture", 2),
    Ask("x", HOW, OCEAN), Ask("class Meta(type):", dataclasses.replace(HOW, logprobs=1), "barycenter", 2),
]  # fmt: skip


def silent(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def run(micro_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("served") / "run"
    shutil.copytree(micro_run, copy)
    return copy


@pytest.fixture(scope="module")
def up(ray_session: None, run: Path) -> Iterator[str]:
    """The name of a constellation that is up."""
    from actors import lifecycle

    status = lifecycle.up(run, name=f"served-{os.getpid()}", say=silent)
    yield status.name
    lifecycle.down(run, say=silent)


def on_ray(run: Path, name: str) -> Service:
    import ray

    from actors.remote import RayKernels
    from actors.supervisor_actor import namespace_of

    return service_of(run, RayKernels((OCEAN, *ROLES), lambda role: ray.get_actor(role, namespace=namespace_of(name))))


async def answers(service: Service, hear: Any = lambda piece: None) -> list[Answer]:
    async def one(ask: Ask) -> Answer:
        async for step in service.stream(ask):
            if isinstance(step, Answer):
                return untimed(step)
            hear(step)
        raise AssertionError("a stream without an answer")

    return list(await asyncio.gather(*map(one, ASKS)))


def test_a_kernel_killed_in_the_middle_of_a_stream_is_replaced_and_the_tokens_are_the_same(run: Path, up: str) -> None:
    from actors import lifecycle

    local = asyncio.run(answers(service_of(run, LocalKernels.from_run(run))))
    assert len({kernel for answer in local for kernel in answer.kernels}) > 2
    assert asyncio.run(answers(on_ray(run, up))) == local
    pids = {k.role: k.pid for k in lifecycle.status(run).kernels}
    killed: list[str] = []

    def kill(piece: Piece) -> None:
        if piece.kernel not in killed and len(killed) < 3:
            killed.append(piece.kernel)
            pid = pids[piece.kernel]
            assert pid is not None
            os.kill(pid, signal.SIGKILL)

    assert asyncio.run(answers(on_ray(run, up), kill)) == local
    assert len(killed) > 1
    after = {k.role: k.pid for k in lifecycle.status(run).kernels}
    assert all(after[role] != pids[role] for role in killed)


def test_texts_are_scored_and_decided_as_in_one_process(run: Path, up: str) -> None:
    async def both(service: Service) -> list[Any]:
        tokens = service.tokenizer.encode("An assignment statement evaluates the expression list" * 4)
        return [
            await service.score(tokens, top=2), await service.score(tokens, "mixture", 1, 2),
            await service.decide("The import statement", [" binds", " is"], "mixture", 2),
        ]  # fmt: skip

    local = asyncio.run(both(service_of(run, LocalKernels.from_run(run))))
    assert asyncio.run(both(on_ray(run, up))) == local


def test_who_leaves_frees_the_slots_of_a_kernel_in_another_process(run: Path, up: str) -> None:
    """An endless answer, and readings for ten seconds: both are left while they are under way."""
    endless = Ask("x", Sampling(seed=1, max_new_tokens=1_000_000, ignore_eos=True), "heart")

    async def leave() -> None:
        service = on_ray(run, up)

        async def heart() -> dict[str, Any]:
            while "active" not in (says := (await service.health())["kernels"]["heart"]):
                await asyncio.sleep(0.1)  # a busy machine: the kernel did not say in time
            return says

        async def answered() -> None:
            async for _ in service.stream(endless):
                pass

        answers = [f"{i} " + "and more " * 4 for i in range(12_000)]
        tokens = sum(map(len, service.tokenizer.encode_batch(answers)))  # seconds of reading
        works: list[Any] = [answered(), service.decide("The import statement", answers, "heart")]
        for work, seen in zip(works, ("active", "queue")):
            task, before = asyncio.ensure_future(work), await heart()
            while not (await heart())[seen]:
                assert not task.done(), await task
                await asyncio.sleep(0.01)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            while (now := await heart())["active"] or now["queue"]:
                await asyncio.sleep(0.01)
            assert now["prompt_tokens"] - before["prompt_tokens"] < tokens / 2  # nothing was read to its end

    asyncio.run(leave())


def test_a_turn_in_another_process_is_told_while_it_is_under_way(run: Path, up: str) -> None:
    """One that would not end before the test does."""
    service = on_ray(run, up)
    how = Sampling(seed=1, max_new_tokens=1_000_000, ignore_eos=True, logprobs=0)
    packet = Packet("endless", "heart", (service.tokenizer.eos,), how)
    heard: list[tuple[int, tuple[int, ...], int]] = []

    async def listen() -> bytes:
        enough = asyncio.Event()

        def ear(first: int, tokens: tuple[int, ...], scores: tuple[Any, ...]) -> None:
            heard.append((first, tokens, len(scores)))
            if first > 200:
                enough.set()

        turn = asyncio.create_task(service.kernels.turn("heart", packet, 10**9, ear))
        async with asyncio.timeout(120):
            await enough.wait()
        turn.cancel()
        with pytest.raises(asyncio.CancelledError):
            await turn
        return service.tokenizer.decode([t for _, tokens, _ in heard for t in tokens])

    told = asyncio.run(listen())
    assert [first for first, _, _ in heard] == [sum(len(t) for _, t, _ in heard[:i]) for i in range(len(heard))]
    assert all(len(tokens) == scores for _, tokens, scores in heard)
    short = dataclasses.replace(packet, sampling=dataclasses.replace(how, max_new_tokens=200))
    after = LocalKernels.from_run(run).answerer("heart").begin(short, 10**9).result()
    assert told.startswith(service.tokenizer.decode(after.tokens[-200:]))


# -- fronts ------------------------------------------------------------------------------------------------------------


def asked(url: str, **body: Any) -> Any:
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.loads(response.read())


def busy(url: str) -> bool:
    """Whether some kernel writes."""
    health = asked(url.replace("/v1/completions", "/health"))
    return any(says["active"] for says in health["kernels"].values())


BODY: dict[str, Any] = {"model": "constellation", "prompt": "The import statement", "max_tokens": 40, "seed": 3}


def test_fronts_share_a_port_are_replaced_when_killed_and_drain(run: Path, up: str) -> None:
    import ray

    from actors.fronts import Fronts, Place

    said: list[str] = []
    fronts = Fronts(Place(run, up, "127.0.0.1", 0, shared=True), 2, said.append)
    url = f"http://127.0.0.1:{fronts.start()}/v1/completions"
    try:
        texts = {asked(url, **BODY)["choices"][0]["text"] for _ in range(6)}
        assert len(texts) == 1
        pids = ray.get([front.report.remote() for front in fronts.actors])
        assert len({found["pid"] for found in pids}) == 2
        os.kill(pids[0]["pid"], signal.SIGKILL)
        wait_for(lambda: fronts.look() or said)
        assert "starting another one" in said[0]
        assert {asked(url, **BODY)["choices"][0]["text"] for _ in range(4)} == texts
        results: list[Any] = []
        slow = threading.Thread(target=lambda: results.append(asked(url, **BODY | {"max_tokens": 200}, n=3)))
        slow.start()
        wait_for(lambda: not slow.is_alive() or busy(url))
        assert fronts.drain()
        slow.join()
        assert results and len(results[0]["choices"]) == 3
        with pytest.raises(OSError):
            asked(url, **BODY)
    finally:
        fronts.end()


def test_serve_uses_what_is_up_and_leaves_it_up(run: Path, up: str) -> None:
    from actors import lifecycle
    from actors.fronts import Place, serve

    ports: list[int] = []

    def ended(seconds: float) -> bool:
        assert asked(f"http://127.0.0.1:{ports[0]}/v1/models")["data"][0]["id"] == "constellation"
        return True

    assert serve(Place(run, "", "127.0.0.1", 0, shared=False), ready=ports.append, ended=ended, say=silent)
    assert lifecycle.status(run).state == "up"


def test_the_same_application_runs_on_ray_serve(run: Path, up: str) -> None:
    serve_api = pytest.importorskip("ray.serve", reason="ray[serve] is not installed", exc_type=ImportError)
    from actors.serve_app import app
    from router.http.listen import bind

    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    serve_api.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve_api.run(app({"run": str(run), "name": up}), name="constellation", route_prefix="/")
        url = f"http://127.0.0.1:{port}/v1/completions"
        text = asked(url, **BODY)["choices"][0]["text"]
        local = asyncio.run(answers_of(service_of(run, LocalKernels.from_run(run)), BODY))
        assert text == local
    finally:
        serve_api.shutdown()


async def answers_of(service: Service, body: dict[str, Any]) -> str:
    ask = Ask(body["prompt"], Sampling(seed=body["seed"], max_new_tokens=body["max_tokens"]))
    *_, answer = [step async for step in service.stream(ask)]
    assert isinstance(answer, Answer)
    return answer.text
