"""Clients over a real socket: openai, httpx, curl; langchain-openai, litellm and lm-eval where they are installed.

The last three live in environments of their own, for litellm wants another openai: CONSTELLATION_CLIENTS names the
folder that holds `langchain/`, `litellm/` and `lm_eval/`; `make test-clients` makes and names it. Without it these
tests look for the packages beside this one, and skip when they are not there.
"""

import asyncio
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Literal

import httpx
import numpy as np
import openai
import pydantic
import pytest

from constellation.coordizer.tokenizer import Tokenizer
from constellation.pipeline.prepare import open_plan
from constellation.roster import ROLES
from router.answer.local import LocalKernels
from router.answer.service import Ask, Service
from router.app import make_app
from router.decide.fisher_rao import FisherRaoRouter
from router.http.server import Server
from router.http.sse import DONE
from tests.waiting import wait_for, wait_until

PROMPT = "The import statement"
HI = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a class?"}]


class Running:
    """A service on a port of its own, in a thread of this process."""

    def __init__(self, run: Path):
        plan = open_plan(run)
        kernels = LocalKernels.from_run(run)
        self.service = Service(plan.config, FisherRaoRouter.load(plan.router), Tokenizer.load(plan.tokenizer), kernels)
        self.server = Server(make_app(self.service), port=0)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        wait_for(lambda: self.server.started or not self.thread.is_alive())
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    @property
    def idle(self) -> bool:
        return not httpx.get(f"{self.url}/health", timeout=None).json()["requests"]

    @property
    def active(self) -> int:
        """Slots in use, of all kernels."""
        return sum(says["active"] for says in httpx.get(f"{self.url}/health", timeout=None).json()["kernels"].values())

    def wait_idle(self) -> None:
        wait_for(lambda: self.idle and not self.active)


@pytest.fixture(scope="module")
def running(micro_run):
    made = Running(micro_run)
    yield made
    made.server.close()
    made.thread.join()


@pytest.fixture
def client(running):
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


# -- openai ------------------------------------------------------------------------------------------------------------


def test_openai_models(client):
    names = [model.id for model in client.models.list()]
    assert names == ["constellation", *(f"constellation/{kernel}" for kernel in ("ocean", *ROLES))]
    assert client.models.retrieve("constellation/heart").owned_by == "constellation"


def test_openai_completions_stream_what_they_give_whole(client):
    body = {"model": "constellation", "prompt": PROMPT, "max_tokens": 60, "seed": 3, "logprobs": 2}
    whole = client.completions.create(**body)
    assert whole.usage.completion_tokens == len(whole.choices[0].logprobs.tokens) > 1
    chunks = list(client.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert "".join(c.choices[0].text for c in chunks[:-1]) == whole.choices[0].text
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert whole.constellation["kernels"]


def test_openai_chat_streams_what_it_gives_whole(client):
    body = {"model": "constellation", "messages": HI, "max_completion_tokens": 40, "seed": 3}
    whole = client.chat.completions.create(**body, logprobs=True, top_logprobs=2)
    content = whole.choices[0].message.content
    assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
    with client.chat.completions.create(**body, stream=True) as stream:
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == content


def test_openai_extra_body_chooses_who_answers(client):
    body = {"model": "constellation", "prompt": PROMPT, "max_tokens": 20, "seed": 3}
    for mode in ("mixture", "barycenter", "ocean", "heart"):
        reply = client.completions.create(**body, extra_body={"mode": mode, "top_kernels": 2})
        assert reply.constellation["mode"] == mode


def test_openai_parses_typed_answers(client):
    class Verdict(pydantic.BaseModel):
        verdict: Literal["yes", "no"]
        sure: bool

    reply = client.chat.completions.parse(model="constellation", messages=HI, response_format=Verdict)
    assert isinstance(reply.choices[0].message.parsed, Verdict)


def test_openai_errors_are_its_own(client):
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-4", prompt="x")
    assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="constellation", prompt="x", temperature=-1)
    assert wrong.value.param == "temperature"


def test_openai_async_clients_stream_side_by_side(running):
    async def one(client, seed):
        stream = await client.completions.create(
            model="constellation", prompt=PROMPT, max_tokens=30, seed=seed, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def go():
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0) as client:
            together = await asyncio.gather(*(one(client, seed) for seed in range(8)))
            alone = [await one(client, seed) for seed in range(8)]
            return together, alone

    together, alone = asyncio.run(go())
    assert together == alone
    assert len(set(alone)) == 8


# -- the wire ----------------------------------------------------------------------------------------------------------


def test_every_event_is_sent_by_itself_and_text_comes_before_the_end(running):
    body = {"prompt": PROMPT, "max_tokens": 3000, "stream": True, "seed": 1, "ignore_eos": True}
    with httpx.stream("POST", f"{running.url}/v1/completions", json=body, timeout=None) as response:
        chunks = []
        for chunk in response.iter_raw():
            chunks.append(chunk)
            if len(chunks) == 1:
                assert not running.idle, "the first text came when all was done"
    assert len(chunks) > 3
    assert b"".join(chunks).endswith(DONE)
    assert all(chunk.startswith(b"data: ") and chunk.endswith(b"\n\n") for chunk in chunks)
    assert response.headers["x-accel-buffering"] == "no"


def test_a_connection_outlives_the_patience_of_clients(running):
    """The server must not be the first to close one: a request may be on its way."""
    one = httpx.Limits(max_connections=1, keepalive_expiry=600)
    with httpx.Client(base_url=running.url, timeout=None, limits=one) as client:
        first = client.get("/health").extensions["network_stream"].get_extra_info("client_addr")
        time.sleep(5.5)  # uvicorn's own patience is 5 s
        assert client.get("/health").extensions["network_stream"].get_extra_info("client_addr") == first


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_curl_shows_text_while_it_is_written(running):
    body = json.dumps({"prompt": PROMPT, "max_tokens": 4000, "stream": True, "seed": 1, "ignore_eos": True})
    command = ["curl", "-sN", f"{running.url}/v1/completions", "-H", "Authorization: Bearer ",
               "-H", "Content-Type: application/json", "-d", body]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        line = process.stdout.readline()
        assert json.loads(line.removeprefix(b"data: "))["choices"][0]["finish_reason"] is None
        process.kill()
    running.wait_idle()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_not_answered_any_more(running, stream):
    body = {"prompt": PROMPT, "max_tokens": 60_000, "stream": stream, "seed": 1, "ignore_eos": True, "n": 3}

    async def go():
        async with httpx.AsyncClient(timeout=None) as client:
            asking = asyncio.create_task(client.post(f"{running.url}/v1/completions", json=body))
            await wait_until(lambda: running.active)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    asyncio.run(go())
    running.wait_idle()
    again = httpx.post(f"{running.url}/v1/completions", json={"prompt": "x", "max_tokens": 1}, timeout=None)
    assert again.status_code == 200


def test_a_slow_reader_gets_the_same_text(running):
    body = {"prompt": PROMPT, "max_tokens": 120, "seed": 2, "ignore_eos": True}
    whole = httpx.post(f"{running.url}/v1/completions", json=body, timeout=None).json()["choices"][0]["text"]
    text = ""
    with httpx.stream("POST", f"{running.url}/v1/completions", json={**body, "stream": True}, timeout=None) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                time.sleep(0.02)
    assert text == whole


def test_a_server_that_is_closed_answers_those_inside_and_ends(micro_run):
    made = Running(micro_run)
    body = {"prompt": PROMPT, "max_tokens": 4000, "seed": 1, "ignore_eos": True}
    replies = []
    asking = threading.Thread(
        target=lambda: replies.append(httpx.post(f"{made.url}/v1/completions", json=body, timeout=None))
    )
    asking.start()
    wait_for(lambda: not made.idle)  # seconds of work, looked at many times
    made.server.close()
    late = httpx.post(f"{made.url}/v1/completions", json=body, timeout=None)
    assert (late.status_code, late.headers["retry-after"], late.headers["connection"]) == (503, "5", "close")
    assert httpx.get(f"{made.url}/ready", timeout=None).status_code == 503
    asking.join()
    assert replies[0].json()["usage"]["completion_tokens"] == 4000
    made.thread.join()


# -- other people's clients --------------------------------------------------------------------------------------------


def python_with(folder: str, package: str) -> str:
    """A Python that has `package`; skips without one."""
    root = os.environ.get("CONSTELLATION_CLIENTS")
    if root and (Path(root) / folder / "bin/python").exists():
        return str(Path(root) / folder / "bin/python")
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; CONSTELLATION_CLIENTS names a folder of environments")
    return sys.executable


def told_by(python: str, code: str, url: str, cwd: Path) -> dict:
    """What a script prints last, as JSON; `URL` is the service."""
    code = f"URL = {url!r}\nimport json\n" + textwrap.dedent(code)
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    found = subprocess.run([python, "-c", code], env={**os.environ, **offline}, capture_output=True, text=True, cwd=cwd)
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads(found.stdout.splitlines()[-1])


@pytest.mark.slow
def test_langchain(running, tmp_path):
    told = told_by(python_with("langchain", "langchain_openai"), """
        from typing import Literal
        from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
        from langchain_openai import ChatOpenAI, OpenAI
        from pydantic import BaseModel
        who = dict(base_url=URL + "/v1", api_key="x", max_retries=0, model="constellation")
        class Verdict(BaseModel):
            verdict: Literal["yes", "no"]
        chat = ChatOpenAI(max_tokens=20, temperature=0, **who)
        said = [SystemMessage("a"), HumanMessage("b"), AIMessage("c"), HumanMessage("d")]
        reply = chat.invoke(said)
        text = OpenAI(max_tokens=8, temperature=0, n=2, best_of=2, **who)
        print(json.dumps({
            "whole": reply.content, "streamed": "".join(piece.content for piece in chat.stream(said)),
            "usage": reply.usage_metadata["output_tokens"], "batch": len(chat.batch(["a", "b"])),
            "typed": chat.with_structured_output(Verdict, method="json_schema").invoke("is it?").verdict,
            "texts": [len(each) for each in text.generate(["a", "b"]).generations],
        }))
    """, running.url, tmp_path)  # fmt: skip
    assert told["whole"] == told["streamed"]
    assert told["typed"] in ("yes", "no")
    assert (told["usage"], told["batch"], told["texts"]) == (20, 2, [2, 2])


@pytest.mark.slow
def test_litellm(running, tmp_path):
    told = told_by(python_with("litellm", "litellm"), """
        import litellm
        who = dict(api_base=URL + "/v1", api_key="x", seed=1, max_tokens=20)
        chat = dict(model="openai/constellation/heart", messages=[{"role": "user", "content": "hi"}], **who)
        whole = litellm.completion(presence_penalty=0, frequency_penalty=0, user=None, stop=None, n=1, **chat)
        chunks = list(litellm.completion(stream=True, stream_options={"include_usage": True}, **chat))
        texts = litellm.text_completion(model="text-completion-openai/constellation", prompt=["a b", "c"], **who)
        try:
            litellm.completion(**{**chat, "model": "openai/nobody"})
        except litellm.NotFoundError as error:
            missing = error.status_code
        print(json.dumps({
            "whole": whole.choices[0].message.content, "usage": whole.usage.completion_tokens,
            "streamed": "".join(c.choices[0].delta.content or "" for c in chunks if c.choices),
            "texts": len(texts.choices), "missing": missing,
        }))
    """, running.url, tmp_path)  # fmt: skip
    assert told["whole"] == told["streamed"]
    assert (told["usage"], told["texts"], told["missing"]) == (20, 2, 404)


DOCS = 40


def task_of(folder: Path) -> list[dict]:
    """Which of four endings is text, and which are its letters in another order? Chance is a quarter."""
    import pydoc_data.topics

    cut = []  # a beginning and its ending, between words: so both are tokenised the same alone and together
    for text in list(pydoc_data.topics.topics.values())[:60]:
        words = text[:2000].split()
        cut += [(" ".join(words[i : i + 4]), " " + " ".join(words[i + 4 : i + 7])) for i in range(20, 130, 20)]
    cut = [both for both in cut if 30 < len("".join(both)) < 55]
    rows = []
    for i in range(DOCS):
        beginning, ending = cut[i * 3]
        letters = random.Random(i)
        endings = [" " + "".join(letters.sample(ending[1:], len(ending) - 1)) for _ in range(3)]
        endings.insert(i % 4, ending)
        rows.append({"question": beginning, "endings": endings, "answer": i % 4})
    (folder / "endings.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "endings.yaml").write_text(
        textwrap.dedent(f"""
        task: endings
        dataset_path: json
        dataset_kwargs: {{data_files: {folder / "endings.jsonl"}}}
        test_split: train
        output_type: multiple_choice
        doc_to_text: "{{{{question}}}}"
        doc_to_choice: "{{{{endings}}}}"
        doc_to_target: answer
        target_delimiter: ""
        metric_list: [{{metric: acc}}]
    """)
    )
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["", "/ocean"])
def test_lm_eval_gives_the_score_that_the_service_gives_in_process(running, tmp_path, mode):
    python = python_with("lm_eval", "lm_eval")
    rows = task_of(tmp_path)
    told = told_by(python, f"""
        import lm_eval
        from lm_eval.tasks import TaskManager
        who = "model=constellation{mode},base_url=" + URL + "/v1/completions,num_concurrent=2,max_length=64"
        found = lm_eval.simple_evaluate(
            model="local-completions", model_args=who, tasks=["endings"], batch_size=4,
            task_manager=TaskManager(include_path=".", include_defaults=False), bootstrap_iters=0,
        )
        print(json.dumps({{
            "acc": found["results"]["endings"]["acc,none"],
            "log_p": [[float(one[0][0]) for one in sample["resps"]] for sample in found["samples"]["endings"]],
        }}))
    """, running.url, tmp_path)  # fmt: skip

    async def score(question: str, ending: str) -> float:
        encode = running.service.tokenizer.encode
        tokens = encode(question + ending)
        scored = await running.service.score(tokens, mode.strip("/") or "route", 1)
        return sum(one.log_prob for one in scored[len(encode(question)) :] if one)

    log_p = [[asyncio.run(score(row["question"], ending)) for ending in row["endings"]] for row in rows]
    assert np.allclose(told["log_p"], log_p, rtol=0, atol=1e-9)
    right = np.mean([int(np.argmax(p)) == row["answer"] for p, row in zip(log_p, rows)])
    assert told["acc"] == right
    assert right > 0.25 + 2 * np.sqrt(0.25 * 0.75 / DOCS), "no better than chance"


def test_asks_of_the_service_and_of_its_front_are_the_same(running):
    """What HTTP adds is nothing but HTTP."""
    from constellation.decoding.sample import Sampling

    async def alone():
        steps = [s async for s in running.service.stream(Ask(PROMPT, Sampling(seed=4, max_new_tokens=50)))]
        return steps[-1].text

    body = {"prompt": PROMPT, "seed": 4, "max_tokens": 50}
    reply = httpx.post(f"{running.url}/v1/completions", json=body, timeout=None).json()
    assert reply["choices"][0]["text"] == asyncio.run(alone())
