"""The service over HTTP, in process: the laws between its answers, its refusals, who is let in, and how it ends."""

import asyncio
import gzip
import json
import math
import re

import httpx
import numpy as np
import pytest

from constellation.config import Config
from constellation.config import Router as RouterConfig
from constellation.decoding.sample import Sampling
from constellation.errors import RunError
from constellation.roster import OCEAN
from router.answer.local import LocalKernels
from router.answer.query import Ask
from router.answer.service import Service
from router.app import AppSettings, make_app
from router.decide.fit import fit
from router.http import keys
from router.http.chat import render
from router.http.keys import Keys, Limits
from router.http.limits import Front
from router.http.requests import Message
from tests import asking
from tests.cases import KERNEL, NAMES, READ, TOKENIZER, models

CONFIG = Config(kernel=KERNEL, router=RouterConfig(bins=512, dims=8, every=32, max_prefix=256, hysteresis=0.05))
POLICY = fit(READ, CONFIG.router, seed=0, names=NAMES, validation=READ)
MODELS = models()
MODES = ("route", "mixture", "barycenter", "heart", OCEAN)


class Failing(LocalKernels):
    """Kernels that break down after some turns."""

    def __init__(self, turns):
        super().__init__(MODELS, TOKENIZER)
        self.turns_left = turns

    async def turn(self, kernel, *call):
        self.turns_left -= 1
        if self.turns_left < 0:
            raise RunError(f"kernel {kernel} is away")
        return await super().turn(kernel, *call)


def service(turns=None):
    kernels = LocalKernels(MODELS, TOKENIZER) if turns is None else Failing(turns)
    return Service(CONFIG, POLICY, TOKENIZER, kernels, name="constellation", created=1_700_000_000)


class Client:
    """Asks an application; every call is whole, streams too."""

    def __init__(self, settings=None, turns=None):
        self.service = service(turns)
        self.app = make_app(self.service, settings)

    def ask(self, method, path, headers=None, **body):
        async def go():
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                content = {"json": body} if body else {}
                return await client.request(method, path, headers=headers, **content)

        return asyncio.run(go())

    def post(self, path, **body):
        answer = self.ask("POST", path, **body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def stream(self, path, **body):
        """The chunks; asserts that [DONE] ends them."""
        answer = self.ask("POST", path, stream=True, **body)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        *events, done, empty = answer.text.split("\n\n")
        assert (done, empty) == ("data: [DONE]", "")
        assert all(event.startswith("data: ") and "\n" not in event for event in events)
        return [json.loads(event.removeprefix("data: ")) for event in events]


CLIENT = Client()
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "the quick brown fox number 3"}]


# -- texts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_completion_is_what_the_service_answers(mode):
    ask = Ask("the quick brown fox number 3", Sampling(seed=5, top_p=0.9, max_new_tokens=60), mode)
    (expected,) = asking.answers(service(), [ask])
    body = {"prompt": "the quick brown fox number 3", "max_tokens": 60, "seed": 5, "top_p": 0.9, "mode": mode}
    reply = CLIENT.post(COMPLETIONS, **body, return_token_ids=True)
    (choice,) = reply["choices"]
    assert (choice["text"], tuple(choice["token_ids"])) == (expected.text, expected.token_ids)
    assert reply["usage"]["completion_tokens"] == expected.completion_tokens
    assert reply["constellation"]["mode"] == mode
    assert tuple(reply["constellation"]["kernels"]) == expected.kernels
    assert reply["constellation"]["certificate"] == expected.certificate


REQUESTS = [
    {"prompt": "the quick brown fox", "max_tokens": 50, "seed": 1, "logprobs": 3},
    {"prompt": "naïve café", "max_tokens": 40, "seed": 2, "logprobs": 0, "echo": True},
    {"prompt": ["def f(x):", "", "GENESIS"], "n": 2, "max_tokens": 30, "seed": 3, "logprobs": 2, "mode": "heart"},
    {"prompt": [[17, 30, 40], [100]], "max_tokens": 9, "temperature": 0, "logprobs": 1, "echo": True},
    {"prompt": "dog", "max_tokens": 60, "seed": 4, "stop": ["e", "zz"], "mode": "mixture"},
    {"prompt": "dog", "max_tokens": 0, "echo": True, "logprobs": 1},
    {
        "prompt": "x = ",
        "max_tokens": 25,
        "seed": 6,
        "frequency_penalty": 1.5,
        "logit_bias": {"20": -100},
        "min_p": 0.01,
    },
]


@pytest.mark.parametrize("body", REQUESTS)
def test_a_streamed_completion_is_the_whole_one_in_pieces(body):
    whole = CLIENT.post(COMPLETIONS, **body, return_token_ids=True)
    chunks = CLIENT.stream(COMPLETIONS, **body, return_token_ids=True, stream_options={"include_usage": True})
    usage = chunks.pop()
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks)
    assert {chunk["id"] for chunk in chunks} == {usage["id"]}
    for choice in whole["choices"]:
        pieces = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert [p["finish_reason"] for p in pieces] == [None] * (len(pieces) - 1) + [choice["finish_reason"]]
        assert [t for p in pieces for t in p.get("token_ids", [])] == choice["token_ids"]
        assert pieces[0]["prompt_token_ids"] == choice["prompt_token_ids"]
        if "logprobs" in body:
            for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                assert [x for p in pieces if p["logprobs"] for x in p["logprobs"][field]] == choice["logprobs"][field]


@pytest.mark.parametrize("extra", [{}, {"logprobs": True, "top_logprobs": 3}, {"n": 3}, {"stop": "o"}])
def test_a_streamed_reply_is_the_whole_one_in_pieces(extra):
    body = {"messages": HI, "max_tokens": 40, "seed": 1, **extra}
    whole, chunks = CLIENT.post(CHAT, **body), CLIENT.stream(CHAT, **body)
    assert (whole["object"], {c["object"] for c in chunks}) == ("chat.completion", {"chat.completion.chunk"})
    assert not any("usage" in chunk for chunk in chunks)
    for choice in whole["choices"]:
        pieces = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert pieces[0]["delta"] == {"role": "assistant", "content": ""}
        assert pieces[-1]["delta"] == {}
        assert "".join(p["delta"].get("content", "") for p in pieces) == choice["message"]["content"]
        if "logprobs" in body:
            found = [one for p in pieces if p["logprobs"] for one in p["logprobs"]["content"]]
            assert found == choice["logprobs"]["content"]
            assert len(found) == whole["usage"]["completion_tokens"]


def test_a_conversation_is_its_template_as_a_completion():
    reply = CLIENT.post(CHAT, messages=HI, max_tokens=30, seed=7)
    text = render([Message("user", HI[0]["content"])])
    completion = CLIENT.post(COMPLETIONS, prompt=text, max_tokens=30, seed=7, stop=["\n\nUser:", "\n\nSystem:"])
    assert reply["choices"][0]["message"]["content"] == completion["choices"][0]["text"]
    assert reply["usage"] == completion["usage"]


def test_usage_may_come_with_every_chunk():
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = CLIENT.stream(COMPLETIONS, prompt="the quick", max_tokens=50, seed=1, stream_options=options)
    made = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert made == sorted(made) and made[0] > 0 and made[-1] == 50
    assert len(set(made)) > 2
    assert all(chunk["usage"]["prompt_tokens"] == 2 for chunk in chunks)


def test_chunks_say_who_wrote_them():
    body = {"prompt": "the quick brown fox number 3", "max_tokens": 60, "seed": 1}
    *chunks, last = CLIENT.stream(COMPLETIONS, **body)
    wrote = list(dict.fromkeys(chunk["constellation"]["kernel"] for chunk in chunks))
    assert wrote == last["constellation"]["kernels"]
    for look in last["constellation"]["looks"]:
        assert {"at_bytes", "kernel", "posterior", "distance_rad", "weights"} <= look.keys()


def test_every_choice_is_what_it_would_be_alone():
    prompts, n = ["the quick", "def f(x):"], 3
    together = CLIENT.post(COMPLETIONS, prompt=prompts, n=n, max_tokens=20, seed=9)["choices"]
    assert [choice["index"] for choice in together] == list(range(6))
    for i, prompt in enumerate(prompts):
        alone = CLIENT.post(COMPLETIONS, prompt=prompt, n=n, max_tokens=20, seed=9)["choices"]
        assert [c["text"] for c in alone] == [c["text"] for c in together[i * n : i * n + n]]
        assert len({c["text"] for c in alone}) == n


def test_a_seed_fixes_the_answer_and_none_draws_anew():
    body = {"prompt": "the quick", "max_tokens": 20}
    texts = [
        CLIENT.post(COMPLETIONS, **body, **seed)["choices"][0]["text"] for seed in ({"seed": 1}, {"seed": 1}, {}, {})
    ]
    assert texts[0] == texts[1]
    assert texts[2] != texts[3]


def test_best_of_keeps_the_likeliest():
    body = {"prompt": "the quick", "max_tokens": 12, "seed": 3}
    all_five = CLIENT.post(COMPLETIONS, **body, n=5, logprobs=0)["choices"]
    ranked = sorted(all_five, key=lambda c: -np.mean(c["logprobs"]["token_logprobs"]))
    best = CLIENT.post(COMPLETIONS, **body, n=2, best_of=5)
    assert [c["text"] for c in best["choices"]] == [c["text"] for c in ranked[:2]]
    assert [c["index"] for c in best["choices"]] == [0, 1]
    assert best["choices"][0]["logprobs"] is None
    assert best["usage"]["completion_tokens"] == 5 * 12  # what was made, not what is told


def test_the_model_name_chooses_the_kernel():
    body = {"prompt": "the quick", "max_tokens": 20, "seed": 1}
    by_name = CLIENT.post(COMPLETIONS, model="constellation/memory", **body)
    by_mode = CLIENT.post(COMPLETIONS, model="constellation", mode="memory", **body)
    assert by_name["choices"] == by_mode["choices"]
    assert by_name["constellation"]["kernels"] == ["memory"]
    assert by_name["model"] == "constellation/memory"


def test_a_long_prompt_is_refused_unless_it_may_be_cut():
    long = "word " * 100
    answer = CLIENT.ask("POST", COMPLETIONS, prompt=long)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    tokens = TOKENIZER.encode(long)
    for kept, left in ((-1, 64), (10, 10), (1000, 64)):
        body = {"max_tokens": 10, "seed": 1, "return_token_ids": True}
        cut = CLIENT.post(COMPLETIONS, prompt=long, truncate_prompt_tokens=kept, **body)
        assert cut["choices"][0]["prompt_token_ids"] == tokens[-left:]
        assert cut["usage"]["prompt_tokens"] == left
        assert (
            cut["choices"][0]["text"] == CLIENT.post(COMPLETIONS, prompt=tokens[-left:], **body)["choices"][0]["text"]
        )


# -- probabilities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_an_echoed_prompt_is_scored_as_the_service_scores_it(mode):
    prompts = [TOKENIZER.encode("the quick brown fox number 3 the quick"), [17], TOKENIZER.encode("GENESIS 1:1")]
    body = {
        "prompt": prompts,
        "echo": True,
        "logprobs": 1,
        "max_tokens": 1,
        "temperature": 0,
        "seed": 1234,
        "mode": mode,
    }
    reply = CLIENT.post(COMPLETIONS, **body)
    for prompt, choice in zip(prompts, reply["choices"]):
        found = choice["logprobs"]
        assert {len(found[name]) for name in found} == {len(prompt) + 1}
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        expected = asyncio.run(service().score(prompt, mode, 1))
        assert found["token_logprobs"][1:-1] == [one.log_prob for one in expected[1:]]
        for log_p, top, one in zip(found["token_logprobs"][1:], found["top_logprobs"][1:], [*expected[1:], None]):
            assert log_p <= max(top.values()) and log_p in top.values()
            if one:  # whether a token is the likeliest one can be told by equality
                assert (log_p == max(top.values())) == (one.log_prob == one.top[0][1])
        assert found["token_logprobs"][-1] == max(found["top_logprobs"][-1].values())  # greedy


def test_log_probabilities_are_of_all_tokens_and_in_order():
    reply = CLIENT.post(CHAT, messages=HI, max_tokens=20, seed=1, logprobs=True, top_logprobs=20)
    for one in reply["choices"][0]["logprobs"]["content"]:
        tops = [top["logprob"] for top in one["top_logprobs"]]
        assert len(tops) == 20 and tops == sorted(tops, reverse=True)
        assert 0 < sum(map(math.exp, tops)) <= 1 + 1e-6
        assert one["logprob"] <= tops[0] <= 0
        assert bytes(one["bytes"]) in TOKENIZER.token_bytes


def test_text_offsets_are_where_tokens_begin():
    choice = CLIENT.post(COMPLETIONS, prompt="naïve café fox", echo=True, logprobs=0, max_tokens=0)["choices"][0]
    found, text = choice["logprobs"], choice["text"]
    assert text == "naïve café fox"
    for token, begin in zip(found["tokens"], found["text_offset"]):
        if not token.startswith("bytes:"):
            assert text[begin:].startswith(token)
    assert found["text_offset"] == sorted(found["text_offset"])


def test_tokens_may_be_named_by_their_ids():
    body = {"prompt": "naïve", "echo": True, "logprobs": 2, "max_tokens": 3, "seed": 1, "return_token_ids": True}
    choice = CLIENT.post(COMPLETIONS, **body, return_tokens_as_token_ids=True)["choices"][0]
    ids = choice["prompt_token_ids"] + choice["token_ids"]
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in ids]


@pytest.mark.parametrize("mode", MODES)
def test_a_decision_is_the_normalised_probability_of_each_answer(mode):
    answers = ["dog", 3, True, None, "café"]
    reply = CLIENT.post("/v1/decisions", prompt="over the lazy ", answers=answers, mode=mode)
    texts = ["dog", "3", "true", "null", "café"]
    expected, told = asyncio.run(service().decide("over the lazy ", texts, mode))
    assert reply["constellation"]["kernels"] == list(told.kernels) and len(told.kernels) >= 1
    assert reply["constellation"]["certificate"] == told.certificate
    assert [one["probability"] for one in reply["probabilities"]] == expected
    assert [one["answer"] for one in reply["probabilities"]] == answers
    assert sum(expected) == pytest.approx(1)
    assert reply["choice"] == answers[int(np.argmax(expected))] and reply["object"] == "decision"


def test_a_choice_is_one_of_its_texts_with_their_probabilities():
    answers = ["dog", "fox", "quick"]
    prompt = "the lazy "
    p, told = asyncio.run(service().decide(prompt, answers, "route"))
    body = {"prompt": prompt, "structured_outputs": {"choice": answers}}
    greedy = CLIENT.post(COMPLETIONS, **body, temperature=0)
    assert greedy["choices"][0]["text"] == answers[int(np.argmax(p))]
    assert greedy["choices"][0]["finish_reason"] == "stop"
    assert greedy["constellation"]["kernels"] == list(told.kernels)
    drawn = CLIENT.post(COMPLETIONS, **body, temperature=4.0, n=100, seed=1)["choices"]
    q = np.array(p) ** (1 / 4.0) / (np.array(p) ** (1 / 4.0)).sum()
    for answer, expected in zip(answers, q):
        share = sum(choice["text"] == answer for choice in drawn) / 100
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / 100) + 0.01


def test_a_schema_of_few_values_is_always_obeyed():
    schema = {"type": "object", "properties": {"mood": {"enum": ["good", "bad"]}, "sure": {"type": "boolean"}}}
    form = {"type": "json_schema", "json_schema": {"name": "mood", "schema": schema}}
    reply = CLIENT.post(CHAT, messages=HI, response_format=form, n=10, temperature=5.0)
    for choice in reply["choices"]:
        value = json.loads(choice["message"]["content"])
        assert value["mood"] in ("good", "bad") and value["sure"] in (True, False)
    chunks = CLIENT.stream(CHAT, messages=HI, response_format=form)
    assert json.loads("".join(c["choices"][0]["delta"].get("content", "") for c in chunks))


# -- tokens, models, routes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "the quick", "naïve café", "<|eos|> inside", "\x00\n"])
def test_tokens_and_their_text(text):
    found = CLIENT.post("/tokenize", prompt=text, return_token_strs=True)
    assert found["tokens"] == TOKENIZER.encode(text)
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == 64
    assert CLIENT.post("/detokenize", tokens=found["tokens"])["prompt"] == text


def test_a_client_can_learn_the_end_of_text_and_the_template():
    info = CLIENT.ask("GET", "/tokenizer_info").json()
    assert CLIENT.post("/tokenize", prompt=info["eos_token"])["tokens"] == [TOKENIZER.eos] == [info["eos_token_id"]]
    by_messages = CLIENT.post("/tokenize", messages=HI)["tokens"]
    assert by_messages == TOKENIZER.encode(render([Message("user", HI[0]["content"])]))


def test_models_are_the_constellation_and_its_kernels():
    listed = CLIENT.ask("GET", "/v1/models").json()
    assert listed["object"] == "list"
    assert {m["id"] for m in listed["data"]} == {"constellation", *(f"constellation/{k}" for k in (OCEAN, *NAMES))}
    for entry in listed["data"]:
        assert (entry["object"], entry["created"], entry["owned_by"]) == ("model", 1_700_000_000, "constellation")
        assert CLIENT.ask("GET", f"/v1/models/{entry['id']}").json() == entry
    missing = CLIENT.ask("GET", "/v1/models/constellation/nobody")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


def test_a_route_is_explained_and_nothing_is_written():
    for body in ({"prompt": "the quick brown fox number 3"}, {"messages": HI}):
        text = body.get("prompt") or render([Message("user", HI[0]["content"])])
        assert CLIENT.post("/route", **body) == json.loads(json.dumps(service().explain(text)))


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        (COMPLETIONS, {"prompt": "x", "model": "gpt-4"}, 404, "model"),
        (COMPLETIONS, {"prompt": "x", "mode": "nobody"}, 400, "mode"),
        (COMPLETIONS, {"prompt": "x", "mode": "heart", "model": "constellation/memory"}, 400, "mode"),
        (COMPLETIONS, {"prompt": "x", "suffix": "y"}, 400, "suffix"),
        (COMPLETIONS, {"prompt": "x", "temperature": -1}, 400, "temperature"),
        (COMPLETIONS, {"prompt": "x", "best_of": 1, "n": 2}, 400, "best_of"),
        (COMPLETIONS, {"prompt": "x", "best_of": 3, "stream": True}, 400, "best_of"),
        (COMPLETIONS, {"prompt": "x", "stream_options": {}}, 400, "stream_options"),
        (COMPLETIONS, {"prompt": "x", "min_tokens": 17}, 400, "min_tokens"),
        (COMPLETIONS, {"prompt": [999]}, 400, "prompt"),
        (COMPLETIONS, {"prompt": ["a", 1]}, 400, "prompt"),
        (COMPLETIONS, {"prompt": "x", "logit_bias": {"1": 1, "01": 2}}, 400, "logit_bias"),
        (COMPLETIONS, {"prompt": "x", "guided_choice": ["a", "a"]}, 400, "structured_outputs"),
        (COMPLETIONS, {"prompt": "x", "guided_choice": ["a"], "logprobs": 1}, 400, "logprobs"),
        (CHAT, {"messages": HI, "tools": [{"type": "function"}]}, 400, "tools"),
        (CHAT, {"messages": HI, "top_logprobs": 2}, 400, "top_logprobs"),
        (CHAT, {"messages": HI, "response_format": {"type": "json_object"}}, 400, "response_format.type"),
        (CHAT, {"messages": [{"role": "user", "content": "word " * 100}]}, 400, "messages"),
        ("/v1/decisions", {"prompt": "x", "answers": ["a", "a"]}, 400, "answers"),
        ("/v1/decisions", {"answers": ["a"]}, 400, "prompt"),
        ("/detokenize", {"tokens": [400]}, 400, None),
        ("/tokenize", {"prompt": "x", "messages": HI}, 400, "prompt"),
        ("/v1/embeddings", {"input": "x"}, 404, None),
    ],
)
def test_what_is_refused_is_told_as_openai_tells_it(path, body, status, param):
    answer = CLIENT.ask("POST", path, **body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert "\n" not in error["message"] and error["message"]


def test_fields_that_nobody_knows_are_told_in_a_header():
    answer = CLIENT.ask("POST", COMPLETIONS, prompt="x", max_tokens=1, user="me", **{"sürprise\n": 1, "a,b": 2})
    assert answer.status_code == 200
    assert answer.headers["x-constellation-ignored"] == "a\\x2cb, s\\xfcrprise\\n, user"
    assert (
        "x-constellation-ignored" not in CLIENT.ask("POST", COMPLETIONS, prompt="x", max_tokens=1, suffix=None).headers
    )


def test_other_methods_and_pickles_are_refused():
    answer = CLIENT.ask("GET", COMPLETIONS)
    assert (answer.status_code, answer.json()["error"]["type"]) == (405, "invalid_request_error")

    pickle = raw(CLIENT.app, b"\x80\x04\x8c\x05posix", {"content-type": "application/x-pickle"})
    assert (pickle.status_code, pickle.json()["error"]["code"]) == (415, "unsupported_media_type")


def raw(app, content, headers, method="POST", path=COMPLETIONS):
    """The answer to a body as it is."""

    async def go():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.request(method, path, content=content, headers=headers)

    return asyncio.run(go())


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/v1/decisions", "/tokenize", "/detokenize", "/route"])
def test_a_body_is_plain_json_and_says_so(path):
    """What a page of another origin may send without being asked is none: text, a form, or no kind at all."""
    body = {"prompt": "x", "messages": HI, "answers": ["a"], "tokens": [17], "max_tokens": 1}
    del body["prompt" if path in (CHAT, "/detokenize") else "messages"]
    content = json.dumps(body).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        refused = raw(CLIENT.app, content, {"content-type": kind} if kind else {}, path=path)
        assert (refused.status_code, refused.json()["error"]["code"]) == (415, "unsupported_media_type")
    for kind in ("application/json", "Application/JSON; charset=utf-8"):
        assert raw(CLIENT.app, content, {"content-type": kind}, path=path).status_code == 200
    packed = {"content-type": "application/json", "content-encoding": "gzip"}
    refused = raw(CLIENT.app, gzip.compress(content), packed, path=path)
    assert (refused.status_code, refused.headers["accept-encoding"]) == (415, "identity")
    assert raw(CLIENT.app, content, {**packed, "content-encoding": "identity"}, path=path).status_code == 200


@pytest.mark.parametrize("method", ["TRACE", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"])
def test_other_methods_are_told_those_that_are_answered(method):
    for path, allowed in ((COMPLETIONS, "POST"), ("/v1/models", "GET"), ("/", "GET")):
        answer = raw(CLIENT.app, b"", {}, method, path)
        if method == "HEAD" and allowed == "GET":
            whole = CLIENT.ask("GET", path)
            ours = {"x-request-id": None}
            assert (answer.status_code, {**answer.headers} | ours) == (200, {**whole.headers} | ours)
        else:
            assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    assert raw(CLIENT.app, b"", {}, method, "/nowhere").status_code == 404


def test_a_model_without_a_name_is_none():
    missing = CLIENT.ask("GET", "/v1/models/")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


def test_what_breaks_before_the_first_text_is_a_status_and_midway_an_event():
    at_once = Client(turns=0).ask("POST", COMPLETIONS, prompt="x", max_tokens=60, stream=True)
    assert (at_once.status_code, at_once.json()["error"]["type"]) == (500, "server_error")
    client = Client(turns=2)
    midway = client.ask("POST", COMPLETIONS, prompt="x", max_tokens=60, seed=1, stream=True, n=1)
    assert midway.status_code == 200
    *events, last, empty = midway.text.split("\n\n")
    assert all(event.startswith("data: {") for event in events) and empty == ""
    told = "".join(json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events)
    whole = CLIENT.post(COMPLETIONS, prompt="x", max_tokens=60, seed=1)["choices"][0]["text"]
    assert 16 <= len(told.encode()) < len(whole.encode()) and whole.startswith(told)  # two turns of it
    kind, data = last.split("\n")
    assert kind == "event: error"
    assert "is away" in json.loads(data.removeprefix("data: "))["error"]["message"]
    assert "[DONE]" not in midway.text
    assert client.service._under_way == set()


def test_a_bug_of_ours_tells_the_client_nothing_and_the_log_everything(caplog):
    client = Client()
    client.service.explain = None  # not callable
    with pytest.raises(TypeError):  # the transport shows what a server would log
        client.ask("POST", "/route", prompt="x")
    assert "a request failed" in caplog.text and "TypeError" in caplog.text


# -- who is let in -----------------------------------------------------------------------------------------------------


def test_requests_have_ids():
    named = CLIENT.ask("POST", COMPLETIONS, headers={"X-Request-Id": "mine-7"}, prompt="x", max_tokens=1)
    assert (named.headers["x-request-id"], named.json()["id"]) == ("mine-7", "cmpl-mine-7")
    body = CLIENT.ask("POST", COMPLETIONS, prompt="x", max_tokens=1, request_id="body-8")
    assert body.json()["id"] == "cmpl-body-8"
    for bad in ("two words", "x" * 200, ""):
        found = CLIENT.ask("GET", "/health", headers={"X-Request-Id": bad}).headers["x-request-id"]
        assert len(found) == 32 and found != bad
    assert CLIENT.ask("GET", "/nowhere").headers["x-request-id"]


def test_a_key_is_needed_where_there_is_a_key_file(tmp_path):
    path = tmp_path / "keys.json"
    key = keys.add(path, "ada")
    client = Client(AppSettings(keys=Keys(path)))
    for wrong in (None, "", "Bearer", "Bearer ", "Bearer ck-wrong", f"Basic {key}"):
        answer = client.ask(
            "POST", COMPLETIONS, headers={"Authorization": wrong} if wrong is not None else None, prompt="x"
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert client.ask("GET", "/v1/models", headers=None).status_code == 401
    assert client.ask("POST", COMPLETIONS, headers={"Authorization": f"Bearer {key}"}, prompt="x").status_code == 200
    for path in ("/health", "/ready", "/"):
        assert client.ask("GET", path).status_code == 200
    assert Client().ask("POST", COMPLETIONS, headers={"Authorization": "Bearer "}, prompt="x").status_code == 200


def test_too_much_is_told_when_to_come_again(tmp_path):
    path = tmp_path / "keys.json"
    key = keys.add(path, "ada", Limits(requests_per_minute=2))
    client = Client(AppSettings(keys=Keys(path), front=Front(answers=4, body_bytes=2000)))
    bearer = {"Authorization": f"Bearer {key}"}
    large = client.ask("POST", COMPLETIONS, headers=bearer, prompt="x" * 3000)
    assert (large.status_code, large.json()["error"]["code"]) == (413, "request_too_large")
    many = client.ask("POST", COMPLETIONS, headers=bearer, prompt="x", n=5)
    assert many.status_code == 400
    answers = [client.ask("POST", COMPLETIONS, headers=bearer, prompt="x", max_tokens=1) for _ in range(3)]
    assert [a.status_code for a in answers] == [200, 200, 429]
    assert int(answers[2].headers["retry-after"]) >= 1
    assert answers[2].json()["error"]["type"] == "rate_limit_error"


def test_how_much_all_keys_use_is_told_to_keys_that_may_know_it(tmp_path):
    """Else a key would know from the whole and its own use how much the others use."""
    path = tmp_path / "keys.json"
    ada, prometheus = keys.add(path, "ada"), keys.add(path, "prometheus", metrics=True)
    client = Client(AppSettings(keys=Keys(path)))
    client.ask("POST", COMPLETIONS, headers={"Authorization": f"Bearer {ada}"}, prompt="x", max_tokens=1)

    def seen(key, path):
        return client.ask("GET", path, headers={"Authorization": f"Bearer {key}"} if key else None)

    assert seen(None, "/metrics").status_code == seen("ck-wrong", "/metrics").status_code == 401
    refused = seen(ada, "/metrics")
    assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error")
    assert "constellation_tokens_total" in seen(prometheus, "/metrics").text
    for open_path, status in (("/health", "ok"), ("/ready", "ready")):
        for key in (None, ada, prometheus):
            assert seen(key, open_path).json() == {"status": status}
    assert Client().ask("GET", "/health").json().keys() == {"status", "requests", "kernels"}
    assert Client().ask("GET", "/metrics").status_code == 200  # without keys there is nobody to hide it from


def test_every_path_is_charged(tmp_path):
    path = tmp_path / "keys.json"
    bodies = {
        "/tokenize": {"prompt": "the quick"}, "/detokenize": {"tokens": [17, 18]}, "/route": {"prompt": "the quick"},
        "/v1/decisions": {"prompt": "the", "answers": ["a"]}, COMPLETIONS: {"prompt": "the", "max_tokens": 1},
        CHAT: {"messages": HI, "max_tokens": 1}, COMPLETIONS + " ": {"prompt": "x", "temperature": -1},
    }  # fmt: skip
    for i, (where, body) in enumerate(bodies.items()):
        for limits, refused in ((Limits(requests_per_minute=1), 429), (Limits(tokens_per_minute=1), 400)):
            key = keys.add(path, f"k{i}-{refused}", limits)
            client = Client(AppSettings(keys=Keys(path)))
            bearer = {"Authorization": f"Bearer {key}"}
            first, second = (client.ask("POST", where.strip(), headers=bearer, **body) for _ in range(2))
            if refused == 429:
                assert first.status_code == (400 if " " in where else 200)
                assert (second.status_code, second.json()["error"]["code"]) == (429, "rate_limit_exceeded")
            elif " " not in where:
                assert (first.status_code, first.json()["error"]["code"]) == (400, "request_too_large")


class Untouched:
    """A tokenizer that may be asked for nothing but what is known already."""

    def __init__(self, tokenizer):
        self.vocab_size, self.eos, self.token_bytes = tokenizer.vocab_size, tokenizer.eos, tokenizer.token_bytes
        self.encode = self.encode_batch = self.decode = self.work

    def work(self, *_):
        raise AssertionError("work before admission")


def test_nothing_is_made_of_what_is_not_let_in(tmp_path):
    """1024 prompts, 128 answers to each, 300 biases: counted, and refused before a token or a sampler is made of it."""
    path = tmp_path / "keys.json"
    poor = keys.add(path, "poor", Limits(requests_per_minute=1))
    client = Client(AppSettings(keys=Keys(path)))
    bearer = {"Authorization": f"Bearer {poor}"}
    client.service.tokenizer = Untouched(TOKENIZER)
    biases = {str(i): 1 for i in range(300)}
    many = {"prompt": ["x"] * 1024, "n": 128, "max_tokens": 1, "logit_bias": biases}
    told = [client.ask("POST", COMPLETIONS, headers=bearer, **body).json()["error"] for body in (
        many, {**many, "prompt": "x"}, {**many, "logit_bias": {}, "prompt": ["x"] * 2},
    )]  # fmt: skip
    assert [error["code"] for error in told] == ["request_too_large"] * 3
    assert "131072 answers" in told[0]["message"] and "38400 token biases" in told[1]["message"]
    with pytest.raises(AssertionError, match="work before admission"):  # this one is let in
        client.ask("POST", COMPLETIONS, headers=bearer, prompt="x", max_tokens=1)
    schema = {"type": "json_schema", "json_schema": {"schema": {"enum": ["a"]}}}
    bodies = {
        "/tokenize": {"prompt": "x"}, "/detokenize": {"tokens": [17]}, "/route": {"prompt": "x"},
        "/v1/decisions": {"prompt": "x", "answers": ["a"]}, CHAT: {"messages": HI, "response_format": schema},
    }  # fmt: skip
    for where, body in bodies.items():
        assert client.ask("POST", where, headers=bearer, **body).status_code == 429


def test_what_is_much_too_long_is_not_tokenised():
    client = Client()
    client.service.tokenizer = Untouched(TOKENIZER)
    refused = client.ask("POST", COMPLETIONS, prompt="x" * 1_000_000)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_a_choice_is_charged_for_all_that_is_read(tmp_path):
    path = tmp_path / "keys.json"
    answers = ["the quick brown fox", "jumps over", "the lazy dog"]
    size = len(TOKENIZER.encode("x = ")) + sum(len(TOKENIZER.encode(one)) for one in answers)
    key = keys.add(path, "ada", Limits(tokens_per_minute=2 * size + 16))
    client = Client(AppSettings(keys=Keys(path)))
    body = {"prompt": "x = ", "guided_choice": answers, "max_tokens": 1, "temperature": 0}
    asked = [client.ask("POST", COMPLETIONS, headers={"Authorization": f"Bearer {key}"}, **body) for _ in range(3)]
    assert [answer.status_code for answer in asked] == [200, 200, 429]


def test_a_schema_whose_references_double_keeps_nobody_waiting():
    """It is refused in a thread, in bounded work, while the service answers others."""
    parts = {f"l{i}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/l{i + 1}"}] * 2} for i in range(60)}
    schema = {"$ref": "#/$defs/l0", "$defs": {**parts, "l60": {"const": 1}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    client = Client()

    async def go():
        transport = httpx.ASGITransport(client.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            refused = asyncio.create_task(http.post(CHAT, json={"messages": HI, "response_format": form}))
            health = await http.get("/health")
            return await refused, health

    refused, health = asyncio.run(go())
    assert (refused.status_code, refused.json()["error"]["param"], health.status_code) == (400, "response_format", 200)


def test_a_service_is_asked_by_its_own_names():
    """A page whose name was made to lead to this machine asks under that name (DNS rebinding)."""
    client = Client(AppSettings(front=Front(hosts=("localhost", "[::1]"))))
    for host in ("localhost", "LOCALHOST:8000", "[::1]:8000", "[::1]"):
        assert client.ask("GET", "/health", headers={"Host": host}).status_code == 200
    for host in ("evil.example", "localhost.evil.example", "evil.example:8000", "127.0.0.1", ""):
        for where in ("/health", "/", "/v1/models", "/nowhere"):
            refused = client.ask("GET", where, headers={"Host": host})
            assert (refused.status_code, refused.json()["error"]["code"]) == (421, "unknown_host")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logit_bias", {"9" * 5000: 1}), ("logit_bias", {"9" * 10: 1}), ("logit_bias", {str(2**32): 1}),
        ("seed", 10**30), ("max_tokens", 10**400), ("stop_token_ids", [2**40]), ("prompt", [2**70]),
        ("truncate_prompt_tokens", -(2**70)), ("n", 10**30), ("response_format", {"type": {}}),
    ],
)  # fmt: skip
def test_numbers_of_any_size_are_refused_and_not_stumbled_over(field, value):
    answer = CLIENT.ask("POST", COMPLETIONS, **{"prompt": "x", "max_tokens": 1, field: value})
    assert answer.status_code == 400, answer.text
    assert field in answer.json()["error"]["message"] + str(answer.json()["error"]["param"])


def test_who_leaves_while_the_body_is_read_is_no_failure_of_ours(caplog):
    client, sent = Client(), []
    messages = [{"type": "http.request", "body": b'{"prompt": ', "more_body": True}, {"type": "http.disconnect"}]

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    asyncio.run(client.app(dict(SCOPE), receive, send))
    assert caplog.text == ""
    assert f'endpoint="{COMPLETIONS}",status="499"}} 1.0' in client.ask("GET", "/metrics").text


def test_what_fails_here_is_told_to_the_log_too(caplog, tmp_path):
    Client(turns=0).ask("POST", COMPLETIONS, prompt="x", max_tokens=60)
    assert "kernel ocean is away" in caplog.text
    path = tmp_path / "keys.json"
    key = keys.add(path, "ada")
    client = Client(AppSettings(keys=Keys(path)))
    path.write_text('{"schema": 1, "keys": [{"name": "ada", "created": 1e400, "sha256": "%s"}]}' % ("0" * 64))
    caplog.clear()
    for _ in range(3):
        answer = client.ask("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == 409 and "see the server's log" in answer.json()["error"]["message"]
    assert caplog.text.count(str(path)) == 1  # once, not for every request


def test_a_line_for_every_request_where_that_is_wished(caplog):
    caplog.set_level("INFO", "constellation.access")
    CLIENT.ask("GET", "/health")
    assert caplog.text == ""
    client = Client(AppSettings(front=Front(access_log=True)))
    client.ask("POST", COMPLETIONS, headers={"X-Request-Id": "mine-7"}, prompt="x", max_tokens=1)
    client.ask("GET", "/no%0Awhere")
    first, second = (record.getMessage() for record in caplog.records)
    assert re.fullmatch(r'127\.0\.0\.1 anyone "POST /v1/completions" 200 \d+ ms mine-7', first)
    assert '"GET /no\\nwhere" 404' in second


def test_pages_of_other_origins_may_not_ask_unless_told():
    origin = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in CLIENT.ask("GET", "/health", headers=origin).headers
    assert CLIENT.ask("OPTIONS", COMPLETIONS, headers=origin).status_code == 405
    client = Client(AppSettings(cors=("https://example.org",)))
    asked = client.ask("OPTIONS", COMPLETIONS, headers=origin)
    assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, "https://example.org")


def test_a_door_that_is_closed_lets_nobody_in_and_those_inside_finish():
    client = Client()

    async def go():
        transport = httpx.ASGITransport(client.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            body = {"prompt": "the quick", "max_tokens": 60, "seed": 1}
            inside = asyncio.create_task(http.post(COMPLETIONS, json=body))
            while not client.service._under_way:
                await asyncio.sleep(0.001)
            client.app.state.gate.close()
            late, ready, health = await asyncio.gather(
                http.post(COMPLETIONS, json=body), http.get("/ready"), http.get("/health")
            )
            assert client.app.state.gate.inside == 1
            done = await inside
            assert client.app.state.gate.inside == 0
            return done, late, ready, health

    done, late, ready, health = asyncio.run(go())
    assert (done.status_code, late.status_code, ready.status_code, health.status_code) == (200, 503, 503, 200)
    assert done.json()["usage"]["completion_tokens"] == 60
    assert late.headers["retry-after"] and ready.headers["retry-after"]
    assert late.json()["error"]["code"] == "shutting_down"


def test_what_happened_is_counted():
    client = Client()
    client.post(COMPLETIONS, prompt="the quick", max_tokens=30, seed=1)
    client.ask("POST", COMPLETIONS, prompt="x", suffix="y")
    client.ask("GET", "/made/up/path")
    told = client.ask("GET", "/metrics").text
    assert f'constellation_requests_total{{endpoint="{COMPLETIONS}",status="200"}} 1.0' in told
    assert f'constellation_requests_total{{endpoint="{COMPLETIONS}",status="400"}} 1.0' in told
    assert 'constellation_requests_total{endpoint="other",status="404"} 1.0' in told
    assert 'constellation_time_to_first_token_seconds_count{mode="route"} 1.0' in told
    made = [float(line.split()[-1]) for line in told.splitlines() if line.startswith("constellation_tokens_total{")]
    assert sum(made) == 30


SCOPE = {
    "type": "http", "method": "POST", "path": COMPLETIONS, "raw_path": COMPLETIONS.encode(), "root_path": "",
    "query_string": b"", "headers": [(b"content-type", b"application/json")], "http_version": "1.1",
    "scheme": "http", "server": ("test", 80), "client": ("test", 1), "asgi": {"version": "3.0", "spec_version": "2.3"},
}  # fmt: skip


def test_who_leaves_takes_the_work_along():
    """A client that goes while its reply is being made: nothing of it is left, and the log says 499."""
    client = Client()
    body = json.dumps({"prompt": "the quick", "max_tokens": 4000, "seed": 1, "ignore_eos": True})
    for stream in (False, True):
        sent = []

        async def go(stream=stream, sent=sent):
            gone = asyncio.Event()
            messages = [{"type": "http.request", "body": json.dumps({**json.loads(body), "stream": stream}).encode()}]

            async def receive():
                if messages:
                    return messages.pop()
                await gone.wait()
                return {"type": "http.disconnect"}

            async def send(message):
                sent.append(message)

            task = asyncio.create_task(client.app(dict(SCOPE), receive, send))
            while not client.service._under_way or (stream and len(sent) < 3):
                await asyncio.sleep(0.001)
            gone.set()
            await task
            assert client.service._under_way == set()

        asyncio.run(go())
        assert not any(m["type"] == "http.response.body" and b"[DONE]" in m.get("body", b"") for m in sent)
    assert f'endpoint="{COMPLETIONS}",status="499"}} 2.0' in client.ask("GET", "/metrics").text
