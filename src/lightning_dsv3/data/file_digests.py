"""Digests of files, kept on disk, so that a start does not read again what has not changed.

As in git's index, a file's digest holds while its size, times of change and inode are those that it was hashed with.
A clock has ticks: a file may be written again within the one in which it was hashed and look the same. So a digest is
kept only of a file that was left alone for some time before; until then the file is hashed at every start.

    <cache>/digests/<source>.json     {"format": 1, "files": {path: [size, mtime_ns, ctime_ns, inode, digest]}}

Several processes may write one index at once: each writes a whole one, the last stays, and what it lacks is hashed
again. So is everything whose index cannot be read: it is a cache and never an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

from lightning_dsv3.data.files import write_atomically

_FORMAT = 1
_BLOCK = 1 << 20
# Coarse file systems count in two seconds.
_RACY_NS = 2 * 10**9

_Stamp = tuple[int, int, int, int]


class FileDigests:
    """Digests of a source's files.

    Args:
        index: File that keeps them from one start to the next.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "a.txt"
        ...     _ = file.write_text("An old silent pond")
        ...     FileDigests(Path(folder) / "digests" / "a.json").digest(file)
        '0ab67d20466c217d570807f05b5ebc14'
    """

    def __init__(self, index: Path) -> None:
        self._index = index
        self._kept = _read(index)
        self._used: dict[str, tuple[_Stamp, str]] = {}

    def digest(self, path: Path) -> str:
        """Return the digest of a file's content, in hexadecimal digits.

        Raises:
            OSError: The file cannot be read.
        """
        name = str(path.resolve())
        known = self._kept.get(name)
        if known is not None and known[0] == _stamp(path.stat()):
            self._used[name] = known
            return known[1]
        with path.open("rb") as file:
            now, before = time.time_ns(), _stamp(os.fstat(file.fileno()))
            content = hashlib.blake2b(digest_size=16)
            while block := file.read(_BLOCK):
                content.update(block)
            unchanged = _stamp(os.fstat(file.fileno())) == before
        if unchanged and now - before[1] > _RACY_NS:
            self._used[name] = (before, content.hexdigest())
        return content.hexdigest()

    def save(self) -> None:
        """Keep the digests of the files that were asked for, and of no others."""
        if self._used == self._kept:
            return
        files = {name: [*stamp, digest] for name, (stamp, digest) in self._used.items()}
        # Without an index, as on a full disk, the next start is slower and that is all.
        with contextlib.suppress(OSError):
            self._index.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._index, json.dumps({"format": _FORMAT, "files": files}).encode())


def _stamp(status: os.stat_result) -> _Stamp:
    # Copying with times kept sets the time of writing back, but not the other one.
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _read(index: Path) -> dict[str, tuple[_Stamp, str]]:
    try:
        content = json.loads(index.read_bytes())
        if content["format"] != _FORMAT:
            return {}
        kept = {}
        for name, (size, mtime, ctime, inode, digest) in content["files"].items():
            if len(bytes.fromhex(digest)) != 16:
                return {}
            kept[name] = ((size, mtime, ctime, inode), digest)
        return kept
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
