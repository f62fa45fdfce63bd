"""Batches: the laws of a pure, exactly-once data order, against a naive reading of the same definition."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from constellation.data.batches import Batches, permute
from constellation.errors import ConfigError, DataError


def stream(n: int) -> SimpleNamespace:
    """N tokens, each its own place, so that a token says where it was read."""
    return SimpleNamespace(tokens=np.arange(n, dtype=np.uint32))


def naive_windows(tokens, segments, context, batches, step):
    """The stream written out, each window cut from it with Python slices."""
    ring = [int(t) for start, end in segments for t in tokens[start:end]]
    for start in batches.starts(step):
        yield [ring[(start + i) % len(ring)] for i in range(context + 1)]


segment_lists = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 60)), min_size=1, max_size=6).map(
    lambda pairs: [(start, min(start + length, 300)) for start, length in pairs]
)


@given(segment_lists, st.integers(1, 20), st.integers(1, 7), st.integers(0, 2**40), st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_equals_the_naive_oracle_and_respects_the_segments(segments, context, batch, seed, step):
    cache = stream(300)
    if all(start == end for start, end in segments):
        with pytest.raises(DataError, match="every segment is empty"):
            Batches(cache, np.array(segments), context, batch, seed)
        return
    batches = Batches(cache, np.array(segments), context, batch, seed)
    x, y = batches.at(step)
    assert x.dtype == y.dtype == np.int64 and x.shape == y.shape == (batch, context)
    wanted = np.array(list(naive_windows(cache.tokens, segments, context, batches, step)))
    assert (x == wanted[:, :-1]).all() and (y == wanted[:, 1:]).all()
    inside = {t for start, end in segments for t in range(start, end)}
    assert set(x.ravel().tolist()) | set(y.ravel().tolist()) <= inside


@given(st.integers(1, 400), st.integers(1, 30), st.integers(1, 9), st.integers(0, 2**64 - 1))
@settings(max_examples=50, deadline=None)
def test_every_window_once_an_epoch(num_tokens, context, batch, seed):
    batches = Batches(stream(num_tokens), None, context, batch, seed)
    steps = 3 * batches.steps_per_epoch + 1
    starts = np.concatenate([batches.starts(step) for step in range(steps)])
    for epoch in range(steps * batch // batches.windows):
        mine = starts[epoch * batches.windows : (epoch + 1) * batches.windows]
        assert len(set(mine.tolist())) == batches.windows
        places = set(mine.tolist())  # on one grid, wherever on the ring it begins
        assert any({(shift + w * context) % num_tokens for w in range(len(mine))} == places for shift in places)


def test_each_target_at_most_once_an_epoch_and_all_but_a_remainder_seen():
    batches = Batches(stream(1003), None, context=10, batch=4, seed=5)
    assert batches.windows == 100 and batches.steps_per_epoch == 25
    for epoch in range(3):
        steps = range(epoch * 25, (epoch + 1) * 25)
        targets = np.concatenate([batches.at(step)[1].ravel() for step in steps])
        assert len(targets) == len(set(targets.tolist())) == 1000


def test_y_is_x_shifted_by_one():
    x, y = Batches(stream(5000), None, 32, 8, 1).at(77)
    assert (x[:, 1:] == y[:, :-1]).all()
    assert ((y - x) % 5000 == 1).all()


def test_a_step_is_a_pure_function_of_seed_and_step():
    one, other = Batches(stream(5000), None, 16, 8, 9), Batches(stream(5000), None, 16, 8, 9)
    wanted = [one.at(step) for step in range(50)]
    for step in (49, 0, 17, 17, 3):
        for a, b in zip(other.at(step), wanted[step]):
            assert (a == b).all()


def test_seeds_and_epochs_differ():
    batches = [Batches(stream(5000), None, 16, 8, seed) for seed in range(20)]
    orders = {tuple(b.starts(step).tolist()) for b in batches for step in (0, b.steps_per_epoch)}
    assert len(orders) == 40


def test_far_steps_are_reached_without_the_steps_before():
    x, y = Batches(stream(100_000), None, 16, 8, 0).at(10**15)  # replaying them would take centuries
    assert ((y - x) % 100_000 == 1).all()


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
@settings(max_examples=100, deadline=None)
def test_the_permutation_is_a_bijection(size, key):
    image = permute(np.arange(size), size, np.array([key], dtype=np.uint64))
    assert sorted(image.tolist()) == list(range(size))


def test_the_permutation_works_on_sizes_that_could_not_be_listed():
    ranks = np.arange(10_000)
    image = permute(ranks, 10**15 + 37, np.array([3], dtype=np.uint64))
    assert len(set(image.tolist())) == len(ranks) and image.min() >= 0 and image.max() < 10**15 + 37
    assert abs(image.mean() / 10**15 - 0.5) < 0.02  # spread over the whole range


def test_the_permutation_looks_random():
    """Neighbours are not kept together, and each place is reached about equally often over the keys."""
    size, keys = 64, 2000
    images = np.array([permute(np.arange(size), size, np.array([k], dtype=np.uint64)) for k in range(keys)])
    expected = keys / size
    for rank in (0, 1, 31, 63):
        chi2 = ((np.bincount(images[:, rank], minlength=size) - expected) ** 2 / expected).sum()
        assert chi2 < 63 + 6 * np.sqrt(2 * 63)  # mean and six standard deviations of chi-squared, 63 degrees
    followed = ((images[:, 1:] - images[:, :-1]) % size == 1).mean()
    assert abs(followed - 1 / size) < 0.005


def test_a_stream_shorter_than_a_window_is_read_round_and_round():
    x, y = Batches(stream(3), None, context=8, batch=2, seed=0).at(4)
    assert ((y - x) % 3 == 1).all()
    x, y = Batches(stream(1), None, context=4, batch=1, seed=0).at(0)
    assert (x == 0).all() and (y == 0).all()


@pytest.mark.parametrize("segments", [[[0, 101]], [[-1, 5]], [[7, 3]]])
def test_refuses_segments_outside_the_cache(segments):
    with pytest.raises(ConfigError, match="100 tokens"):
        Batches(stream(100), np.array(segments), 4, 1, 0)


@pytest.mark.parametrize("shape", [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_refuses_impossible_shapes(shape):
    with pytest.raises(ConfigError, match="context="):
        Batches(stream(100), None, *shape)


def test_no_segments_at_all_is_no_data():
    with pytest.raises(DataError, match="give this model some documents"):
        Batches(stream(100), np.zeros((0, 2), dtype=np.int64), 4, 1, 0)
