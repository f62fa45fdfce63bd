"""A stream says bit for bit what the router says of the whole text, however its bytes came."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from constellation import config
from router.decide.fisher_rao import Calibration, FisherRaoRouter
from router.decide.policy import decide
from router.decide.stream import RouterStream

K, BINS, DIMS = 3, 256, 9
SETTINGS = config.Router(bins=BINS, dims=DIMS, every=32, min_prefix=8)


@pytest.fixture(scope="module")
def router() -> FisherRaoRouter:
    rng = np.random.default_rng(0)
    mean = np.sqrt(rng.dirichlet(np.full(BINS, 2.0)))
    frame = np.linalg.qr(np.concatenate([mean[None], rng.standard_normal((DIMS, BINS))]).T)[0].T
    frame *= np.sign(frame[0] @ mean)
    charts = rng.standard_normal((K, 8))
    return FisherRaoRouter(
        names=("a", "b", "c"),
        config=SETTINGS,
        calibration=Calibration(0.3, -0.5, 2.0, 0.0, 0.5, 0.25),
        kernel_counts=rng.integers(0, 99, (K, BINS)),
        mean=frame[0],
        directions=frame[1:],
        spread=np.linspace(0.2, 0.05, DIMS),
        centres=0.2 * rng.standard_normal((K, DIMS)),
        charts=charts / np.linalg.norm(charts, axis=1, keepdims=True),
        roots=np.eye(8)[:K] * np.sqrt(2),
        log_prior=np.log([0.5, 0.3, 0.2]),
        limit_bytes=np.array([8.0, 64.0]),
        limit_rad=np.array([3.0, 2.0]),
    )


def equal(stream: RouterStream, router: FisherRaoRouter, text: bytes) -> None:
    streamed, routed = stream.choice(), router.route([text])[0]
    assert streamed.to_json() == routed.to_json()
    for name in ("posterior", "z", "distances_rad"):
        assert (getattr(streamed, name) == getattr(routed, name)).all()
    assert stream.bytes_seen == len(text) and stream.tail == text[-2:]


@settings(deadline=None)
@given(pieces=st.lists(st.binary(max_size=40), max_size=12))
def test_any_pieces_give_the_choice_of_the_whole(router, pieces):
    stream = RouterStream(router)
    for i, piece in enumerate(pieces):
        stream.update(piece)
        if i % 3 == 0:
            equal(stream, router, b"".join(pieces[: i + 1]))
    equal(stream, router, b"".join(pieces))


def test_a_long_stream_of_single_bytes_does_not_drift(router):
    text = (b"All happy families are alike; " * 400)[:10_000] + np.random.default_rng(1).bytes(2000)
    stream = RouterStream(router)
    for i in range(len(text)):
        stream.update(text[i : i + 1])
    equal(stream, router, text)


def test_its_looks_are_the_trajectory(router):
    text = np.random.default_rng(2).bytes(500)
    stream, current, decided, before = RouterStream(router), -1, [], 0
    whole = router.trajectories([text], 32)[0]
    for i, at in enumerate(whole.at_bytes.tolist()):
        stream.update(text[before:at])
        before = at
        look = stream.trajectory()
        assert (look.posterior[0] == whole.posterior[i]).all() and look.distance_rad[0] == whole.distance_rad[i]
        current = int(decide(look, 0.5, current)[0])
        decided.append(current)
    assert decided == decide(whole, 0.5).tolist()


@settings(deadline=None)
@given(text=st.binary(max_size=300), cut=st.integers(0, 300))
def test_resumed_elsewhere_it_goes_on_as_if_it_had_never_left(router, text, cut):
    stream = RouterStream(router)
    stream.update(text[:cut])
    resumed = RouterStream.resumed(router, stream.counts.copy(), stream.tail)
    for one in (stream, resumed):
        one.update(text[cut:])
    assert (resumed.counts == stream.counts).all()
    equal(resumed, router, text)


def test_two_streams_of_a_router_are_strangers(router):
    a, b = RouterStream(router), RouterStream(router)
    a.update(b"only a has read this sentence")
    equal(b, router, b"")
