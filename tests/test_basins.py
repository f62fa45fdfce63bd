"""Basin terms: the formula, every way to decode gives the same tokens, and nothing without coordinates."""

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from constellation.config import Kernel
from constellation.decoding import basins
from constellation.decoding.basins import Basins
from constellation.decoding.batch import Batch, Writing
from constellation.decoding.decode import decode_naive
from constellation.decoding.sampling import Sampling
from constellation.errors import ArtifactError, ConfigError
from constellation.kernel.model import KernelLM
from router.answer.packet import Packet

SIZE = 300
MODEL = KernelLM(Kernel(vocab_size=SIZE, width=32, layers=2, heads=2, hidden=40, context=32), seed=3)
RANDOM = np.random.default_rng(0)
P = RANDOM.dirichlet(np.ones(8), SIZE - 10)  # ten ids of the model have no token
TEXT = RANDOM.integers(16, SIZE - 10, 2000)
OWN = Basins(P, basins.transitions(P.argmax(-1), TEXT, 8), context=32)
WEIGHTS = {"basin_weight": 0.7, "distance_weight": 1.5, "transition_weight": 0.9}


def naive_terms(before, sampling):
    out = np.zeros(SIZE)
    known = [t for t in before[-OWN.recent :] if 0 < t < len(P)]
    c = P[known].mean(0)
    k = P.argmax(-1)
    counts = np.ones((8, 8))
    for a, b in pairwise(TEXT):
        counts[k[a], k[b]] += 1
    for i in range(len(P)):
        out[i] += sampling.basin_weight * math.log(sum(math.sqrt(x * y) for x, y in zip(P[i], c, strict=True)))
        angle = 2 * math.acos(min(1.0, sum(math.sqrt(x * y) for x, y in zip(P[i], P[known[-1]], strict=True))))
        out[i] -= sampling.distance_weight * angle
        row = counts[k[known[-1]]]
        out[i] += sampling.transition_weight * math.log(row[k[i]] / row.sum())
    return out


@pytest.mark.parametrize("name", [*WEIGHTS, "all"])
def test_terms_are_their_formula(name):
    sampling = Sampling(**(WEIGHTS if name == "all" else {name: WEIGHTS[name]}))
    before = TEXT[:40].tolist()
    found = OWN.terms(before, sampling, SIZE).numpy()
    np.testing.assert_allclose(found, naive_terms(before, sampling), atol=2e-3)
    assert (found[len(P) :] == 0).all()


def decoded(windows, samplings, **options):
    batch, works = Batch(MODEL, basins=OWN, **options), []
    for window, sampling in zip(windows, samplings, strict=True):
        work = Writing(tokens=list(window), sampling=sampling, room=1, take=lambda token: False)
        until = len(window) + sampling.max_new_tokens
        work.take = lambda token, work=work, until=until: len(work.tokens) == until
        works.append(work)
        batch.add(work)
    while not batch.idle:
        batch.step()
    for work in works:
        work.done.result()
    return [work.tokens[len(w) :] for work, w in zip(works, windows, strict=True)]


@pytest.mark.parametrize("native", [True, False, None])
def test_every_path_draws_what_the_slow_one_draws_whoever_is_beside_it(native):
    if native and not Batch(MODEL).stats()["native"]:
        pytest.skip("no C library here")
    samplings = [
        Sampling(seed=1, max_new_tokens=20, **WEIGHTS),
        Sampling(seed=2, max_new_tokens=20),
        Sampling(seed=3, max_new_tokens=20, top_p=0.9, basin_weight=2.0),
        Sampling(temperature=0, max_new_tokens=20, transition_weight=3.0),
    ]
    windows = [TEXT[i : i + 5 + i].tolist() for i in range(4)]
    naive = [decode_naive(MODEL, w, s, basins=OWN) for w, s in zip(windows, samplings, strict=True)]
    assert decoded(windows, samplings, native=native) == naive
    plain = decode_naive(MODEL, windows[1], samplings[1])
    assert naive[1] == plain and naive[0] != decode_naive(MODEL, windows[0], dataclasses.replace(samplings[1], seed=1))


def test_a_stronger_pull_stays_nearer_to_the_texts_basin():
    window = TEXT[:12].tolist()
    affinity_V = OWN.affinity(OWN.p_VN[window].mean(0))

    def nearness(weight):
        drawn = decode_naive(MODEL, window, Sampling(max_new_tokens=24, basin_weight=weight), basins=OWN)
        return float(affinity_V[[token for token in drawn if token < len(P)]].mean())

    near = [nearness(weight) for weight in (0.0, 10.0)]
    assert near[0] < near[1]


def test_who_has_no_coordinates_says_so():
    with pytest.raises(ConfigError, match=r"distance_weight=1\.0: this run has no coordinates .* --tokenizer"):
        basins.check(Sampling(distance_weight=1.0), None)
    work = Writing(tokens=[20], sampling=Sampling(basin_weight=1.0), room=1, take=lambda token: True)
    Batch(MODEL).add(work)
    with pytest.raises(ConfigError, match="basin_weight"):
        work.done.result()


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_have_a_range(name):
    for value in (-0.1, 10.5, math.nan):
        with pytest.raises(ConfigError, match=name):
            Sampling(**{name: value})


def test_a_packet_carries_them():
    packet = Packet("1", "heart", (20, 21), Sampling(**WEIGHTS))
    assert Packet.decode(packet.encode()) == packet


def test_transitions_are_shares_of_what_follows():
    table = np.exp(basins.transitions(np.array([0, 1, 1]), np.array([0, 1, 0, 2, 0]), 2))
    np.testing.assert_allclose(table, [[1 / 4, 3 / 4], [3 / 4, 1 / 4]])


def test_those_of_a_run_are_of_its_tokenizer(tmp_path):
    assert basins.read(tmp_path, "a", 32) is None
    basins.write(tmp_path, P, np.zeros((8, 8)), "a")
    found = basins.read(tmp_path, "a", 32)
    assert found is not None and torch.equal(found.p_VN, OWN.p_VN)
    with pytest.raises(ArtifactError, match="of another tokenizer"):
        basins.read(tmp_path, "b", 32)
