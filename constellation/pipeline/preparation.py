"""A corpus made fit for training, and what is to be said of one that is: `constellation data prepare | validate`.

    read        every document once, long ones cut (data/corpus.py)
    licence     only those whose metadata name a licence that is wanted, where some are named
    repeats     a document that resembles an earlier one is left out (data/near.py)
    shared      one that shares a run of words with a held-out document is left out
    phi         off. Documents a model integrates little would be left out; see PHI

Held out are the corpus' own dev/, or the documents of another one, or those that `split` chooses. Written are
OUT/{train,dev}/DOMAIN.jsonl, which split the same when they are read, and OUT/report.json; all of it or nothing.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from constellation.config import Config
from constellation.data.corpus import Document, read_corpus
from constellation.data.near import contaminated, repeats
from constellation.errors import ConfigError, DataError, RunError
from constellation.storage.atomic import write_bytes, write_folder, write_json

PHI = (
    "a phi filter is circular: it keeps the text that some model integrates already, and what is then measured of a "
    "model trained on it was put there by the choice of its text; phi says nothing of training then. Off unless asked"
)
UNITS = 16  # of the state that phi is measured of, random directions: a document must have UNITS + 2 tokens
UNSTATED = "unstated"


@dataclass(frozen=True)
class Wanted:
    """What a document must be."""

    resemblance: float = 0.8  # at most, to an earlier document; 1 leaves all but equal ones
    licences: tuple[str, ...] = ()  # one of these; (): any, or none stated
    min_phi: float = 0.0  # 0: not asked


@dataclass(frozen=True)
class Prepared:
    """The documents that stay, and why others do not."""

    train: list[Document]
    dev: list[Document]
    left_out: list[dict[str, Any]] = field(default_factory=list)  # source, reason
    read: list[str] = field(default_factory=list)  # the report of reading, for a person

    def report(self) -> dict[str, Any]:
        """Counts, licences and domains."""
        reasons = Counter(row["reason"] for row in self.left_out)
        return {
            "read": self.read, "left_out": dict(reasons), "left_out_documents": self.left_out,
            **{name: _counted(part) for name, part in (("train", self.train), ("dev", self.dev))},
        }  # fmt: skip


def sift(
    corpus: Path | None, against: Path | None, config: Config, wanted: Wanted, run: Path | None = None
) -> Prepared:
    """The documents of `corpus` that are wanted, none of whose words are in a held-out one."""
    if not 0 < wanted.resemblance <= 1:
        raise ConfigError(f"--resemblance {wanted.resemblance}: must be above 0 and at most 1")
    found = read_corpus(corpus, config.data)
    train, dev = found.split(config.data.dev_fraction)
    if against is not None:
        train, dev = found.documents, read_corpus(against, config.data).documents
    left_out: list[dict[str, Any]] = []
    for reason, dropped in (
        ("licence", _of_other_licences(wanted.licences)),
        ("repeats", _repeating(wanted.resemblance)),
        ("shared with a held-out document", _sharing(_texts(dev))),
        ("phi", _below_phi(wanted.min_phi, run)),
    ):  # fmt: skip
        out = dropped(train)
        left_out += [{"source": train[at].source, "reason": reason, "detail": out[at]} for at in sorted(out)]
        train = [document for at, document in enumerate(train) if at not in out]
    return Prepared(train, dev, left_out, found.report.lines())


def prepare(prepared: Prepared, out: Path, about: dict[str, Any]) -> None:
    """Write the folder; RunError when it cannot be, ConfigError when it is there."""
    if out.exists():
        raise ConfigError(f"--out {out} exists already; choose another")
    if not prepared.train:
        raise DataError("no document is left for training; see --resemblance, --licences and --against")

    def fill(folder: Path) -> None:
        for part in ("train", "dev"):
            for domain, documents in _by_domain(getattr(prepared, part)).items():
                lines = "".join(json.dumps(_row(d), ensure_ascii=False) + "\n" for d in documents)
                write_bytes(folder / part / f"{_name(domain)}.jsonl", lines.encode())
        write_json(folder / "report.json", {**prepared.report(), **about})

    write_folder(out, fill)


def tokens_of(prepared: Prepared, config: Config, tokenizer: Path | None) -> dict[str, Any]:
    """How many tokens each part is, by the tokenizer in a file, else by one trained on the part for training."""
    from constellation.coordizer.tokenizer import Tokenizer

    if tokenizer is not None:
        words = Tokenizer.load(tokenizer)
    else:
        words = Tokenizer.train(_texts(prepared.train), config.kernel.vocab_size)
    counts = {
        part: sum(map(len, words.encode_batch(_texts(documents)))) + len(documents)
        for part, documents in (("train", prepared.train), ("dev", prepared.dev))
    }
    return {"tokenizer": words.hash, "vocabulary": words.vocab_size, **counts}


def coverage(prepared: Prepared, run: Path) -> dict[str, Any]:
    """How the text lies in the basins of the router of `run`: the share of bytes that each kernel would be asked, and

    effective   exp of the entropy of the kernels' shares, 1 .. K: how many kernels the text is spread over
    """
    import numpy as np

    from router.decide.fisher_rao import FisherRaoRouter

    router = FisherRaoRouter.load(run / "router")
    texts = [document.text.encode() for document in prepared.train]
    asked: Counter[str] = Counter(dict.fromkeys((*router.names, "ocean"), 0))
    for choice, text in zip(router.route(texts), texts, strict=True):
        asked[choice.kernel] += len(text)
    share = np.array([asked[name] for name in router.names], float)
    p = share / share.sum() if share.sum() else share
    entropy = float(-(p[p > 0] * np.log(p[p > 0])).sum())
    total = max(1, sum(asked.values()))
    return {
        "shares": {name: count / total for name, count in asked.items()}, "effective": float(np.exp(entropy)),
        "empty": [name for name in router.names if not asked[name]],
    }  # fmt: skip


def refuse_unclean(prepared: Prepared) -> None:
    """RunError, in a line, when anything had to be left out."""
    counts = Counter(row["reason"] for row in prepared.left_out)
    if counts:
        said = ", ".join(f"{count} x {reason}" for reason, count in counts.items())
        raise RunError(f"the corpus is not clean: {said}; constellation data prepare leaves them out")


Dropped = Callable[[Sequence[Document]], dict[int, Any]]  # number of a document -> detail


def _of_other_licences(wanted: Sequence[str]) -> Dropped:
    names = {name.casefold() for name in wanted}

    def dropped(documents: Sequence[Document]) -> dict[int, Any]:
        found = {at: licence(document) for at, document in enumerate(documents)} if names else {}
        return {at: name for at, name in found.items() if name.casefold() not in names}

    return dropped


def _repeating(threshold: float) -> Dropped:
    def dropped(documents: Sequence[Document]) -> dict[int, Any]:
        found = repeats(_texts(documents), threshold) if threshold < 1 else {}
        return {at: f"{documents[other].source}, {close:.2f}" for at, (other, close) in found.items()}

    return dropped


def _sharing(held_out: Sequence[str]) -> Dropped:
    def dropped(documents: Sequence[Document]) -> dict[int, Any]:
        return {at: "" for at, shared in enumerate(contaminated(_texts(documents), held_out)) if shared}

    return dropped


def _below_phi(threshold: float, run: Path | None) -> Dropped:
    def dropped(documents: Sequence[Document]) -> dict[int, Any]:
        if not threshold:
            return {}
        if run is None:
            raise ConfigError(f"--min-phi {threshold}: phi is of a model; name its --run")
        return {at: f"{phi:.3f}" for at, phi in enumerate(_phis(documents, run)) if phi < threshold}

    return dropped


def _phis(documents: Sequence[Document], run: Path) -> list[float]:
    """Phi (telemetry/integration.py) of OCEAN's hidden states over each document's first tokens; 1 if too short."""
    import torch

    from constellation.coordizer.tokenizer import Tokenizer
    from constellation.telemetry.integration import integration
    from constellation.train.checkpoint import load_model

    model, words = load_model(run / "ocean"), Tokenizer.load(run / "tokenizer.json")
    turned = torch.linalg.qr(torch.randn(model.config.width, UNITS, generator=torch.Generator().manual_seed(0))).Q
    found = []
    with torch.no_grad():
        for ids in words.encode_batch(_texts(documents)):
            ids = ids[: model.config.context]
            short = len(ids) < UNITS + 2
            found.append(1.0 if short else integration(model.hidden(torch.tensor([ids]))[0] @ turned).phi)
    return found


def licence(document: Document) -> str:
    """What the document's metadata say under licence, license or license_type; "unstated" otherwise."""
    said = (document.metadata.get(name) for name in ("licence", "license", "license_type"))
    return next((one for one in said if isinstance(one, str) and one), UNSTATED)


def _counted(documents: Sequence[Document]) -> dict[str, Any]:
    size: Counter[str] = Counter()
    for document in documents:
        size[document.domain or ""] += document.num_bytes
    return {
        "documents": len(documents), "bytes": sum(size.values()), "domains": dict(size),
        "licences": dict(Counter(map(licence, documents))),
    }  # fmt: skip


def _row(document: Document) -> dict[str, Any]:
    about = {**document.metadata, "source": document.metadata.get("source", document.source)}
    return {"text": document.text, "metadata": {**about, **({"domain": document.domain} if document.domain else {})}}


def _by_domain(documents: Sequence[Document]) -> dict[str, list[Document]]:
    found: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        found[document.domain or ""].append(document)
    return found


def _name(domain: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in domain) or "text"


def _texts(documents: Sequence[Document]) -> list[str]:
    return [document.text for document in documents]
