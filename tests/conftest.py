"""One thread, fixed seeds, bounded property tests, and a built wheel for the tests that need one."""

import os

# Before torch is imported: its thread pools are sized then.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import random
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

torch.set_num_threads(1)
# No deadline, as a shared machine has slow moments; derandomised, so that a red test is red for everybody.
settings.register_profile("bounded", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("bounded")


def pytest_configure(config: pytest.Config) -> None:
    """Keep tokenised text out of the user's cache; worker processes inherit the folder."""
    if "LIGHTNING_DSV3_TEST_CACHE" not in os.environ:
        folder = tempfile.mkdtemp(prefix="lightning_dsv3_cache_")
        os.environ["LIGHTNING_DSV3_TEST_CACHE"] = os.environ["LIGHTNING_DSV3_CACHE"] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Start every test from the same random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def not_under_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget a launcher that these tests may have been started by."""
    for name in [name for name in os.environ if name.startswith(("LT_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def project_root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def tree_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built from the working tree."""
    folder = tmp_path_factory.mktemp("tree_wheel")
    return build("--wheel", ROOT, folder)


def build(kind: str, source: Path, folder: Path) -> Path:
    """Build with the tools of the test environment; nothing is fetched."""
    command = [sys.executable, "-m", "build", "--no-isolation", kind, "--outdir", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (built,) = folder.iterdir()
    return built


class Environment:
    """A fresh virtual environment without anything in it, pip included."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.bin = folder / "bin"
        self.python = self.bin / "python"
        (self.site_packages,) = folder.glob("lib/python*/site-packages")

    def install(self, *wheels: Path) -> None:
        command = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--quiet"]
        command += ["--no-deps", "--no-index", "--disable-pip-version-check", *map(str, wheels)]
        subprocess.run(command, check=True, capture_output=True, text=True)

    def see_test_packages(self) -> None:
        """Add the packages of the test environment, after installing: pip would take them for its own."""
        paths = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        (self.site_packages / "test_environment.pth").write_text("\n".join(paths) + "\n")

    def run(self, *command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        words = [str(word) for word in command]
        environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return subprocess.run(words, capture_output=True, text=True, env=environ, timeout=120, cwd=cwd or self.bin)


@pytest.fixture
def new_environment(tmp_path: Path) -> Callable[..., Environment]:
    def new(name: str = "environment") -> Environment:
        return Environment(tmp_path / name)

    return new


def write_wheel(folder: Path, name: str, files: dict[str, str], scripts: dict[str, str]) -> Path:
    """Write a small pure Python wheel by hand, to stand in for a package that is not installed here."""
    info = f"{name}-1.0.dist-info"
    entry_points = "[console_scripts]\n" + "".join(f"{script} = {home}\n" for script, home in scripts.items())
    members = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": entry_points,
    }
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, text in members.items():
            archive.writestr(member, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{member},,\n" for member in [*members, f"{info}/RECORD"]))
    return path
