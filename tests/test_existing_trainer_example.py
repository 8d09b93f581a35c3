"""The example of adding the callback to a Trainer that exists, run on a few texts."""

from __future__ import annotations

import ast
import importlib.util
import logging
import re
import sys
import warnings

import pytest
from conftest import ROOT

from lightning_dsv3 import DeepSeekV3DataModule

SCRIPT = ROOT / "examples" / "existing_trainer.py"
TEXTS = {"prose": ["It was the best of times, it was the worst of times. " * 9] * 3 + ["All happy families. " * 40] * 3}


@pytest.fixture
def example(monkeypatch, tmp_path):
    """The script as a module, on texts that need neither a network nor minutes of tokenising."""
    spec = importlib.util.spec_from_file_location("existing_trainer", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(
        module, "DeepSeekV3DataModule", lambda config, **sizes: DeepSeekV3DataModule(config, documents=TEXTS, **sizes)
    )
    monkeypatch.chdir(tmp_path)
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    yield module
    logger.setLevel(level)


def test_prints_both_runs_side_by_side(example, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["existing_trainer.py", "--offline", "--steps", "3"])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        example.main()
    assert not [str(warning.message) for warning in said if "val loop" in str(warning.message)]
    rows = re.findall(r"^(with the callback|without it) +([\d.]+) +([\d.]+) +([\d.]+)$", capsys.readouterr().out, re.M)
    assert [name for name, *_ in rows] == ["with the callback", "without it"]
    (_, first, last, _), (_, first_without, last_without, _) = rows
    assert first == first_without, "the first step is made before any bias has moved, on the same batch and weights"
    assert last != last_without, "after two updates other experts are chosen"
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_the_users_own_module_knows_nothing_of_balancing():
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    [module] = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    names = {node.id for node in ast.walk(module) if isinstance(node, ast.Name)}
    assert not {name for name in names if "balance" in name.lower()}


def test_fits_a_screen_or_two():
    assert len(SCRIPT.read_text(encoding="utf-8").splitlines()) <= 90
