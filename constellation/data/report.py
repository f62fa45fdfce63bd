"""Report: what reading a corpus found, used and left out; nothing is dropped silently."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

LISTED = 100  # problems kept one by one; the counts are always complete


@dataclass(frozen=True)
class Problem:
    """Something that was left out, or changed, and where."""

    source: str  # "file" or "file:line"
    what: str  # "kind" or "kind: detail"

    @property
    def kind(self) -> str:
        return self.what.partition(":")[0]


@dataclass(frozen=True)
class Report:
    """What reading a corpus came to."""

    files: int  # files read
    documents: int  # documents kept
    bytes: int  # UTF-8 bytes of them
    duplicates: int  # documents dropped because the same text was there before
    problems: tuple[Problem, ...]  # the first LISTED of them
    counts: dict[str, int]  # kind of problem -> how often

    def lines(self) -> list[str]:
        """The report for a person, a line for the corpus and one for each kind of problem."""
        head = f"{self.files} files, {self.documents} documents, {self.bytes / 1e6:.1f} MB"
        if self.duplicates:
            head += f", {self.duplicates} duplicates dropped"
        return [head, *(f"{n} x {kind}: {self._where(kind)}" for kind, n in self.counts.items())]

    def _where(self, kind: str) -> str:
        listed = [p for p in self.problems if p.kind == kind]
        if not listed:
            return f"beyond the first {LISTED} problems"
        _, _, detail = listed[0].what.partition(": ")
        few = [listed[0].source + (f" ({detail})" if detail else ""), *(p.source for p in listed[1:3])]
        return ", ".join(few) + (", ..." if self.counts[kind] > 3 else "")


@dataclass
class Notes:
    """A report while it is being written."""

    files: int = 0
    duplicates: int = 0
    problems: list[Problem] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, source: str, detail: str = "") -> None:
        self.counts[kind] += 1
        if len(self.problems) < LISTED:
            self.problems.append(Problem(source, f"{kind}: {detail}" if detail else kind))

    def report(self, documents: int, num_bytes: int) -> Report:
        return Report(self.files, documents, num_bytes, self.duplicates, tuple(self.problems), dict(self.counts))
