"""The user's own text, as ``data.sources`` names it: JSONL, Parquet, text files, data sets of the Hugging Face hub.

    jsonl     one object per line, the text in ``field``; .gz and .zst too
    parquet   one row per document, the text in the column ``field``
    text      one file per document; .gz and .zst too
    hf        whatever ``datasets.load_dataset`` loads, the text in the column ``field``

``path`` of the first three is a file, a folder (all that is in it) or a pattern with ``*``, from the working directory.

Documents are read once, in order, into the token cache. The cache's key is the hash of the files' content, so a file
that changed is tokenised again and one that did not is not, nor is it read again to know that (``file_digests.py``). A
data set of the hub is known by what the configuration says of it: the hub is not asked again while the tokens are
there, and ``revision`` pins what is fetched.

A record that cannot be read ends the preparation with one error that names source, file, record and field: a source
that somebody asked for is not left out in silence. Blank texts are not documents and are passed over.
"""

from __future__ import annotations

import codecs
import contextlib
import glob
import gzip
import hashlib
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from lightning_dsv3.config import ConfigError, SourceConfig, did_you_mean
from lightning_dsv3.data.corpus import Document, Source
from lightning_dsv3.data.file_digests import FileDigests

# Part of every cache key: raise it when other documents are made of the same bytes.
_VERSION = 2
_BLOCK = 1 << 20
_ENDINGS: Mapping[str, tuple[str, ...]] = {
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst"),
    "parquet": (".parquet",),
    "text": ("",),
}


@dataclass(frozen=True)
class _Place:
    """Where in the user's data something is, for errors."""

    source: str
    file: str = ""
    record: int = 0

    def __str__(self) -> str:
        return ": ".join(filter(None, [self.source, self.file, f"record {self.record}" if self.record else ""]))


def configured_sources(
    configs: Sequence[SourceConfig], cache_dir: Path, *, offline: bool = False
) -> list[tuple[Source, float]]:
    """Look up the sources that a configuration names; nothing is read but what identifies their content.

    Args:
        configs: The value of ``data.sources``.
        cache_dir: Digests of the files are kept in its folder ``digests``.
        offline: Fetch nothing from the hub.

    Returns:
        The sources whose weight is not 0, with their weights.

    Raises:
        ConfigError: A file that is not there or cannot be read, or the same source twice.
    """
    sources: dict[str, tuple[Source, float]] = {}
    for index, config in enumerate(configs):
        if config.weight == 0:
            continue
        source = _source(config, _Place(f"data.sources[{index}]"), cache_dir / "digests", offline)
        if source.name in sources:
            raise ConfigError(f"data.sources[{index}]: {config.path} is there twice; add the weights up in one entry")
        sources[source.name] = (source, config.weight)
    return list(sources.values())


def _source(config: SourceConfig, place: _Place, digests: Path, offline: bool) -> Source:
    if config.kind == "hf":
        files = _files(config.path, ("",), place) if Path(config.path).exists() else []
        read = _hub_reader(config, place, offline=offline and not files)
    else:
        files = _files(config.path, _ENDINGS[config.kind], place)
        read = _file_reader(config, place, files)
    # What decides which documents there are, beside the bytes of the files.
    choice = [config.kind, config.field, config.limit, config.subset, config.split, config.revision]
    if not files:
        choice.append(config.path)
    slug = re.sub(r"[^\w.-]+", "-", config.path).strip("-.")[-40:]
    words = json.dumps([config.domain, config.path, *choice])
    # The same files read in another way have the same digests.
    where = json.dumps([config.kind, str(Path(config.path).expanduser().absolute())])
    index = FileDigests(digests / f"{config.kind}-{slug}-{_short_hash(where)}.json")
    return Source(
        name=f"{config.kind}-{slug}-{_short_hash(words)}",
        domain=config.domain,
        licence="the user's own" if config.kind != "hf" else "see the data set's card",
        text_bytes=sum(path.stat().st_size for path in files),
        fingerprint=_fingerprint([_VERSION, *choice], files, index, place),
        read=lambda: _documents(read, config, place),
    )


def _short_hash(words: str) -> str:
    return hashlib.blake2b(words.encode(), digest_size=4).hexdigest()


def _documents(
    read: Callable[[], Iterator[tuple[_Place, object]]], config: SourceConfig, place: _Place
) -> Iterator[Document]:
    """Check every record and name every document: by its text's hash, so that equal texts are held out together."""
    documents = (text for where, value in read() if (text := _text(value, where, config)).strip())
    count = 0
    for text in itertools.islice(documents, config.limit):
        count += 1
        yield Document("text", hashlib.blake2b(text.encode("utf-8"), digest_size=16).hexdigest(), text)
    if not count:
        raise ConfigError(f"{place}: {config.path}: there is no text in it; give another path or leave the source out")


def _text(value: object, place: _Place, config: SourceConfig) -> str:
    name = "" if config.kind == "text" else f"field {config.field!r} "
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise ConfigError(f"{place}: {name}is {kind}, not text; mend the record or set data.sources[].field")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{place}: {name}is no text: character {error.start} is half of a surrogate pair; mend the record"
        ) from error
    return value


def _files(path: str, endings: tuple[str, ...], place: _Place) -> list[Path]:
    """Return the files behind a path, a folder or a pattern, in the order of their names."""
    root = Path(path).expanduser()
    if root.is_file():
        return [root]
    if root.is_dir():
        found = [file for file in root.rglob("*") if file.name.endswith(endings)]
        found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(root).parts)]
    else:
        found = [Path(name) for name in glob.glob(str(root), recursive=True)]
    files = sorted(file for file in found if file.is_file())
    if not files:
        wanted = f" that ends in {' or '.join(endings)}" if root.is_dir() and any(endings) else ""
        raise ConfigError(
            f"{place}: path={path}: there is no file{wanted}; paths begin at the working directory, {Path.cwd()}"
        )
    return files


def _fingerprint(choice: Sequence[object], files: Sequence[Path], digests: FileDigests, place: _Place) -> str:
    total = hashlib.blake2b(json.dumps(choice).encode(), digest_size=16)
    for path in files:
        with _explained(_Place(place.source, str(path))):
            total.update(digests.digest(path).encode())
    digests.save()
    return total.hexdigest()


def _file_reader(
    config: SourceConfig, place: _Place, files: Sequence[Path]
) -> Callable[[], Iterator[tuple[_Place, object]]]:
    readers = {"jsonl": _read_jsonl, "parquet": _read_parquet, "text": _read_text}

    def read() -> Iterator[tuple[_Place, object]]:
        for path in files:
            yield from readers[config.kind](path, config.field, _Place(place.source, str(path)))

    return read


def _read_text(path: Path, field: str, place: _Place) -> Iterator[tuple[_Place, object]]:
    with _explained(place), _open(path, place) as file:
        content = file.read()
    yield place, _decoded(content, place)


def _read_jsonl(path: Path, field: str, place: _Place) -> Iterator[tuple[_Place, object]]:
    number = 0
    with _open(path, place) as file:
        while True:
            number += 1
            where = _Place(place.source, place.file, number)
            with _explained(where):
                line = file.readline()
            if not line:
                return
            text = _decoded(line, where)
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except ValueError as error:
                raise ConfigError(f"{where}: is not JSON ({error}); is the file truncated?") from error
            if not isinstance(record, dict):
                raise ConfigError(f"{where}: is {type(record).__name__}, not an object with a field {field!r}")
            if field not in record:
                raise ConfigError(f"{where}: {_no_field(field, record)}")
            yield where, record[field]


def _read_parquet(path: Path, field: str, place: _Place) -> Iterator[tuple[_Place, object]]:
    parquet = _imported("pyarrow.parquet", "pyarrow", place)
    number = 0
    with contextlib.ExitStack() as stack:
        with _explained(place):
            table = stack.enter_context(parquet.ParquetFile(path))
        names = table.schema_arrow.names
        if field not in names:
            raise ConfigError(f"{place}: {_no_field(field, names)}")
        batches = table.iter_batches(columns=[field], batch_size=1024)
        while True:
            with _explained(_Place(place.source, place.file, number + 1)):
                batch = next(batches, None)
            if batch is None:
                return
            for value in batch.column(0):
                number += 1
                where = _Place(place.source, place.file, number)
                try:
                    text = value.as_py()
                except UnicodeDecodeError as error:
                    raise ConfigError(f"{where}: field {field!r} is not UTF-8 ({error.reason}); mend it") from error
                yield where, text


def _hub_reader(config: SourceConfig, place: _Place, *, offline: bool) -> Callable[[], Iterator[tuple[_Place, object]]]:
    def read() -> Iterator[tuple[_Place, object]]:
        if offline:
            raise ConfigError(
                f"{place}: {config.path}: its tokens are not in the cache and data.offline=true; run once with "
                "data.offline=false"
            )
        datasets = _imported("datasets", "datasets", place)
        here, number = _Place(place.source, config.path), 0
        with _explained(here):
            rows = iter(
                datasets.load_dataset(
                    config.path,
                    name=config.subset,
                    split=config.split,
                    revision=config.revision,
                    streaming=config.streaming,
                )
            )
        while True:
            number += 1
            where = _Place(place.source, config.path, number)
            with _explained(where):
                row = next(rows, None)
            if row is None:
                return
            if config.field not in row:
                raise ConfigError(f"{where}: {_no_field(config.field, row)}")
            yield where, row[config.field]

    return read


def _no_field(field: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    return f"there is no field {field!r}; set data.sources[].field: {did_you_mean(field, map(str, known))}"


def _decoded(content: bytes, place: _Place) -> str:
    try:
        # Editors on Windows put a mark before the first character.
        return content.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{place}: is not UTF-8 (byte {error.start}: {error.reason}); convert it, for example with iconv"
        ) from error


@contextlib.contextmanager
def _explained(place: _Place) -> Iterator[None]:
    """Turn what a reading library raises into the one error; around library calls only, never around a yield."""
    try:
        yield
    except (ConfigError, MemoryError):
        raise
    except (EOFError, zlib.error) as error:
        raise ConfigError(f"{place}: is truncated or damaged ({error}); fetch it again") from error
    except OSError as error:
        raise ConfigError(f"{place}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # each of the libraries has a family of its own
        raise ConfigError(f"{place}: cannot be read ({type(error).__name__}: {error})") from error


def _imported(module: str, package: str, place: _Place) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(f"{place}: needs {package}, which is not installed; pip install {package}") from error


def _open(path: Path, place: _Place) -> BinaryIO:
    with _explained(place):
        if path.suffix == ".gz":
            return io.BufferedReader(gzip.GzipFile(path))
        if path.suffix == ".zst":
            return io.BufferedReader(_ZstdFile(path, _imported("zstandard", "zstandard", place)))
        return path.open("rb")


class _ZstdFile(io.RawIOBase):
    """A .zst file's content; unlike the library's own stream it does not take a truncated file for a short one."""

    def __init__(self, path: Path, zstandard: ModuleType) -> None:
        self._file = path.open("rb")
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            block = self._file.read(_BLOCK)
            if not block:
                if self._frame is not None:
                    raise EOFError("the file ends inside a frame")
                return 0
            self._ready = self._decompressed(block)
        taken = self._ready[: len(buffer)]
        buffer[: len(taken)] = taken
        self._ready = self._ready[len(taken) :]
        return len(taken)

    def _decompressed(self, block: bytes) -> bytes:
        parts = []
        while block:
            self._frame = self._frame or self._decompressor.decompressobj()
            parts.append(self._frame.decompress(block))
            block = b""
            if self._frame.eof:
                # A file may be several frames one after another.
                block, self._frame = self._frame.unused_data, None
        return b"".join(parts)
