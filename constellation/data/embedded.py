"""The embedded corpus: what every Python carries, about 11 MB of text in nine domains, offline.

    reference    the language reference (pydoc_data.topics), the help of built-in objects and of the library's core
    docstrings   the docstrings of the subjects below, by module
    net ...      the library's sources without their docstrings, by subject; its core is `library`

No domain is more than LARGEST times the smallest: of a larger one whole modules are left out, in the
order of a hash of their names. A subject that a distribution ships without (Debian's Python has no
tkinter) is counted with the rest of the library. The same Python gives the same corpus.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import os
import statistics
import sys
import sysconfig
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from constellation.data.document import Document, pieces
from constellation.data.report import Notes

PIECE_BYTES = 8192  # documents are at most this long
LARGEST = 1.6  # size of the largest domain / size of the smallest
REST = "library"  # the domain of modules the table does not name
SUBJECTS = {
    "net": "email http urllib xmlrpc ssl smtplib smtpd ftplib imaplib poplib nntplib telnetlib socketserver socket "
    "wsgiref ipaddress cgi cgitb mailbox mailcap mimetypes uuid webbrowser html nturl2path netrc hmac hashlib secrets",
    "concurrency": "asyncio multiprocessing concurrent threading subprocess queue sched signal selectors asyncore "
    "asynchat contextvars _threading_local logging contextlib weakref _weakrefset tracemalloc pty",
    "formats": "xml json csv plistlib tarfile zipfile gzip bz2 lzma compression _compression configparser pickle "
    "pickletools copyreg tomllib base64 quopri uu sqlite3 dbm shelve struct wave aifc sunau chunk sndhdr imghdr "
    "colorsys xdrlib binhex _markupbase fileinput zipimport",
    "gui": "tkinter idlelib turtle turtledemo curses",
    "encodings": "encodings",
    "tools": "unittest doctest pdb bdb pydoc inspect ast dis opcode tokenize token trace traceback linecache profile "
    "cProfile pstats timeit argparse optparse getopt cmd code codeop symtable pyclbr tabnanny rlcompleter _pyrepl "
    "warnings typing annotationlib distutils lib2to3 modulefinder pkgutil zipapp venv compileall py_compile",
}
BUILT_IN = (  # not sys, whose hooks programs replace: the corpus would depend on the program
    "builtins posix nt time itertools marshal gc errno atexit faulthandler _abc _ast _codecs _collections "
    "_functools _imp _io _operator _signal _sre _stat _string _symtable _thread _tracemalloc _typing _warnings _weakref"
)
_SMALLEST = 0.4  # of the median domain; a smaller one is counted with the library
_SKIPPED_MODULES = {"pydoc_data", "ensurepip", "antigravity", "this"}
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "__pycache__"}
_OBJECTS = (
    type, types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType,
    types.ClassMethodDescriptorType, types.GetSetDescriptorType, types.MemberDescriptorType,
)  # fmt: skip
_Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def read_embedded(notes: Notes) -> Iterator[Document]:
    """The documents of the embedded corpus, domain by domain; a part that this Python lacks is noted."""
    domains: dict[str, dict[str, str]] = {"reference": _reference(notes), "docstrings": {}, REST: {}}
    subject = {module: name for name, modules in SUBJECTS.items() for module in modules.split()}
    for source, text in _sources(notes):
        prose, code = _without_docstrings(source, text)
        module = source.split("/")[0].removesuffix(".py")
        name = subject.get(module, REST)
        domains["reference" if name == REST else "docstrings"][f"{source} docstrings"] = prose
        domains.setdefault(name, {})[source] = code
    domains = {name: texts for name, texts in domains.items() if texts}
    _fold_small(domains, notes)
    limit = LARGEST * min(_size(texts) for texts in domains.values())
    for name in sorted(domains):
        for source, text in _within(domains[name], limit).items():
            first = ""
            for piece in pieces(text, PIECE_BYTES):
                if not piece.isspace():
                    document = Document(piece, name, source, first=first)
                    first = first or document.id
                    yield document


def _reference(notes: Notes) -> dict[str, str]:
    texts = {}
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
        texts = {f"topics/{name}": topics[name] for name in sorted(topics)}
    except ImportError:
        notes.add("missing in this Python", "pydoc_data.topics", "the language reference")
    for name in BUILT_IN.split():
        if name in sys.builtin_module_names:
            texts[f"help/{name}"] = "\n\n".join(_help(importlib.import_module(name), name))
    notes.files += len(texts)
    return texts


def _help(holder: Any, name: str, depth: int = 0) -> Iterator[str]:
    for member, value in sorted(vars(holder).items()):
        if depth and member.startswith("__"):  # the same few words for every type
            continue
        if isinstance(value, _OBJECTS) and isinstance(value.__doc__, str):
            yield f"{name}.{member}\n{inspect.cleandoc(value.__doc__)}"
        if isinstance(value, type) and depth == 0:
            yield from _help(value, f"{name}.{member}", depth=1)


def _sources(notes: Notes) -> Iterator[tuple[str, str]]:
    """The standard library's sources, tests and what was installed beside it left out."""
    root = Path(sysconfig.get_path("stdlib"))
    wanted = sys.stdlib_module_names - _SKIPPED_MODULES
    found = 0
    for folder, subfolders, names in os.walk(root):
        top = Path(folder) == root
        subfolders[:] = sorted(s for s in subfolders if (s in wanted if top else s not in _SKIPPED_FOLDERS))
        for name in sorted(names):
            if not name.endswith(".py") or (top and name.removesuffix(".py") not in wanted):
                continue
            path = Path(folder, name)
            source = path.relative_to(root).as_posix()
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                notes.add("unreadable file", str(path), str(error))
                continue
            found += 1
            yield source, text
    notes.files += found
    if not found:
        notes.add("missing in this Python", str(root), "the standard library's sources; give a corpus of your own")


def _without_docstrings(source: str, text: str) -> tuple[str, str]:
    """(the docstrings with the names they belong to, the rest of the module)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes in old modules
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return "", text
    module = source.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    lines = text.split("\n")
    prose: list[str] = []
    gone: set[int] = set()
    for name, node in _docstrings(tree, module):
        prose.append(f"{name}\n\n{inspect.cleandoc(node.value.value)}\n")
        before = lines[node.lineno - 1].encode()[: node.col_offset]
        after = lines[node.end_lineno - 1].encode()[node.end_col_offset :]
        if not before.strip() and not after.strip():  # alone on its lines
            gone.update(range(node.lineno - 1, node.end_lineno))
    clean = "\n".join(prose).encode("utf-8", "replace").decode()
    return clean, "\n".join(line for i, line in enumerate(lines) if i not in gone)


def _docstrings(node: _Definition, name: str) -> Iterator[tuple[str, Any]]:
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        yield name, first
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")


def _fold_small(domains: dict[str, dict[str, str]], notes: Notes) -> None:
    """Count a subject of which a distribution has little with the rest of the library."""
    median = statistics.median(_size(texts) for texts in domains.values())
    for name in sorted(domains):
        if name != REST and _size(domains[name]) < _SMALLEST * median:
            notes.add("missing in this Python", name, f"most of it; what there is counts as {REST}")
            domains.setdefault(REST, {}).update(domains.pop(name))


def _within(texts: dict[str, str], limit: float) -> dict[str, str]:
    """Texts of at most `limit` characters together, chosen by a hash of their names, in their order."""
    kept, total = set(), 0
    for source in sorted(texts, key=lambda s: hashlib.sha256(s.encode()).digest()):
        if total + len(texts[source]) <= limit:
            kept.add(source)
            total += len(texts[source])
    return {source: text for source, text in texts.items() if source in kept}


def _size(texts: dict[str, str]) -> int:
    return sum(map(len, texts.values()))
