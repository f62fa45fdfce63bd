"""The OpenAPI document against the service: schemathesis sends what it allows and what it forbids, within bounds."""

import os

import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance

from constellation.config import Config, Kernel
from constellation.coordizer.tokenizer import Tokenizer
from constellation.kernel.model import KernelLM
from constellation.roster import OCEAN
from router.answer.local import LocalKernels
from router.answer.service import Service
from router.app import AppSettings, make_app
from router.decide.fit import fit
from router.http.limits import Front
from router.http.openapi import components
from router.http.requests import ChatRequest, CompletionRequest

NAMES = ("heart", "memory")
TEXTS = [f"the quick brown fox {i} jumps over the lazy dog {i}: x = {i} + 1\n" * 4 for i in range(20)]
TOKENIZER = Tokenizer.train(TEXTS, 300)
KERNEL = Kernel(vocab_size=304, width=16, layers=1, heads=1, hidden=16, context=32, coupling_ref=8)  # decoded in C
CONFIG = Config(kernel=KERNEL)
EXAMPLES = int(os.environ.get("SCHEMATHESIS_EXAMPLES", "5"))  # requests an operation


def service():
    halves = [text.encode() for text in TEXTS]
    policy = fit(halves, CONFIG.router, seed=0, names=NAMES, validation=halves)
    models = {name: KernelLM(KERNEL, seed=i) for i, name in enumerate((OCEAN, *NAMES))}
    return Service(CONFIG, policy, TOKENIZER, LocalKernels(models, TOKENIZER))


torch.set_num_threads(1)
APP = make_app(service(), AppSettings(front=Front(answers=64)))
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP)


def test_the_document_refers_to_nothing_that_is_not_in_it():
    document = APP.openapi()
    refs = []

    def walk(node):
        if isinstance(node, dict):
            refs.extend([node["$ref"]] if isinstance(node.get("$ref"), str) else [])
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(document)
    assert len(refs) > 40
    assert {ref.removeprefix("#/components/schemas/") for ref in refs} <= document["components"]["schemas"].keys()
    posts = [path for path, methods in document["paths"].items() if "post" in methods]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/decisions", "/tokenize", "/detokenize", "/route"} == {
        *posts
    }


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest])
def test_the_document_names_every_parameter_and_lets_each_be_null(kind):
    properties = components()[kind.__name__]["properties"]
    assert kind.not_here.keys() <= properties.keys()
    assert {"seed", "logit_bias", "min_tokens", "ignore_eos", "mode", "top_kernels"} <= properties.keys()
    for name, says in properties.items():
        if name not in ("prompt", "messages") and says.keys() - {"description"}:
            text = str(says)
            assert "'null'" in text or "None" in text, name


@SCHEMA.parametrize()
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_nothing_that_is_sent_breaks_the_service(case):
    shorten(case.body)
    response = case.call()
    case.validate_response(response, checks=[not_a_server_error, response_schema_conformance])


def shorten(body):
    """The document allows answers of 65 536 tokens; here they are short, so that many are sent."""
    if isinstance(body, dict):
        body["max_tokens"] = 2 if body.get("max_tokens") is None else body["max_tokens"]
        for name in ("max_tokens", "max_completion_tokens", "min_tokens", "n", "best_of"):
            if isinstance(body.get(name), int) and not isinstance(body[name], bool):
                body[name] = min(body[name], 2)
