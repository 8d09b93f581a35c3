"""Records of the benchmarks: from the hub, or from the folder that LIGHTNING_DSV3_DATA names, in one shape.

`load_records` and `load_subsets` are what tasks read; `found` and `list_benchmarks` say what is at hand, `check_data`
what is wrong with it. What each benchmark is stands in `lightning_dsv3.evaluation.data_table`.

The folder holds one folder for each benchmark with its published files, whole or in part: any file that matches
``<folder>/<stem>*``. Several files that match are joined; the same record in two of them is an error.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_dsv3.evaluation.data_files import DataError, Raw, matching, read_labels, read_rows
from lightning_dsv3.evaluation.data_records import FieldError, Record, Row
from lightning_dsv3.evaluation.data_table import BENCHMARKS, Benchmark, Hub, Split

__all__ = [
    "BENCHMARKS",
    "VARIABLE",
    "WAY_OUT",
    "Checked",
    "Coverage",
    "DataError",
    "MissingDataError",
    "check_data",
    "coverage",
    "data_folder",
    "found",
    "list_benchmarks",
    "load_records",
    "load_subsets",
    "stand_in",
    "used_files",
]

VARIABLE = "LIGHTNING_DSV3_DATA"
WAY_OUT = f"name a folder with the published files in {VARIABLE}"

_log = logging.getLogger(__name__)


class MissingDataError(DataError):
    """A file of a benchmark is not in the local folder; the message names it."""


def data_folder() -> Path | None:
    """Return the local folder, or None where records come from the hub.

    Raises:
        DataError: If LIGHTNING_DSV3_DATA names no folder.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        return None
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise DataError(f"{VARIABLE}={name}: there is no such folder")
    return folder


# Loading


def load_records(benchmark: str, subset: str | None = None, split: str = "test") -> list[Record]:
    """Load one part of a benchmark.

    Args:
        benchmark: Its name in the table, without ``dsv3_``.
        subset: One of its subsets; all that are at hand by default.
        split: ``test`` or ``shots``.

    Returns:
        The records in their published order, subset after subset; where there are subsets, the field ``subset``
        names each record's.

    Raises:
        MissingDataError: If a file is not in the local folder.
        DataError: If a record is wrong, or the hub cannot be read.
    """
    entry = _benchmark(benchmark)
    if entry.subsets:
        wanted = None if subset is None else [subset]
        return [record for records in load_subsets(benchmark, split, wanted).values() for record in records]
    if subset is not None:
        raise ValueError(f"{benchmark} has no subsets; it has no {subset!r}")
    return [record for origin in _origins(benchmark, _split(benchmark, split), "") for record in origin.records()]


def load_subsets(benchmark: str, split: str = "test", subsets: Sequence[str] | None = None) -> dict[str, list[Record]]:
    """Load a benchmark's subsets, each apart; see `load_records`.

    Args:
        benchmark: Its name.
        split: ``test`` or ``shots``.
        subsets: Which; by default those that are at hand, with a warning that names the others.

    Raises:
        MissingDataError: If none is in the local folder, or a named one is not.
    """
    known = _benchmark(benchmark).subsets
    if unknown := [subset for subset in subsets or () if subset not in known]:
        raise ValueError(f"{benchmark} has no {unknown}; its subsets are {list(known)}")
    part = _split(benchmark, split)
    if subsets is None:
        state = coverage(benchmark)
        if not state.present:
            way_out = "" if data_folder() else f"; {WAY_OUT}"
            raise MissingDataError(f"dsv3_{benchmark}: {state.missing}{way_out}")
        if state.absent:
            _log.warning(
                "dsv3_%s: %d of %d subsets are absent, its score is partial: %s",
                *(benchmark, len(state.absent), len(known), ", ".join(state.absent)),
            )
        subsets = state.present
    loaded: dict[str, list[Record]] = {subset: [] for subset in subsets}
    if data_folder() is None and part.hub.column:
        (origin,) = _origins(benchmark, part, "")
        for row, record in origin.pairs():
            name = row.fields.get(part.hub.column)
            if name in loaded:
                loaded[name].append({**record, "subset": name})
        return loaded
    for subset in subsets:
        for origin in _origins(benchmark, part, subset):
            loaded[subset] += [{**record, "subset": subset} for record in origin.records()]
    return loaded


def _benchmark(name: str) -> Benchmark:
    if name not in BENCHMARKS:
        raise ValueError(f"no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def _split(benchmark: str, split: str) -> Split:
    entry = _benchmark(benchmark)
    if split == "test":
        return entry.test
    pool = BENCHMARKS[entry.pool_of].pool if entry.pool_of else entry.pool
    if split != "shots" or pool is None:
        raise ValueError(f"{benchmark} has no part {split!r}")
    return pool


def _folder(benchmark: str, part: Split) -> Path:
    entry = BENCHMARKS[benchmark]
    owner = BENCHMARKS[entry.pool_of] if entry.pool_of and part is not entry.test else entry
    folder = data_folder()
    assert folder is not None
    return folder / owner.folder


@dataclass(frozen=True)
class _Origin:
    """Rows of one file or of one data set on the hub."""

    name: str
    rows: Sequence[Raw]
    part: Split
    subset: str

    def pairs(self) -> Iterator[tuple[Row, Record]]:
        """Yield each record with the published one it is from."""
        count = 0
        for raw in self.rows:
            row = Row(raw, self.subset)
            try:
                for record in self.part.read(row):
                    count += 1
                    if self.part.keep is None or self.part.keep(record):
                        yield row, record
            except FieldError as error:
                raise DataError(f"{self.name}, record {count + 1}: {error}") from error

    def records(self) -> Iterator[Record]:
        """Yield the records."""
        return (record for _, record in self.pairs())

    def problems(self) -> tuple[int, list[str]]:
        """Count the records, and say what is wrong with those that cannot be read."""
        count, problems = 0, []
        for raw in self.rows:
            try:
                count += sum(1 for _ in self.part.read(Row(raw, self.subset)))
            except FieldError as error:
                count += 1
                problems.append(f"{self.name}, record {count}: {error}")
        return count, problems


def _origins(benchmark: str, part: Split, subset: str) -> list[_Origin]:
    if data_folder() is None:
        name = " ".join(filter(None, (part.hub.path.format(subset=subset), subset, f"({part.hub.split})")))
        return [_Origin(name, _hub_rows(benchmark, part.hub, subset), part, subset)]
    files = _files(benchmark, part, subset)
    if not files:
        raise MissingDataError(f"dsv3_{benchmark}: {_absence(benchmark, part, subset)}")
    read = [(path, _with_labels(part, path, read_rows(path))) for path in files]
    _refuse_twins(read)
    entry = BENCHMARKS[benchmark]
    chosen = part.hub.rows
    if chosen is not None:
        read = [(path, _choose(path, rows, chosen)) for path, rows in read]
    elif entry.pool is not None and entry.pool.hub.rows and set(_files(benchmark, entry.pool, subset)) & set(files):
        shots = set(entry.pool.hub.rows)
        read = [(path, [row for number, row in enumerate(rows) if number not in shots]) for path, rows in read]
    return [_Origin(str(path), rows, part, subset) for path, rows in read]


def _choose(path: Path, rows: list[Raw], chosen: Sequence[int]) -> list[Raw]:
    """Take rows of a whole split; a file may also hold these and no others."""
    if len(rows) == len(chosen):
        return rows
    if len(rows) <= max(chosen):
        raise DataError(f"{path}: has {len(rows)} records; rows {', '.join(map(str, chosen))} are needed")
    return [rows[number] for number in chosen]


def _with_labels(part: Split, path: Path, rows: list[Raw]) -> list[Raw]:
    if part.labels is None or not rows or "label" in rows[0]:
        return rows
    ending = path.name.removeprefix(part.files[0]).partition(".json")[0]
    file = path.with_name(f"{part.labels}{ending}.lst")
    if not file.is_file():
        raise MissingDataError(f"{file} is missing: the labels of {path.name}")
    labels = read_labels(file)
    if len(labels) != len(rows):
        raise DataError(f"{file}: has {len(labels)} labels for {len(rows)} records of {path.name}")
    return [{**row, "label": label} for row, label in zip(rows, labels, strict=True)]


def _refuse_twins(read: Sequence[tuple[Path, Sequence[Raw]]]) -> None:
    """Refuse a record that two files hold: a part of a split beside the whole would count twice."""
    owner: dict[str, Path] = {}
    for path, rows in read if len(read) > 1 else ():
        for number, row in enumerate(rows, start=1):
            other = owner.setdefault(json.dumps(row, sort_keys=True, default=str), path)
            if other != path:
                raise DataError(f"{path}, record {number}: is in {other.name} too; leave one of the files out")


def _stems(benchmark: str, part: Split, subset: str) -> Iterator[list[str]]:
    """For each part of a split, its stems in the order in which they are looked for."""
    yield from ([stem.format(subset=subset) for stem in stems.split("|")] for stems in part.files)


def _files(benchmark: str, part: Split, subset: str) -> list[Path]:
    folder, stems = _folder(benchmark, part), _all_stems(benchmark, part)
    files: list[Path] = []
    for alternatives in _stems(benchmark, part, subset):
        files += next((found for stem in alternatives if (found := matching(folder, stem, stems))), [])
    return files


def _all_stems(benchmark: str, part: Split) -> list[str]:
    """Every stem in a benchmark's folder: a file belongs to the longest that it begins with."""
    folder = _folder(benchmark, part)
    stems: list[str] = []
    for name, entry in BENCHMARKS.items():
        if folder.name != entry.folder:
            continue
        stems += entry.others
        for other in filter(None, (entry.test, entry.pool)):
            for subset in entry.subsets or ("",):
                stems += [stem for stems in _stems(name, other, subset) for stem in stems]
    return stems


def _patterns(benchmark: str, part: Split, subset: str) -> str:
    """Name the files of a split: ``FOLDER/ccpm/valid*``."""
    stems = [" or ".join(f"{stem}*" for stem in found) for found in _stems(benchmark, part, subset)]
    return f"{_folder(benchmark, part)}/{', '.join(stems)}"


def _absence(benchmark: str, part: Split, subset: str) -> str:
    return f"no file {_patterns(benchmark, part, subset)} ({VARIABLE})"


# The hub


def _hub_rows(benchmark: str, hub: Hub, subset: str) -> list[Raw]:
    rows: list[Raw] = []
    for config in [hub.config] if isinstance(hub.config, str) or hub.config is None else hub.config:
        rows += _load(benchmark, hub, config, subset)
    return rows


def _load(benchmark: str, hub: Hub, config: str | None, subset: str) -> list[Raw]:
    import datasets

    path, name = hub.path.format(subset=subset), config and config.format(subset=subset)
    files = {"data_files": {hub.split: list(hub.files)}} if hub.files else {}
    try:
        loaded = datasets.load_dataset(path, name, split=hub.split, **files)
    except Exception as error:  # of the network, the hub, or the data set's own form
        raise DataError(
            f"dsv3_{benchmark}: {path} {name or ''} ({hub.split}) cannot be loaded from the hub: {error}. "
            f"Offline, {WAY_OUT}."
        ) from error
    if hub.rows is not None:
        loaded = loaded.select(hub.rows)
    labels = {name: kind for name, kind in loaded.features.items() if isinstance(kind, datasets.ClassLabel)}
    rows: list[Raw] = loaded.to_list()
    for row in rows:
        for column, kind in labels.items():
            if row[column] is not None and row[column] >= 0:
                row[column] = kind.int2str(row[column])
    return rows


def _is_cached(path: str) -> bool:
    from huggingface_hub.constants import HF_HUB_CACHE

    return (Path(HF_HUB_CACHE) / f"datasets--{path.replace('/', '--')}").is_dir()


def _downloaded(entry: Benchmark, subsets: Iterable[str]) -> tuple[str, ...]:
    """Those of a benchmark's subsets whose data set has been downloaded."""
    return tuple(name for name in subsets if _is_cached(entry.test.hub.path.format(subset=name)))


def _switched_off_by() -> str | None:
    """Name the variable that switches the hub off, if one does."""
    on = ("1", "TRUE", "YES", "ON")
    return next((name for name in _OFFLINE if os.environ.get(name, "0").upper() in on), None)


_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


# What is at hand


@dataclass(frozen=True)
class Coverage:
    """What of a benchmark is at hand.

    Attributes:
        source: The local files or the data set on the hub.
        present: Subsets at hand (one that is '' for a benchmark without).
        absent: The others.
        missing: What is missing, in words; '' if nothing.
    """

    source: str
    present: tuple[str, ...]
    absent: tuple[str, ...]
    missing: str = ""


def coverage(benchmark: str, subset: str | None = None) -> Coverage:
    """Look what of a benchmark is at hand, without reading it.

    Where records come from the hub, everything counts as at hand, but offline only what has been downloaded.
    """
    entry = _benchmark(benchmark)
    subsets = [subset] if subset is not None else list(entry.subsets or ("",))
    folder = data_folder()
    if folder is None:
        hub = entry.test.hub
        source = hub.files[0] if hub.files and "://" in hub.files[0] else f"hub: {hub.path}"
        switch = _switched_off_by()
        there = tuple(subsets) if switch is None else _downloaded(entry, subsets)
        absent = tuple(name for name in subsets if name not in there)
        if not absent:
            return Coverage(source, there, ())
        first = source.format(subset=absent[0])
        missing = f"{first} has not been downloaded and the hub is switched off ({switch})"
        return Coverage(source, there, absent, missing)
    parts = [entry.test]
    if entry.needs_pool and (entry.pool or entry.pool_of):
        parts.append(_split(benchmark, "shots"))
    gaps = {
        name: [_absence(benchmark, part, name) for part in parts if not _files(benchmark, part, name)]
        for name in subsets
    }
    absent = tuple(name for name in subsets if gaps[name])
    missing = next((gap[0] for gap in gaps.values() if gap), "")
    return Coverage(
        _patterns(benchmark, entry.test, "{subset}"), tuple(name for name in subsets if not gaps[name]), absent, missing
    )


def found(benchmark: str, subset: str | None = None) -> bool:
    """Say whether a benchmark (one of its subsets; any of them by default) can be loaded."""
    return bool(coverage(benchmark, subset).present)


def used_files(benchmark: str, subset: str | None = None, split: str = "test") -> list[str]:
    """Name the local files, or the data set on the hub, that a part of a benchmark is read from."""
    entry, part = _benchmark(benchmark), _split(benchmark, split)
    folder = data_folder()
    if folder is None:
        return [f"{part.hub.path} ({part.hub.split})"]
    subsets = [subset] if subset is not None else entry.subsets or ("",)
    files = [path.relative_to(folder).as_posix() for name in subsets for path in _files(benchmark, part, name)]
    return list(dict.fromkeys(files))


def stand_in(benchmark: str, subset: str | None = None, split: str = "test") -> str:
    """Name the other split, by how its files begin, that a part of a benchmark is read from; '' if it is its own."""
    name = _split(benchmark, split).stand_in
    files = used_files(benchmark, subset, split) if name else []
    return name if any(Path(file).name.startswith(name) for file in files) else ""


def list_benchmarks() -> list[dict[str, Any]]:
    """Return a row for each benchmark: name, title, method, shots, metric, source, found, licence.

    ``found`` is True, False, or says how much: ``29 of 57``; ``to be downloaded`` for what the hub has.
    """
    rows = []
    for name, entry in BENCHMARKS.items():
        state = coverage(name)
        there: bool | str = bool(state.present)
        if state.present and state.absent:
            there = f"{len(state.present)} of {len(entry.subsets)}"
        elif there and data_folder() is None and not _downloaded(entry, entry.subsets or ("",)):
            there = "to be downloaded"
        rows.append(
            {
                "name": f"dsv3_{name}",
                "title": entry.title,
                "method": entry.method,
                "shots": entry.shots,
                "metric": entry.metric,
                "source": state.source,
                "found": there,
                "licence": entry.licence,
            }
        )
    return rows


@dataclass(frozen=True)
class Checked:
    """What `check_data` says of a benchmark.

    Attributes:
        benchmark: Its name.
        records: How many records were read.
        problems: What is wrong, each naming file, record and field.
    """

    benchmark: str
    records: int
    problems: list[str] = field(default_factory=list)


def check_data(benchmarks: Iterable[str] | None = None) -> Iterator[Checked]:
    """Read every record at hand and say what is wrong.

    Args:
        benchmarks: Which; all by default. Without a local folder only what has been downloaded counts as at hand.
    """
    for name in BENCHMARKS if benchmarks is None else benchmarks:
        entry = _benchmark(name)
        records, problems = 0, []
        read: set[tuple[str, str]] = set()  # a file may hold both splits
        for split in ("test", "shots") if entry.pool is not None else ("test",):
            part = _split(name, split)
            for subset in entry.subsets or ("",):
                if not _at_hand(name, part, subset):
                    continue
                try:
                    origins = _origins(name, part, subset)
                except DataError as error:
                    problems.append(str(error))
                    continue
                for origin in origins:
                    if part.hub.rows is None and (origin.name, subset) in read:
                        continue
                    read.add((origin.name, subset))
                    count, faults = origin.problems()
                    records += count
                    problems += faults
        if records or problems:
            yield Checked(name, records, problems)


def _at_hand(benchmark: str, part: Split, subset: str) -> bool:
    if data_folder() is None:
        first = BENCHMARKS[benchmark].subsets[:1]
        return _is_cached(part.hub.path.format(subset=subset)) and (not part.hub.column or subset in first)
    return bool(_files(benchmark, part, subset))
