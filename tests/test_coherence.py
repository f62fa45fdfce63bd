"""Coherence, an answer's telemetry and the semantic metric: closed forms, laws, and what must be exactly nothing."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from constellation.config import Kernel
from constellation.coordizer.tokenizer import Tokenizer
from constellation.decoding.basins import Basins
from constellation.errors import ConfigError
from constellation.experiments.statistics import auroc
from constellation.geometry.semantic import SemanticFisherMetric, worst_triangle
from constellation.kernel.model import KernelLM
from constellation.train.coherence import CoherenceTracker, units
from router.answer.generation import generation_telemetry

CHAPTER = "one comes first. two follows it. three is third. four ends it. "
TOKENIZER = Tokenizer.train([CHAPTER * 50], 320)


@given(st.text("ab .!?\n;", max_size=60))
@settings(max_examples=200, deadline=None)
def test_units_joined_are_the_text(text):
    assert "".join(units(text)) == text


@pytest.fixture(scope="module")
def tracker():
    """A model that has learnt that the four sentences follow each other."""
    model = KernelLM(Kernel(vocab_size=320, width=32, layers=2, heads=2, hidden=88, context=48), seed=0)
    stream = torch.tensor(TOKENIZER.encode(CHAPTER * 300))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        at = torch.randint(len(stream) - 49, (16, 1), generator=generator) + torch.arange(49)
        x = stream[at]
        loss = torch.nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return CoherenceTracker(model, TOKENIZER)


def test_order_gains_shuffled_text_does_not_and_repetition_gains_exactly_nothing(tracker):
    real = tracker.judge(CHAPTER)
    parts = units(CHAPTER)
    shuffled = tracker.judge("".join(parts[i] for i in (2, 0, 3, 1)))
    repeated = tracker.judge(parts[0] * 4)
    assert real.gain > 0.05 and real.gain > shuffled.gain + 0.05
    assert repeated.gain == 0.0 and repeated.repetition > real.repetition


def test_a_text_of_one_unit_or_of_none_has_no_order(tracker):
    assert tracker.judge("no end here").gain == 0.0
    assert dataclasses.asdict(tracker.judge("")) == {
        "gain": 0.0, "surprisal": 0.0, "distinct": 1.0, "repetition": 0.0, "units": 0,
    }  # fmt: skip


def test_the_same_text_is_judged_the_same(tracker):
    assert tracker.judge(CHAPTER, seed=4) == tracker.judge(CHAPTER, seed=4)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=8), st.lists(st.integers(-3, 3), min_size=1, max_size=8))
def test_auroc_counts_pairs(a, b):
    wanted = sum((x > y) + 0.5 * (x == y) for x in a for y in b) / (len(a) * len(b))
    assert auroc(a, b) == pytest.approx(wanted)
    assert auroc(a, b) + auroc(b, a) == pytest.approx(1)


P = np.full((40, 4), 0.0)
P[np.arange(40), np.arange(40) % 4] = 1
BASINS = Basins(P, np.zeros((4, 4)))


def test_telemetry_of_a_loop_and_of_new_tokens():
    loop = generation_telemetry([16, 17, 18, 19], [16, 17, 18, 19] * 3, BASINS)
    new = generation_telemetry([16, 17, 18, 19], [20, 24, 28, 32], BASINS)
    # of 15 4-grams behind the prompt's own the first three are new: they turn the prompt's end into its beginning
    assert loop.repetition == pytest.approx(9 / 12) and new.repetition == 0.0
    assert loop.basins == 4 and new.basins == 1
    assert loop.stride_rad == pytest.approx(np.pi) and new.stride_rad == pytest.approx(np.pi / 4)
    assert new.distinct_1 == 1.0 and loop.distinct_1 == 4 / 12


def test_telemetry_without_coordinates_or_tokens_has_no_numbers_for_them():
    bare = generation_telemetry([16], [17, 18], None)
    assert bare.flow is None and bare.stride_rad is None and bare.basins is None and bare.nats_per_token is None
    assert generation_telemetry([16], [], BASINS).basins is None
    assert generation_telemetry([16], [17, 18], None, [-1.0, -2.0]).nats_per_token == 1.5


def points(count, seed):
    generator = np.random.default_rng(seed)
    root = np.sqrt(generator.dirichlet(np.ones(5), count))
    distance = 2 * np.arccos((root @ root.T).clip(-1, 1))
    np.fill_diagonal(distance, 0)
    related = np.triu(generator.random((count, count)) ** 3, 1)
    return (distance + distance.T) / 2, related + related.T


@given(st.integers(1, 14), st.integers(0, 2**31), st.floats(0, 20))
@settings(max_examples=60, deadline=None)
def test_the_closure_is_a_metric_and_the_largest_below_the_warped_distance(count, seed, warp):
    distance, related = points(count, seed)
    metric = SemanticFisherMetric(distance, related, warp)
    closed = metric.closed_NN
    assert worst_triangle(closed) <= 1e-12
    assert (closed <= metric.warped_NN + 1e-12).all() and np.allclose(closed, closed.T) and (np.diag(closed) == 0).all()
    assert (closed[~np.eye(count, dtype=bool)] > 0).all()
    # any metric below the warped distance is below the closure: Fisher-Rao / (1 + warp) is one
    assert (distance / (1 + warp) <= closed + 1e-9).all()


def test_the_warped_distance_itself_is_no_metric():
    distance, related = points(12, 0)
    metric = SemanticFisherMetric(distance, related, 5.0)
    assert worst_triangle(metric.warped_NN) > 0 and metric.shortened > 0
    flat = SemanticFisherMetric(distance, related, 0.0)
    np.testing.assert_allclose(flat.closed_NN, distance, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"warp": -1.0}, "warp"),
        ({"warp": float("inf")}, "warp"),
        ({"relation": 2.0}, "from 0 to 1"),
        ({"n": 3}, "both must"),
    ],
)
def test_wrong_relations_are_refused(change, said):
    distance, related = points(4, 1)
    related = related * change.get("relation", 1.0) if "relation" not in change else np.full((4, 4), 2.0)
    with pytest.raises(ConfigError, match=said):
        SemanticFisherMetric(distance[: change.get("n", 4)], related, change.get("warp", 1.0))
