"""Result files of evaluations as lm-eval writes them, and readers of the Markdown that is made of them."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_dsv3.cli import dsv3
from lightning_dsv3.evaluation import report as reports
from lightning_dsv3.evaluation.data_table import BENCHMARKS
from lightning_dsv3.evaluation.groups import GROUPS, task_name

ROWS = {row.benchmark: row for row in reports.base_rows()}
LEAVES = {name: [task_name(leaf) for leaf in GROUPS[name]] for name in ("dsv3_mgsm", "dsv3_mmmlu")}


def result(scores: dict[str, float], **config: Any) -> dict[str, Any]:
    """A result with scores in percent or bits per byte by benchmark, of the whole protocol and of our model."""
    info = {"name": "runs/a/checkpoints/last.ckpt", "architecture": "MoE", "max_length": 4096}
    info |= {"num_parameters_total": 15_700_000_000, "num_parameters_activated": 2_400_000_000}
    seeds = {"random_seed": 0, "numpy_seed": 1234, "torch_seed": 1234, "fewshot_seed": 1234}
    data: dict[str, Any] = {"config": {"model": "dsv3", "dsv3_model_info": info, **seeds, **config}}
    parts = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "n-samples")
    data |= {part: {} for part in parts}
    for benchmark, value in scores.items():
        name = task_name(benchmark)
        leaves = LEAVES.get(name, [name])
        metric, share = BENCHMARKS[benchmark].metric, 1.0 if benchmark == "pile_test" else 0.01
        stderr = "N/A" if benchmark == "pile_test" else 0.01
        entry = {f"{metric},none": value * share, f"{metric}_stderr,none": stderr}
        for task in dict.fromkeys([*leaves, name]):
            data["results"][task] = {"name": task, "alias": task, "sample_len": 100, **entry}
        for task in leaves:
            data["configs"][task] = {"task": task, "repeats": 1, "metadata": {"version": 1.0, "benchmark": benchmark}}
            data["n-samples"][task] = {"original": 100, "effective": 100}
            data["versions"][task] = 1.0
            data["n-shot"][task] = BENCHMARKS[benchmark].shots
        if leaves != [name]:
            data["group_subtasks"][name] = leaves
    return data


def changed(data: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy with changes, as in ``config__fewshot_seed=7``."""
    data = copy.deepcopy(data)
    for path, value in changes.items():
        *way, last = path.split("__")
        inner = data
        for key in way:
            inner = inner[key]
        if value is None:
            del inner[last]
        else:
            inner[last] = value
    return data


def writer(folder: Path) -> Callable[[str, Any], Path]:
    """Return what writes a file of this name: a result, or a text as it is."""

    def write(name: str, content: Any) -> Path:
        path = folder / f"{name}.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


def runner(capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Return what calls ``dsv3 report eval``: its exit code and what it prints."""

    def run(*words: object) -> SimpleNamespace:
        code = dsv3.main(["report", "eval", *map(str, words)])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return run


def tables(markdown: str) -> dict[str, list[dict[str, str]]]:
    """The tables of a Markdown text by their heading, each a list of lines by the heads of its columns."""
    found = {}
    for part in markdown.split("\n## ")[1:]:
        title, _, body = part.partition("\n")
        lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in body.strip().splitlines() if line.startswith("|")]
        cells = [[cell.strip().replace("\\", "") for cell in line] for line in lines]
        assert len({len(line) for line in cells}) <= 1, f"{title}: lines of different widths"
        found[title] = [dict(zip(cells[0], line, strict=True)) for line in cells[2:]] if cells else []
    return found


def lines_of(markdown: str, title: str) -> dict[str, dict[str, str]]:
    table = next(lines for name, lines in tables(markdown).items() if name.startswith(title))
    return {next(iter(line.values())): line for line in table}


def section(markdown: str, title: str) -> str:
    parts = {part.partition("\n")[0]: part for part in markdown.split("\n## ")}
    return parts[title].replace("\\", "") if title in parts else ""


def column(path: Path, *rows: reports.Row, name: str | None = None) -> reports.Column:
    (read,) = reports.result_columns([(name, path)], rows or list(ROWS.values()))
    return read
