"""Hand-off packets: nothing is lost on the wire, nothing wrong is taken from it."""

import dataclasses

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from constellation.config import Router as RouterConfig
from constellation.decoding.sample import Sampling
from constellation.errors import ArtifactError, ConfigError
from router.answer.packet import BODY_BYTES, COUNTS_BYTES, Packet, pack_counts, unpack_counts
from router.answer.view import View
from router.decide.counts import trigrams
from router.decide.fit import fit

LOG_P = st.floats(max_value=0, width=32, allow_nan=False)
packets = st.builds(
    Packet,
    request=st.text(max_size=20),
    kernel=st.sampled_from(["heart", "ocean"]),
    tokens=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=300).map(tuple),
    sampling=st.builds(
        Sampling,
        temperature=st.floats(0, 5),
        seed=st.integers(0, 2**64 - 1),
        stop=st.lists(st.text(min_size=1, max_size=9), max_size=3).map(tuple),
        presence_penalty=st.floats(-2, 2),
        logit_bias=st.dictionaries(st.integers(0, 2**32 - 1), st.floats(-100, 100), max_size=300).map(
            lambda bias: tuple(bias.items())
        ),
        stop_token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=5).map(tuple),
        ignore_eos=st.booleans(),
        index=st.integers(0, 2**32 - 1),
    ),
    position=st.integers(0, 2**40),
    pending=st.binary(max_size=9),
    finish=st.sampled_from(["", "stop", "eos", "length"]),
    text_bytes=st.integers(0, 2**40),
    counts=st.binary(max_size=COUNTS_BYTES),
    tail=st.binary(max_size=2),
    z=st.binary(max_size=256),
    posterior=st.binary(max_size=32),
    logprobs=st.none()
    | st.integers(0, 20).flatmap(
        lambda top: st.lists(
            st.tuples(
                LOG_P, st.lists(st.tuples(st.integers(0, 2**32 - 1), LOG_P), min_size=top, max_size=top).map(tuple)
            ),
            max_size=4,
        ).map(tuple)
    ),
)


@given(packets)
@settings(deadline=None)
def test_decoding_undoes_encoding_within_four_kilobytes_besides_the_window(packet):
    data = packet.encode()
    assert Packet.decode(data) == packet
    assert Packet.decode(data).encode() == data
    asked = 12 * len(packet.sampling.logit_bias) + sum(4 + 8 * len(top) for _, top in packet.logprobs or ())
    assert len(data) <= BODY_BYTES + 4 * len(packet.tokens) + asked + 64


@given(packets, st.data())
@settings(deadline=None)
def test_any_changed_byte_is_noticed(packet, data):
    wire = bytearray(packet.encode())
    at = data.draw(st.integers(0, len(wire) - 1))
    wire[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ArtifactError):
        Packet.decode(bytes(wire))


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_foreign_bytes_are_refused(data):
    with pytest.raises(ArtifactError):
        Packet.decode(data)


def test_a_cut_packet_another_schema_and_a_large_body_are_refused():
    packet = Packet("7", "heart", (1, 2), Sampling())
    data = packet.encode()
    for end in range(len(data)):
        with pytest.raises(ArtifactError):
            Packet.decode(data[:end])
    schema, *rest = msgpack.unpackb(data)
    with pytest.raises(ArtifactError, match=f"schema {schema + 1}, this version reads {schema}"):
        Packet.decode(msgpack.packb([schema + 1, *rest]))
    with pytest.raises(ConfigError, match="stop texts are too long"):
        dataclasses.replace(packet, sampling=Sampling(stop=("x" * BODY_BYTES,))).encode()


def test_a_packet_without_a_token_is_refused():
    with pytest.raises(ConfigError, match="at least one token"):
        Packet("7", "heart", (), Sampling())


@given(st.one_of(st.binary(max_size=400), st.builds(lambda b, n: b * n, st.binary(max_size=40), st.integers(0, 800))))
@settings(deadline=None)
def test_counts_come_back_whole_or_not_at_all(text):
    counts = np.bincount(trigrams(text, 512), minlength=512)
    packed = pack_counts(counts)
    assert len(packed) <= COUNTS_BYTES + 1
    assert packed or len(text) > 8192
    if packed:
        assert unpack_counts(packed, len(text), 512).tolist() == counts.tolist()
        with pytest.raises(ArtifactError):
            unpack_counts(packed, len(text) + 4000, 512)


def test_who_receives_a_packet_sees_the_text_as_the_sender_did():
    texts = [(f"{a} {b} " * 30).encode() for a in ("fox", "def f(x):", "café") for b in ("one", "two", "1 + 1")]
    router = fit(texts, RouterConfig(bins=512, dims=8, max_prefix=256), seed=0, names=("a", "b", "c"), validation=texts)
    for text in (b"", b"x", b"xy", b"xyz", texts[0], texts[4] * 20):
        view = View(router)
        view.update(text)
        look = view.decide(len(text), 0.5)
        packet = Packet("7", look.kernel, (1,), Sampling(), **view.carried())
        received = Packet.decode(packet.encode()).stream(router)
        for more in (b"", b"and so on"):
            received.update(more)
            view.update(more)
            assert received.choice().to_json() == view.stream.choice().to_json()
        assert np.frombuffer(packet.posterior, "<f4").sum() == pytest.approx(1)


def test_a_view_too_long_to_travel_says_that_the_text_is_needed():
    packet = Packet("7", "heart", (1,), Sampling(), text_bytes=10**6, tail=b"xy")
    with pytest.raises(ConfigError, match="read them anew"):
        packet.stream(None)
