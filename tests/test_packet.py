"""Hand-off packets: nothing is lost on the wire, nothing wrong is taken from it; counts take bounded bytes."""

import dataclasses

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from constellation.decoding.sampling import MOST_STOP_TOKENS, MOST_TOP_K, Sampling
from constellation.errors import ArtifactError, ConfigError
from router.answer import count_codec, packet
from router.answer.packet import BODY_BYTES, STOP_BYTES, Packet

EXAMPLE = Packet("r1", "heart", (5, 70_000, 3), Sampling(stop=("\n\n",), seed=2**64 - 1), 7, b"\xe6\xbc")
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
def test_decoding_undoes_encoding_within_four_kilobytes_besides_the_window(one):
    data = one.encode()
    assert Packet.decode(data) == one
    assert Packet.decode(data).encode() == data
    asked = 12 * len(one.sampling.logit_bias) + sum(4 + 8 * len(top) for _, top in one.logprobs or ())
    assert len(data) <= BODY_BYTES + 4 * len(one.tokens) + asked + 64


@given(packets, st.data())
@settings(deadline=None)
def test_any_changed_byte_is_noticed(one, data):
    wire = bytearray(one.encode())
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
    data = EXAMPLE.encode()
    for end in range(len(data)):
        with pytest.raises(ArtifactError):
            Packet.decode(data[:end])
    schema, *rest = msgpack.unpackb(data)
    with pytest.raises(ArtifactError, match=f"schema {schema + 1}, this version reads {schema}"):
        Packet.decode(msgpack.packb([schema + 1, *rest]))
    with pytest.raises(ConfigError, match="stop texts are too long"):
        dataclasses.replace(EXAMPLE, sampling=Sampling(stop=("x" * BODY_BYTES,)))


def test_a_packet_without_a_token_is_refused():
    with pytest.raises(ConfigError, match="at least one token"):
        Packet("7", "heart", (), Sampling())


# -- fields ------------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_refused():
    data = EXAMPLE.encode()
    for i in range(8 * len(data)):
        bad = bytearray(data)
        bad[i // 8] ^= 1 << i % 8
        with pytest.raises(ArtifactError):
            Packet.decode(bytes(bad))


def forged(**changes: object) -> bytes:
    """What a sender without our encoder might send: any fields under a right checksum."""
    schema, _, *parts, body = msgpack.unpackb(EXAMPLE.encode())
    fields = {**msgpack.unpackb(body), **changes}
    body = msgpack.packb({name: value for name, value in fields.items() if value is not ...})
    return msgpack.packb([schema, packet._checksum(schema, [*parts, body]), *parts, body])


def test_fields_of_a_wrong_type_or_value_are_refused_in_one_line():
    assert Packet.decode(forged()) == EXAMPLE
    wrong = [{"position": "7"}, {"position": 7.0}, {"position": True}, {"pending": "text"}, {"request": b"r1"},
             {"finish": None}, {"kernel": ...}, {"sampling": ...}, {"sampling": []}, {"sampling": {"temperature": -1}},
             {"more": 1}, {"sampling": {"heat": 1}}, {"pending": bytes(BODY_BYTES)}, {"counts": b""}]  # fmt: skip
    for changes in wrong:
        with pytest.raises(ArtifactError) as caught:
            Packet.decode(forged(**changes))
        assert "\n" not in str(caught.value)


def test_lone_surrogates_in_a_stop_text_survive():
    odd = dataclasses.replace(EXAMPLE, sampling=Sampling(stop=("\udcff",)))
    assert Packet.decode(odd.encode()) == odd


def test_long_stop_texts_are_refused_before_anything_is_generated():
    with pytest.raises(ConfigError, match="stop texts are too long"):
        Packet("r", "heart", (1,), Sampling(stop=("x" * 300,)))


def test_the_largest_body_that_a_request_may_ask_for_keeps_to_its_bound():
    """So none is refused in the middle of its answer: what a client chooses is bounded, what grows is a few bytes."""
    wishes = {
        "temperature": 0.123, "top_k": MOST_TOP_K, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.5,
        "presence_penalty": 1.1, "frequency_penalty": 1.2, "min_tokens": 65_535, "max_new_tokens": 65_536,
        "ignore_eos": True, "logprobs": 20, "stop_token_ids": tuple(2**32 - 1 - i for i in range(MOST_STOP_TOKENS)),
        "seed": 2**64 - 1, "index": 2**32 - 1,
    }  # fmt: skip
    sizes = []
    for length in range(1, 257):
        stop = ("x" * length, *("y" for _ in range(STOP_BYTES - 2 * length)))
        largest = Packet(
            "r" * 36, "k" * 64, tuple(range(2048)), Sampling(**wishes, stop=stop), 2**63, bytes(length - 1), "length"
        )
        sizes.append(len(msgpack.unpackb(largest.encode())[5]))
    assert BODY_BYTES // 4 < max(sizes) <= BODY_BYTES


# -- counts ------------------------------------------------------------------------------------------------------------


def worst_histograms(n: int, bins: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    zipf = rng.multinomial(n, 1 / np.arange(1, bins + 1) / np.sum(1 / np.arange(1, bins + 1)))
    flat = np.full(bins, n // bins)
    flat[: n % bins] += 1
    one = np.zeros(bins, np.int64)
    one[-1] = n
    return [zipf, rng.permutation(zipf), rng.multinomial(n, np.full(bins, 1 / bins)), flat, one]


@pytest.mark.parametrize("n", [0, 1, 62, 1000, 8190, 32_768])
def test_counts_take_no_more_than_the_bound_whatever_they_are(n):
    for histogram in worst_histograms(n, 4096):
        code, data = count_codec.pack(histogram)
        assert len(data) <= count_codec.bound_bytes(n, 4096) <= 2560
        assert (count_codec.unpack(code, data, n, 4096) == histogram).all()


def test_the_documented_sizes():
    assert [count_codec.bound_bytes(n, 4096) for n in (62, 1000, 32_768)] == [63, 503, 2560]


@settings(deadline=None)
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=200))
def test_rice_codes_are_exact(values):
    histogram = np.array(values)
    assert (count_codec.unpack(*count_codec.pack(histogram), histogram.sum(), len(histogram)) == histogram).all()


@settings(deadline=None)
@given(st.integers(0, 33), st.binary(max_size=60), st.integers(0, 100), st.integers(1, 300))
def test_other_bytes_are_no_counts_or_counts_of_that_size(code, data, n, bins):
    try:
        counts = count_codec.unpack(code, data, n, bins)
    except ValueError:
        return
    assert counts.sum() == n and len(counts) == bins and (counts >= 0).all()
