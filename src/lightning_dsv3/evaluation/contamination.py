"""How much of a benchmark stands in a training text: records that share a run of n words with it.

The measure is that of the GPT-3 report (Brown et al. 2020, appendix C): a record overlaps if any run of 13 words of it,
case and punctuation aside, occurs in a training document. In scripts that put no spaces between words, such as Chinese,
every character counts as a word. A record whose longest text is shorter than n words cannot overlap; it is counted
apart, and the share is of the others.

A benchmark is small and the training text is not. So the runs of the benchmarks are held, as 64-bit hashes, and the
documents stream past them: memory is bounded by ``max_runs``, whatever the size of the text. Benchmarks with more runs
than that are looked up in several passes over the text. Hashes stand in for runs: with 10^7 held and 10^10 looked up,
one run in all is taken for another with a probability of about 0.5 %.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Hashes: TypeAlias = npt.NDArray[np.uint64]

DEFAULT_LENGTH = 13
_MAX_RUNS = 1 << 25  # 12 bytes each, and as much again while they are sorted
_BLOCK = 1 << 16  # words of a document that are looked up at a time
# Any odd number whose powers differ in all bits; 2^64 divided by the golden ratio.
_FACTOR = np.uint64(0x9E3779B97F4A7C15)

# Scripts without spaces: Thai, Lao, Tibetan, Burmese; Khmer; kana; Han with its extensions and compatibility forms.
_UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
# Python's \w has no vowel signs of the scripts of India and no accents that stand apart: they belong to their word.
_MARKS = "\u0300-\u036f\u0900-\u0963\u0966-\u0dff"
_WORDS = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])[^\W_]|[{_MARKS}])+")


class Record(NamedTuple):
    """A record of a benchmark.

    Attributes:
        id: What it is called in a report.
        texts: What is compared; no run goes from one into the next.
    """

    id: str
    texts: Sequence[str]


@dataclass
class Overlap:
    """What a training text holds of a benchmark.

    Attributes:
        records: Records of the benchmark.
        too_short: Those with no run of n words.
        overlapping: Those of which a run stands in the text.
        worst: Id and share of the runs found, of those of which most was found, the worst first.
    """

    records: int = 0
    too_short: int = 0
    overlapping: int = 0
    worst: list[tuple[str, float]] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Share of overlapping records among those that are long enough; 0 where there are none."""
        compared = self.records - self.too_short
        return self.overlapping / compared if compared else 0.0


def words(text: str) -> Iterator[str]:
    """Cut a text into what is compared: words in small letters, characters where words are not spaced.

    >>> list(words("It's 3.5 kg, ＡＢＣ！我们 went"))
    ['it', 's', '3', '5', 'kg', 'abc', '我', '们', 'went']
    """
    return (match.group() for match in _WORDS.finditer(unicodedata.normalize("NFKC", text).casefold()))


def find_overlaps(
    benchmarks: Mapping[str, Iterable[Record]],
    documents: Callable[[], Iterable[str]],
    *,
    length: int = DEFAULT_LENGTH,
    max_runs: int = _MAX_RUNS,
    num_worst: int = 5,
) -> dict[str, Overlap]:
    """Look for the records of benchmarks in a training text.

    Args:
        benchmarks: Records by benchmark; they are gone through once.
        documents: Gives the training documents, anew at each call: one call a pass.
        length: Words in a run.
        max_runs: Runs held at a time, but for those of a single record.
        num_worst: Records to name for each benchmark.

    Returns:
        By benchmark, what was found.

    Raises:
        ValueError: ``length`` or ``max_runs`` below 1.
    """
    if length < 1 or max_runs < 1:
        raise ValueError(f"length={length}, max_runs={max_runs}: must be at least 1")
    overlaps = {name: Overlap() for name in benchmarks}
    found: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for portion in _portions(benchmarks, overlaps, length, max_runs):
        for (name, record), share in zip(portion.owners, portion.shares(documents()), strict=True):
            if share:
                overlaps[name].overlapping += 1
                found[name].append((record, share))
                if len(found[name]) > 100 * num_worst:
                    found[name] = _worst(found[name], num_worst)
    for name, pairs in found.items():
        overlaps[name].worst = _worst(pairs, num_worst)
    return overlaps


def _worst(pairs: Iterable[tuple[str, float]], count: int) -> list[tuple[str, float]]:
    return sorted(pairs, key=lambda pair: -pair[1])[:count]


class _Portion:
    """The records that are looked for in one pass."""

    def __init__(self, length: int) -> None:
        self.owners: list[tuple[str, str]] = []
        self.num_runs = 0
        self._length = length
        self._runs: list[Hashes] = []

    def add(self, name: str, record: str, runs: Hashes) -> None:
        self.owners.append((name, record))
        self._runs.append(runs)
        self.num_runs += len(runs)

    def shares(self, documents: Iterable[str]) -> Iterator[float]:
        """Return of each record which share of its runs is in the documents."""
        # Equal runs of two records are looked up once.
        known, place = np.unique(np.concatenate(self._runs), return_inverse=True)
        ends = np.cumsum([len(runs) for runs in self._runs])
        place = place.astype(np.int32 if len(known) < 2**31 else np.int64)
        self._runs.clear()
        seen = np.zeros(len(known), dtype=bool)
        for text in documents:
            for runs in _runs_of(text, self._length):
                # The first one not below; behind the last there is none.
                at = np.minimum(np.searchsorted(known, runs), len(known) - 1)
                seen[at[known[at] == runs]] = True
        begin = 0
        for end in ends.tolist():
            yield float(seen[place[begin:end]].mean())
            begin = end


def _portions(
    benchmarks: Mapping[str, Iterable[Record]], overlaps: Mapping[str, Overlap], length: int, max_runs: int
) -> Iterator[_Portion]:
    portion = _Portion(length)
    for name, records in benchmarks.items():
        for record in records:
            overlaps[name].records += 1
            parts = [runs for text in record.texts for runs in _runs_of(text, length)]
            if not parts:
                overlaps[name].too_short += 1
                continue
            runs = np.unique(np.concatenate(parts))
            if portion.num_runs and portion.num_runs + len(runs) > max_runs:
                yield portion
                portion = _Portion(length)
            portion.add(name, record.id, runs)
    if portion.owners:
        yield portion


def _runs_of(text: str, length: int) -> Iterator[Hashes]:
    """Yield hashes of all runs of ``length`` words, some at a time; nothing if the text is shorter."""
    # Python's own hash of a word is 64 bits and the same within a process.
    hashes = map(hash, words(text))
    last = np.empty(0, dtype=np.uint64)
    while len(new := np.fromiter(islice(hashes, _BLOCK), dtype=np.int64).view(np.uint64)):
        block = np.concatenate([last, new])
        count = len(block) - length + 1
        if count > 0:
            runs = np.zeros(count, dtype=np.uint64)
            for first in range(length):
                runs = runs * _FACTOR + block[first : first + count]
            yield runs
        last = block[max(count, 0) :]
