"""The embedded corpus: what any CPython carries, balanced, repeatable, prose and code apart."""

import ast
import inspect
import os
import statistics
import subprocess
import sys
import textwrap
from collections import Counter

import pytest

from constellation.config import Data
from constellation.data.corpus import Corpus, read_corpus
from constellation.data.embedded import PIECE_BYTES, REST, SUBJECTS, _fold_small, _within, _without_docstrings
from constellation.data.report import Notes

SOURCE = '''"""The module."""
import os

class A:
    """A class.

    Of two paragraphs.
    """

    text = """not a docstring"""

    def f(self, x):
        r"""A \\d function."""
        """a second string"""
        return x

    async def g(self): "on the line"

def h():
    """With a comment."""  # why not
    def inner():
        'Quoted singly'
'''


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return read_corpus(None, Data())


def test_at_least_eight_domains_of_balanced_size(corpus):
    size = Counter()
    for document in corpus.documents:
        size[document.domain] += document.num_bytes
    mean = sum(size.values()) / len(size)
    assert len(size) >= 8 and {"reference", "docstrings", REST} <= set(size)
    assert all(0.65 * mean <= n <= 1.35 * mean for n in size.values()), size
    assert 8e6 < sum(size.values()) < 14e6


def test_documents_are_of_sensible_size(corpus):
    sizes = [d.num_bytes for d in corpus.documents]
    assert max(sizes) <= PIECE_BYTES and statistics.median(sizes) > 1000
    assert all(d.text.strip() for d in corpus.documents)


def test_each_text_is_there_once_and_says_where_it_is_from(corpus):
    assert len({d.id for d in corpus.documents}) == len(corpus.documents)
    assert all(d.source and d.split is None for d in corpus.documents)
    assert corpus.report.documents == len(corpus.documents) and corpus.report.files > 400


def test_the_same_python_gives_the_same_corpus(corpus):
    code = (
        "from constellation.config import Data; from constellation.data.corpus import read_corpus;"
        "import sys; before = set(sys.modules); print(read_corpus(None, Data()).hash);"
        "print(*sorted({'asyncio', 'tkinter', 'unittest', 'idlelib'} & (set(sys.modules) - before)))"
    )
    env = {**os.environ, "PYTHONHASHSEED": "11"}
    other = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert other.stdout.split() == [corpus.hash], other.stderr  # and the library was read, not imported


def test_docstrings_are_prose_and_the_rest_is_code(corpus):
    """The help of textwrap stands in one domain, its code in another, and in no third."""
    where = {d.domain for d in corpus.documents if inspect.cleandoc(textwrap.fill.__doc__) in d.text}
    assert where == {"reference"}  # the library's core counts as reference
    code = [d for d in corpus.documents if d.source == "textwrap.py"]
    assert {d.domain for d in code} <= {REST}
    assert all(textwrap.fill.__doc__ not in d.text for d in code)


def test_train_and_dev_share_no_module(corpus):
    train, dev = corpus.split(0.05)
    assert {d.domain for d in train} == {d.domain for d in dev}
    assert not {(d.domain, d.source) for d in train} & {(d.domain, d.source) for d in dev}


def test_taking_docstrings_out_changes_nothing_else():
    prose, code = _without_docstrings("pkg/__init__.py", SOURCE)

    class Emptied(ast.NodeTransformer):
        """The oracle: the same tree without the docstrings that stand alone on their lines."""

        def generic_visit(self, node):
            super().generic_visit(node)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                alone = node.body[0].value.value not in ("With a comment.", "on the line")
                node.body = node.body[1:] if alone else node.body
            return node

    # inner() would be empty, which is no Python: give both sides a body
    wanted = Emptied().visit(ast.parse(SOURCE.replace("'Quoted singly'", "'Quoted singly'\n        pass")))
    assert ast.dump(ast.parse(code + "\n        pass")) == ast.dump(wanted)
    assert prose.split("\n\n")[0] == "pkg" and "pkg.A\n\nA class.\n\nOf two paragraphs.\n" in prose
    names = ["pkg.A.f\n\nA \\d function.", "pkg.A.g\n\non the line", "pkg.h\n\nWith a comment.", "Quoted singly"]
    assert all(name in prose for name in names)
    assert "not a docstring" not in prose and "a second string" not in prose


def test_a_module_of_another_syntax_is_kept_as_it_is():
    assert _without_docstrings("old.py", "print 'hello'\n") == ("", "print 'hello'\n")


def test_a_subject_that_is_missing_counts_with_the_library_and_is_reported():
    texts = {"net": "x" * 100, REST: "x" * 100, "formats": "x" * 90, "gui": "x" * 10}
    domains, notes = {name: {name: text} for name, text in texts.items()}, Notes()
    _fold_small(domains, notes)
    assert set(domains) == {"net", REST, "formats"} and set(domains[REST]) == {REST, "gui"}
    assert [p.source for p in notes.problems] == ["gui"]


def test_a_larger_domain_is_cut_by_whole_modules():
    texts = {f"m{i}": "x" * (10 + i) for i in range(40)}
    kept = _within(texts, 300)
    assert 200 < sum(map(len, kept.values())) <= 300
    assert list(kept) == [name for name in texts if name in kept] and set(kept.values()) <= set(texts.values())


def test_no_module_is_of_two_subjects():
    modules = [m for names in SUBJECTS.values() for m in names.split()]
    assert len(modules) == len(set(modules))
