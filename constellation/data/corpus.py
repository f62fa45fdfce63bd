"""A corpus: the documents of a folder, a file or the running Python, each once, and what was left out.

The documents are held in memory, once, as `str`: one byte a character for Latin text, two or four
for others. Files are read as streams; besides the documents only one part of one file is in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from constellation.config import Data
from constellation.data.document import Document
from constellation.data.embedded import read_embedded
from constellation.data.files import shown, walk
from constellation.data.readers import read_file
from constellation.data.report import Notes, Problem, Report
from constellation.data.split import split
from constellation.data.tables import splits
from constellation.errors import ConfigError, DataError

__all__ = ["Corpus", "Document", "Problem", "Report", "read_corpus"]


@dataclass(frozen=True)
class Corpus:
    """Documents without duplicates, in reading order, and the report of reading them."""

    documents: list[Document]
    report: Report

    @cached_property
    def hash(self) -> str:
        """sha256 of the documents' ids and domains, whatever their order."""
        lines = sorted(f"{d.id} {json.dumps(d.domain)}\n" for d in self.documents)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def split(self, dev_fraction: float) -> tuple[list[Document], list[Document]]:
        """(train, dev) documents; the rule is in split.py."""
        return split(self.documents, dev_fraction)

    def __repr__(self) -> str:
        return f"Corpus({self.report.lines()[0]}, hash={self.hash[:16]})"


def read_corpus(path: Path | None, data: Data) -> Corpus:
    """The corpus at `path`, a folder or a single file; None is the embedded one.

    Read are txt, md, source code and jsonl, also .gz and .zst (files.py has the table), Parquet and Arrow with a column
    `text`, and folders that Hugging Face `datasets` saved. A document's domain is its `metadata.domain`, else the first
    folder below the root, else None. A root that has both `train/` and `dev/`, or is a saved DatasetDict with a train
    and a held-out split (tables.py, HELD_OUT), is split so, and only these two are read; a text in both stays in dev.
    Of equal texts the first counts.
    """
    notes = Notes()
    found = read_embedded(notes) if path is None else _read_tree(Path(path), data, notes)
    documents = list(_without_duplicates(found, notes))
    report = notes.report(len(documents), sum(d.num_bytes for d in documents))
    sides = {d.split for d in documents}
    if len(sides) < 2 and None not in sides:  # nothing at all, or nothing in one of train/ and dev/
        where = str(path or "the embedded corpus")
        where += "".join(f"/{side}" for side in ({"train", "dev"} - sides if sides else ()))
        raise DataError(
            f"{where}: no usable text ({'; '.join(report.lines()[1:]) or 'nothing in it'}); give a folder or file "
            'of txt, md, source code or jsonl with a "text" field, also .gz or .zst, or of Parquet with a column "text"'
        )
    return Corpus(documents, report)


def _read_tree(path: Path, data: Data, notes: Notes) -> Iterator[Document]:
    try:
        os.stat(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"corpus {str(path)!r}: {reason}; give a folder or a file that exists") from None
    for base, part in _parts(path, notes):
        for file in walk(base, path, notes):
            yield from read_file(file, base, path, part, data, notes)


def _parts(root: Path, notes: Notes) -> list[tuple[Path, str | None]]:
    names = splits(root) or {"train": "train", "dev": "dev"}
    if not all(os.path.isdir(root / name) for name in names.values()):
        return [(root, None)]
    for file in sorted(root.glob("[!.]*")):
        if file.name not in (*names.values(), "dataset_dict.json"):
            notes.add(f"outside train/ and {names['dev']}/", shown(file, root))
    return [(root / names["dev"], "dev"), (root / names["train"], "train")]


def _without_duplicates(documents: Iterable[Document], notes: Notes) -> Iterator[Document]:
    seen: set[str] = set()
    for document in documents:
        if document.id in seen:
            notes.duplicates += 1
        else:
            seen.add(document.id)
            yield document
