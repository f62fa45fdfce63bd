"""The routers to compare with keep the same laws, and find the same planted sources as well as they can."""

import dataclasses
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from constellation import config
from constellation.errors import ArtifactError, ConfigError
from constellation.roster import OCEAN, ROLES
from router.decide.baselines import RandomRouter, TfidfRouter
from router.decide.partition import loads, partition
from router.decide.policy import Policy, Trajectory, decide, looks

sklearn = pytest.importorskip("sklearn", reason="the tf-idf router needs scikit-learn")
SETTINGS = config.Router(every=32)
KINDS = 4


def sources(documents: int, seed: int) -> tuple[list[bytes], np.ndarray]:
    rng = np.random.default_rng(seed)
    kinds = np.arange(documents) % KINDS
    return [
        b" ".join(b"%s%d" % (b"abcd"[k : k + 1] * 3, i) for i in rng.integers(0, 50, rng.integers(100, 300)))
        for k in kinds.tolist()
    ], kinds


@pytest.fixture(scope="module")
def tfidf() -> TfidfRouter:
    return TfidfRouter.fit(sources(80, 0)[0], SETTINGS, seed=0, names=("a", "b", "c", "d"))


@pytest.fixture(params=["tfidf", "random"])
def policy(request, tfidf):
    return tfidf if request.param == "tfidf" else RandomRouter(("a", "b", "c", "d"), seed=3)


def test_they_are_policies(policy):
    assert isinstance(policy, Policy)


@settings(deadline=None)
@given(
    past=st.binary(min_size=1, max_size=150),
    a=st.binary(max_size=90),
    b=st.binary(max_size=90),
    every=st.integers(1, 40),
)
def test_later_bytes_change_nothing(tfidf, past, a, b, every):
    for policy in (tfidf, RandomRouter(seed=1)):
        one, other = policy.trajectories([past + a, past + b], every)
        seen = int((one.at_bytes <= len(past)).sum()) if len(past) >= every else 0
        assert (one.posterior[:seen] == other.posterior[:seen]).all()
        assert (one.abstain[:seen] == other.abstain[:seen]).all()


@settings(deadline=None)
@given(text=st.text("abc xy1.", max_size=200).map(str.encode), every=st.integers(1, 60))
def test_a_trajectory_is_the_route_of_every_prefix(tfidf, text, every):
    trajectory = tfidf.trajectories([text], every)[0]
    assert trajectory.at_bytes.tolist() == looks(len(text), every).tolist()
    for at, row, choice in zip(
        trajectory.at_bytes.tolist(), trajectory.posterior, tfidf.route([text[:at] for at in trajectory.at_bytes])
    ):
        assert np.abs(row - choice.posterior).max() < 1e-5 and abs(row.sum() - 1) < 1e-5
        assert choice.abstained == (at < SETTINGS.min_prefix)


def test_tfidf_finds_planted_words_in_equal_shares(tfidf):
    dev, kinds = sources(40, 1)
    found = np.array([choice.index for choice in tfidf.route(dev)])
    assert all(len(set(found[kinds == k])) == 1 for k in range(KINDS)) and len(set(found)) == KINDS
    load = loads(partition(tfidf, sources(80, 0)[0], 32, 0.5), KINDS)
    assert np.abs(load / load.mean() - 1).max() < 0.2


def test_tfidf_is_the_same_for_the_same_seed_and_from_a_file(tfidf, tmp_path):
    again = TfidfRouter.fit(sources(80, 0)[0], SETTINGS, seed=0, names=("a", "b", "c", "d"))
    digest = tfidf.save(tmp_path)
    assert digest == again.save(tmp_path / "again")
    text = sources(1, 5)[0][0]
    assert (TfidfRouter.load(tmp_path).route([text])[0].posterior == tfidf.route([text])[0].posterior).all()
    next(tmp_path.glob("*.npz")).write_bytes(b"")
    with pytest.raises(ArtifactError, match="damaged"):
        TfidfRouter.load(tmp_path)


def test_tfidf_of_text_without_words_is_refused():
    with pytest.raises(ConfigError, match="needs words"):
        TfidfRouter.fit([b"... --- ..."] * 9, SETTINGS, seed=0)


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)
    with pytest.raises(ConfigError, match=r"constellation\[bench\]"):
        TfidfRouter.fit(sources(8, 0)[0], SETTINGS, seed=0)


def test_chance_is_even_and_never_changes_its_mind():
    rng = np.random.default_rng(0)
    texts = [rng.bytes(200) for _ in range(4000)]
    policy = RandomRouter(seed=7)
    found = np.array([choice.index for choice in policy.route(texts)])
    expected = len(texts) / len(ROLES)
    assert (
        (np.bincount(found) - expected) ** 2 / expected
    ).sum() < 24.3  # chi-squared, 7 degrees of freedom, p = 0.001
    for text, k in zip(texts[:50], found):
        assert set(decide(policy.trajectories([text], 64)[0], 0.5).tolist()) == {k}
    other = np.array([choice.index for choice in dataclasses.replace(policy, seed=8).route(texts)])
    assert 0.08 < (other == found).mean() < 0.17


def test_a_choice_of_theirs_prints_like_the_routers(policy, tfidf):
    text = sources(1, 2)[0][0]
    plain = policy.route([text])[0].to_json(policy.names)
    assert plain["kernel"] in policy.names and set(plain["posterior"]) == set(policy.names)
    assert plain["distances_rad"] == dict.fromkeys(policy.names) and plain["z"] == [] and len(plain["neighbours"]) == 3
    assert tfidf.route([b"a few"])[0].kernel == OCEAN
    assert all(len(getattr(policy.trajectories([b""], 32)[0], f.name)) == 1 for f in dataclasses.fields(Trajectory))
