"""The router's experiments run end to end on a small corpus and measure what they say."""

import json

import numpy as np
import pytest

from constellation.experiments import bench_route, centres, route_quality


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three domains with words of their own, 16 training and 6 dev documents each."""
    root, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    for domain in ("alpha", "beta", "gamma"):
        words = [f"{domain[:2]}{a}{b}" for a in "aeiou" for b in "klmnrst"]
        for side, documents in (("train", 16), ("dev", 6)):
            lines = [
                json.dumps({"text": " ".join(rng.choice(words, 300)), "metadata": {"domain": domain}})
                for _ in range(documents)
            ]
            (root / side).mkdir(exist_ok=True)
            (root / side / f"{domain}.jsonl").write_text("\n".join(lines) + "\n")
    return root


def test_route_quality_sees_the_routers_find_the_domains_and_chance_not(corpus, tmp_path, capsys):
    pytest.importorskip("sklearn")
    result = route_quality.run(corpus, seeds=(0,), out=tmp_path / "raw.json")
    rows = {name: runs[0] for name, runs in result["routers"].items()}
    assert rows["fisher_rao"]["nmi"] > 0.6 > 0.4 > rows["random"]["nmi"]
    assert rows["fisher_rao"]["stable"] > 0.6 and rows["random"]["stable"] == 1
    assert set(json.loads((tmp_path / "raw.json").read_text())["routers"]) == {"fisher_rao", "tfidf", "random"}
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_normalised_mutual_information_on_the_degenerate_tables():
    measured = [route_quality.mutual_information(t) for t in (np.eye(4), np.ones((4, 4)), np.ones((1, 4)))]
    assert measured == pytest.approx([1, 0, 0], abs=1e-12)


def test_centres_compares_every_code_that_exists_at_a_size(corpus, tmp_path, capsys):
    result = centres.run(corpus, sizes=(3, 8), seeds=(0,), out=tmp_path / "raw.json")
    found = {(row["centres"], row["code"]): row for row in result["rows"]}
    assert set(found) == {(3, c) for c in ("k-means", "random", "frame")} | {
        (8, c) for c in ("k-means", "random", "frame", "e8")
    }
    assert found[8, "k-means"]["angle_rad"] < min(found[8, c]["angle_rad"] for c in ("random", "frame", "e8"))
    assert found[8, "k-means"]["overload"] < 2


def test_bench_route_measures_both_routers(tmp_path, capsys):
    pytest.importorskip("sklearn")
    result = bench_route.run(centres=3, out=tmp_path / "raw.json", fit_bytes=60_000, repeats=1)
    assert json.loads((tmp_path / "raw.json").read_text())["fisher_rao"] == result["fisher_rao"]
    assert all(value > 0 for times in (result["fisher_rao"], result["tfidf"]) for value in times.values())
    assert set(result["fisher_rao"]) - set(result["tfidf"]) == {"byte_us", "chunk_us"}
    assert "query of 1 KB" in capsys.readouterr().out
