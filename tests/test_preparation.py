"""A corpus made fit for training: near repeats, held-out words, licences; nothing half written, nothing silent."""

import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from constellation.cli import run as cli
from constellation.config import Data
from constellation.data.corpus import read_corpus
from constellation.data.near import RUN, SHARED, contaminated, repeats, resemblance, runs, sketch

WORDS = [f"{a}{b}{c}" for a in "bdfglm" for b in "aeiou" for c in "nrst"]


def text(seed, words=200):
    return " ".join(random.Random(seed).choices(WORDS, k=words))


@given(st.text(max_size=120), st.integers(1, 40))
def test_equal_runs_have_equal_hashes_wherever_they_stand(one, size):
    plain = " ".join(one.lower().split()).encode("utf-8", "surrogatepass")
    found = runs(one, size)
    pieces = [plain[i : i + size] for i in range(max(1, len(plain) - size + 1))] if plain else []
    assert len(found) == len(pieces)
    assert len(set(found.tolist())) == len(set(pieces))
    moved = runs("x " + one, size) if plain else found
    assert not plain or len(plain) < size or set(found.tolist()) <= set(moved.tolist())


def jaccard(a, b):
    one, other = (set(runs(t, RUN).tolist()) for t in (a, b))
    return len(one & other) / len(one | other)


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.6, 0.9, 1.0])
def test_resemblance_is_that_of_the_sets_of_runs(kept):
    a, b = text(1, 900), text(2, 900)
    mixed = a[: int(kept * len(a))] + b[int(kept * len(a)) :]
    assert abs(resemblance(sketch(a), sketch(mixed)) - jaccard(a, mixed)) < 0.1
    assert resemblance(sketch(""), sketch(a)) == 0.0 and resemblance(sketch(a), sketch(f"  {a.upper()}")) == 1.0


def test_later_repeats_point_to_the_earlier_text_that_stays():
    a, b = text(1), text(2)
    found = repeats([a, b, a + " end", text(3), "start " + a, ""], 0.8)
    assert {at: other for at, (other, _) in found.items()} == {2: 0, 4: 0}
    assert not repeats([a, a + b], 0.8) and repeats([a, a + b], 0.3)


def test_a_shared_run_of_words_is_found_and_a_shorter_one_is_not():
    held, shared = text(5), text(5)[100 : 100 + SHARED]
    others = [f"{text(6)} {shared} {text(7)}", f"{text(6)} {shared[:-8]} {text(7)}", text(8), held[:30], ""]
    assert contaminated(others, [held]) == [True, False, False, False, False]
    assert contaminated(["a short one"], ["A  short one"]) == [True] and contaminated(others, []) == [False] * 5


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    rows = [{"text": text(i), "metadata": {"domain": f"d{i % 2}", "license": "MIT" if i % 3 else "GPL"}}
            for i in range(30)]  # fmt: skip
    rows += [{"text": text(4) + " more", "metadata": {"domain": "d0"}}, {"text": text(1)}]
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = tmp_path / "held"
    held.mkdir()
    (held / "a.txt").write_text(text(100) + text(7)[:200])
    (held / "b.txt").write_text(text(101))
    return folder, held


def said(capsys):
    return json.loads(capsys.readouterr().out)


def test_a_prepared_corpus_is_clean_split_and_counted(corpus, tmp_path, capsys):
    folder, held = corpus
    out = tmp_path / "out"
    words = ["data", "prepare", "--corpus", str(folder), "--against", str(held), "--json"]
    assert cli([*words, "--out", str(out)]) == 0
    report = said(capsys)
    reasons = {(row["reason"], row["source"]) for row in report["left_out_documents"]}
    assert reasons == {("repeats", "a.jsonl:31"), ("shared with a held-out document", "a.jsonl:8")}
    assert report["train"]["licences"] == {"GPL": 10, "MIT": 19} and set(report["train"]["domains"]) == {"d0", "d1"}
    again = read_corpus(out, Data())
    train, dev = again.split(0.05)
    assert (len(train), len(dev)) == (report["train"]["documents"], report["dev"]["documents"]) == (29, 2)
    assert sum(d.num_bytes for d in train) == report["train"]["bytes"] and again.report.duplicates == 0
    assert report["tokens"]["train"] > report["tokens"]["dev"] > 0
    assert json.loads((out / "report.json").read_text())["left_out"] == report["left_out"]
    assert cli(["data", "validate", "--corpus", str(out)]) == 0
    assert cli(["data", "validate", "--corpus", str(folder), "--against", str(held)]) == 1
    assert "1 x repeats, 1 x shared" in capsys.readouterr().err
    assert cli([*words, "--out", str(out)]) == 2 and "exists already" in capsys.readouterr().err


def test_only_the_licences_that_are_wanted_stay(corpus, tmp_path, capsys):
    folder, _ = corpus
    out = tmp_path / "out"
    assert cli(["data", "prepare", "--corpus", str(folder), "--out", str(out), "--licences", "gpl", "--json"]) == 0
    assert set(said(capsys)["train"]["licences"]) == {"GPL"}


def test_mistakes_are_one_line_and_leave_nothing(corpus, tmp_path, capsys):
    folder, _ = corpus
    out = tmp_path / "out"
    for words, name in (
        (["--licences", "none-such"], "no document is left"), (["--resemblance", "0"], "--resemblance"),
        (["--min-phi", "0.5"], "name its --run"), (["--against", "nowhere"], "nowhere"),
        (["--run", str(folder)], "is not a constellation run"), (["data.none=1"], "data.none"),
    ):  # fmt: skip
        assert cli(["data", "prepare", "--corpus", str(folder), "--out", str(out), *words]) == 2
        told = capsys.readouterr().err.splitlines()
        assert name in told[-1] and not out.exists() and not list(tmp_path.glob(".out*"))
    assert cli(["data", "prepare", "--corpus", str(tmp_path / "none"), "--out", str(out)]) == 2


def test_coverage_and_phi_are_those_of_a_run(micro_run, micro_corpus, capsys):
    words = ["data", "validate", "--corpus", str(micro_corpus), "--run", str(micro_run), "--resemblance", "1", "--json"]
    cli(words)
    report = said(capsys)
    shares = report["coverage"]["shares"]
    assert abs(sum(shares.values()) - 1) < 1e-9 and 1 <= report["coverage"]["effective"] <= 8
    p = np.array([share for name, share in shares.items() if name != "ocean"])
    p = p[p > 0] / p.sum()
    assert report["coverage"]["effective"] == pytest.approx(float(np.exp(-(p * np.log(p)).sum())))
    cli([*words, "--min-phi", "0.999"])
    told = capsys.readouterr()
    assert "circular" in told.err and json.loads(told.out)["left_out"]["phi"] > 0
