"""Hashed trigram counts: the public hash is pinned, counts are additive, windows lose nothing."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from router.decide.counts import count, ranks, trigram, trigrams, windows

BINS = 4096
texts = st.lists(st.binary(max_size=300), max_size=6)


def test_the_public_hash_never_changes():
    """A saved router means nothing under another hash: these values are part of the file format."""
    assert trigrams(b"the quick", BINS).tolist() == [2307, 2159, 3319, 1479, 1876, 2455, 2956]
    assert trigrams(b"th", BINS).tolist() == []


@settings(deadline=None)
@given(st.binary(min_size=3, max_size=3), st.sampled_from([1, 7, 240, 4096, 65_536, 1 << 20]))
def test_one_trigram_at_a_time_gives_the_same_bin(three, bins):
    assert trigram(*three, bins) == trigrams(three, bins)[0]


def test_bins_are_filled_evenly_by_all_trigrams_of_ascii():
    a = np.arange(32, 127, dtype=np.uint8)
    grid = np.stack(np.meshgrid(a, a, a, indexing="ij"), -1).reshape(-1, 3)
    filled = np.bincount(
        np.concatenate([trigrams(row.tobytes(), BINS)[::3] for row in grid.reshape(95, -1)]), minlength=BINS
    )
    mean = len(grid) / BINS  # a random hash gives Poisson counts
    assert abs(filled.var() / mean - 1) < 0.15


@settings(deadline=None)
@given(texts)
def test_counts_are_those_of_a_loop_over_trigrams(some):
    counted = count(some, BINS).toarray()
    naive = np.zeros((len(some), BINS))
    for i, text in enumerate(some):
        for j in range(len(text) - 2):
            naive[i, trigram(*text[j : j + 3], BINS)] += 1
    assert (counted == naive).all()


def test_many_texts_are_counted_without_a_table_of_all():
    rng = np.random.default_rng(0)
    some = [rng.bytes(size) for size in rng.integers(0, 40, 1500).tolist()]
    together = count(some, BINS)
    assert (together != sparse.vstack([count([text], BINS) for text in some])).nnz == 0
    assert together.has_sorted_indices and together.sum() == sum(max(0, len(text) - 2) for text in some)


@settings(deadline=None)
@given(texts, st.integers(1, 70))
def test_windows_add_up_to_every_prefix(some, every):
    cut = windows(some, every, BINS)
    running = cut.running(cut.matrix(BINS).toarray())
    assert cut.size.sum() == sum(map(len, some))
    for i, text in enumerate(some):
        for w, seen in enumerate(running[cut.first[i] : cut.first[i + 1]]):
            assert (seen == count([text[: (w + 1) * every]], BINS).toarray()).all()


@settings(deadline=None)
@given(st.binary(min_size=2, max_size=200), st.binary(min_size=2, max_size=200))
def test_counts_are_additive_but_for_the_two_trigrams_across_the_seam(a, b):
    whole, parts = count([a + b], BINS).toarray()[0], count([a, b], BINS).toarray().sum(0)
    seam = count([a[-2:] + b[:2]], BINS).toarray()[0]
    assert (whole == parts + seam).all()


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), max_size=60), st.sampled_from([0, 70_000]))
def test_ranks_count_earlier_occurrences(values, offset):
    bins = np.array(values, dtype=np.int32) + offset
    assert ranks(bins).tolist() == [values[:i].count(v) for i, v in enumerate(values)]
