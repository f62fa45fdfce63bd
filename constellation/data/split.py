"""Split: which documents are held out, by document and by content, never by chance or by order."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from constellation.data.document import Document

Group = list[Document]  # the parts of one text, in order


def split(documents: Sequence[Document], dev_fraction: float) -> tuple[list[Document], list[Document]]:
    """(train, dev), each in the order of `documents`, a pure function of their texts and domains.

    A document's own split wins. Of the others, each domain's texts go to dev in the order of a keyed
    hash until dev holds `dev_fraction` of the domain's bytes; a text that would take dev beyond twice
    that is passed over, and if none fits the smallest is taken. A domain of one text is for training.
    Where that leaves nothing in dev, as with a single book, the end of every domain's text is held out.
    """
    domains: dict[str | None, dict[str, Group]] = defaultdict(lambda: defaultdict(list))
    for document in documents:
        if document.split is None:
            domains[document.domain][document.whole].append(document)
    held = {id(d) for groups in domains.values() for group in _held_out(groups, dev_fraction) for d in group}
    held |= {id(d) for d in documents if d.split == "dev"}
    if held or not domains:
        return [d for d in documents if id(d) not in held], [d for d in documents if id(d) in held]
    train: list[Document] = [d for d in documents if d.split is not None]
    dev: list[Document] = []
    for groups in domains.values():
        for group in groups.values():
            head, tail = _ends(group, dev_fraction)
            train += head
            dev += tail
    return train, dev


def _held_out(groups: dict[str, Group], dev_fraction: float) -> list[Group]:
    if len(groups) < 2:
        return []
    size = {whole: sum(d.num_bytes for d in group) for whole, group in groups.items()}
    quota = dev_fraction * sum(size.values())
    chosen: list[str] = []
    taken = 0
    for whole in sorted(groups, key=_keyed):
        if taken < quota and taken + size[whole] <= 2 * quota and len(chosen) + 1 < len(groups):
            chosen.append(whole)
            taken += size[whole]
    chosen = chosen or [min(groups, key=lambda whole: (size[whole], _keyed(whole)))]
    return [groups[whole] for whole in chosen]


def _keyed(whole: str) -> bytes:
    return hashlib.sha256(f"dev {whole}".encode()).digest()


def _ends(group: Group, dev_fraction: float) -> tuple[Group, Group]:
    """The parts before and in the last `dev_fraction` of a text, cut after a line where there is one."""
    quota = dev_fraction * sum(d.num_bytes for d in group)
    head, tail = list(group), list[Document]()
    while len(head) > 1 and head[-1].num_bytes <= quota:
        tail.insert(0, head.pop())
        quota -= tail[0].num_bytes
    last = head[-1]
    place = round(len(last.text) * (1 - quota / last.num_bytes))
    place = last.text.rfind("\n", place // 2, place) + 1 or place
    if 0 < place < len(last.text):
        head[-1] = replace(last, text=last.text[:place])
        tail.insert(0, replace(last, text=last.text[place:]))
    return head, tail
