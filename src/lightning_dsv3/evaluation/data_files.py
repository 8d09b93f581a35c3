"""Reading the published files of the benchmarks: JSON, JSONL, TSV, CSV and parquet, plain or packed (zst, gz)."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

Raw = dict[str, Any]

_PACKED = (".zst", ".gz")
# A cell of a CSV file may hold a whole passage; the csv module's own limit is 128 KiB.
_LARGEST_CELL = 1 << 24


class DataError(ValueError):
    """Data of a benchmark that are absent or wrong; the message names the file, the record and the field."""


def matching(folder: Path, stem: str, other_stems: Sequence[str] = ()) -> list[Path]:
    """Return the files ``<folder>/<stem>*``, sorted, without those that belong to a longer stem.

    Args:
        folder: The benchmark's folder.
        stem: Beginning of a file's path below the folder, as in ``test/anatomy``.
        other_stems: Stems of the benchmark's other files: ``sat-en-without-passage.jsonl`` is no ``sat-en``.
    """
    parent, _, name = stem.rpartition("/")
    longer = [other for other in other_stems if other != stem and other.startswith(stem)]
    where = folder / parent
    if not where.is_dir():
        return []
    found = []
    for path in sorted(where.iterdir()):
        relative = f"{parent}/{path.name}" if parent else path.name
        if not path.is_file() or not path.name.startswith(name) or _suffix(path) not in _READERS:
            continue
        if not any(relative.startswith(other) for other in longer):
            found.append(path)
    return found


def read_rows(path: Path) -> list[Raw]:
    """Return the records of a file as they are.

    A TSV file has no header: its cells are ``0``, ``1``, .... A JSON file is a list, one object, or JSONL under another
    name; an object is one record. A CSV file without a header (MMLU as first published) is told by its first row, which
    ends in the letter of an answer.

    Raises:
        DataError: If the file cannot be read, naming it and the line.
    """
    try:
        return list(_READERS[_suffix(path)](path))
    except DataError:
        raise
    except Exception as error:  # of the disk, a decompressor, the encoding, or a table's reader
        raise DataError(f"{path}: cannot be read: {error}") from error


def read_labels(path: Path) -> list[str]:
    """Return the lines of a file with one label in each."""
    return _text(path).split()


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in _PACKED else suffix


def _open(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return cast("IO[bytes]", gzip.open(path, "rb"))
    if path.suffix.lower() == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise DataError(f"{path}: needs zstandard; pip install 'lightning-dsv3[eval]'") from error
        return cast("IO[bytes]", zstandard.open(path, "rb"))
    return path.open("rb")


def _text(path: Path) -> str:
    with _open(path) as file:
        data = file.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        # One of MMLU-Redux's tables was saved by a spreadsheet.
        if _suffix(path) == ".csv":
            return data.decode("cp1252", errors="replace")
        raise


def _read_jsonl(path: Path) -> Iterator[Raw]:
    with _open(path) as file:
        for number, line in enumerate(io.TextIOWrapper(file, encoding="utf-8-sig"), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: must be an object of fields, not a {type(row).__name__}")
            yield row


def _read_json(path: Path) -> Iterator[Raw]:
    text = _text(path)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise DataError(f"{path}: is no JSON: {error}") from error
        yield from _read_jsonl(path)
        return
    for number, row in enumerate(content if isinstance(content, list) else [content], start=1):
        # C3's records are lists of paragraphs, questions and id.
        yield (
            row if isinstance(row, dict) else {str(index): part for index, part in enumerate(_parts(path, number, row))}
        )


def _parts(path: Path, number: int, row: Any) -> list[Any]:
    if not isinstance(row, list):
        raise DataError(f"{path}, record {number}: must be an object or a list, not a {type(row).__name__}")
    return row


def _read_tsv(path: Path) -> Iterator[Raw]:
    for line in _text(path).split("\n"):  # not splitlines: a text may hold other separators
        if line.strip():
            yield {str(index): cell for index, cell in enumerate(line.rstrip("\r").split("\t"))}


def _read_csv(path: Path) -> Iterator[Raw]:
    csv.field_size_limit(_LARGEST_CELL)
    text = _text(path)
    first = text.partition("\n")[0]
    delimiter = ";" if first.count(";") > first.count(",") else ","
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    header = next(rows, [])
    if len(header) == 6 and header[-1] in tuple("ABCD") and "question" not in map(str.lower, header):
        names = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]
        yield dict(zip(names, header, strict=True))
        header = names
    for number, row in enumerate(rows, start=1):
        if not row:
            continue
        if len(row) != len(header):
            raise DataError(f"{path}, record {number}: has {len(row)} cells where the header has {len(header)}")
        yield dict(zip(header, row, strict=True))


def _read_parquet(path: Path) -> Iterator[Raw]:
    import pyarrow.parquet

    yield from pyarrow.parquet.read_table(path).to_pylist()


_READERS = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
