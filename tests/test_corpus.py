"""Reading a corpus: what is read, what is left out and said, and how train and dev are split."""

import gzip
import hashlib
import json
import os
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from constellation.config import Data
from constellation.data.corpus import Corpus, Document, read_corpus
from constellation.data.document import cut, pieces
from constellation.data.report import LISTED
from constellation.data.split import split
from constellation.errors import ConfigError, DataError

DATA = Data()
KINDS = ".txt .md .py .c .h .cpp .rs .js .ts .java .go .tex .rst .html .css .sh .toml .yaml"


def write(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def rows(*texts: str, **metadata: object) -> str:
    return "".join(json.dumps({"text": t, "metadata": metadata}) + "\n" for t in texts)


def texts(corpus: Corpus) -> list[str]:
    return [d.text for d in corpus.documents]


def zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


# -- what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", KINDS.split())
@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_reads_every_kind_of_text_plain_and_compressed(tmp_path, ending, packed):
    content = b"some text\nof two lines\n"
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zst}[packed]
    corpus = read_corpus(write(tmp_path, {f"a{ending}{packed}": pack(content)}), DATA)
    assert texts(corpus) == [content.decode()] and corpus.documents[0].source == f"a{ending}{packed}"
    assert corpus.report.counts == {} and corpus.report.files == 1 and corpus.report.bytes == len(content)


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_reads_jsonl_with_metadata(tmp_path, packed):
    content = rows("one", domain="law", year=1999) + rows("two") + '{"text": "three"}\n\n{"text": "four"}'
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zst}[packed]
    corpus = read_corpus(write(tmp_path, {f"books/x.jsonl{packed}": pack(content.encode())}), DATA)
    assert texts(corpus) == ["one", "two", "three", "four"]
    assert [d.domain for d in corpus.documents] == ["law", "books", "books", "books"]
    assert corpus.documents[0].metadata == {"domain": "law", "year": 1999}
    assert [d.source for d in corpus.documents][3] == f"books/x.jsonl{packed}:5"


def test_concatenated_compressed_streams_are_one_text(tmp_path):
    write(
        tmp_path,
        {"a.txt.gz": gzip.compress(b"one\n") + gzip.compress(b"two\n"), "b.txt.zst": zst(b"1\n") + zst(b"2\n")},
    )
    assert texts(read_corpus(tmp_path, DATA)) == ["one\ntwo\n", "1\n2\n"]


def test_a_single_file_is_a_corpus(tmp_path):
    write(tmp_path, {"a.txt": "alone", "b.txt": "not asked for"})
    corpus = read_corpus(tmp_path / "a.txt", DATA)
    assert [(d.text, d.domain, d.source) for d in corpus.documents] == [("alone", None, "a.txt")]


def test_the_first_folder_is_the_domain_and_names_give_the_order(tmp_path):
    write(
        tmp_path,
        {"z.txt": "1", "b/y.txt": "2", "b/a/x.txt": "3", "a/x.txt": "4", ".hidden.txt": "5", ".git/a.txt": "6"},
    )
    corpus = read_corpus(tmp_path, DATA)
    assert [(d.source, d.domain) for d in corpus.documents] == [
        ("a/x.txt", "a"), ("b/a/x.txt", "b"), ("b/y.txt", "b"), ("z.txt", None),
    ]  # fmt: skip


def test_train_and_dev_folders_are_the_split(tmp_path):
    write(tmp_path, {
        "train/a.jsonl": rows("t1", "t2", "both", domain="d"), "train/prose/b.txt": "t3",
        "dev/a.jsonl": rows("both", "v1", domain="d"), "test/c.txt": "kept away", "README.md": "kept away too",
    })  # fmt: skip
    corpus = read_corpus(tmp_path, DATA)
    assert {(d.text, d.split, d.domain) for d in corpus.documents} == {
        ("t1", "train", "d"), ("t2", "train", "d"), ("t3", "train", "prose"), ("both", "dev", "d"), ("v1", "dev", "d"),
    }  # fmt: skip
    train, dev = corpus.split(0.5)
    assert [d.text for d in dev] == ["both", "v1"] and [d.text for d in train] == ["t1", "t2", "t3"]
    assert corpus.report.duplicates == 1 and corpus.report.counts == {"outside train/ and dev/": 2}
    assert "dev/a.jsonl:1" in {d.source for d in corpus.documents}


@pytest.mark.parametrize("empty", ["train", "dev"])
def test_an_empty_side_of_the_split_is_refused(tmp_path, empty):
    write(tmp_path, {f"{({'train', 'dev'} - {empty}).pop()}/a.txt": "text"})
    (tmp_path / empty).mkdir()
    with pytest.raises(DataError, match=f"{tmp_path}/{empty}: no usable text"):
        read_corpus(tmp_path, DATA)


def test_equal_texts_count_once(tmp_path):
    corpus = read_corpus(write(tmp_path, {"a.txt": "same", "b/c.md": "same", "d.jsonl": rows("same", "other")}), DATA)
    assert texts(corpus) == ["same", "other"] and corpus.report.duplicates == 2
    assert "2 duplicates dropped" in corpus.report.lines()[0]


def test_an_id_is_the_hash_of_the_text():
    document = Document("Ça va")
    assert document.id == hashlib.sha256("Ça va".encode()).hexdigest()[:16] and document.num_bytes == 6


def test_the_hash_is_of_the_content_not_of_the_order_or_the_place(tmp_path):
    one = read_corpus(write(tmp_path / "one", {"d/a.txt": "1", "d/b.txt": "2", "e/c.txt": "3"}), DATA)
    two = read_corpus(write(tmp_path / "two", {"d/z.txt": "1", "d/y.md": "2", "e/x.jsonl": rows("3")}), DATA)
    other = read_corpus(write(tmp_path / "other", {"d/a.txt": "1", "d/b.txt": "2", "f/c.txt": "3"}), DATA)
    assert one.hash == two.hash != other.hash and len(one.hash) == 64


# -- what is left out, and said -------------------------------------------------------------------------------------

BROKEN_LINES = {
    "broken JSON line": ['{"text": "cut', "{'text': 1}", "[" * 100_000, '{"text": ' + "9" * 5000 + "}", "nonsense"],
    "no text field": ["{}", "[]", "3", "null", '"text"', '{"text": 3}', '{"text": null}', '{"TEXT": "x"}'],
    "empty document": ['{"text": ""}', '{"text": " \\n "}'],
    "invalid UTF-8": ['{"text": "\udcff"}', '{"text": "\\ud800"}', "\udcc3("],
    "line too long": ['{"text": "' + "x" * 200_000 + '"}'],
}


@pytest.mark.parametrize(("kind", "line"), [(kind, line) for kind, lines in BROKEN_LINES.items() for line in lines],
                         ids=lambda v: v[:12].encode("ascii", "replace").decode())  # fmt: skip
def test_a_line_that_cannot_be_used_is_named_and_the_others_are_read(tmp_path, kind, line):
    content = f'{{"text": "before"}}\n{line}\n{{"text": "after"}}\n'.encode("utf-8", "surrogateescape")
    corpus = read_corpus(write(tmp_path, {"d/x.jsonl": content}), Data(max_line_bytes=150_000))
    assert texts(corpus) == ["before", "after"] and corpus.report.counts == {kind: 1}
    (problem,) = corpus.report.problems
    assert problem.source == "d/x.jsonl:2" and problem.what.startswith(kind)
    assert corpus.documents[1].source == "d/x.jsonl:3"
    assert len(corpus.report.lines()) == 2 and corpus.report.lines()[1].startswith(f"1 x {kind}: d/x.jsonl:2")


def test_invalid_utf8_in_a_text_is_replaced_and_counted(tmp_path):
    corpus = read_corpus(write(tmp_path, {"a.txt": b"good\ngood\nb\xffd \xc3(\n\xef\xbf\xbd is fine\n"}), DATA)
    assert texts(corpus) == ["good\ngood\nb\ufffdd \ufffd(\n\ufffd is fine\n"]
    (problem,) = corpus.report.problems
    assert problem.source == "a.txt:3" and "2 places" in problem.what
    assert corpus.report.counts == {"invalid UTF-8": 1}


def test_a_byte_order_mark_is_no_text(tmp_path):
    corpus = read_corpus(write(tmp_path, {"a.txt": b"\xef\xbb\xbfx", "b.jsonl": b'\xef\xbb\xbf{"text": "y"}'}), DATA)
    assert texts(corpus) == ["x", "y"] and corpus.report.counts == {}


def test_files_that_cannot_be_read_are_named_and_the_others_are_read(tmp_path):
    noise = os.urandom(50_000)
    write(tmp_path, {
        "a/truncated.txt.gz": gzip.compress(noise)[:9000], "a/truncated.txt.zst": zst(noise)[:9000],
        "a/no.txt.gz": "plain", "a/no.jsonl.zst": "plain", "a/photo.png": b"\x89PNG", "a/noending": "?",
        "a/empty.txt": "", "a/blank.md": " \n\t\n", "a/empty.txt.gz": gzip.compress(b""), "good.txt": "good",
    })  # fmt: skip
    (tmp_path / "nothing").mkdir()
    (tmp_path / "a/dangling.txt").symlink_to("nowhere")
    (tmp_path / "a/itself.txt").symlink_to("itself.txt")
    os.mkfifo(tmp_path / "a/pipe.txt")  # opening it would wait for ever
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "secret.txt").chmod(0)
    corpus = read_corpus(tmp_path, DATA)
    named: dict[str, set[str]] = {}
    for problem in corpus.report.problems:
        named.setdefault(problem.kind, set()).add(problem.source)
    unreadable = {f"a/{n}" for n in (
        "truncated.txt.gz", "truncated.txt.zst", "no.txt.gz", "no.jsonl.zst", "dangling.txt", "itself.txt", "pipe.txt",
    )}  # fmt: skip
    if os.geteuid() != 0:  # root reads everything
        unreadable.add("secret.txt")
    assert named == {
        "unreadable file": unreadable,
        "unknown kind of file": {"a/photo.png", "a/noending"},
        "empty document": {"a/empty.txt", "a/blank.md", "a/empty.txt.gz"},
        "empty folder": {"nothing"},
    }
    assert "good" in texts(corpus)
    assert corpus.report.counts == {kind: len(sources) for kind, sources in named.items()}


def test_a_truncated_file_gives_the_lines_before_the_end(tmp_path):
    content = "".join(json.dumps({"text": os.urandom(16).hex()}) + "\n" for _ in range(5000)).encode()
    write(tmp_path, {"a.jsonl.gz": gzip.compress(content)[:-1000], "b.jsonl.zst": zst(content[::1])[:-1000]})
    corpus = read_corpus(tmp_path, DATA)
    whole = [json.loads(line)["text"] for line in content.splitlines()]
    assert 1000 < len(corpus.documents) < 5000 and set(texts(corpus)) < set(whole)
    assert corpus.report.counts == {"unreadable file": 2}


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that opens but cannot be read")
def test_an_input_output_error_is_a_line_of_the_report(tmp_path):
    write(tmp_path, {"good.txt": "good"})
    (tmp_path / "bad.txt").symlink_to("/proc/self/mem")
    corpus = read_corpus(tmp_path, DATA)
    assert texts(corpus) == ["good"] and corpus.report.problems[0].source == "bad.txt"


def test_link_loops_end_and_are_named(tmp_path):
    write(tmp_path, {"c/a/x.txt": "x", "elsewhere/y.txt": "y"})
    root = tmp_path / "c"
    (root / "a/up").symlink_to("..")
    (root / "a/self").symlink_to(".")
    (root / "a/out").symlink_to(tmp_path)  # holds the corpus
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    corpus = read_corpus(root, DATA)
    assert {(d.text, d.domain) for d in corpus.documents} == {("x", "a"), ("y", "linked")}
    assert {p.source for p in corpus.report.problems} == {"a/up", "a/self", "a/out"}
    assert corpus.report.counts == {"folder loop": 3}


@pytest.mark.skipif(sys.platform == "darwin", reason="this file system refuses such names")
def test_names_that_are_not_unicode_are_shown_as_unicode(tmp_path):
    folder = os.fsencode(tmp_path) + b"/d\xff"
    os.mkdir(folder)
    for name in (b"/a\n\xfe.txt", b"/b.jsonl"):
        with open(folder + name, "wb") as file:
            file.write(b"{")
    corpus = read_corpus(tmp_path, DATA)
    assert [(d.domain, d.source) for d in corpus.documents] == [("d\ufffd", "d\ufffd/a?\ufffd.txt")]
    "".join(corpus.report.lines()).encode()
    assert all("\n" not in line for line in corpus.report.lines())


def test_the_list_of_problems_is_capped_and_the_counts_are_not(tmp_path):
    corpus = read_corpus(write(tmp_path, {"x.jsonl": "broken\n" * 5000 + rows("good"), "y.png": ""}), DATA)
    assert len(corpus.report.problems) == LISTED
    assert corpus.report.counts == {"broken JSON line": 5000, "unknown kind of file": 1}
    assert len(corpus.report.lines()) == 3 and max(map(len, corpus.report.lines())) < 200


def test_a_gigantic_line_is_skipped_without_being_held(tmp_path):
    with (tmp_path / "x.jsonl").open("wb") as file:
        file.write(b'{"text": "')
        for _ in range(40):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n{"text": "after"}\n')
    tracemalloc.start()
    corpus = read_corpus(tmp_path, Data(max_line_bytes=100_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts(corpus) == ["after"] and peak < 4_000_000
    assert corpus.report.problems[0].source == "x.jsonl:1" and "40000013 bytes" in corpus.report.problems[0].what


def test_a_compressed_file_is_never_unpacked_whole(tmp_path):
    write(tmp_path, {"x.txt.zst": zst(b"a" * 160_000_000), "y.txt.gz": gzip.compress(b"a" * 40_000_000, 1)})
    tracemalloc.start()
    corpus = read_corpus(tmp_path, DATA)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert corpus.report.duplicates > 150 and peak < 60_000_000


NOTHING = {
    "empty folder": {},
    "unknown kind": {"a.png": b"\x89PNG", "b.zip": b"PK"},
    "only broken lines": {"a.jsonl": "broken\n{}\n"},
    "only blanks": {"a.txt": "  ", "b.txt": ""},
    "only hidden": {".a.txt": "text"},
}


@pytest.mark.parametrize("name", NOTHING)
def test_a_corpus_of_nothing_is_refused_with_what_was_found(tmp_path, name):
    with pytest.raises(DataError, match=f"{tmp_path}: no usable text .*give a folder or file of") as caught:
        read_corpus(write(tmp_path, NOTHING[name]), DATA)
    assert "\n" not in str(caught.value)
    for file in NOTHING[name]:
        assert file.startswith((".", "b")) or file in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere", "a.txt/b", "nul\0byte", "x" * 5000])
def test_a_path_that_is_not_there_is_a_wrong_request(tmp_path, name):
    write(tmp_path, {"a.txt": "text"})
    with pytest.raises(ConfigError, match="give a folder or a file that exists") as caught:
        read_corpus(tmp_path / name, DATA)
    assert "\n" not in str(caught.value)


# -- long texts -----------------------------------------------------------------------------------------------------


@given(st.text(st.sampled_from("ab é日𝄞\n"), max_size=300), st.integers(4, 60))
@settings(max_examples=300, deadline=None)
def test_pieces_join_to_the_text_and_are_short_enough(text, limit):
    parts = pieces(text, limit)
    assert "".join(parts) == text
    assert all(0 < len(p.encode()) <= limit for p in parts)


@given(st.binary(max_size=300), st.integers(4, 60))
@settings(max_examples=200, deadline=None)
def test_a_cut_always_advances_whatever_the_bytes(data, limit):
    assert (0 < cut(data, limit) <= limit) or not data


def test_a_cut_prefers_blank_lines_then_lines_then_characters():
    assert cut(b"aaaa\nbb\n\ncc\ndd", 13) == 9
    assert cut(b"aaaa\nbbbb\ncc dd", 12) == 10
    assert cut("aaaaéé".encode(), 7) == 6


def test_a_long_text_becomes_parts_that_join_to_it(tmp_path):
    text = "".join(f"line {i} of the file\n" for i in range(3000)) + "".join(chr(0x4E00 + i) for i in range(5000))
    corpus = read_corpus(write(tmp_path, {"a.txt": text, "b.jsonl": rows(text + "!")}), Data(max_document_bytes=4096))
    for name, whole in (("a.txt", text), ("b.jsonl", text + "!")):
        parts = [d for d in corpus.documents if d.source.startswith(name)]
        if name == "a.txt":
            assert "".join(d.text for d in parts) == whole and len({d.whole for d in parts}) == 1
            for d in parts:  # the source names the line where the part begins
                line = int(d.source.partition(":")[2])
                assert line == text[: text.index(d.text)].count("\n") + 1
        assert all(d.num_bytes <= 4096 for d in parts)
        assert all(d.text.endswith("\n") for d in parts if d.text.isascii())


# -- train and dev --------------------------------------------------------------------------------------------------

documents = st.lists(
    st.builds(
        Document,
        text=st.text("abc\n", min_size=1, max_size=200),
        domain=st.sampled_from(["one", "two", None]),
        split=st.sampled_from([None, None, None, None, "train", "dev"]),
    ),
    min_size=1, max_size=40, unique_by=lambda d: d.text,
)  # fmt: skip


@given(documents, st.floats(0.01, 0.5), st.randoms())
@settings(max_examples=200, deadline=None)
def test_split_laws(documents, fraction, random):
    train, dev = split(documents, fraction)
    free = Counter(d.domain for d in documents if d.split is None)
    if free and max(free.values()) < 2 and not any(d.split == "dev" for d in documents):
        # nothing to hold out whole: ends were cut off
        assert {d.domain for d in dev} <= set(free)
        assert sum(d.num_bytes for d in train + dev) == sum(d.num_bytes for d in documents)
        return
    # every document is on one side, and an explicit split wins
    assert sorted(d.id for d in train + dev) == sorted(d.id for d in documents)
    assert all(d.split != "dev" for d in train) and all(d.split != "train" for d in dev)
    # each domain with two texts that are free to go has some in dev and some in train
    for domain in ("one", "two", None):
        free = {d.id: d.num_bytes for d in documents if d.domain == domain and d.split is None}
        held = [free[d.id] for d in dev if d.id in free]
        if len(free) >= 2:
            assert 0 < len(held) < len(free)
            assert sum(held) <= 2 * fraction * sum(free.values()) or held == [min(free.values())]
    # a pure function of the content: neither order nor file names matter
    shuffled = [Document(d.text, d.domain, "elsewhere", d.split) for d in random.sample(documents, len(documents))]
    again = split(shuffled, fraction)
    assert {d.text for d in again[0]} == {d.text for d in train} and {d.text for d in again[1]} == {d.text for d in dev}


def test_dev_takes_its_share_of_each_domain():
    many = [Document(f"{domain} {i} " * 20, domain) for domain in ("x", "y") for i in range(1000)]
    _, dev = split(many, 0.05)
    for domain in ("x", "y"):
        share = sum(d.num_bytes for d in dev if d.domain == domain) / sum(
            d.num_bytes for d in many if d.domain == domain
        )
        assert 0.05 <= share < 0.052


def test_adding_a_document_to_one_domain_leaves_the_others_alone():
    many = [Document(f"text {i}", domain) for domain in ("x", "y") for i in range(100)]
    more = [*many, Document("new " * 50, "x")]
    ids = [{d.id for d in split(docs, 0.1)[1] if d.domain == "y"} for docs in (many, more)]
    assert ids[0] == ids[1]


def test_the_parts_of_one_text_stay_together(tmp_path):
    files = {f"d/{i}.txt": "".join(f"{i} {j}\n" for j in range(400)) for i in range(30)}
    corpus = read_corpus(write(tmp_path, files), Data(max_document_bytes=512))
    train, dev = corpus.split(0.1)
    assert len(dev) > 3 and not {d.whole for d in train} & {d.whole for d in dev}


@pytest.mark.parametrize("limit", [1 << 20, 512])
def test_of_a_single_text_the_end_is_held_out(tmp_path, limit):
    text = "".join(f"line {i}\n" for i in range(1000))
    corpus = read_corpus(write(tmp_path, {"book.txt": text}), Data(max_document_bytes=limit))
    train, dev = corpus.split(0.1)
    assert "".join(d.text for d in train + dev) == text
    assert 0.09 < sum(d.num_bytes for d in dev) / len(text) < 0.12
    assert train[-1].text.endswith("\n")


def test_a_domain_of_one_text_is_for_training():
    train, dev = split([Document("alone", "x"), Document("1 first", "y"), Document("2 second", "y")], 0.1)
    assert "alone" in {d.text for d in train} and len(dev) == 1


# -- the acceptance corpus ------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    "CONSTELLATION_DOMAINS8" not in os.environ, reason="CONSTELLATION_DOMAINS8 does not name the folder of domains8"
)
def test_domains8_is_read_whole():
    corpus = read_corpus(Path(os.environ["CONSTELLATION_DOMAINS8"]), DATA)
    assert corpus.report.counts == {} and corpus.report.files == 16
    train, dev = corpus.split(0.05)
    assert len({d.domain for d in train}) == len({d.domain for d in dev}) == 8
    assert sum(d.num_bytes for d in train) > 7e6 and 4e5 < sum(d.num_bytes for d in dev) < 6e5
    assert all(d.metadata["source"] for d in corpus.documents)
