"""Learning a coordizer: count pieces, merge round by round, learn coordinates; a killed one goes on where it was.

    OUT/tokenizer.json     the tokenizer, as the library `tokenizers` has it
    OUT/coordinates.npy    z (V, 64) float32 of its tokens
    OUT/coordizer.json     sealed, written last: what it was learnt from and how, checksums, neighbours' quality
    OUT/learning/          pieces and the newest round, while it is being learnt

Everything is a function of the documents, the settings and the vocabulary, so what a killed training leaves and an
undisturbed one are the same bytes.
"""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from constellation.config import Coordizer as Settings
from constellation.coordizer import coordinates
from constellation.coordizer.coordinates import Neighbours
from constellation.coordizer.merging import Merger
from constellation.coordizer.pieces import Pieces, count_pieces
from constellation.coordizer.sample import Sample
from constellation.coordizer.scores import Score, round_of, score_of, weights
from constellation.coordizer.tokenizer import FIRST_MERGE, PATTERN, PHRASES, Tokenizer
from constellation.data.document import Document
from constellation.errors import ArtifactError, ConfigError
from constellation.storage import array_file
from constellation.storage.atomic import read_object, sha256, write_bytes, write_json

MANIFEST, LEARNING = "coordizer.json", "learning"
SCHEMA = 1
SAVE_S = 5.0  # seconds between two saved rounds


@dataclass(frozen=True)
class Progress:
    """How far the training is: `tokens` of `vocabulary`, after a step that is told in words."""

    tokens: int
    vocabulary: int
    words: str


@dataclass(frozen=True)
class Coordizer:
    """A saved coordizer."""

    tokenizer: Tokenizer
    coordinates_VN: NDArray[np.float32]
    manifest: dict[str, Any]


def train(
    documents: Sequence[Document], corpus_hash: str, out: Path, vocabulary: int, settings: Settings
) -> Iterator[Progress]:
    """Learn a coordizer into `out`; what an earlier sitting did there is used if it was asked for the same."""
    asked = {"schema": SCHEMA, "corpus": corpus_hash, "vocabulary": vocabulary, **asdict(settings)}
    score = score_of(settings.score)
    _check(out, vocabulary, asked)
    write_json(out / LEARNING / "asked.json", asked, sealed=True)
    domains = sorted({str(d.domain) for d in documents})
    groups = [(d.text, domains.index(str(d.domain))) for d in documents]
    most = vocabulary - FIRST_MERGE

    if score.name == "superword":
        words = Merger(_pieces(out, "words", groups, len(domains), PATTERN))
        yield Progress(words.num_tokens, vocabulary, "words counted")
        words.round(round(settings.words * most), settings.min_count)
        yield Progress(words.num_tokens, vocabulary, "merged inside words")
        merger = Merger(_pieces(out, "phrases", groups, len(domains), PHRASES))
        merger.encode_pieces(words.merges)
        merger.round(vocabulary - merger.num_tokens, settings.min_count)
        pattern = PHRASES
    else:
        merger, pattern = Merger(_pieces(out, "words", groups, len(domains), PATTERN)), PATTERN
        yield Progress(merger.num_tokens, vocabulary, "pieces counted")
        yield from _rounds(out, merger, score, vocabulary, settings, [d.text for d in documents])
    yield Progress(merger.num_tokens, vocabulary, "merged")

    tokenizer = Tokenizer(merger.named_merges(), pattern)
    yield Progress(tokenizer.vocab_size, vocabulary, "learning coordinates")
    sample = Sample.of([d.text for d in documents], train_bytes=4_000_000, held_bytes=1_000_000)
    train_ids, held_ids = (
        [np.array(ids, np.int64) for ids in tokenizer.encode_batch(texts)] for texts in (sample.train, sample.held)
    )
    z = coordinates.coordinates(train_ids, tokenizer.vocab_size)
    save(out, tokenizer, z, {**asked, "neighbours": asdict(coordinates.neighbours(z, held_ids))})
    shutil.rmtree(out / LEARNING, ignore_errors=True)
    yield Progress(tokenizer.vocab_size, vocabulary, "saved")


def learnt(documents: Sequence[Document], vocabulary: int, settings: Settings) -> Coordizer:
    """The coordizer alone, without a folder."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for _ in train(documents, "", Path(folder) / "coordizer", vocabulary, settings):
            pass
        return load(Path(folder) / "coordizer")


def save(out: Path, tokenizer: Tokenizer, z: NDArray[np.float32], manifest: dict[str, Any]) -> None:
    """Write the folder, its manifest last."""
    held = io.BytesIO()
    np.save(held, z, allow_pickle=False)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(out / "tokenizer.json")
    write_bytes(out / "coordinates.npy", held.getvalue())
    sums = {name: sha256(out / name) for name in ("tokenizer.json", "coordinates.npy")}
    told = {**manifest, "tokens": tokenizer.vocab_size, "tokenizer": tokenizer.hash, "sha256": sums}
    told["neighbours"] = {k: None if v != v else v for k, v in manifest["neighbours"].items()}
    write_json(out / MANIFEST, told, sealed=True)


def load(folder: Path) -> Coordizer:
    """The coordizer in `folder`; ConfigError where there is none, ArtifactError for a damaged one."""
    if not (folder / MANIFEST).exists():
        raise ConfigError(
            f"{folder} holds no coordizer (no {MANIFEST}); make one: constellation coordizer train --out {folder}"
        )
    manifest = read_object(folder / MANIFEST)
    for name, wanted in manifest.get("sha256", {"tokenizer.json": ""}).items():
        if not (folder / name).exists() or sha256(folder / name) != wanted:
            raise ArtifactError(f"{folder / name}: missing or not what {MANIFEST} says; train it anew")
    z = np.load(folder / "coordinates.npy", allow_pickle=False)
    return Coordizer(Tokenizer.load(folder / "tokenizer.json"), z, manifest)


def check(out: Path, resume: bool) -> None:
    """ConfigError unless `out` may be trained into."""
    begun = (out / LEARNING / "asked.json").exists()
    if resume and not begun and not (out / MANIFEST).exists() and out.exists() and any(out.iterdir()):
        raise ConfigError(f"nothing to resume in {out}; choose another --out")
    if not resume and out.exists() and (not out.is_dir() or any(file.name != ".lock" for file in out.iterdir())):
        raise ConfigError(f"{out} exists already; go on with --resume, or choose another --out")


def _check(out: Path, vocabulary: int, asked: dict[str, Any]) -> None:
    if vocabulary < FIRST_MERGE:
        raise ConfigError(f"vocabulary {vocabulary}: must be at least {FIRST_MERGE} (256 bytes + 16 specials)")
    before = out / LEARNING / "asked.json"
    if before.exists():
        found = read_object(before)
        for name, value in asked.items():
            if found.get(name) != value:
                raise ConfigError(
                    f"{out} was begun with {name}={found.get(name)!r}, not {value!r}; choose another --out"
                )


def _rounds(
    out: Path, merger: Merger, score: Score, vocabulary: int, settings: Settings, texts: Sequence[str]
) -> Iterator[Progress]:
    if score.weigh is None:
        merger.round(vocabulary - merger.num_tokens, settings.min_count)
        return
    sample, saved_s = Sample.of(texts), time.monotonic()
    _restore(out, merger)
    while merger.num_tokens < vocabulary:
        pairs = merger.pairs()
        left = min(vocabulary - merger.num_tokens, round_of(score, merger.num_tokens))
        if not merger.round(left, settings.min_count, pairs, weights(score, merger, pairs, sample)):
            break
        yield Progress(merger.num_tokens, vocabulary, "merging")
        if time.monotonic() - saved_s >= SAVE_S:
            _keep(out, merger)
            saved_s = time.monotonic()


def _keep(out: Path, merger: Merger) -> None:
    arrays: dict[str, NDArray[Any]] = {
        "symbols": merger.symbols_N, "lengths": merger.length_W,
        "merges": np.array(merger.merges, np.int32).reshape(-1, 3),
    }  # fmt: skip
    array_file.write(out / LEARNING, "round", {}, arrays)


def _restore(out: Path, merger: Merger) -> None:
    """Go on from the newest round that is whole."""
    if (out / LEARNING / "round.json").exists():
        _, arrays = array_file.read(out / LEARNING, "round")
        merger.take(arrays["symbols"], arrays["lengths"], arrays["merges"].tolist())


def _pieces(out: Path, name: str, groups: Sequence[tuple[str, int]], count: int, pattern: str) -> Pieces:
    """The pieces of the corpus, from disk when an earlier sitting counted them."""
    if (out / LEARNING / f"{name}.json").exists():
        _, held = array_file.read(out / LEARNING, name)
        data, edges = held["text"].tobytes(), np.cumsum(np.append(0, held["sizes"])).tolist()
        return Pieces([data[a:b] for a, b in pairwise(edges)], held["seen"])
    pieces = count_pieces(groups, count, pattern)
    arrays: dict[str, NDArray[Any]] = {
        "text": np.frombuffer(b"".join(pieces.texts), np.uint8),
        "sizes": np.array([len(text) for text in pieces.texts], np.int64),
        "seen": pieces.seen_WG,
    }
    array_file.write(out / LEARNING, name, {}, arrays)
    return pieces


__all__ = ["Coordizer", "Neighbours", "Progress", "check", "learnt", "load", "save", "train"]
