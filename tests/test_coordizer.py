"""The coordizer: merges equal to the library's and to the slow loop's, every score lossless, killed trainings whole."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from constellation.config import Coordizer as Settings
from constellation.coordizer import coordinates, reading, scores, trainer
from constellation.coordizer.merging import Merger
from constellation.coordizer.pieces import Pieces, count_pieces
from constellation.coordizer.sample import Sample
from constellation.coordizer.tokenizer import PATTERNS, PHRASES, Tokenizer, splitter
from constellation.data.document import Document
from constellation.decoding.compiled import available
from constellation.errors import ArtifactError, ConfigError

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "then",
    "that",
    "other",
    "cat",
    "ate",
    "what",
    "the",
    "first",
    "one",
    "had",
    "left;",
    "it",
    "was",
    "1234567",
    "o'clock,",
    "né?",
]
RANDOM = np.random.default_rng(3)
TEXTS = [" ".join(RANDOM.choice(WORDS, 60)) + ".\n\n\tdef f(x):\r\n    return x*2 \n" for _ in range(40)]
DOCUMENTS = [Document(text, domain="ab"[i % 2]) for i, text in enumerate(TEXTS)]
WAYS = [False, pytest.param(True, marks=pytest.mark.skipif(not available(), reason="no C compiler"))]


def pieces_of(texts, native=None):
    return count_pieces([(text, 0) for text in texts], 1, native=native)


@pytest.mark.parametrize("native", WAYS)
@pytest.mark.parametrize("vocabulary", [300, 420])
def test_frequency_is_the_librarys_bpe_token_for_token(native, vocabulary):
    merger = Merger(pieces_of(TEXTS), native=native)
    merger.round(vocabulary - 272, fewest=2)
    assert Tokenizer(merger.named_merges()).hash == Tokenizer.train(TEXTS, vocabulary).hash


@given(st.lists(st.text("ab \n.1é", max_size=60), min_size=1, max_size=6), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_frequency_is_the_librarys_bpe_on_texts_full_of_repetition(texts, merges):
    merger = Merger(pieces_of(texts))
    merger.round(merges, fewest=2)
    assert Tokenizer(merger.named_merges()).hash == Tokenizer.train(texts, 272 + merges).hash


@pytest.mark.skipif(not available(), reason="no C compiler")
@given(st.lists(st.text("abc \n", min_size=1, max_size=50), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_the_library_in_c_makes_the_slow_loops_merges_with_any_weights(texts, seed):
    fast, slow = (Merger(pieces_of(texts), native=native) for native in (True, False))
    for round_number in range(3):
        pairs = fast.pairs()
        assert all(np.array_equal(a, b) for a, b in zip(vars(pairs).values(), vars(slow.pairs()).values(), strict=True))
        weight = np.random.default_rng(seed + round_number).integers(0, 4, len(pairs.count_P)) / 2.0
        assert fast.round(5, 1, pairs, weight) == slow.round(5, 1, pairs, weight)
        assert fast.merges == slow.merges
        assert fast.words() == slow.words()
        assert np.array_equal(fast.counts(), slow.counts())


@given(st.lists(st.text(max_size=80), max_size=5))
@settings(max_examples=200, deadline=None)
def test_pieces_are_those_that_the_tokenizer_cuts(texts):
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    for pattern in PATTERNS:
        found = count_pieces([(text, 0) for text in texts], 1, pattern)
        slow = count_pieces([(text, 0) for text in texts], 1, pattern, native=False)
        assert found.texts == slow.texts
        assert np.array_equal(found.seen_WG, slow.seen_WG)
        assert found.num_bytes == sum(len(text.encode()) for text in texts)


@given(st.text("ab \t\r\n'-1२é日\u00a0\u2028\u0301", max_size=40))
@settings(max_examples=300, deadline=None)
def test_a_text_is_cut_where_the_pattern_cuts_it(text):
    for pattern in PATTERNS:
        cuts = sorted(text[a:b].encode() for _, (a, b) in splitter(pattern).pre_tokenize_str(text))
        found = count_pieces([(text, 0)], 1, pattern)
        assert sorted(t for t, n in zip(found.texts, found.seen_WG[:, 0]) for _ in range(n)) == cuts


def test_groups_are_counted_apart():
    found = count_pieces([("a b", 0), (" b b", 1)], 2)
    assert found.texts == [b" b", b"a"]
    assert found.seen_WG.tolist() == [[1, 2], [1, 0]]


@pytest.mark.parametrize("native", WAYS)
def test_making_merges_again_gives_the_symbols_that_they_made(native):
    merger, again = Merger(pieces_of(TEXTS), native=native), Merger(pieces_of(TEXTS), native=native)
    merger.round(80, fewest=2)
    again.encode_pieces(merger.merges)
    assert again.words() == merger.words()


def naive_weight(name, merger, pairs):
    """The formulas of scores.py, pair by pair."""
    n, total = merger.counts().tolist(), int(merger.counts().sum())

    def f(x):
        return x * np.log(x) if x > 0 else 0.0

    out = []
    for a, b, ab in zip(pairs.left_P.tolist(), pairs.right_P.tolist(), pairs.count_P.tolist(), strict=True):
        if name == "pmi":
            out.append(max(0.0, np.log(ab * total / (n[a] * n[b]))))
        else:
            after = {**dict(enumerate(n)), "ab": ab}
            for one in (a, b):
                after[one] -= ab
            before_l = sum(map(f, n)) - f(total)
            out.append((sum(map(f, after.values())) - f(total - ab) - before_l) / ab)
    return np.array(out)


@pytest.mark.parametrize("name", ["pmi", "unigram_gain"])
def test_weights_are_their_formulas(name):
    merger = Merger(pieces_of(TEXTS))
    merger.round(20, fewest=2)
    pairs = merger.pairs()
    apart = pairs.left_P != pairs.right_P
    found = scores.SCORES[name].weigh(merger, pairs, Sample([], []))
    np.testing.assert_allclose(found[apart], naive_weight(name, merger, pairs)[apart], rtol=1e-9, atol=1e-9)


def test_parity_merges_for_the_domain_that_is_compressed_worst():
    merger = Merger(count_pieces([("xyxyxyxy", 0), ("qwer", 1)], 2))
    merger.round(3, fewest=2)
    pairs = merger.pairs()
    found = scores.parity(merger, pairs, Sample([], []))
    qw = [
        i
        for i, (a, b) in enumerate(zip(pairs.left_P, pairs.right_P))
        if merger.spelling[a] + merger.spelling[b] == b"qw"
    ]
    assert found[qw].tolist() == [1.0]
    assert found.sum() == 3.0  # qw, we, er: pairs of the other domain weigh nothing


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Every score's coordizer of the same small corpus."""
    root = tmp_path_factory.mktemp("coordizers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "STEPS", 20)
        for name in scores.SCORES:
            for _ in trainer.train(DOCUMENTS, "corpus", root / name, 330, Settings(score=name)):
                pass
    return root


@pytest.mark.parametrize("name", scores.SCORES)
def test_every_score_is_lossless_and_loads_elsewhere_with_equal_ids(name, made):
    tokenizer = trainer.load(made / name).tokenizer
    assert 280 < tokenizer.vocab_size <= 330
    theirs = tokenizers.Tokenizer.from_file(str(made / name / "tokenizer.json"))
    theirs.encode_special_tokens = True
    for data in (*(text.encode() for text in TEXTS[:3]), b"", bytes(range(256)), b"\xff\xfe ok \xc3(", b"\r\n\r \t"):
        assert tokenizer.decode(tokenizer.encode(data)) == data
    for text in TEXTS[:5]:
        assert theirs.encode(text).ids == tokenizer.encode(text)


def test_transformers_loads_one_with_equal_ids(made):
    transformers = pytest.importorskip("transformers")
    for name in ("superword", "pmi"):
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(made / name / "tokenizer.json"))
        ours = trainer.load(made / name).tokenizer
        assert [theirs(text)["input_ids"] for text in TEXTS[:5]] == [ours.encode(text) for text in TEXTS[:5]]


@given(st.binary(max_size=120))
@settings(max_examples=100, deadline=None)
def test_phrases_are_lossless_on_any_bytes(data):
    tokenizer = phrases()
    assert tokenizer.decode(tokenizer.encode(data)) == data


_HELD: list[Tokenizer] = []


def phrases() -> Tokenizer:
    if not _HELD:
        _HELD.append(trainer.learnt(DOCUMENTS, 400, Settings(score="superword", words=0.5)).tokenizer)
    return _HELD[0]


def test_superword_tokens_cross_spaces_and_others_do_not(made):
    assert any(b" " in text.strip() for text in phrases().token_bytes)
    assert phrases().pattern == PHRASES
    for name in set(scores.SCORES) - {"superword"}:
        assert not any(b" " in text.strip() for text in trainer.load(made / name).tokenizer.token_bytes), name


@pytest.mark.parametrize("name", ["pmi", "basin", "superword", pytest.param("kernel", marks=pytest.mark.slow)])
def test_the_same_corpus_gives_the_same_bytes(name, made, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "STEPS", 20)
    for _ in trainer.train(DOCUMENTS, "corpus", tmp_path / "again", 330, Settings(score=name)):
        pass
    for file in ("tokenizer.json", "coordinates.npy", "coordizer.json"):
        assert (tmp_path / "again" / file).read_bytes() == (made / name / file).read_bytes()


@pytest.mark.parametrize("name", ["pmi", "parity"])
def test_a_training_that_is_left_goes_on_to_the_same_bytes(name, made, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "SAVE_S", 0.0)
    steps = trainer.train(DOCUMENTS, "corpus", tmp_path / "left", 330, Settings(score=name))
    for _ in range(4):
        next(steps)
    steps.close()
    assert (tmp_path / "left" / "learning" / "round.json").exists()
    for _ in trainer.train(DOCUMENTS, "corpus", tmp_path / "left", 330, Settings(score=name)):
        pass
    for file in ("tokenizer.json", "coordinates.npy", "coordizer.json"):
        assert (tmp_path / "left" / file).read_bytes() == (made / name / file).read_bytes()


def command(*words, **options):
    return subprocess.run([sys.executable, "-m", "constellation", "coordizer", *map(str, words)], text=True, **options)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a").mkdir()
    for i, text in enumerate(TEXTS):
        (folder / "a" / f"{i}.txt").write_text(text)
    return folder


def test_sigkill_and_resume_give_the_same_bytes(corpus, tmp_path):
    words = ("train", "--corpus", corpus, "--vocab", 300, "--score", "attention", "--out")
    command(*words, tmp_path / "whole", check=True, stdout=subprocess.DEVNULL)
    begun = [sys.executable, "-m", "constellation", "coordizer", *map(str, words), str(tmp_path / "killed")]
    process = subprocess.Popen(begun, stdout=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "learning" / "words.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / trainer.MANIFEST).exists()
    command(*words, tmp_path / "killed", "--resume", check=True, stdout=subprocess.DEVNULL)
    for file in ("tokenizer.json", "coordinates.npy", "coordizer.json"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert not (tmp_path / "killed" / "learning").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--vocab", "100"], "100 is not in the range x>=272"),
        (["--score", "magic"], "'magic' is not one of"),
        (["--corpus", "/nowhere"], "corpus /nowhere does not exist"),
        (["train.tokens=5"], "train.tokens: a coordizer is trained with settings coordizer.* and data.* alone"),
        (["--score", "pmi", "coordizer.score=parity"], "say one of them"),
    ],
)
def test_wrong_requests_are_told_in_one_line(words, said, tmp_path):
    found = command("train", "--out", tmp_path / "new", *words, capture_output=True)
    assert found.returncode == 2 and said in found.stderr and found.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_another_request_in_the_same_folder_is_refused(made, tmp_path):
    steps = trainer.train(DOCUMENTS, "corpus", tmp_path / "one", 330, Settings(score="pmi"))
    next(steps)
    steps.close()
    with pytest.raises(ConfigError, match="was begun with vocabulary=330, not 340"):
        next(trainer.train(DOCUMENTS, "corpus", tmp_path / "one", 340, Settings(score="pmi")))
    with pytest.raises(ConfigError, match="exists already"):
        trainer.check(made / "pmi", resume=False)


def test_a_damaged_coordizer_is_named(made, tmp_path):
    import shutil

    shutil.copytree(made / "pmi", tmp_path / "pmi")
    data = bytearray((tmp_path / "pmi" / "coordinates.npy").read_bytes())
    data[-1] ^= 1
    (tmp_path / "pmi" / "coordinates.npy").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"coordinates\.npy: missing or not what"):
        trainer.load(tmp_path / "pmi")
    with pytest.raises(ConfigError, match="holds no coordizer"):
        trainer.load(tmp_path)


def test_a_manifest_says_how_it_was_made(made):
    manifest = json.loads((made / "superword" / trainer.MANIFEST).read_text())
    assert manifest["score"] == "superword" and manifest["corpus"] == "corpus" and manifest["vocabulary"] == 330
    assert trainer.load(made / "superword").coordinates_VN.shape == (manifest["tokens"], 64)


def test_neighbours_by_learnt_coordinates_keep_like_company_and_shuffled_ones_do_not():
    """Tokens of two kinds, each standing among its own: a neighbour is of the same kind."""
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 20, 400) + 20 * (i % 2) for i in range(40)]
    z = coordinates.coordinates(documents[:20], 40)
    found = coordinates.neighbours(z, documents[20:])
    assert found.tokens == 40 and found.learned > 1.5 * found.shuffled
    assert np.isnan(coordinates.neighbours(z[:5], [np.arange(5)]).learned)


def test_company_is_ppmi_pair_by_pair():
    documents = [np.array([0, 1, 2, 1, 0, 3]), np.array([3, 3])]
    counts = np.zeros((4, 4))
    for d in documents:
        for i in range(len(d)):
            for j in range(len(d)):
                if 0 < abs(i - j) <= coordinates.WINDOW:
                    counts[d[i], d[j]] += 1
    total, sums = counts.sum(), counts.sum(1)
    with np.errstate(divide="ignore"):
        wanted = np.log(counts * total / np.outer(sums, sums)).clip(min=0)
    np.testing.assert_allclose(coordinates.company(documents, 4).toarray(), wanted, atol=1e-12)


def test_kernel_scores_are_weights_of_pairs_that_stand_in_the_corpus(monkeypatch):
    monkeypatch.setattr(reading, "STEPS", 8)
    sample, merger = Sample.of(TEXTS), Merger(pieces_of(TEXTS))
    pairs = merger.pairs()
    looks = scores.weights(scores.SCORES["attention"], merger, pairs, sample)
    gains = scores.weights(scores.SCORES["kernel"], merger, pairs, sample)
    assert ((looks >= 0) & (looks <= 1)).all() and looks.max() > 0
    assert 0 < (gains > 0).sum() <= 2 * scores.round_of(scores.SCORES["kernel"], merger.num_tokens)


def test_no_text_gives_the_bytes_alone(tmp_path):
    found = trainer.learnt([Document("")], 300, Settings(score="pmi")).tokenizer
    assert found.vocab_size == 272 and found.decode(found.encode("any")) == b"any"
    assert Merger(Pieces([], np.zeros((0, 1), np.int64))).round(5, 2) == 0


def test_settings_of_the_group_are_ranges():
    with pytest.raises(ConfigError, match=r"words=1\.5"):
        from constellation.settings import check

        check(replace(Settings(), words=1.5))
