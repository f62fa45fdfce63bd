"""The router's answers: exact sums, causality, formulas against a float64 oracle, files that cannot be fooled."""

import dataclasses
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from constellation import config
from constellation.errors import ArtifactError
from constellation.geometry import e8, sphere
from constellation.roster import OCEAN
from router.decide.counts import count
from router.decide.fisher_rao import Calibration, FisherRaoRouter, corpus_mean
from router.decide.policy import ABSTAINED, Trajectory, decide, looks

K, BINS, DIMS = 5, 512, 12
SETTINGS = config.Router(bins=BINS, dims=DIMS, every=32, min_prefix=8, max_prefix=512, smoothing=20.0)


def made_up(seed: int = 0, weight: float = 0.0) -> FisherRaoRouter:
    """A router with arbitrary but valid arrays: its laws do not depend on a good fit."""
    rng = np.random.default_rng(seed)
    mean = np.sqrt(rng.dirichlet(np.full(BINS, 2.0)))
    frame = np.linalg.qr(np.concatenate([mean[None], rng.standard_normal((DIMS, BINS))]).T)[0].T
    frame *= np.sign(frame[0] @ mean)
    charts = rng.standard_normal((K, 8))
    return FisherRaoRouter(
        names=tuple("abcde"),
        config=SETTINGS,
        calibration=Calibration(0.2, -0.3, 3.0, 0.1, weight, weight / 2),
        kernel_counts=rng.integers(0, 200, (K, BINS)),
        mean=frame[0],
        directions=frame[1:],
        spread=np.linspace(0.2, 0.05, DIMS),
        centres=0.2 * rng.standard_normal((K, DIMS)),
        charts=charts / np.linalg.norm(charts, axis=1, keepdims=True),
        roots=e8.roots()[[0, 3, 100, 150, 239]],
        log_prior=np.log(rng.dirichlet(np.full(K, 20.0))),
        limit_bytes=np.array([8.0, 64.0, 512.0]),
        limit_rad=np.array([3.0, 2.9, 2.8]),
    )


ROUTER, BLEND = made_up(), made_up(1, weight=0.5)
texts = st.lists(st.binary(max_size=200), min_size=1, max_size=5)


def same(a: Trajectory, b: Trajectory) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Trajectory))


# -- formulas ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", [ROUTER, BLEND])
def test_a_choice_is_what_the_definitions_say(router):
    """z, distances and posterior recomputed from scratch: sqrt(p), log map and KL, float64, no rounding to grids."""
    text = b"def f(x): return x + 1  # of course " * 3
    choice = router.route([text])[0]
    h = count([text], BINS).toarray()[0]
    n, mu, p0 = h.sum(), SETTINGS.smoothing, corpus_mean(router.kernel_counts.sum(0))
    x = torch.from_numpy(np.sqrt((h + mu * p0) / (n + mu)))
    m = torch.from_numpy(np.array(router.mean))
    z = sphere.log(m, x).numpy() @ router.directions.T
    centres = sphere.exp(m, torch.from_numpy(router.centres @ router.directions))
    u = z[:8] / router.spread[:8]
    p = (router.kernel_counts + mu * p0) / (router.kernel_counts.sum(1, keepdims=True) + mu)
    kl = -n * ((h[h > 0] / n) * np.log((h[h > 0] / n) / p[:, h > 0])).sum(1)  # -n KL(h / n || P_k)
    gamma, beta = (f(np.array([n]))[0] for f in (router.calibration.gamma, router.calibration.beta))
    w = choice.tangent_weight
    score = w * beta * (router.charts @ u / np.linalg.norm(u)) + (1 - w) * gamma * kl + router.log_prior
    posterior = np.exp(score - np.logaddexp.reduce(score))
    assert choice.counts_used == n == len(text) - 2
    assert np.abs(choice.z - z).max() < 1e-6
    assert np.abs(choice.distances_rad - 2 * sphere.angle(x, centres).numpy()).max() < 1e-6
    assert np.abs(choice.posterior - posterior).max() < 1e-5
    assert choice.index == posterior.argmax() and choice.kernel == router.names[choice.index]


@settings(deadline=None)
@given(texts)
def test_posteriors_are_distributions_and_distances_angles(some):
    for choice in BLEND.route(some):
        assert abs(choice.posterior.sum() - 1) < 1e-5 and (choice.posterior >= 0).all()
        assert (choice.distances_rad >= 0).all() and (choice.distances_rad <= np.pi + 1e-6).all()


def test_the_reported_score_is_the_one_that_decided():
    text = (
        b"some text that is long enough to count, and then some more of it to pass one hundred and twenty-eight bytes "
    )
    assert ROUTER.route([text])[0].decided_by == "kl"
    for weight, name in ((0.5, "blend"), (1.0, "tangent")):
        bent = dataclasses.replace(
            BLEND, calibration=dataclasses.replace(BLEND.calibration, tangent_weight_short=weight)
        )
        assert bent.route([text])[0].decided_by == name
        assert bent.route([text])[0].tangent_weight == weight
        assert bent.route([text + text])[0].tangent_weight == BLEND.calibration.tangent_weight_long


def test_rebalancing_moves_the_posterior_by_exactly_the_shift():
    shift = np.array([0.5, -1, 0, 2, 0.25])
    before, after = (r.route([b"to be or not to be"])[0].posterior for r in (ROUTER, ROUTER.rebalanced(shift)))
    moved = np.log(after) - np.log(before) - shift
    assert np.ptp(moved) < 1e-5


# -- exactness and causality -------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(texts, st.randoms())
def test_a_batch_says_bit_for_bit_what_single_questions_say(some, random):
    together = BLEND.route(some)
    order = list(range(len(some)))
    random.shuffle(order)
    for i, choice in zip(order, BLEND.route([some[i] for i in order])):
        alone = BLEND.route([some[i]])[0]
        assert choice.to_json() == together[i].to_json() == alone.to_json()
        assert (alone.posterior == choice.posterior).all() and (alone.z == choice.z).all()


def looks_by_hand(length, every):
    """16, 32, ... below `every`, then its multiples; at the end of a text too short for any."""
    return [at for at in range(1, length + 1) if at % every == 0 or (at < every and at % 16 == 0)] or [length]


@given(st.integers(0, 300), st.integers(1, 100))
def test_a_text_is_looked_at_oftener_before_the_first_w(length, every):
    assert looks(length, every).tolist() == looks_by_hand(length, every)


@settings(deadline=None)
@given(texts, st.integers(1, 60))
def test_a_trajectory_is_the_route_of_every_prefix_bit_for_bit(some, every):
    for text, trajectory in zip(some, BLEND.trajectories(some, every)):
        wanted = looks_by_hand(len(text), every)
        assert trajectory.at_bytes.tolist() == wanted
        for i, choice in enumerate(BLEND.route([text[:at] for at in wanted])):
            assert (trajectory.posterior[i] == choice.posterior).all()
            assert trajectory.distance_rad[i] == choice.distances_rad.min()
            assert trajectory.abstain[i] == choice.abstained


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=150), st.binary(max_size=150), st.binary(max_size=150), st.integers(1, 40))
def test_later_bytes_change_nothing(past, future, other, every):
    looks = sum(at % every == 0 or (at < every and at % 16 == 0) for at in range(1, len(past) + 1))
    a, b = ROUTER.trajectories([past + future, past + other], every)
    seen = [Trajectory(*(getattr(t, f.name)[:looks] for f in dataclasses.fields(t))) for t in (a, b)]
    assert same(*seen)


def test_many_texts_are_routed_in_pieces_without_a_seam():
    rng = np.random.default_rng(0)
    some = [rng.bytes(size) for size in (400_000, 700_000, 5, 0, 900_000, 64)]
    for text, trajectory in zip(some, ROUTER.trajectories(some, 50_000)):
        assert same(trajectory, ROUTER.trajectories([text], 50_000)[0])


def test_no_text_is_too_short_to_be_asked_about():
    assert ROUTER.route([]) == [] and ROUTER.trajectories([], 32) == []
    for text in (b"", b"a", b"ab", b"abc"):
        choice, trajectory = ROUTER.route([text])[0], ROUTER.trajectories([text], 32)[0]
        assert choice.kernel == OCEAN and choice.reason == "too short" and choice.index == ABSTAINED
        assert trajectory.at_bytes.tolist() == [len(text)] and trajectory.abstain.all()


# -- abstaining and deciding -------------------------------------------------------------------------------------------


def test_abstains_beyond_the_limit_and_below_the_threshold_and_says_why():
    text = b"the same text for everyone here"
    far = dataclasses.replace(ROUTER, limit_rad=np.full(3, 0.1)).route([text])[0]
    unsure = dataclasses.replace(ROUTER, config=dataclasses.replace(SETTINGS, abstain_below=0.999)).route([text])[0]
    assert (far.kernel, far.reason, far.abstained) == (OCEAN, "far", True)
    assert (unsure.kernel, unsure.reason, unsure.index) == (OCEAN, "low posterior", ABSTAINED)
    sure = ROUTER.route([text])[0]
    assert (sure.reason, sure.abstained) == ("", False) and sure.kernel in ROUTER.names
    assert (far.posterior == sure.posterior).all()  # abstaining hides nothing


posteriors = st.lists(
    st.tuples(st.lists(st.floats(0.01, 1), min_size=3, max_size=3), st.booleans()), min_size=1, max_size=30
)


def as_trajectory(rows):
    p = np.array([row for row, _ in rows], np.float32)
    p /= p.sum(1, keepdims=True)
    return Trajectory(
        np.arange(len(p)) + 1, p, np.zeros(len(p), np.float32), np.array([abstains for _, abstains in rows])
    )


@settings(deadline=None)
@given(posteriors, st.floats(0, 3))
def test_decisions_follow_the_rule_one_by_one(rows, hysteresis):
    trajectory, current = as_trajectory(rows), ABSTAINED
    log_p = np.log(trajectory.posterior)
    for i, k in enumerate(decide(trajectory, hysteresis).tolist()):
        if trajectory.abstain[i]:
            assert k == ABSTAINED
        elif current == ABSTAINED or log_p[i].max() - log_p[i, current] > hysteresis:
            assert k == log_p[i].argmax()
        else:
            assert k == current
        current = k


@settings(deadline=None)
@given(posteriors, st.floats(0, 3), st.integers(0, 30))
def test_deciding_piece_by_piece_changes_nothing(rows, hysteresis, cut):
    whole = decide(as_trajectory(rows), hysteresis).tolist()
    cut = min(max(cut, 1), len(rows))
    head = whole[:cut]
    tail = decide(as_trajectory(rows[cut:]), hysteresis, head[-1]).tolist() if cut < len(rows) else []
    assert decide(as_trajectory(rows[:cut]), hysteresis).tolist() + tail == whole


# -- explaining --------------------------------------------------------------------------------------------------------


def test_neighbours_are_roots_at_60_degrees_first_then_the_nearest_centres():
    choice = ROUTER.route([b"a text of more than eight bytes"])[0]
    index = choice.index
    inner = ROUTER.roots @ ROUTER.roots[index]
    cos = ROUTER.charts @ ROUTER.charts[index]
    keys = [(inner[ROUTER.names.index(name)] != 1, -cos[ROUTER.names.index(name)]) for name in choice.neighbours]
    assert keys == sorted(keys) and set(choice.neighbours) == set(ROUTER.names) - {choice.kernel}
    assert choice.root == tuple(ROUTER.roots[index])


def test_a_choice_prints_as_json_with_and_without_names():
    choice = BLEND.route([b"any text"])[0]
    plain, named = json.loads(json.dumps(choice.to_json())), json.loads(json.dumps(choice.to_json(BLEND.names)))
    assert plain["posterior"] == list(named["posterior"].values()) and list(named["posterior"]) == list(BLEND.names)
    assert len(plain["z"]) == DIMS and len(plain["root"]) == 8


def test_routing_needs_no_torch(tmp_path):
    ROUTER.save(tmp_path)
    program = (
        "import sys, pathlib; from router.decide.fisher_rao import FisherRaoRouter;"
        "from router.decide.stream import RouterStream; r = FisherRaoRouter.load(pathlib.Path(sys.argv[1]));"
        "s = RouterStream(r); s.update(b'hello world'); s.choice(); r.route([b'hello']); r.trajectories([b'hello'], 2);"
        "assert 'torch' not in sys.modules and 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)


# -- files -------------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_it_answers_the_same_bits(tmp_path):
    digest = BLEND.save(tmp_path)
    again = FisherRaoRouter.load(tmp_path)
    assert again.hash == BLEND.hash == digest and again.names == BLEND.names and again.config == BLEND.config
    text = b"the proof of the pudding"
    assert (again.route([text])[0].posterior == BLEND.route([text])[0].posterior).all()
    assert again.save(tmp_path / "copy") == digest


def test_saving_another_router_replaces_the_first(tmp_path):
    ROUTER.save(tmp_path)
    BLEND.save(tmp_path)
    assert FisherRaoRouter.load(tmp_path).hash == BLEND.hash and len(list(tmp_path.iterdir())) == 2


def test_a_writer_killed_between_its_two_files_leaves_the_old_router(tmp_path):
    ROUTER.save(tmp_path)
    BLEND.save(tmp_path / "other")
    arrays = next((tmp_path / "other").glob("*.npz"))
    (tmp_path / arrays.name).write_bytes(arrays.read_bytes())
    assert FisherRaoRouter.load(tmp_path).hash == ROUTER.hash


def refused(folder, words):
    with pytest.raises(ArtifactError) as caught:
        FisherRaoRouter.load(folder)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), which=st.sampled_from(["json", "npz"]))
def test_one_flipped_bit_is_refused_or_harmless(tmp_path_factory, data, which):
    """A flip in a zip header that no reader looks at may pass: then nothing at all was changed."""
    folder = tmp_path_factory.mktemp("flip")
    ROUTER.save(folder)
    path = next(folder.glob(f"*.{which}"))
    held = bytearray(path.read_bytes())
    held[data.draw(st.integers(0, len(held) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(held)
    try:
        assert FisherRaoRouter.load(folder).hash == ROUTER.hash
    except ArtifactError as error:
        assert "\n" not in str(error)


def test_damaged_foreign_and_other_files_are_refused_with_their_reason(tmp_path):
    refused(tmp_path, "no such file")
    ROUTER.save(tmp_path)
    page, arrays = tmp_path / "router.json", next(tmp_path.glob("*.npz"))
    good_page, good_arrays = page.read_text(), arrays.read_bytes()
    for cut in (0, 10, len(good_arrays) // 2, len(good_arrays) - 1):
        arrays.write_bytes(good_arrays[:cut])
        refused(tmp_path, "damaged")
    arrays.write_bytes(good_arrays)
    for text, words in (
        (good_page[: len(good_page) // 2], "damaged"),
        ("[1, 2]", "not a saved router"),
        ('{"kind": "tfidf"}', "not a saved router"),
        (good_page.replace('"schema": 1', '"schema": 2'), "schema 2"),
        (good_page.replace('"kl_scale": 0.2', '"kl_scale": 0.3'), "content hash"),
    ):
        page.write_text(text)
        refused(tmp_path, words)


def test_a_pickle_in_the_arrays_is_never_opened(tmp_path):
    ROUTER.save(tmp_path)
    path = next(tmp_path.glob("*.npz"))

    class Bomb:
        def __reduce__(self):
            return exec, ("raise SystemExit('opened')",)

    np.savez(path.open("wb"), mean=np.array([Bomb()], dtype=object))
    refused(tmp_path, "damaged")
    path.write_bytes(pickle.dumps(Bomb()))
    refused(tmp_path, "damaged")
