"""The cache folder, and files that are either whole or not there."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lightning_dsv3.config import ConfigError

_PARTIAL = ".partial-"
_ABANDONED_SECONDS = 24 * 3600


def cache_folder(configured: str | None = None) -> Path:
    """Return the cache folder: what is configured, $LIGHTNING_DSV3_CACHE, or the user's cache folder."""
    if configured:
        return Path(configured).expanduser()
    if chosen := os.environ.get("LIGHTNING_DSV3_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lightning_dsv3"


def make_cache_folder(path: Path) -> Path:
    """Create ``path`` and clear away what processes that were killed left half done in it.

    Raises:
        ConfigError: It cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir={path}: cannot be written ({error.strerror or error}); set data.cache_dir or "
            "LIGHTNING_DSV3_CACHE to a folder that can"
        ) from error
    for partial in path.glob(f"{_PARTIAL}*"):
        with contextlib.suppress(OSError):
            if time.time() - partial.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
    return path


@contextlib.contextmanager
def partial_folder(parent: Path) -> Iterator[Path]:
    """Make a folder inside ``parent`` to prepare files in; it is gone afterwards, whatever happens."""
    folder = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=parent))
    os.chmod(folder, 0o777 & ~_umask())
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish_folder(prepared: Path, final: Path) -> None:
    """Rename a prepared folder to its final name; when another process was first, its folder stays."""
    try:
        # A folder never replaces one that has files in it.
        os.rename(prepared, final)
    except OSError:
        if not final.is_dir():
            raise


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is either whole or not there."""
    handle, name = tempfile.mkstemp(prefix=_PARTIAL, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _umask() -> int:
    # tempfile makes private files and folders; published ones get the usual rights. It can only be read by setting.
    umask = os.umask(0o022)
    os.umask(umask)
    return umask
