"""House rules that no linter knows."""

import re
import subprocess

import pytest
from conftest import ROOT

FOLDERS = ["src", "callbacks", "configs", "examples", "tests", "benchmarks", "docs", ".ci"]
TOP = ["pyproject.toml", "Makefile", "README.md", "CHANGELOG.md", ".pre-commit-config.yaml", ".gitignore"]
TEXT = {".py", ".yaml", ".yml", ".toml", ".md", ".sh", ".txt", ".json", ".lock", ""}
SKIPPED = {"__pycache__"}

# In pieces, so that this file does not name them. Packages come through the user's own installer and its
# settings, wherever those point.
REGISTRIES = ["pypi" + ".org", "python" + "hosted.org", "download." + "pytorch.org", "ana" + "conda.org"]
MACHINE_PATH = re.compile(r"(?<![\w.~$}-])/(?:root|home|work|opt|mnt|Users)/\w")


def project_files():
    paths = [ROOT / name for name in TOP if (ROOT / name).exists()]
    for folder in FOLDERS:
        # Links are followed by their real folders, which are in the list.
        paths += [path for path in (ROOT / folder).glob("**/*") if not any(p.is_symlink() for p in path.parents)]
    chosen = {path for path in paths if path.is_file() and path.suffix in TEXT and not SKIPPED & set(path.parts)}
    return sorted(path.relative_to(ROOT) for path in chosen)


FILES = project_files()


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix == ".py"], ids=str)
def test_no_source_file_is_longer_than_500_lines(path):
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= 500, "look for a cut"


def test_no_file_names_a_package_registry():
    found = [(str(path), host) for path in FILES for host in REGISTRIES if host in (ROOT / path).read_text("utf-8")]
    assert found == []


def test_no_file_names_a_path_of_one_machine():
    found = {
        str(path): match.group()
        for path in FILES
        if path.name != "test_style.py" and (match := MACHINE_PATH.search((ROOT / path).read_text("utf-8")))
    }
    assert found == {}


def test_shell_scripts_parse():
    for script, shell in {".ci/environment.sh": "sh", ".ci/test.sh": "sh", ".ci/run": "bash"}.items():
        subprocess.run([shell, "-n", str(ROOT / script)], check=True)
