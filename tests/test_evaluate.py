"""Every way to answer, against plain loops; the weight of a byte uses only bytes before it."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.decide.evaluate import Scores, answers, look_in_force, mix, report
from router.decide.mixture import combine, weight_table, weights
from router.decide.modes import MIXTURE
from router.decide.partition import assign, segments
from router.decide.policy import ABSTAINED, Trajectory

EVERY = 8


class Planted:
    """A policy whose looks are given: text i is looked at with the posteriors planted for it."""

    names = ("a", "b", "c")

    def __init__(self, posteriors: list[np.ndarray], abstain: list[np.ndarray] | None = None):
        self.looks = [
            Trajectory(
                np.arange(1, len(p) + 1) * EVERY, p.astype(np.float32), np.zeros(len(p), np.float32),
                abstain[i] if abstain else np.zeros(len(p), bool),
            )
            for i, p in enumerate(posteriors)
        ]  # fmt: skip

    def trajectories(self, texts: list[bytes], every: int) -> list[Trajectory]:
        return self.looks

    def route(self, texts: list[bytes]) -> list[object]:
        raise AssertionError("not asked")


def one_hot(*kernels: int) -> np.ndarray:
    return np.eye(3)[list(kernels)]


@pytest.fixture
def scores() -> Scores:
    generator = np.random.default_rng(0)
    tokens = (14, 9)  # of two documents, 3 bytes a token
    document = np.repeat([0, 1], tokens)
    byte = np.concatenate([3 * np.arange(n) for n in tokens])
    nats = generator.exponential(size=(4, 23)).astype(np.float32)
    return Scores(("a", "b", "c"), nats[0], nats[1:], document, byte, np.array([42, 27]), ("prose", "code"))


def test_the_look_in_force_is_the_last_one_not_after_the_token(scores: Scores) -> None:
    looks = Planted([one_hot(0, 1, 2, 0, 1), one_hot(2, 2, 0)]).looks
    found = look_in_force(scores.byte_N, scores.document_N, looks)
    for n, at in enumerate(found):
        d, byte = scores.document_N[n], scores.byte_N[n]
        made = [i for i, x in enumerate(looks[d].at_bytes) if x <= byte]
        assert at == (made[-1] + (5 if d else 0) if made else -1)


def test_routed_is_the_kernel_in_force_and_ocean_before_the_first_look(scores: Scores) -> None:
    posteriors = [one_hot(0, 1, 2, 0, 1), one_hot(2, 2, 0)]
    abstain = [np.array([0, 0, 1, 0, 0], bool), np.zeros(3, bool)]
    found = answers(scores, Planted(posteriors, abstain).looks, 0.0, (2,))["routed"]
    kernels = [[0, 1, ABSTAINED, 0, 1], [2, 2, 0]]
    for n in range(23):
        d, look = scores.document_N[n], scores.byte_N[n] // EVERY - 1
        k = ABSTAINED if look < 0 else kernels[d][min(look, len(kernels[d]) - 1)]
        expected = scores.ocean_N[n] if k == ABSTAINED else scores.kernels_KN[k, n]
        assert found[n] == expected


def test_a_mixture_of_all_is_the_dense_mixture_and_of_one_is_the_routed_answer(scores: Scores) -> None:
    generator = np.random.default_rng(1)
    posteriors = [generator.dirichlet(np.ones(3), 5), generator.dirichlet(np.ones(3), 3)]
    looks = Planted(posteriors).looks
    found = answers(scores, looks, 0.0, (1, 2, 3))
    assert np.allclose(found["mixture_1"], found["routed"], atol=1e-6)
    at = look_in_force(scores.byte_N, scores.document_N, looks)
    weights = np.concatenate(posteriors)[np.maximum(at, 0)]
    dense = -np.log((weights.T * np.exp(-scores.kernels_KN.astype(np.float64))).sum(0))
    assert np.allclose(found["mixture_3"], np.where(at < 0, scores.ocean_N, dense), atol=1e-5)


def test_of_equal_posteriors_an_evaluation_asks_those_who_would_be_served() -> None:
    """Posterior .4 .2 .2 .2 and two kernels: the likeliest, and the first by name of the others."""
    names, posterior = ("d", "c", "b", "a"), np.array([[0.4, 0.2, 0.2, 0.2], [0.25, 0.25, 0.25, 0.25]], np.float32)
    table = weight_table(names, posterior, 2)
    assert (table > 0).tolist() == [[True, False, False, True], [False, False, True, True]]
    assert table[0] == pytest.approx([2 / 3, 0, 0, 1 / 3]) and table[1].tolist() == [0, 0, 0.5, 0.5]


@given(st.lists(st.lists(st.integers(1, 4), min_size=5, max_size=5), min_size=1, max_size=6), st.integers(1, 6))
def test_evaluated_is_served_ties_included(shares: list[list[int]], k: int) -> None:
    """Of each token the probability is that of the served distribution, whose weights are the served ones."""
    names, posterior = tuple("edcba"), np.array([np.float32(row) / np.float32(sum(row)) for row in shares])
    log_p = np.log(np.random.default_rng(0).dirichlet(np.ones(4), (5, len(shares)))).astype(np.float32)
    nats_KN = -log_p[:, :, 0]  # each look is followed by one token, the first of four, of 3 bytes after `EVERY`
    numbers = np.arange(len(shares))
    scores = Scores(names, nats_KN[0], nats_KN, numbers, np.full(len(shares), EVERY), np.full(len(shares), 11),
                    (None,) * len(shares))  # fmt: skip
    looks = [Trajectory(np.array([EVERY]), row[None], np.zeros(1, np.float32), np.zeros(1, bool)) for row in posterior]
    found = answers(scores, looks, 0.0, (k,))[f"mixture_{k}"]
    for n, row in enumerate(posterior):
        panel = weights(names, row, k)
        served = combine(MIXTURE, np.stack([log_p[names.index(name), n : n + 1] for name, _ in panel]),
                         [weight for _, weight in panel])  # fmt: skip
        assert found[n] == pytest.approx(-served[0, 0], abs=1e-6)
        assert {name: weight for name, weight in zip(names, weight_table(names, row[None], k)[0]) if weight} == dict(
            panel
        )


def test_permuting_the_kernels_changes_no_mixture(scores: Scores) -> None:
    uniform = np.full((3, 1), -math.log(3))
    swapped = Scores(scores.names, scores.ocean_N, scores.kernels_KN[[2, 0, 1]], *list(vars(scores).values())[3:])
    assert np.allclose(mix(scores, uniform), mix(swapped, uniform))


def test_bayes_weights_use_only_earlier_tokens(scores: Scores) -> None:
    looks = Planted([one_hot(0, 0, 0, 0, 0), one_hot(0, 0, 0)]).looks
    before = answers(scores, looks, 0.0)["bayes"]
    changed = scores.kernels_KN.copy()
    changed[:, 10:14] += np.array([[5], [0], [1]])
    other = Scores(scores.names, scores.ocean_N, changed, *list(vars(scores).values())[3:])
    after = answers(other, looks, 0.0)["bayes"]
    assert np.array_equal(before[:10], after[:10]) and np.allclose(before[14:], after[14:])
    assert before[0] == pytest.approx(-math.log(np.exp(-scores.kernels_KN[:, 0].astype(float)).mean()), rel=1e-5)


def test_the_oracle_is_the_best_kernel_of_each_document(scores: Scores) -> None:
    looks = Planted([one_hot(0, 0, 0, 0, 0), one_hot(0, 0, 0)]).looks
    bits = scores.bits_D(answers(scores, looks, 0.0)["oracle"])
    for d in range(2):
        assert bits[d] == pytest.approx(min(scores.bits_D(x)[d] for x in scores.kernels_KN), rel=1e-6)


def test_the_report_adds_up(scores: Scores) -> None:
    row = report(scores, {"ocean": scores.ocean_N})["ocean"]
    assert row["bits_per_byte"] == pytest.approx(scores.ocean_N.sum() / math.log(2) / 69, rel=1e-6)
    domains = row["domains"]
    assert isinstance(domains, dict) and set(domains) == {"prose", "code"}
    assert (domains["prose"] * 42 + domains["code"] * 27) / 69 == pytest.approx(row["bits_per_byte"], rel=1e-6)


def test_training_tokens_go_where_a_query_would_go(scores: Scores) -> None:
    abstain = [np.array([1, 0, 0, 0, 0], bool), np.zeros(3, bool)]
    posteriors = [np.array([[0.2, 0.5, 0.3], *one_hot(1, 2, 2, 2).tolist()]), one_hot(0, 0, 1)]
    texts = [b"x" * 42, b"y" * 27]
    found = assign(Planted(posteriors, abstain), texts, scores.byte_N, scores.document_N, EVERY, 0.0)
    first = [1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2]  # before the first look, and abstained: the likeliest
    assert found.tolist() == [*first, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    assert segments(found, 0).tolist() == [[14, 22]] and segments(found, 1).tolist() == [[0, 8], [22, 23]]
    covered = np.concatenate([np.arange(a, b) for k in range(3) for a, b in segments(found, k)])
    assert sorted(covered) == list(range(23))
