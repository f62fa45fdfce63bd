"""TokenCache: written whole or not at all, reused, checked, and aligned with bytes."""

import json
import os
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from constellation.coordizer.tokenizer import Tokenizer
from constellation.data.cache import build_cache, open_cache
from constellation.data.corpus import Document
from constellation.errors import ArtifactError, ConfigError, DataError, RunError

DOCUMENTS = [
    Document("def f(x):\n    return x\n", "python"),
    Document("Ça va, l'été — 日本語", None),
    Document("x", "single"),
    Document("the rain in spain and the rain again\n" * 40, "fiction"),
]
FILES = ["tokens.bin", "offsets.npy", "byte_length.npy", "documents.json", "meta.json"]


class Bytes:
    """The plainest encoder there is, a token a byte; it counts what it is asked to encode."""

    eos = 0

    def __init__(self, vocab_size: int = 257, name: str = "bytes") -> None:
        self.vocab_size, self.hash, self.encoded = vocab_size, name, 0
        self.token_bytes = [b"", *(bytes([b]) for b in range(256))]

    def encode_batch(self, texts):
        self.encoded += len(texts)
        return [[b + 1 for b in text.encode()] for text in texts]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([d.text for d in DOCUMENTS], 300)


def test_holds_every_document_and_its_end(tokenizer, tmp_path):
    cache = build_cache(DOCUMENTS, tokenizer, tmp_path / "data")
    assert cache.path == tmp_path / "data" / cache.hash and cache.tokenizer_hash == tokenizer.hash
    assert cache.ids == [d.id for d in DOCUMENTS] and cache.domains == ["python", None, "single", "fiction"]
    assert cache.byte_length.tolist() == [len(d.text.encode()) for d in DOCUMENTS]
    assert cache.offsets.dtype == cache.byte_length.dtype == np.int64 and cache.offsets[0] == 0
    assert cache.offsets[-1] == len(cache.tokens)
    for d, document in enumerate(DOCUMENTS):
        ids = cache.tokens[cache.offsets[d] : cache.offsets[d + 1]]
        assert ids.tolist() == [*tokenizer.encode(document.text), tokenizer.eos]
        assert tokenizer.decode(ids).decode() == document.text


def test_tokens_stay_on_disk_and_are_read_only(tokenizer, tmp_path):
    cache = build_cache(DOCUMENTS, tokenizer, tmp_path)
    assert isinstance(cache.tokens.base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        cache.tokens[0] = 1


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_the_narrowest_type_that_holds_the_vocabulary(tmp_path, vocab_size, dtype):
    assert build_cache(DOCUMENTS, Bytes(vocab_size), tmp_path).tokens.dtype == dtype


def test_is_tokenised_once(tmp_path):
    encoder = Bytes()
    first = build_cache(DOCUMENTS, encoder, tmp_path)
    again = build_cache(DOCUMENTS, encoder, tmp_path)
    assert encoder.encoded == len(DOCUMENTS) and (again.tokens == first.tokens).all()
    assert os.listdir(tmp_path) == [first.hash]


def test_the_key_says_what_is_inside(tmp_path):
    keys = [
        build_cache(DOCUMENTS, Bytes(), tmp_path).hash,
        build_cache(DOCUMENTS[::-1], Bytes(), tmp_path).hash,
        build_cache(DOCUMENTS[:-1], Bytes(), tmp_path).hash,
        build_cache(DOCUMENTS, Bytes(name="other"), tmp_path).hash,
        build_cache([Document(d.text, "renamed") for d in DOCUMENTS], Bytes(), tmp_path).hash,
    ]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_is_refused_with_the_way_out(tmp_path, name, damage):
    path = build_cache(DOCUMENTS, Bytes(), tmp_path).path
    data = (path / name).read_bytes()
    if damage == "flip":  # in meta.json, the first digit of a checksum
        place = data.index(b'"sha256"') + 30 if name == "meta.json" else len(data) // 2
        (path / name).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    elif damage == "truncate":
        (path / name).write_bytes(data[:-2])
    else:
        (path / name).unlink()
    for use in (lambda: open_cache(path), lambda: build_cache(DOCUMENTS, Bytes(), tmp_path)):
        with pytest.raises(ArtifactError, match=f"{path}.*delete the folder") as caught:
            use()
        assert "\n" not in str(caught.value)


def test_another_schema_is_refused(tmp_path):
    path = build_cache(DOCUMENTS, Bytes(), tmp_path).path
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps({**meta, "schema": 99}))
    with pytest.raises(ArtifactError, match="schema 99"):
        open_cache(path)


def test_a_missing_cache_is_named(tmp_path):
    with pytest.raises(ArtifactError, match="nowhere"):
        open_cache(tmp_path / "nowhere")


def test_no_documents_is_no_data(tmp_path):
    with pytest.raises(DataError, match="no documents"):
        build_cache([], Bytes(), tmp_path)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        build_cache(DOCUMENTS, Bytes(), tmp_path / "file")


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_cache import DOCUMENTS, Bytes, build_cache
class Killed(Bytes):
    def encode_batch(self, texts):
        os.kill(os.getpid(), signal.SIGKILL)
build_cache(DOCUMENTS, Killed(), Path({root!r}))
"""


def test_a_killed_builder_leaves_no_cache_and_the_next_one_cleans_up(tmp_path):
    code = KILLED.format(tests=os.path.dirname(__file__), root=str(tmp_path))
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    left = os.listdir(tmp_path)
    assert len(left) == 1 and left[0].endswith(".tmp")
    cache = build_cache(DOCUMENTS, Bytes(), tmp_path)
    assert os.listdir(tmp_path) == [cache.hash]


def test_a_builder_that_comes_second_uses_what_the_first_one_wrote(tmp_path):
    class Overtaken(Bytes):
        def encode_batch(self, texts):
            build_cache(DOCUMENTS, Bytes(), root)  # somebody else finishes meanwhile
            return super().encode_batch(texts)

    root = tmp_path / "data"
    cache = build_cache(DOCUMENTS, Overtaken(), root)
    assert cache.ids == [d.id for d in DOCUMENTS] and os.listdir(root) == [cache.hash]


def test_goes_to_another_process_as_a_path(tokenizer, tmp_path):
    cache = build_cache([Document("word " * 100_000)], tokenizer, tmp_path)
    data = pickle.dumps(cache)
    assert len(data) < 1000 and (pickle.loads(data).tokens == cache.tokens).all()


@given(st.lists(st.text(min_size=1, max_size=60), min_size=1, max_size=5, unique=True), st.data())
@settings(max_examples=40, deadline=None)
def test_byte_offsets_equal_the_lengths_of_what_was_decoded(tokenizer, tmp_path_factory, texts, data):
    cache = build_cache([Document(t) for t in texts], tokenizer, tmp_path_factory.mktemp("cache"))
    wanted = []
    for start, end in zip(cache.offsets[:-1], cache.offsets[1:]):
        ids = cache.tokens[start:end]
        wanted += [len(tokenizer.decode(ids[:i])) for i in range(len(ids))]
    assert cache.byte_offsets(tokenizer).tolist() == wanted
    start = data.draw(st.integers(0, len(wanted)))
    end = data.draw(st.integers(start, len(wanted)))
    assert cache.byte_offsets(tokenizer, start, end).tolist() == wanted[start:end]


def test_byte_offsets_refuse_another_tokenizer_and_range(tmp_path):
    cache = build_cache(DOCUMENTS, Bytes(), tmp_path)
    with pytest.raises(ConfigError, match="tokenizer other did not make"):
        cache.byte_offsets(Bytes(name="other"))
    with pytest.raises(ConfigError, match="not a range"):
        cache.byte_offsets(Bytes(), 3, len(cache.tokens) + 1)
