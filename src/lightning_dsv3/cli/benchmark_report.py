"""``dsv3 eval --list``, ``--check-data`` and ``--contamination``: the benchmarks themselves, without a model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from lightning_dsv3.cli.dsv3 import table
from lightning_dsv3.config import ConfigError, SourceConfig, did_you_mean
from lightning_dsv3.data.corpus import DOMAINS, Source, default_corpus
from lightning_dsv3.data.files import cache_folder
from lightning_dsv3.data.readers import SourceError, quiet_parsing
from lightning_dsv3.data.text_sources import configured_sources
from lightning_dsv3.evaluation import data
from lightning_dsv3.evaluation.contamination import Overlap, Record, find_overlaps
from lightning_dsv3.evaluation.groups import GROUPS, benchmark_of, task_name

_KINDS = ("jsonl", "parquet", "text", "hf")
_ENDINGS = {"jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst"), "parquet": (".parquet",)}
_IDS = ("id", "task_id", "query_id", "question_id")
# No text: the packed tests of LiveCodeBench.
_NOT_TEXT = {"private_test_cases"}


def tell(options: argparse.Namespace) -> int:
    """Do what one of the three options asks for; return the exit code."""
    names = _names(options.tasks)
    try:
        if options.list:
            return _list(names)
        if options.check_data:
            return _check_data(names)
        return _contamination(options, names)
    except data.DataError as error:
        raise ConfigError(str(error)) from error


def _names(tasks: str | None) -> list[str]:
    """Return the benchmarks that tasks, groups or patterns of either mean; all where none is named.

    >>> _names("dsv3_c3,gsm8k,dsv3_hendrycks_*")
    ['c3', 'gsm8k', 'math']
    """
    if tasks is None:
        return list(data.BENCHMARKS)
    meant: dict[str, list[str]] = {name: [name] for name in data.BENCHMARKS}
    meant |= {task_name(name): [name] for name in data.BENCHMARKS}
    meant |= {group: [benchmark_of(leaf)[0] for leaf in leaves] for group, leaves in GROUPS.items()}
    names: dict[str, None] = {}
    for word in filter(None, (word.strip() for word in tasks.split(","))):
        matches = [name for name in meant if fnmatchcase(name, word)]
        if not matches:
            raise ConfigError(f"--tasks {word}: there is no such benchmark; {did_you_mean(word, meant)}")
        names |= dict.fromkeys(benchmark for name in matches for benchmark in meant[name])
    if not names:
        raise ConfigError("--tasks: names no benchmark; leave it out for all")
    return list(names)


def _list(names: Sequence[str]) -> int:
    wanted = {f"dsv3_{name}": task_name(name) for name in names}
    rows = [["task", "benchmark", "method", "shots", "metric", "found", "data", "licence"]]
    for row in data.list_benchmarks():
        if row["name"] in wanted:
            found = {True: "yes", False: "no"}.get(row["found"], row["found"])
            known = [str(row[key]) for key in ("title", "method", "shots", "metric")]
            rows.append([wanted[row["name"]], *known, found, row["source"], row["licence"]])
    print(table(rows, left=(0, 1, 2, 4, 5, 6, 7)))
    if data.data_folder() is None:
        print("\nThe hub's data are downloaded when a run needs them; --data FOLDER or LIGHTNING_DSV3_DATA: from files")
    return 0


def _check_data(names: Sequence[str]) -> int:
    rows, problems = [["task", "records", "problems"]], []
    with _bar(names, "Checking") as bar:
        for name in bar:
            bar.set_postfix_str(name)
            for checked in data.check_data([name]):
                rows.append([task_name(name), f"{checked.records:,}", f"{len(checked.problems):,}"])
                problems += checked.problems
    if len(rows) == 1:
        raise ConfigError("--check-data: no data at hand; name their folder in --data or LIGHTNING_DSV3_DATA")
    print(table(rows, left=(0,)))
    for problem in problems:
        print(problem)
    return 1 if problems else 0


def _contamination(options: argparse.Namespace, names: Sequence[str]) -> int:
    if data.data_folder() is None and options.tasks is None:
        raise ConfigError("--contamination: would fetch every benchmark; give --data FOLDER, or name some in --tasks")
    at_hand = [name for name in names if data.found(name)]
    if missing := [name for name in names if name not in at_hand]:
        # As in an evaluation: a group goes on without the members whose data are absent, a named one is an error.
        words = {word.strip() for word in (options.tasks or "").split(",")}
        named = [name for name in missing if {name, task_name(name)} & words]
        if named or not at_hand:
            raise ConfigError(f"--contamination: {data.coverage((named or missing)[0]).missing}")
        print(f"dsv3: no data of {', '.join(map(task_name, missing))}", file=sys.stderr)
    sources = _sources(options.contamination, options.field)
    overlaps = find_overlaps(
        {name: _records(name) for name in at_hand}, lambda: _documents(sources), length=options.ngram
    )
    print(
        f"{options.ngram} words that are the same, in a row; too short: records that have no {options.ngram} in a row"
    )
    rows = [["task", "records", "too short", "overlapping", "share"]]
    for name, overlap in overlaps.items():
        share = f"{overlap.share:.2%}" if overlap.records > overlap.too_short else "-"
        counts = (overlap.records, overlap.too_short, overlap.overlapping)
        rows.append([task_name(name), *(f"{count:,}" for count in counts), share])
    print(table(rows, left=(0,)))
    if any(overlap.worst for overlap in overlaps.values()):
        print("\nrecords of which most is in the text (how much of it)")
        for name, overlap in overlaps.items():
            if overlap.worst:
                print(f"  {task_name(name)}: {_worst(overlap)}")
    return 0


def _worst(overlap: Overlap) -> str:
    return ", ".join(f"{record} ({share:.0%})" for record, share in overlap.worst)


def _records(benchmark: str) -> Iterator[Record]:
    """Yield a benchmark's test records with all their text; they are read when the first is asked for."""
    if data.BENCHMARKS[benchmark].subsets:
        # Named, as otherwise a warning would name those that are not there.
        parts = data.load_subsets(benchmark, subsets=data.coverage(benchmark).present)
    else:
        parts = {"": data.load_records(benchmark)}
    for subset, records in parts.items():
        for number, record in enumerate(records, start=1):
            name = next((record[key] for key in _IDS if key in record), number)
            yield Record(f"{subset} {name}".strip(), list(_texts(record)))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, part in value.items():
            if name not in _NOT_TEXT:
                yield from _texts(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _texts(part)


def _sources(name: str, field: str) -> list[Source]:
    cache = cache_folder()
    if name != "corpus":
        kind, path = _kind(name)
        config = SourceConfig(domain="text", kind=kind, path=path, field=field)
        return [source for source, _ in configured_sources([config], cache)]
    sources, missing = default_corpus(DOMAINS, cache, offline=True)
    for source in missing:
        print(f"dsv3: without {source.name}: {source.reason}", file=sys.stderr)
    if missing:
        print('dsv3: "dsv3 corpus --fetch" fetches what is missing', file=sys.stderr)
    if not sources:
        raise ConfigError("--contamination corpus: nothing of it is here; dsv3 corpus --fetch fetches it")
    return sources


def _kind(name: str) -> tuple[str, str]:
    """Tell what a source is by the word before its path, the endings of its files, or else take it for text."""
    word, colon, path = name.partition(":")
    if colon and word in _KINDS:
        return word, path
    root = Path(name).expanduser()
    files = [file.name for file in root.rglob("*")] if root.is_dir() else [name]
    for kind, endings in _ENDINGS.items():
        if any(file.endswith(endings) for file in files):
            return kind, name
    return "text", name


def _documents(sources: Sequence[Source]) -> Iterator[str]:
    total = sum(source.text_bytes for source in sources)
    with quiet_parsing(), _bar(None, "Reading the text", total=total or None, unit="B", unit_scale=True) as bar:
        for source in sources:
            try:
                for document in source.read():
                    yield document.text
                    bar.update(len(document.text.encode("utf-8", "replace")))
            except SourceError as error:
                raise ConfigError(f"{source.name}: {error}") from error


def _bar(items: Iterable[str] | None, title: str, **more: Any) -> tqdm:
    # None: where stderr is a terminal.
    return tqdm(items, desc=title, disable=None, dynamic_ncols=True, **more)
