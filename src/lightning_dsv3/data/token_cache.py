"""Tokens of each source on disk, made once.

    <cache>/tokens/<source>-<key>/tokens.bin       little-endian uint16, or uint32 where ids do not fit
                                  documents.npy    one record per document: key, number of tokens, bytes of text
                                  source.json      what it is, for people

The key is made of the content, the tokenizer's file and cut, and the versions of reader and format, so nothing in it
can be stale. A folder is prepared under another name and renamed: two processes at once do the work twice and do no
harm, and a process that is killed leaves nothing that looks finished.

Text is encoded in threads of ours (the tokenizer lets go of the interpreter while it works) and not in the tokenizer's
own pool, which would print warnings in every data worker that is forked later.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tqdm import tqdm

from lightning_dsv3.data.corpus import Document, Source, document_key
from lightning_dsv3.data.files import make_cache_folder, partial_folder, publish_folder
from lightning_dsv3.data.readers import SourceError, quiet_parsing
from lightning_dsv3.data.tokenizer import load_tokenizer, tokenizer_fingerprint

_FORMAT_VERSION = 1
_RECORD = np.dtype([("key", "<u8"), ("tokens", "<i8"), ("bytes", "<i8")])
# Large enough that threads seldom meet, small enough that little text is in memory.
_CHUNK_CHARACTERS = 1 << 18


@dataclass(frozen=True)
class TokenizedSource:
    """One source's tokens; pickles as a path, so that data workers map the file instead of copying it.

    Attributes:
        path: Folder in the cache.
        vocab_size: All ids are below it.
    """

    path: Path
    vocab_size: int

    @property
    def tokens(self) -> npt.NDArray[np.unsignedinteger]:
        """All tokens, memory-mapped, documents one after another."""
        file = self.path / "tokens.bin"
        if file.stat().st_size == 0:
            return np.empty(0, _token_dtype(self.vocab_size))
        return np.asarray(np.memmap(file, dtype=_token_dtype(self.vocab_size), mode="r"))

    @property
    def documents(self) -> npt.NDArray[np.void]:
        """One record per document: ``key`` (split and shuffle hash), ``tokens`` and ``bytes``."""
        documents: npt.NDArray[np.void] = np.load(self.path / "documents.npy", allow_pickle=False)
        return documents

    def is_whole(self) -> bool:
        """Whether the files are there and of the size that they must have."""
        try:
            expected = int(self.documents["tokens"].sum()) * _token_dtype(self.vocab_size).itemsize
            return (self.path / "tokens.bin").stat().st_size == expected
        except (OSError, ValueError):
            return False


def tokenize_sources(
    sources: Sequence[Source], vocab_size: int, cache_dir: Path, *, progress: bool = True
) -> tuple[dict[str, TokenizedSource], dict[str, str]]:
    """Tokenise what is not in the cache yet.

    Args:
        sources: Any number of sources with different names.
        vocab_size: Cut of the tokenizer.
        cache_dir: Tokens are kept in its folder ``tokens``.
        progress: Show a bar in megabytes of text.

    Returns:
        The tokens of each source by name, and for each source that could not be read the reason.
    """
    folder = cache_dir / "tokens"
    fingerprint = tokenizer_fingerprint(vocab_size)
    tokenized = {
        source.name: TokenizedSource(folder / f"{source.name}-{_cache_key(source, fingerprint)}", vocab_size)
        for source in sources
    }
    wanted = [source for source in sources if not tokenized[source.name].is_whole()]
    failed: dict[str, str] = {}
    if not wanted:
        return tokenized, failed
    make_cache_folder(folder)
    total = sum(source.text_bytes for source in wanted)
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with (
        quiet_parsing(),
        _single_threaded_tokenizers(),
        tqdm(total=total, desc="Tokenising", unit="B", unit_scale=True, disable=not progress) as bar,
        _Encoder(load_tokenizer(vocab_size), threads, bar) as encoder,
        # A source is read in Python (parsing sympy takes seconds), so the sources are read side by side.
        ThreadPoolExecutor(len(wanted)) as readers,
    ):
        jobs = {readers.submit(_build, source, tokenized[source.name], encoder): source.name for source in wanted}
        for job in as_completed(jobs):
            try:
                job.result()
            except SourceError as error:
                failed[jobs[job]] = str(error)
                del tokenized[jobs[job]]
        # What sources hold was an estimate.
        bar.total = bar.n
        bar.refresh()
    return tokenized, failed


def _cache_key(source: Source, tokenizer: str) -> str:
    parts = (str(_FORMAT_VERSION), source.name, source.fingerprint, tokenizer)
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=10).hexdigest()


def _token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def _build(source: Source, target: TokenizedSource, encoder: _Encoder) -> None:
    with partial_folder(target.path.parent) as partial:
        records = []
        with (partial / "tokens.bin").open("wb") as file:
            for document, ids in encoder.encode(source.read()):
                file.write(ids.astype(_token_dtype(target.vocab_size)).tobytes())
                size = len(document.text.encode("utf-8"))
                records.append((document_key(document.source, document.id), len(ids), size))
        if not records:
            raise SourceError("there is no text in it")
        documents = np.array(records, dtype=_RECORD)
        np.save(partial / "documents.npy", documents, allow_pickle=False)
        summary = {
            "source": source.name,
            "domain": source.domain,
            "licence": source.licence,
            "documents": len(documents),
            "text_bytes": int(documents["bytes"].sum()),
            "tokens": int(documents["tokens"].sum()),
            "vocab_size": target.vocab_size,
        }
        (partial / "source.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False), encoding="utf-8")
        if target.path.exists() and not target.is_whole():
            # Damaged: move it out of the way, into the folder that is about to go.
            os.rename(target.path, partial / "damaged")
        publish_folder(partial, target.path)


class _Encoder:
    """Encodes documents in threads and keeps their order."""

    def __init__(self, tokenizer: Tokenizer, threads: int, bar: tqdm) -> None:
        self._tokenizer = tokenizer
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)
        self._bar = bar
        self._lock = threading.Lock()

    def __enter__(self) -> _Encoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def encode(self, documents: Iterable[Document]) -> Iterator[tuple[Document, npt.NDArray[np.int64]]]:
        """Yield each document with its ids, reading only a little ahead."""
        pending: deque[Future[list[tuple[Document, npt.NDArray[np.int64]]]]] = deque()
        for chunk in _chunks(documents):
            pending.append(self._pool.submit(self._encode_chunk, chunk))
            if len(pending) > 2 * self._threads:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()

    def _encode_chunk(self, chunk: list[Document]) -> list[tuple[Document, npt.NDArray[np.int64]]]:
        encodings = self._tokenizer.encode_batch_fast([document.text for document in chunk], add_special_tokens=False)
        ids = [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]
        with self._lock:
            self._bar.update(sum(len(document.text.encode("utf-8")) for document in chunk))
        return list(zip(chunk, ids, strict=True))


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document.text)
        if size >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


@contextlib.contextmanager
def _single_threaded_tokenizers() -> Iterator[None]:
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
