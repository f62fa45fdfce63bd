"""What a client may send: every parameter of the protocols is honoured, refused by name, or said to be unused."""

import itertools
import json
import typing

import jinja2
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params

from router.http.chat import JINJA, render
from router.http.finite import MOST, MOST_CHARACTERS, MOST_PARTS, texts_of
from router.http.requests import (
    LABELS,
    ChatRequest,
    CompletionRequest,
    DecisionRequest,
    DetokenizeRequest,
    Message,
    Refusal,
    Text,
    TokenizeRequest,
    read,
)

# The sampling and extra parameters of vLLM's two requests, from its protocol's documentation.
VLLM = {
    "use_beam_search", "top_k", "min_p", "repetition_penalty", "length_penalty", "stop_token_ids", "ignore_eos",
    "include_stop_str_in_output", "min_tokens", "skip_special_tokens", "spaces_between_special_tokens", "cache_salt",
    "truncate_prompt_tokens", "allowed_token_ids", "prompt_logprobs", "add_special_tokens", "structured_outputs",
    "guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_decoding_backend", "priority",
    "guided_whitespace_pattern", "request_id", "logits_processors", "return_tokens_as_token_ids", "return_token_ids",
    "kv_transfer_params", "vllm_xargs", "bad_words", "response_format",
}  # fmt: skip
VLLM_CHAT = {
    "echo", "add_generation_prompt", "continue_final_message", "documents", "chat_template", "chat_template_kwargs",
    "mm_processor_kwargs", "media_io_kwargs", "include_reasoning", "thinking_token_budget",
}  # fmt: skip
OPENAI = set(typing.get_type_hints(completion_params.CompletionCreateParamsStreaming))
OPENAI_CHAT = set(typing.get_type_hints(chat_params.CompletionCreateParamsStreaming))
LEAST = {
    CompletionRequest: {"prompt": "x"},
    ChatRequest: {"messages": [{"role": "user", "content": "x"}]},
    DecisionRequest: {"prompt": "x", "answers": ["a"]},
    TokenizeRequest: {"prompt": "x"},
    DetokenizeRequest: {"tokens": [17]},
}


def parse(kind, **fields):
    return read(json.dumps({**LEAST[kind], **fields}).encode(), kind)


def refusal(kind, **fields):
    with pytest.raises(Refusal) as caught:
        parse(kind, **fields)
    return caught.value


# -- every parameter ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "names"), [(CompletionRequest, OPENAI | VLLM), (ChatRequest, OPENAI_CHAT | VLLM | VLLM_CHAT)]
)
def test_no_parameter_of_openai_or_vllm_is_unknown(kind, names):
    assert len(names) > 40
    known = {field.name for field in msgspec.structs.fields(kind)} | kind.not_here.keys() | LABELS
    assert names <= known
    assert not {field.name for field in msgspec.structs.fields(kind)} & kind.not_here.keys()


NOT_HERE = [(kind, name) for kind in (CompletionRequest, ChatRequest) for name in kind.not_here]


@pytest.mark.parametrize(("kind", "name"), NOT_HERE)
def test_what_is_not_offered_is_refused_by_name_unless_it_asks_for_nothing(kind, name):
    for neutral in (*kind.not_here[name], None):
        _, unused = parse(kind, **{name: neutral})
        assert unused == []
    refused = refusal(kind, **{name: {"some": "wish"}})
    assert (refused.param, refused.code, refused.http_status) == (name, "unsupported_parameter", 400)
    assert name in str(refused)


@pytest.mark.parametrize("kind", LEAST)
def test_null_is_a_parameter_that_was_not_sent(kind):
    optional = {f.name: None for f in msgspec.structs.fields(kind) if not f.required and f.name not in LEAST[kind]}
    assert parse(kind, **optional) == parse(kind)


def test_one_and_true_are_different_wishes():
    assert parse(CompletionRequest, length_penalty=1)
    assert refusal(CompletionRequest, length_penalty=True).param == "length_penalty"
    assert refusal(CompletionRequest, use_beam_search=0).param == "use_beam_search"


@pytest.mark.parametrize("kind", LEAST)
def test_unknown_fields_and_labels_are_told(kind):
    assert parse(kind, user="me", surprise={"a": 1}, metadata={})[1] == ["metadata", "surprise", "user"]


@pytest.mark.parametrize(
    ("kind", "fields", "param"),
    [
        (CompletionRequest, {"temperature": -0.1}, "temperature"),
        (CompletionRequest, {"temperature": "hot"}, "temperature"),
        (CompletionRequest, {"top_p": 0}, "top_p"),
        (CompletionRequest, {"top_p": 1.5}, "top_p"),
        (CompletionRequest, {"n": 0}, "n"),
        (CompletionRequest, {"n": 1.5}, "n"),
        (CompletionRequest, {"max_tokens": -1}, "max_tokens"),
        (CompletionRequest, {"max_tokens": True}, "max_tokens"),
        (CompletionRequest, {"logprobs": 21}, "logprobs"),
        (CompletionRequest, {"presence_penalty": 2.5}, "presence_penalty"),
        (CompletionRequest, {"logit_bias": {"5": 101}}, "logit_bias[...]"),
        (CompletionRequest, {"logit_bias": {"five": 1}}, "logit_bias"),
        (CompletionRequest, {"stop": [1]}, "stop[0]"),
        (CompletionRequest, {"prompt": None}, "prompt"),
        (CompletionRequest, {"prompt": [1.5]}, "prompt[0]"),
        (CompletionRequest, {"stream_options": 3}, "stream_options"),
        (CompletionRequest, {"structured_outputs": {"regex": "a*"}}, "structured_outputs.choice"),
        (ChatRequest, {"messages": []}, "messages"),
        (ChatRequest, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        (ChatRequest, {"messages": [{"content": "x"}]}, "messages[0].role"),
        (ChatRequest, {"messages": [{"role": "user", "content": [{"type": "x"}]}]}, "messages[0].content[0].type"),
        (ChatRequest, {"messages": [{"role": "assistant", "tool_calls": [1]}]}, "messages[0]"),
        (ChatRequest, {"logprobs": 3}, "logprobs"),
        (ChatRequest, {"response_format": {"type": "grammar"}}, "response_format.type"),
        (DecisionRequest, {"answers": []}, "answers"),
        (DetokenizeRequest, {"tokens": [-1]}, "tokens[0]"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_with_its_place(kind, fields, param):
    refused = refusal(kind, **fields)
    assert (refused.param, refused.http_status) == (param, 400)
    assert str(refused).startswith(param)
    assert "\n" not in str(refused)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"3", b'"text"', b"\xff\xfe", b'{"a": "\xff"}', b"[" * 5000, b"\x80\x04\x95pickle"]
)
def test_a_body_that_is_not_a_json_object_is_refused(body):
    with pytest.raises(Refusal, match="the body"):
        read(body, CompletionRequest)


def test_what_clients_send_back_of_our_own_messages_is_read():
    ours = {
        "role": "assistant",
        "content": "yes",
        "refusal": None,
        "tool_calls": None,
        "audio": None,
        "annotations": [],
    }
    request, _ = parse(ChatRequest, messages=[ours])
    assert request.messages[0].text == "yes"


# -- what they mean ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("", [""]),
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [(1, 2)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
    ],
)
def test_a_prompt_is_a_text_tokens_or_a_batch_of_them(prompt, prompts):
    assert parse(CompletionRequest, prompt=prompt)[0].prompts() == prompts


@pytest.mark.parametrize("prompt", [[], ["a", 1], [1, [2]], [[1], "a"], [[]], ["a"] * 1025])
def test_a_mixed_or_empty_prompt_is_refused(prompt):
    with pytest.raises(Refusal) as caught:
        parse(CompletionRequest, prompt=prompt)[0].prompts()
    assert caught.value.param == "prompt"


def test_the_sampler_gets_what_the_client_asked():
    wishes = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1,
        "repetition_penalty": 1.2, "logit_bias": {"20": 3, "17": -100}, "seed": -1, "stop": "end", "min_tokens": 2,
        "stop_token_ids": [30], "ignore_eos": True, "max_tokens": 9, "logprobs": 2,
    }  # fmt: skip
    sampling = parse(CompletionRequest, **wishes)[0].sampling()
    expected = {
        **wishes, "logit_bias": ((17, -100.0), (20, 3.0)), "seed": 2**64 - 1, "stop": ("end",), "stop_token_ids": (30,),
        "max_new_tokens": 9,
    }  # fmt: skip
    del expected["max_tokens"]
    assert {name: getattr(sampling, name) for name in expected} == expected


def test_defaults_are_those_of_openai():
    assert parse(CompletionRequest)[0].most_tokens == 16
    request = parse(CompletionRequest)[0]
    assert (request.n, request.temperature, request.top_p, request.echo, request.logprobs) == (1, 1.0, 1.0, False, None)
    assert parse(CompletionRequest, top_k=-1)[0].sampling().top_k == 0
    assert parse(ChatRequest, max_tokens=5)[0].most_tokens == 5
    assert parse(ChatRequest, max_tokens=5, max_completion_tokens=7)[0].most_tokens == 7
    assert parse(ChatRequest)[0].tops is None
    assert parse(ChatRequest, logprobs=True)[0].tops == 0
    assert parse(ChatRequest, logprobs=True, top_logprobs=4)[0].tops == 4


# -- conversations -----------------------------------------------------------------------------------------------------

roles = st.sampled_from(["system", "developer", "user", "assistant"])
contents = st.one_of(st.none(), st.text(max_size=20), st.lists(st.builds(Text, text=st.text(max_size=8)), max_size=3))
conversations = st.lists(
    st.builds(Message, role=roles, content=contents, name=st.none() | st.text("ab", min_size=1, max_size=3)),
    min_size=1, max_size=5,
)  # fmt: skip


def test_the_documented_template():
    messages = [Message("system", "Answer in one line."), Message("user", "What is an E8 lattice?")]
    assert render(messages) == "System:\nAnswer in one line.\n\nUser:\nWhat is an E8 lattice?\n\nAssistant:\n"
    assert render([Message("user", "a"), Message("assistant", "b")], go_on=True) == "User:\na\n\nAssistant:\nb"
    assert render([Message("user", "a", name="Ada")], reply=False) == "User (Ada):\na\n\n"


@given(conversations, st.text(max_size=20))
def test_a_conversation_goes_on_where_the_prompt_and_its_reply_ended(messages, reply):
    assert render([*messages, Message("assistant", reply)], go_on=True) == render(messages) + reply


@given(conversations, st.booleans())
@settings(max_examples=50, deadline=None)
def test_clients_that_render_the_template_get_the_same_text(messages, reply):
    template = jinja2.Environment(keep_trailing_newline=True).from_string(JINJA)
    plain = msgspec.to_builtins(messages)
    assert template.render(messages=plain, add_generation_prompt=reply) == render(messages, reply)


# -- schemas with few values -------------------------------------------------------------------------------------------

scalars = st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.text("ab", max_size=2))
leaves = st.one_of(
    st.builds(lambda v: ({"const": v}, [v]), scalars),
    st.builds(lambda v: ({"enum": v}, v), st.lists(scalars, min_size=1, max_size=3)),
    st.just(({"type": "boolean"}, [True, False])),
    st.just(({"type": "null"}, [None])),
)


def objects(parts):
    names = [f"p{i}" for i in range(len(parts))]
    values = [dict(zip(names, each)) for each in itertools.product(*(values for _, values in parts))]
    return {"type": "object", "properties": {n: schema for n, (schema, _) in zip(names, parts)}}, values


def unions(parts):
    return {"anyOf": [schema for schema, _ in parts]}, [value for _, values in parts for value in values]


schemas = st.recursive(
    leaves,
    lambda inner: st.lists(inner, min_size=1, max_size=2).flatmap(lambda p: st.sampled_from([objects(p), unions(p)])),
    max_leaves=4,
)


@given(schemas)
def test_a_schema_of_few_values_is_all_of_their_texts(drawn):
    schema, values = drawn
    texts = [msgspec.json.encode(value).decode() for value in values]
    assert texts_of({"schema": schema}) == list(dict.fromkeys(texts))


def test_references_are_followed_and_circles_found():
    schema = {"$ref": "#/$defs/a", "$defs": {"a": {"enum": [1, 2]}}}
    assert texts_of({"schema": schema}) == ["1", "2"]
    circle = {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/a"}]}}}
    with pytest.raises(Refusal, match="endless"):
        texts_of({"schema": circle})


class Watched(dict):
    """A part of a schema that counts how often it is looked into."""

    looks = 0

    def __contains__(self, name):
        Watched.looks += 1
        return super().__contains__(name)


def doubling(levels, leaf, part):
    """A schema each of whose levels refers twice to the one below it."""
    refs = [[Watched({"$ref": f"#/$defs/l{i + 1}"}) for _ in "ab"] for i in range(levels)]
    parts = {f"l{i}": Watched(part(two)) for i, two in enumerate(refs)}
    return Watched({"$ref": "#/$defs/l0", "$defs": {**parts, f"l{levels}": Watched(leaf)}})


PAIRS = {
    "array": lambda two: {"type": "array", "prefixItems": two},
    "object": lambda two: {"type": "object", "properties": dict(zip("ab", two))},
    "anyOf": lambda two: {"anyOf": two},
}


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("leaf", [{"const": 1}, {"enum": []}, {"type": "boolean"}, {"type": "string"}])
def test_references_that_double_at_each_level_are_followed_once_each(kind, leaf):
    """14 levels of two references are 16 384 ways and 45 parts, each of which is looked into four times at most."""
    Watched.looks, levels = 0, 14
    try:
        assert texts_of({"schema": doubling(levels, leaf, PAIRS[kind])})
    except Refusal as refused:
        assert refused.param == "response_format"
    assert Watched.looks <= 4 * (3 * levels + 2)


@pytest.mark.parametrize("kind", ["array", "object"])
def test_a_short_schema_of_a_text_without_end_is_refused(kind):
    with pytest.raises(Refusal, match=f"more than {MOST_CHARACTERS} characters"):
        texts_of({"schema": doubling(60, {"const": 1}, PAIRS[kind])})
    with pytest.raises(Refusal, match=f"more than {MOST_CHARACTERS} characters"):
        texts_of({"schema": doubling(1, {"const": "long" * MOST_CHARACTERS}, PAIRS[kind])})


def test_a_schema_of_too_many_parts_or_without_a_value_is_refused():
    many = {"anyOf": [{"const": 1}] * 3 + [{"const": 1} for _ in range(MOST_PARTS)]}
    with pytest.raises(Refusal, match=f"more than {MOST_PARTS} parts"):
        texts_of({"schema": many})
    with pytest.raises(Refusal, match="admits no value"):
        texts_of({"schema": {"enum": []}})
    deep = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(Refusal, match="not a JSON schema"):
        texts_of({"schema": {"const": deep}})
    assert texts_of({"schema": {"anyOf": [{"const": 1}] * 300}}) == ["1"]  # one value, however often it is told


@pytest.mark.parametrize(
    "schema",
    [
        None, 3, {}, {"type": "string"}, {"type": "integer"}, {"type": "array", "items": {"type": "boolean"}},
        {"type": "object", "properties": {"a": {"type": "number"}}}, {"anyOf": 3}, {"enum": 3}, {"$ref": "#/nowhere"},
        {"$ref": 5}, {"type": "object", "properties": [1]}, {"enum": list(range(MOST + 1))},
        {"type": "object", "properties": {str(i): {"type": "boolean"} for i in range(40)}},
    ],
)  # fmt: skip
def test_a_schema_of_many_values_or_none_is_refused(schema):
    with pytest.raises(Refusal) as caught:
        texts_of({"schema": schema})
    assert caught.value.param == "response_format"
