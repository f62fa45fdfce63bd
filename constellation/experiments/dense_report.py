"""What `constellation bench dense` says of its numbers: tables, differences with intervals, kill rules.

All of it is computed from bits (S, D): what each answer needs for document d under seed s. The kill rules were
written before the numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from constellation.experiments.statistics import difference, holm
from constellation.storage.atomic import write_json

RULES = (  # the routed constellation against: other answer, the rule, what follows when it fails
    ("dense", "claim A: it beats one dense kernel at equal tokens and FLOPs", "the claim does not hold here"),
    ("dense_token", "kill rule: it beats a dense kernel that is told the domain", "geometry is not the cause"),
    ("fisher_rao/permuted", "kill rule: it beats itself with permuted names", "geometry is not the cause"),
    ("random", "kill rule: it beats random shards", "there is no specialisation"),
    ("tfidf", "kill rule: it beats the tf-idf router", "Fisher-Rao adds nothing here"),
)


def analyse(
    bits: Mapping[str, NDArray[np.floating]], bytes_D: NDArray[np.integer], domains: Sequence[str | None]
) -> dict[str, Any]:
    """Bits per byte of every answer, differences from dense, kill rules: all from bits (S, D) per document."""
    total = bytes_D.sum()
    table = {
        name: {
            "bits_per_byte": float(values.sum() / len(values) / total),
            "per_seed": (values.sum(1) / total).tolist(),
            "domains": {
                str(d): float(values[:, m].sum() / len(values) / bytes_D[m].sum())
                for d in sorted({str(x) for x in domains})
                for m in [np.array([str(x) == d for x in domains])]
            },
        }
        for name, values in bits.items()
    }
    against = {name: difference(values, bits["dense"], bytes_D) for name, values in bits.items() if name != "dense"}
    return {
        "table": table,
        "difference_from_dense": {name: d.to_json() for name, d in against.items()},
        "verdicts": verdicts(bits, bytes_D),
    }


def verdicts(bits: Mapping[str, NDArray[np.floating]], bytes_D: NDArray[np.integer]) -> list[dict[str, Any]]:
    """The claim and the kill rules, with Holm's correction over all of them."""
    ours = "fisher_rao"
    present = [rule for rule in RULES if ours in bits and rule[0] in bits]
    gaps = [difference(bits[ours], bits[other], bytes_D) for other, _, _ in present]
    adjusted = holm([gap.p_value for gap in gaps])
    return [
        {
            **gap.to_json(),
            "rule": rule,
            "p_holm": p,
            "verdict": "passed" if gap.verdict == "better" else f"failed: {otherwise}",
        }
        for (_, rule, otherwise), gap, p in zip(present, gaps, adjusted, strict=True)
    ]


def markdown(result: Mapping[str, Any]) -> str:
    """The result as the tables of README.md and experiments/README.md."""
    lines = ["| answer | bits per byte | against dense, 95 % interval |", "|---|---|---|"]
    for name, row in result["table"].items():
        gap = result["difference_from_dense"].get(name)
        shown = "" if gap is None else f"{gap['mean']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]"
        lines.append(f"| {name} | {row['bits_per_byte']:.4f} | {shown} |")
    lines += ["", "| rule | difference | Holm p | verdict |", "|---|---|---|---|"]
    for v in result["verdicts"]:
        p = "-" if v["p_holm"] != v["p_holm"] else f"{v['p_holm']:.4f}"
        lines.append(f"| {v['rule']} | {v['mean']:+.4f} [{v['low']:+.4f}, {v['high']:+.4f}] | {p} | {v['verdict']} |")
    return "\n".join(lines)


def save(result: Mapping[str, Any], path: Path) -> None:
    """The raw result as JSON and the tables beside it as Markdown."""
    write_json(path, json.loads(json.dumps(result, default=str)))
    path.with_suffix(".md").write_text(markdown(result) + "\n")
