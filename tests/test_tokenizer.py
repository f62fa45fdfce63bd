"""Tokenizer: lossless on any bytes, the fixed layout of ids, and files that are whole or refused."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from constellation.coordizer.tokenizer import FIRST_BYTE, FIRST_MERGE, SPECIALS, Tokenizer
from constellation.errors import ArtifactError, ConfigError

TEXTS = [
    "def square(x):\n    return x * x\n\n\ndef cube(x):\n    return x * square(x)\n" * 3,
    "The rain in Spain stays mainly in the plain; 1234567 drops of it, said she: Ça va, l'été — 日本語.\n" * 3,
    '{"key": [1, 2, 3], "other key": null}\r\n\r\n' * 4,
]
HOSTILE = [
    b"", b"\x00", bytes(range(256)), b"\xff\xfe\xfd", b"ok \xc3( \xe2\x82 end\xf0\x9f", b"\xed\xa0\x80", b"\xc0\x80",
    b" " * 5000 + b"\n", b"\n" * 5000, b"a" * 5000, "\u0301\u200d\ufeff\U0010ffff".encode(), b"\r\n\r \t\x0b\x0c",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 360)


@pytest.mark.parametrize("data", HOSTILE, ids=lambda d: repr(d[:12]))
def test_hostile_bytes_come_back(tokenizer, data):
    assert tokenizer.decode(tokenizer.encode(data)) == data


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_bytes_come_back(tokenizer, data):
    ids = tokenizer.encode(data)
    assert tokenizer.decode(ids) == data
    assert b"".join(tokenizer.token_bytes[i] for i in ids) == data
    assert all(FIRST_BYTE <= i < tokenizer.vocab_size for i in ids)


@given(st.text(st.characters(), max_size=100))
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back_lone_surrogates_included(tokenizer, text):
    data = text.encode("utf-8", "surrogatepass")
    assert tokenizer.encode(text) == tokenizer.encode(data)
    assert tokenizer.decode(tokenizer.encode(text)) == data


@given(st.lists(st.one_of(st.text(max_size=40), st.binary(max_size=40)), max_size=6))
@settings(max_examples=60, deadline=None)
def test_a_batch_is_its_texts_one_by_one(tokenizer, texts):
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(t) for t in texts]


def test_the_layout_of_ids(tokenizer):
    assert tokenizer.eos == 0 and SPECIALS[0] == "<|eos|>" and len(SPECIALS) == 16
    assert tokenizer.token_bytes[:16] == [b""] * 16
    assert tokenizer.token_bytes[16:272] == [bytes([b]) for b in range(256)]
    assert len(tokenizer.token_bytes) == tokenizer.vocab_size == 360
    assert len(set(tokenizer.token_bytes[16:])) == 360 - 16  # no two tokens are the same bytes
    assert all(len(b) > 1 for b in tokenizer.token_bytes[272:])


def test_bytes_that_are_not_utf8_are_single_byte_tokens(tokenizer):
    assert tokenizer.encode(b"\xff\xc3") == [FIRST_BYTE + 0xFF, FIRST_BYTE + 0xC3]
    inside = tokenizer.encode(b"return\xffreturn")
    word = tokenizer.encode("return")
    assert inside == [*word, FIRST_BYTE + 0xFF, *word]


@pytest.mark.parametrize("special", SPECIALS)
def test_specials_in_a_text_are_text(tokenizer, special):
    for text in (special, f"a {special} b", special * 3):
        ids = tokenizer.encode(text)
        assert min(ids) >= FIRST_BYTE and tokenizer.decode(ids) == text.encode()
        assert tokenizer.encode_batch([text]) == [ids]


def test_specials_are_not_learnt_even_from_texts_full_of_them():
    learnt = Tokenizer.train(["<|eos|><|eos|> <|reserved_3|>"] * 50, 320)
    assert b"<|eos|>" not in learnt.token_bytes and min(learnt.encode("<|eos|>")) >= FIRST_BYTE


def test_two_merges_may_make_the_same_token():
    """Learnt merges (x, yz) and (xy, z) both spell xyz: one id, or ids would leave the vocabulary asked for."""
    twice = Tokenizer([("x", "y"), ("y", "z"), ("x", "yz"), ("xy", "z"), ("xyz", "x")])
    assert twice.vocab_size == FIRST_MERGE + 4 and twice.token_bytes[-2:] == [b"xyz", b"xyzx"]
    assert twice.decode(twice.encode("xyz" * 5)) == b"xyz" * 5


def test_specials_decode_to_nothing(tokenizer):
    assert tokenizer.decode([0, *tokenizer.encode("x"), 15, 0]) == b"x"


def test_merges_are_learnt(tokenizer):
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 2


def test_the_same_texts_give_the_same_tokenizer_in_any_order_and_process(tokenizer):
    assert Tokenizer.train(TEXTS[::-1], 360).hash == tokenizer.hash
    code = (
        "import json, sys; from constellation.coordizer.tokenizer import Tokenizer;"
        "print(Tokenizer.train(json.load(sys.stdin), 360).hash)"
    )
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "7"}
    other = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(TEXTS), env=env, text=True, capture_output=True
    )
    assert other.stdout.strip() == tokenizer.hash, other.stderr
    assert Tokenizer.train(TEXTS, 359).hash != tokenizer.hash


def test_a_small_corpus_leaves_the_vocabulary_unfilled():
    small = Tokenizer.train(["abab"], 5000)
    assert FIRST_MERGE <= small.vocab_size < 300
    assert Tokenizer.train([], 272).vocab_size == FIRST_MERGE


@pytest.mark.parametrize("size", [0, 256, 271])
def test_a_vocabulary_without_room_for_the_bytes_is_refused(size):
    with pytest.raises(ConfigError, match=f"vocab_size={size}: must be at least 272"):
        Tokenizer.train(TEXTS, size)


@pytest.mark.parametrize("bad", [-1, 360, 10**9])
def test_ids_outside_the_vocabulary_are_refused(tokenizer, bad):
    with pytest.raises(ConfigError, match=str(bad)):
        tokenizer.decode([20, bad])


def test_save_and_load_is_the_identity(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (again.hash, again.vocab_size, again.token_bytes) == (tokenizer.hash, 360, tokenizer.token_bytes)
    assert all(again.encode(t) == tokenizer.encode(t) for t in (*TEXTS, *HOSTILE))
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["again.json", "tokenizer.json"]


def test_the_file_is_readable_by_the_library_alone(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    engine = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        assert engine.encode(text).ids == tokenizer.encode(text)
        assert engine.decode(tokenizer.encode(text)) == text
    assert engine.token_to_id("<|eos|>") == 0 and engine.get_vocab_size() == 360


def test_a_pickled_copy_is_the_same(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.hash == tokenizer.hash and copy.encode("<|eos|> return") == tokenizer.encode("<|eos|> return")


@pytest.mark.parametrize("part", [0, 0.3, 0.7, 0.999])
def test_a_truncated_file_is_refused(tokenizer, tmp_path, part):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        Tokenizer.load(path)


def test_a_changed_byte_is_refused_or_changes_nothing(tokenizer, tmp_path):
    """Law: no single changed byte gives another tokenizer."""
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    data = path.read_bytes()
    refused = 0
    for place in range(7, len(data), len(data) // 150):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        try:
            assert Tokenizer.load(path).hash == tokenizer.hash
        except ArtifactError:
            refused += 1
    assert refused > 30  # the rest fell on white space or on fields that decide nothing


@pytest.mark.parametrize(
    "content", ["{}", "[]", "3", '{"model": {"merges": [["a"]]}}', '{"model": {"merges": [["q", "é"]]}}']
)
def test_a_foreign_file_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_another_projects_tokenizer_is_refused(tmp_path):
    engine = tokenizers.Tokenizer(tokenizers.models.BPE())
    engine.train_from_iterator(TEXTS, tokenizers.trainers.BpeTrainer(vocab_size=300, show_progress=False))
    engine.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ArtifactError, match="not a tokenizer of this project"):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"nowhere\.json: cannot be read"):
        Tokenizer.load(tmp_path / "nowhere.json")


def test_a_forked_child_encodes_without_warning_or_deadlock():
    code = (
        "import os, sys; from constellation.coordizer.tokenizer import Tokenizer;"
        "t = Tokenizer.train(['some words of text'] * 9, 300);"
        "want = t.encode_batch(['some words'] * 99); pid = os.fork();"
        "same = t.encode_batch(['some words'] * 99) == want;"
        "os._exit(not same) if pid == 0 else sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    env = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    quiet = "ignore:This process:DeprecationWarning"  # of fork itself, from Python 3.12 on
    done = subprocess.run([sys.executable, "-W", quiet, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
