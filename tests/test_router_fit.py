"""Fitting: balance, planted sources found again, beginnings that go with their text, a posterior meant as said."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from constellation import config, roster
from constellation.errors import ConfigError, DataError
from constellation.geometry import e8, sphere
from constellation.roster import ROLES
from router.decide import counts
from router.decide.clustering import anticipate, balance, in_force, pool, refine, sample, spherical, window_weights
from router.decide.fisher_rao import corpus_mean
from router.decide.fit import fit
from router.decide.partition import balanced, in_force_bytes, loads, partition
from router.decide.policy import ABSTAINED, decide

SETTINGS = config.Router(bins=512, dims=16, every=32, min_prefix=16, max_prefix=512)
SOURCES = 8


def sources(documents: int, seed: int) -> tuple[list[bytes], np.ndarray]:
    """Documents of `SOURCES` planted kinds, 0.5 to 2 KB of words of its own among words of all."""
    rng = np.random.default_rng(0)  # the vocabularies are the same for every seed
    letters = np.frombuffer(b"etaoinshrdlucmfwypvbgk", np.uint8)
    words = [[bytes(rng.choice(letters, rng.integers(2, 8))) for _ in range(40)] for _ in range(SOURCES + 1)]
    rng = np.random.default_rng(1 + seed)
    texts, kinds = [], np.arange(documents) % SOURCES
    for kind in kinds.tolist():
        common = rng.random(rng.integers(100, 400)) < 0.5
        texts.append(b" ".join(words[SOURCES if c else kind][rng.integers(40)] for c in common.tolist()))
    return texts, kinds


def accuracy(found: np.ndarray, wanted: np.ndarray, weight: np.ndarray | None = None) -> float:
    table = np.zeros((found.max() + 1, wanted.max() + 1))
    np.add.at(table, (found, wanted), 1.0 if weight is None else weight)
    rows, columns = linear_sum_assignment(-table)
    return table[rows, columns].sum() / table.sum()


@pytest.fixture(scope="module")
def planted():
    train, dev = sources(160, 0), sources(80, 1)
    return train, dev, fit(train[0], SETTINGS, seed=0, validation=dev[0])


# -- balance -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 12))
def test_balance_gives_every_kernel_the_same_weight(seed, k):
    rng = np.random.default_rng(seed)
    score = rng.standard_normal((4000, k)) * rng.uniform(0.1, 50) + rng.standard_normal(k) * 3
    weight = rng.uniform(0.5, 2, 4000)
    bias = balance(score, weight, tolerance=0.02)
    load = np.bincount((score + bias).argmax(1), weight, minlength=k) / weight.sum() * k
    assert np.abs(load - 1).max() <= 0.03 and abs(bias.mean()) < 1e-9


def test_balance_leaves_what_is_balanced_and_survives_what_cannot_be():
    assert (balance(np.eye(4), np.ones(4)) == 0).all()
    assert np.isfinite(balance(np.zeros((5, 3)), np.ones(5))).all()  # equal scores: nobody can tell them apart
    assert np.isfinite(balance(np.ones((1, 3)), np.ones(1))).all()


def test_spherical_finds_bundles_of_equal_weight():
    rng = np.random.default_rng(0)
    centres = np.linalg.qr(rng.standard_normal((8, 8)))[0][:4]
    wanted = np.repeat(np.arange(4), 50)
    points = centres[wanted] + 0.1 * rng.standard_normal((200, 8))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    found = max((spherical(points, np.ones(200), 4, rng) for _ in range(5)), key=lambda f: accuracy(f, wanted))
    assert accuracy(found, wanted) == 1 and (np.bincount(found) == 50).all()


# -- division ----------------------------------------------------------------------------------------------------------


def cut_up(texts):
    cut = counts.windows(texts, SETTINGS.every, SETTINGS.bins)
    matrix = cut.matrix(SETTINGS.bins)
    return cut, matrix, SETTINGS.smoothing * corpus_mean(window_weights(cut) @ matrix)


def test_refining_a_half_wrong_start_finds_the_sources_in_equal_shares():
    texts, kinds = sources(160, 0)
    cut, matrix, pseudo = cut_up(texts)
    rng = np.random.default_rng(0)
    start = np.where(rng.random(160) < 0.5, kinds, rng.integers(0, SOURCES, 160))[cut.text]
    found = refine(matrix, cut, pool(matrix, start, SOURCES), pseudo)
    assert accuracy(found.kernel_W, kinds[cut.text], cut.size) > 0.95
    load = np.bincount(found.kernel_W, cut.size) / cut.size.sum() * SOURCES
    assert np.abs(load - 1).max() < 0.1
    assert found.counts_KB.sum() == len(cut.bins)  # every trigram counted once
    once = refine(matrix, cut, pool(matrix, start, SOURCES), pseudo, rounds=1)
    assert found.gain_nats > once.gain_nats


def test_what_is_in_force_is_the_look_before_and_at_first_the_own():
    cut = counts.windows([b"x" * 70, b"", b"y" * 10, b"z" * 64], 32, SETTINGS.bins)
    assert in_force(np.arange(6), cut).tolist() == [0, 0, 1, 3, 4, 4]


def test_a_header_counts_for_the_text_after_it():
    """Texts of source 0 and 1 with one and the same header: its trigrams are split as the texts are, not by itself."""
    texts, kinds = sources(160, 3)
    header = b"permission is hereby granted, free of charge, to any person "
    texts = [header[: 32 * 1] + text if kind < 2 else text for text, kind in zip(texts, kinds)]
    cut, matrix, pseudo = cut_up(texts)
    start = pool(matrix, kinds[cut.text], SOURCES)
    after = anticipate(matrix, cut, start, pseudo, horizon=16)
    own = np.setdiff1d(
        counts.trigrams(header[:32], SETTINGS.bins), counts.trigrams(b" ".join(texts[2:8]), SETTINGS.bins)
    )
    share = after[:, own].sum(1) / after[:, own].sum()
    assert (share[:2] > 0.3).all() and share[2:].sum() < 0.2


def test_anticipation_never_empties_a_kernel():
    texts, kinds = sources(16, 0)
    cut, matrix, pseudo = cut_up(texts)
    start = pool(matrix, kinds[cut.text], SOURCES + 1)  # the ninth has nothing to begin with
    start[SOURCES] = start[0] // 100 + 1  # and then next to nothing
    assert anticipate(matrix, cut, start, pseudo, 16).any(axis=1).all()


# -- the whole fit -----------------------------------------------------------------------------------------------------


def test_planted_sources_are_found_without_labels(planted):
    (train, kinds), (dev, dev_kinds), router = planted
    index = {name: i for i, name in enumerate(router.names)}
    for texts, wanted, length, least in (
        (train, kinds, 9999, 0.98),
        (dev, dev_kinds, 9999, 0.98),
        (dev, dev_kinds, 64, 0.95),
    ):
        found = np.array([c.posterior.argmax() for c in router.route([t[:length] for t in texts])])
        assert accuracy(found, wanted) > least
    assert set(index) == set(ROLES)


def test_same_seed_same_router_bit_for_bit():
    (texts, _), (dev, _) = sources(32, 0), sources(16, 1)
    a, b, c = (fit(texts, SETTINGS, seed=s, validation=dev, names=("x", "y", "z")).hash for s in (3, 3, 4))
    assert a == b != c


def test_it_stands_on_the_geometry_it_names(planted):
    """m is the Karcher mean's fixed point up to sampling, V an orthonormal tangent frame, centres within the sphere."""
    _, _, router = planted
    assert abs(np.linalg.norm(router.mean) - 1) < 1e-9 and (router.mean > 0).all()
    gram = router.directions @ router.directions.T
    assert np.abs(gram - np.eye(len(gram))).max() < 1e-8 and np.abs(router.directions @ router.mean).max() < 1e-8
    assert (np.diff(router.spread) <= 0).all() and np.abs(np.linalg.norm(router.charts, axis=1) - 1).max() < 1e-9
    assert (np.linalg.norm(router.centres, axis=1) < np.pi / 2).all()


def test_a_centre_is_the_frechet_mean_of_its_texts():
    """One kernel: its centre is the mean of all prefixes weighted by bytes, so nearer to long ones than m is."""
    texts, _ = sources(40, 0)
    router = fit(texts, SETTINGS, seed=0, names=("all",), validation=texts)
    mean = torch.from_numpy(np.array(router.mean))
    point = sphere.exp(mean, torch.from_numpy(router.centres[0] @ router.directions))
    long = counts.count([t[:512] for t in texts], SETTINGS.bins).toarray() + router.pseudo
    points = torch.from_numpy(np.sqrt(long / long.sum(1, keepdims=True)))

    def spread(p: torch.Tensor) -> float:
        return float(sphere.squared_angle(p, points).mean())

    assert spread(point) < spread(mean)


def test_roles_keep_their_simple_roots_and_others_get_distinct_ones(planted):
    router = planted[2]
    assert router.names == ROLES
    assert [tuple(r) for r in router.roots] == [tuple(e8.roots()[roster.root_index(name)]) for name in ROLES]
    texts, _ = sources(48, 0)
    named = fit(texts, SETTINGS, seed=0, names=[f"k{i:03d}" for i in range(12)], validation=texts)
    assert len({tuple(r) for r in named.roots}) == 12 and np.allclose((named.roots**2).sum(1), 2)


def test_the_posterior_means_what_it_says(planted):
    """Calibrated: the mean largest posterior of held-out looks is about the share of looks that agree with the end."""
    _, (dev, _), router = planted
    for size in (32, 64, 128):
        long = [t for t in dev if len(t) >= 2 * size]
        early, late = router.route([t[:size] for t in long]), router.route(long)
        right = np.mean([a.posterior.argmax() == b.posterior.argmax() for a, b in zip(early, late)])
        sure = np.mean([a.posterior.max() for a in early])
        assert abs(right - sure) < 0.15

    def nats(scale: float) -> float:
        bent = dataclasses.replace(router.calibration, kl_scale=scale * router.calibration.kl_scale)
        r = dataclasses.replace(router, calibration=bent)
        end = [c.posterior.argmax() for c in r.route(dev)]
        looks = [r.route([t[:size] for t in dev]) for size in (16, 32, 64, 128)]
        return -np.mean([np.log(max(c.posterior[k], 1e-30)) for some in looks for c, k in zip(some, end)])

    assert nats(1.0) < nats(0.4) and nats(1.0) < nats(2.5)


def test_it_abstains_from_what_is_unlike_all_training_text_only(planted):
    (train, _), (dev, _), router = planted
    own = np.concatenate([t.abstain for t in router.trajectories(train, 32)]).mean()
    held_out = np.concatenate([t.abstain for t in router.trajectories(dev, 32)]).mean()
    assert own < 0.04 and held_out < 0.1
    strange = [np.random.default_rng(0).bytes(600), "日本語の文章です。".encode() * 20, b"0123456789 " * 40]
    assert all(choice.reason == "far" for choice in router.route(strange))


def test_kernels_read_equal_shares_and_every_byte_once(planted):
    (train, _), _, router = planted
    ranges = partition(router, [*train, b"", b"short"], 32, SETTINGS.hysteresis)
    load = loads(ranges, SOURCES)
    assert (
        load.sum() == sum(map(len, train)) + 5 and np.abs(load / load.mean() - 1).max() < 0.25
    )  # the sources' own sizes: up to 0.23
    for text, rows in zip([*train, b"", b"short"], ranges):
        assert rows[:, 0].tolist() == [0, *rows[:-1, 1].tolist()][: len(rows)]
        assert (rows[-1, 1] if len(rows) else 0) == len(text)
        assert (rows[1:, 2] != rows[:-1, 2]).all() and ((rows[:, 2] >= 0) & (rows[:, 2] < SOURCES)).all()


def test_training_text_goes_where_queries_are_sent(planted):
    (train, _), _, router = planted
    for text, rows in zip(train[:20], partition(router, train[:20], 32, 0.5)):
        trajectory = router.trajectories([text], 32)[0]
        for at, k, p in zip(trajectory.at_bytes.tolist(), decide(trajectory, 0.5), trajectory.posterior):
            if at < len(text):
                wanted = p.argmax() if k == ABSTAINED else k
                assert rows[np.searchsorted(rows[:, 1], at, side="right"), 2] == wanted


def test_a_skewed_router_is_brought_into_balance(planted):
    (train, _), _, router = planted
    soft = dataclasses.replace(router.calibration, kl_scale=0.03)  # scores that a prior can move
    skewed = dataclasses.replace(router, calibration=soft).rebalanced(np.linspace(-3, 3, SOURCES))

    def worst(r):
        load = loads(partition(r, train, 32, 0.0), SOURCES)
        return np.abs(load / load.mean() - 1).max()

    assert worst(skewed) > 0.25 > 0.08 > worst(balanced(skewed, train, 32, most=np.inf))
    kept = balanced(skewed, train, 32).log_prior - skewed.log_prior
    assert np.ptp(kept) <= 2 * np.log(2) + 1e-9
    log_posterior, size = in_force_bytes(router, train, 32)
    assert log_posterior.shape == (len(size), SOURCES) and size.sum() == sum(map(len, train))


def test_long_texts_are_known_by_more_than_their_beginning():
    """Two books whose title pages are equal: a fit from the first bytes alone could not tell them apart."""
    (texts, kinds) = sources(160, 5)
    title = b"THE COLLECTED WORKS " * 20
    books = [title + b" ".join(t for t, k in zip(texts, kinds) if k == kind) for kind in range(4)]
    router = fit(books, SETTINGS, seed=0, names=("a", "b"), validation=[book[400:3000] for book in books])
    late = router.route([book[2000:4000] for book in books])
    assert {choice.posterior.argmax() for choice in late} == {0, 1}


def test_a_corpus_above_the_limit_is_sampled_whole_texts_first():
    rng = np.random.default_rng(0)
    texts = [bytes([i]) * 100 for i in range(50)]
    some = sample(texts, 1030, rng)
    assert sum(map(len, some)) == 1030 and sum(len(t) == 100 for t in some) == 10
    assert sample([*texts, b""], 10**6, rng) == texts


def test_impossible_fits_are_refused_in_one_line():
    texts, _ = sources(16, 0)
    for names, change, error, words in (
        ([], {}, ConfigError, "0 kernels"),
        (["a", "a"], {}, ConfigError, "distinct"),
        ([str(i) for i in range(241)], {}, ConfigError, "241 kernels"),
        (ROLES, {"dims": 7}, ConfigError, "router.dims=7"),
        (ROLES, {"bins": 10}, ConfigError, "router.bins=10"),
        (ROLES, {"min_prefix": 2}, ConfigError, "router.min_prefix=2"),
        ([str(i) for i in range(30)], {}, DataError, "30 texts"),
    ):
        with pytest.raises(error) as caught:
            fit(texts, dataclasses.replace(SETTINGS, **change), seed=0, names=names, validation=texts)
        assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DataError, match="validation"):
        fit(texts, SETTINGS, seed=0, validation=[b"too short"])


def test_equal_texts_do_not_break_it():
    router = fit(
        [b"all work and no play makes Jack a dull boy " * 4] * 12, SETTINGS, seed=0, validation=[b"all work " * 9]
    )
    assert np.isfinite(router.route([b"all work and no play"])[0].posterior).all()


# -- real text ---------------------------------------------------------------------------------------------------------

DOMAINS8 = os.environ.get("CONSTELLATION_DOMAINS8")


def domains(split: str) -> tuple[list[bytes], np.ndarray]:
    texts, labels = [], []
    for i, path in enumerate(sorted(Path(DOMAINS8, split).glob("*.jsonl"))):
        for line in path.read_text(encoding="utf-8").splitlines():
            texts.append(json.loads(line)["text"].encode())
            labels.append(i)
    return texts, np.array(labels)


@pytest.mark.skipif(not DOMAINS8, reason="CONSTELLATION_DOMAINS8 does not name the folder of eight domains")
def test_eight_domains_are_found_without_labels():
    (train, labels), (dev, dev_labels) = domains("train"), domains("dev")
    router = fit(train, config.Router(), seed=0, validation=dev)
    ranges = partition(router, train, 64, 0.5)
    rows = np.concatenate(ranges)
    wanted = np.repeat(labels, [len(r) for r in ranges])
    assert accuracy(rows[:, 2], wanted, rows[:, 1] - rows[:, 0]) > 0.97  # measured: 0.989
    load = loads(ranges, 8)
    assert np.abs(load / load.mean() - 1).max() < 0.06
    looks = router.trajectories(dev, 64)
    stable = np.concatenate([t.posterior.argmax(1) == t.posterior[-1].argmax() for t in looks])
    assert stable.mean() > 0.97  # 0.990
    prefix = np.array([t.posterior[0].argmax() for t in router.trajectories([t[:256] for t in dev], 256)])
    assert accuracy(prefix, dev_labels) > 0.9  # 0.94
    assert np.concatenate([t.abstain for t in looks]).mean() < 0.03  # 0.010
