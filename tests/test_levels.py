"""The stack of the package: a file imports only from lower lines, and neighbours on one line not each other.

Imports inside functions and under ``TYPE_CHECKING`` count too.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

# From the bottom up; each line holds the packages and modules that stand side by side.
STACK = [
    {"config"},
    {"ops"},
    {"layers"},
    {"balance", "metrics", "data"},
    {"model"},
    {"checkpoint", "parallel", "inference"},
    {"module", "precision", "plots"},
    {"evaluation"},
    {"callbacks"},
    {"cli", "configs", "__main__", "pytorch_lightning"},
]
LEVEL = {unit: level for level, line in enumerate(STACK) for unit in line}
# The command is started by the module that only calls it.
ALLOWED = {("__main__", "cli")}
PACKAGE = ROOT / "src" / "lightning_dsv3"
# `configs` is data: it is read by name through importlib.resources and imports nothing.
TORCH_FREE = ("config", "configs")
FILES = sorted(path.relative_to(PACKAGE) for unit in PACKAGE.iterdir() for path in [unit, *unit.glob("**/*.py")])
FILES = [path for path in FILES if path.suffix == ".py" and path != Path("__init__.py")]


def unit_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def imported_names(path: Path) -> Iterator[str]:
    """Every absolute dotted name that a file imports, wherever it does so."""
    package = ["lightning_dsv3", *path.parent.parts]
    for node in ast.walk(ast.parse((PACKAGE / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            first = node.args[0]
            if isinstance(first, ast.Constant):
                yield first.value


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_only_from_lower_lines(path):
    unit = unit_of(path)
    assert unit in LEVEL, f"{path} has no place in the stack: give it a line in DESIGN and here"
    for name in imported_names(path):
        owner, _, rest = name.partition(".")
        if owner != "lightning_dsv3" or rest == "__version__":
            continue
        other = rest.partition(".")[0]
        assert other in LEVEL, f"{path} imports {name}: inside the package import a name from its home"
        if other != unit and (unit, other) not in ALLOWED:
            assert LEVEL[other] < LEVEL[unit], f"{path} (level {LEVEL[unit]}) imports {name} (level {LEVEL[other]})"


@pytest.mark.parametrize("path", [path for path in FILES if unit_of(path) in TORCH_FREE], ids=str)
def test_the_configuration_imports_no_torch(path):
    heavy = {"torch", "lightning", "pytorch_lightning", "torchmetrics", "transformers", "numpy"}
    assert not heavy & {name.partition(".")[0] for name in imported_names(path)}


@pytest.mark.parametrize(
    "module",
    ["lightning_dsv3.config", "lightning_dsv3.cli.launcher", "lightning_dsv3.cli.dsv3", "lightning_dsv3.configs"],
)
def test_light_modules_do_not_load_torch(module):
    program = f"import sys, {module}; print([name for name in ('torch', 'lightning') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_walk_sees_every_kind_of_import(tmp_path, monkeypatch):
    source = """
import lightning_dsv3.model
from . import norm
from ..ops.rope import apply
def lazily():
    from lightning_dsv3.callbacks import X
    importlib.import_module("lightning_dsv3.cli")
"""
    (tmp_path / "layers").mkdir()
    (tmp_path / "layers" / "block.py").write_text(source)
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    assert sorted(imported_names(Path("layers/block.py"))) == [
        "lightning_dsv3.callbacks.X",
        "lightning_dsv3.cli",
        "lightning_dsv3.layers.norm",
        "lightning_dsv3.model",
        "lightning_dsv3.ops.rope.apply",
    ]
