"""Packets at their limits: counts in a bounded number of bytes, forged fields, long stop texts, long texts."""

import dataclasses

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from constellation import config
from constellation.decoding.sample import Sampling
from constellation.errors import ArtifactError, ConfigError
from router.answer import count_codec, packet
from router.answer.packet import BODY_BYTES, COUNTS_BYTES, Packet
from router.answer.view import View
from router.decide.fisher_rao import Calibration, Router

EXAMPLE = Packet("r1", "heart", (5, 70_000, 3), Sampling(stop=("\n\n",), seed=2**64 - 1), 7, b"\xe6\xbc")


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
        assert len(data) <= count_codec.bound_bytes(n, 4096) <= COUNTS_BYTES
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
             {"z": None}, {"kernel": ...}, {"sampling": ...}, {"sampling": []}, {"sampling": {"temperature": -1}},
             {"more": 1}, {"sampling": {"heat": 1}}, {"pending": bytes(BODY_BYTES)}, {"counts": 5}]  # fmt: skip
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


def test_the_largest_packet_of_100_kernels_fits():
    stop = tuple(c * 100 for c in "abcd")
    code, data = count_codec.pack(worst_histograms(32_768, 4096)[2])
    largest = Packet(
        "r" * 36, "k" * 32, tuple(range(2048)), Sampling(stop=stop, top_p=0.5, seed=2**64 - 1), 2**32, bytes(99),
        "length", 32_770, bytes([code]) + data.ljust(COUNTS_BYTES), b"ab", bytes(4 * 64), bytes(4 * 100),
    )  # fmt: skip
    assert 3900 < len(msgpack.unpackb(largest.encode())[5]) <= BODY_BYTES


# -- the router's part -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def router() -> Router:
    rng = np.random.default_rng(0)
    mean = np.sqrt(rng.dirichlet(np.full(4096, 2.0)))
    frame = np.linalg.qr(np.concatenate([mean[None], rng.standard_normal((64, 4096))]).T)[0].T
    return Router(
        ("a", "b"), config.Router(), Calibration(0.1, -0.5, 1.0, 0.0, 0.0, 0.0), rng.integers(0, 99, (2, 4096)),
        frame[0], frame[1:], np.full(64, 0.1), np.zeros((2, 64)), np.eye(8)[:2], np.eye(8)[:2], np.log([0.5, 0.5]),
        np.array([16.0]), np.array([np.pi]),
    )  # fmt: skip


def carried(router: Router, text: bytes) -> Packet:
    view = View(router)
    view.update(text)
    view.decide(len(text), 0.5)
    return Packet.decode(dataclasses.replace(EXAMPLE, **view.carried()).encode())


def test_a_text_of_32_kilobytes_travels_and_goes_on_bit_for_bit(router):
    text = np.random.default_rng(3).bytes(33_000)
    stream = carried(router, text[:32_000]).stream(router)
    stream.update(text[32_000:])
    assert (stream.choice().posterior == router.route([text])[0].posterior).all()
    assert stream.choice().to_json() == router.route([text])[0].to_json()


def test_a_longer_one_says_that_it_has_to_be_read_anew(router):
    with pytest.raises(ConfigError, match="read them anew"):
        carried(router, np.random.default_rng(4).bytes(40_000)).stream(router)
