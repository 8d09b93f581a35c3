"""The package is the same from the tree, from the source distribution, and editable."""

import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, Environment, build

PACKAGE = ROOT / "src" / "lightning_dsv3"
IGNORED = {"__pycache__", ".DS_Store"}

IMPORT_EVERYTHING = """
import importlib, json, pkgutil
from importlib.resources import files
import lightning_dsv3
names = [found.name for found in pkgutil.walk_packages(lightning_dsv3.__path__, "lightning_dsv3.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
for name in lightning_dsv3.__all__:
    getattr(lightning_dsv3, name)
presets = sorted(path.stem for path in files("lightning_dsv3.configs").joinpath("model").iterdir())
sizes = {name: lightning_dsv3.DeepSeekV3Config.from_preset(name).num_parameters().total for name in presets}
print(json.dumps({"home": lightning_dsv3.__path__[0], "modules": sorted(names), "sizes": sizes}))
"""


def files_of_the_package() -> set[str]:
    """What an installed package must hold, as paths below the installation folder."""
    folders = {"": PACKAGE, "callbacks": ROOT / "callbacks", "configs": ROOT / "configs"}
    found = {"lightning_dsv3_lm_eval_hook.py", "lightning_dsv3_lm_eval_hook.pth"}
    for name, folder in folders.items():
        for path in folder.rglob("*"):
            relative = path.relative_to(folder)
            linked = name == "" and relative.parts[0] in folders
            if path.is_file() and not linked and not IGNORED & set(relative.parts):
                found.add(str(Path("lightning_dsv3") / name / relative))
    return found


@pytest.fixture(scope="module")
def source_distribution(tmp_path_factory):
    return build("--sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def sdist_wheel(source_distribution, tmp_path_factory):
    unpacked = tmp_path_factory.mktemp("unpacked")
    shutil.unpack_archive(source_distribution, unpacked)
    (source,) = unpacked.iterdir()
    return build("--wheel", source, tmp_path_factory.mktemp("sdist_wheel"))


def build_editable(folder: Path) -> Path:
    """Build the wheel that `pip install --editable` installs."""
    program = f"from hatchling.build import build_editable; build_editable({str(folder)!r})"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, cwd=ROOT)
    (wheel,) = folder.glob("*.whl")
    return wheel


def import_everything(environment: Environment, wheel: Path) -> dict:
    environment.install(wheel)
    environment.see_test_packages()
    result = environment.run(environment.python, "-W", "ignore", "-c", IMPORT_EVERYTHING)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def check_imported(report: dict) -> None:
    expected = {
        path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for path in files_of_the_package()
        if path.endswith(".py") and path.startswith("lightning_dsv3/")
    } - {"lightning_dsv3"}
    assert set(report["modules"]) == expected
    assert report["sizes"]["671b"] == 671_026_419_200


@pytest.mark.parametrize("origin", ["tree", "sdist"])
def test_wheel_holds_each_file_once_and_imports(origin, tree_wheel, request, new_environment):
    wheel = tree_wheel if origin == "tree" else request.getfixturevalue("sdist_wheel")
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    assert {name for name in names if ".dist-info/" not in name} == files_of_the_package()

    environment = new_environment()
    report = import_everything(environment, wheel)
    check_imported(report)
    assert Path(report["home"]).is_relative_to(environment.site_packages)


def test_editable_install_imports_the_tree_and_has_the_hook(tmp_path, new_environment):
    folder = tmp_path / "editable"
    folder.mkdir()
    environment = new_environment()
    report = import_everything(environment, build_editable(folder))
    check_imported(report)
    assert Path(report["home"]) == PACKAGE

    program = "import sys; hook = sys.modules['lightning_dsv3_lm_eval_hook']; print(hook.__file__, hook.tasks_folder())"
    result = environment.run(environment.python, "-c", program)
    assert result.stdout.split() == [f"{PACKAGE}_lm_eval_hook.py", str(PACKAGE / "evaluation" / "tasks")], result.stderr


def test_source_distribution_holds_what_the_wheel_needs(source_distribution):
    with tarfile.open(source_distribution) as archive:
        names = [member.name.partition("/")[2] for member in archive if member.isfile()]
    assert len(names) == len(set(names))
    assert {"pyproject.toml", "README.md", "LICENSE", "callbacks/__init__.py", "configs/__init__.py"} <= set(names)
    assert not [name for name in names if name.startswith(("runs/", "dist/", ".venv/"))]


def test_metadata_declares_the_command_the_marker_and_the_licence(tree_wheel):
    archive = zipfile.ZipFile(tree_wheel)
    text = {Path(name).name: name for name in archive.namelist() if ".dist-info/" in name}
    metadata = archive.read(text["METADATA"]).decode()
    assert re.search(r"^Requires-Python: >=3\.10$", metadata, re.M)
    assert re.search(r"^License-Expression: Apache-2\.0$", metadata, re.M)
    assert re.search(r"^Requires-Dist: triton.*; .*platform_system == 'Linux'", metadata, re.M)
    commands = archive.read(text["entry_points.txt"]).decode()
    assert "lightning = lightning_dsv3.cli.launcher:main" in commands
    assert "dsv3 = lightning_dsv3.cli.dsv3:main" in commands
    assert "[lm_eval.models]\ndsv3 = lightning_dsv3.evaluation.lm:DSV3LM\n" in commands
    assert "[lm_eval.tasks]\ndsv3 = lightning_dsv3.evaluation.tasks" in commands
    assert re.search(r"^Requires-Dist: lm-eval\[hf\].*; extra == 'eval'$", metadata, re.M)
    assert "LICENSE" in text


def test_importing_the_package_does_not_import_torch():
    program = "import sys, lightning_dsv3, lightning_dsv3.config; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_an_unknown_public_name_is_an_attribute_error():
    import lightning_dsv3

    with pytest.raises(AttributeError, match="DeepSeekV9"):
        _ = lightning_dsv3.DeepSeekV9
    assert set(lightning_dsv3.__all__) <= set(dir(lightning_dsv3))
