"""Parquet, Arrow and saved datasets are read as jsonl is; what cannot be used is named, and the rest is read."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from constellation.config import Data
from constellation.data.corpus import Corpus, read_corpus
from constellation.data.tables import BATCH_ROWS
from constellation.errors import DataError

DATA = Data()
SHARDS = "data-{:05d}-of-{:05d}.arrow"


def texts(corpus: Corpus) -> list[str]:
    return [d.text for d in corpus.documents]


def write_stream(path: Path, table: pa.Table, rows: int = 2) -> None:
    with pa.OSFile(str(path), "wb") as file, ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


def save_to_disk(folder: Path, *shards: list[Any]) -> Path:
    """The files that `Dataset.save_to_disk` of datasets 3 and 4 leaves: Arrow streams, state and description."""
    folder.mkdir(parents=True)
    names = [SHARDS.format(i, len(shards)) for i in range(len(shards))]
    for name, rows in zip(names, shards, strict=True):
        write_stream(folder / name, pa.table({"text": pa.array(rows, pa.string()), "id": range(len(rows))}))
    (folder / "state.json").write_text(json.dumps({
        "_data_files": [{"filename": name} for name in names], "_fingerprint": "0123456789abcdef", "_split": "train",
        "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False, "_format_columns": None,
    }))  # fmt: skip
    features = {"text": {"dtype": "string", "_type": "Value"}, "id": {"dtype": "int64", "_type": "Value"}}
    (folder / "dataset_info.json").write_text(json.dumps({"citation": "", "description": "", "features": features}))
    return folder


def save_dict(folder: Path, **parts: list[Any]) -> Path:
    for name, rows in parts.items():
        save_to_disk(folder / name, rows)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(parts)}))
    return folder


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
@pytest.mark.parametrize("form", ["parquet", "stream", "file"])
def test_a_table_gives_a_document_a_row(tmp_path: Path, kind: pa.DataType, form: str) -> None:
    many = [f"text {i} Ça" for i in range(3 * BATCH_ROWS + 1)]
    domains = [{"domain": "law" if i % 2 else None, "year": i} for i in range(len(many))]
    table = pa.table({"other": range(len(many)), "text": pa.array(many).cast(kind), "metadata": domains})
    (tmp_path / "books").mkdir()
    if form == "parquet":
        parquet.write_table(table, tmp_path / "books" / "x.parquet", row_group_size=100)
    elif form == "stream":
        write_stream(tmp_path / "books" / "x.arrow", table)
    else:
        with pa.OSFile(str(tmp_path / "books" / "x.arrow"), "wb") as file, ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=50)
    corpus = read_corpus(tmp_path, DATA)
    assert texts(corpus) == many and corpus.report.counts == {} and corpus.report.files == 1
    assert [d.domain for d in corpus.documents[:2]] == ["books", "law"] and corpus.documents[1].metadata["year"] == 1
    assert corpus.documents[-1].source.endswith(f":{len(many)}")


def test_the_same_texts_are_the_same_corpus_in_every_form(tmp_path: Path) -> None:
    rows = ["one", "two\n" * 40, "three"]
    (tmp_path / "j.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in rows))
    parquet.write_table(pa.table({"text": rows}), tmp_path / "p.parquet")
    save_to_disk(tmp_path / "saved", rows[:1], rows[1:])
    cut = Data(max_document_bytes=64)
    found = [read_corpus(tmp_path / name, cut) for name in ("j.jsonl", "p.parquet", "saved")]
    assert len({corpus.hash for corpus in found}) == 1
    assert [[d.whole for d in c.documents] for c in found[1:]] == [[d.whole for d in found[0].documents]] * 2


def test_a_saved_dataset_is_read_without_a_word_about_its_descriptions(tmp_path: Path) -> None:
    corpus = read_corpus(save_to_disk(tmp_path / "d", ["a", "b", "c"], ["d"]), DATA)
    assert texts(corpus) == ["a", "b", "c", "d"] and corpus.report.counts == {} and corpus.report.files == 2


@pytest.mark.parametrize(("parts", "dev"), [
    ({"train": ["a", "b"], "validation": ["v"], "test": ["t"]}, ["v"]), ({"train": ["a", "b"], "test": ["t"]}, ["t"]),
])  # fmt: skip
def test_a_saved_dict_is_split_as_it_says(tmp_path: Path, parts: dict[str, list[str]], dev: list[str]) -> None:
    corpus = read_corpus(save_dict(tmp_path / "d", **parts), DATA)
    train, held_out = corpus.split(0.05)
    assert sorted(d.text for d in train) == ["a", "b"] and [d.text for d in held_out] == dev
    assert sum(corpus.report.counts.values()) == len(parts) - 2  # a split that is not read is said


def test_a_saved_dict_without_a_held_out_split_is_one_text(tmp_path: Path) -> None:
    corpus = read_corpus(save_dict(tmp_path / "d", train=["a", "b", "c"]), DATA)
    assert texts(corpus) == ["a", "b", "c"] and {d.split for d in corpus.documents} == {None}


def test_a_row_that_cannot_be_used_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    rows = pa.array([b"before", None, b"", b" \n", b"\xff\xfe", b"x" * 300, b"after"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"text": rows}), tmp_path / "x.parquet")
    corpus = read_corpus(tmp_path, Data(max_line_bytes=200))
    assert texts(corpus) == ["before", "after"]
    assert corpus.report.counts == {"no text field": 1, "empty document": 2, "invalid UTF-8": 1, "line too long": 1}
    assert [p.source for p in corpus.report.problems] == [f"x.parquet:{i}" for i in range(2, 7)]


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
@pytest.mark.parametrize("bad", ["torn", "text", "empty", "other", "numbers"])
def test_a_table_that_is_none_is_one_line_and_the_others_are_read(tmp_path: Path, ending: str, bad: str) -> None:
    path, table = tmp_path / f"x.{ending}", pa.table({"text": [f"text {i}" for i in range(100)]})
    table = {"other": table.rename_columns(["body"]), "numbers": pa.table({"text": [1, 2]})}.get(bad, table)
    parquet.write_table(table, path) if ending == "parquet" else write_stream(path, table, 10)
    whole = path.read_bytes()
    path.write_bytes({"torn": whole[: len(whole) // 2], "text": b"some text", "empty": b""}.get(bad, whole))
    (tmp_path / "y.txt").write_text("the other")
    corpus = read_corpus(tmp_path, DATA)
    assert "the other" in texts(corpus) and corpus.report.counts == {"unreadable file": 1}
    assert len(corpus.report.lines()) == 2 and "x." in corpus.report.lines()[1]
    path.with_name("y.txt").unlink()
    if len(texts(corpus)) == 1:
        with pytest.raises(DataError, match="Parquet"):
            read_corpus(tmp_path, DATA)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = save_to_disk(tmp_path / "d", ["a"], ["b"])
    (folder / SHARDS.format(1, 2)).unlink()
    corpus = read_corpus(folder, DATA)
    assert texts(corpus) == ["a"] and corpus.report.counts == {"missing file": 1}
    (folder / "state.json").write_text("{")  # no longer a saved dataset: its files are files
    assert read_corpus(folder, DATA).report.counts == {"unknown kind of file": 2}
