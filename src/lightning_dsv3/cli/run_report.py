"""The page of ``dsv3 report``: a run folder as one HTML file that needs nothing else, to keep or to send."""

from __future__ import annotations

import base64
import csv
import json
import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch

from lightning_dsv3.balance.loads import load_statistics
from lightning_dsv3.config import ConfigError
from lightning_dsv3.plots import (
    plot_bits_per_byte,
    plot_expert_load,
    plot_loss,
    plot_max_violation,
    plotting_problem,
)

_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.note, caption { color: #666; } caption { text-align: left; padding-bottom: .3rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .15rem .9rem .15rem 0; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child, .facts td { text-align: left; } td.warn { color: #b00020; font-weight: 600; }
img { max-width: 100%; } pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: 12px; }
"""
_DEAD = "an expert that got no token of the held-out text"


def write_report(run: Path, output: Path) -> None:
    """Write the page of a run.

    Args:
        run: A run folder. One whose run was killed has no summary; what is there is shown.
        output: HTML file to write, complete or not at all.

    Raises:
        ConfigError: ``run`` is no run folder, or a file of it cannot be read.
    """
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run}: no run folder, as it has no config.yaml; give one of runs/")
    summary, loads = _read_json(run / "summary.json"), _read_json(run / "loads.json")
    history = _read_history(run / "metrics.csv")
    name = str(summary.get("name") or run.resolve().name)
    body = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="note">{escape(run.resolve().name)}</p>',
        *_overview(summary, history),
        *_bits_per_byte(summary),
        *_figures(history, summary, loads),
        *_loads(loads),
        *_configuration(run / "config.yaml"),
    ]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(name)}</title>'
        f"<style>\n{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )
    temporary = output.with_name(f".{output.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(output)


def _overview(summary: Mapping[str, Any], history: Sequence[Mapping[str, float]]) -> list[str]:
    if not summary:
        tokens = max((row.get("train/tokens", 0.0) for row in history), default=0.0)
        return [f"<p>The run has not ended: there is no summary yet. It has seen {tokens:,.0f} tokens.</p>"]
    parameters, violation = summary["parameters"], summary["max_violation"]
    stopped = summary.get("stopped_by")
    rows = [
        ("tokens", f"{summary['tokens'] or 0:,} in {summary['steps']:,} optimizer steps"),
        ("speed", f"{_number(summary['tokens_per_second'], 0)} tokens/s"),
        (
            "parameters",
            f"{parameters['total']:,} in all, {parameters['activated']:,} activated per token, "
            f"{parameters['mtp']:,} in MTP modules",
        ),
        ("balance", ", ".join(summary["balance"]) or "none"),
        (
            "MaxVio of training batches",
            f"{_number(violation['training_batch_start'])} in the first tenth of the steps, "
            f"{_number(violation['training_batch_end'])} in the last",
        ),
        ("MaxVio of held-out text", _number(violation["held_out_end"])),
        ("ended by", stopped or "its last step"),
        ("versions", ", ".join(f"{name} {version}" for name, version in summary["versions"].items())),
    ]
    cells = "".join(f"<tr><td>{escape(key)}</td><td>{escape(str(value))}</td></tr>" for key, value in rows)
    return [f'<table class="facts">{cells}</table>']


def _bits_per_byte(summary: Mapping[str, Any]) -> list[str]:
    domains: Mapping[str, Mapping[str, float]] = summary.get("bits_per_byte") or {}
    if not domains:
        return []
    columns = list(dict.fromkeys(key for values in domains.values() for key in values))
    rows = [[domain, *(_number(values.get(key)) for key in columns)] for domain, values in domains.items()]
    return ["<h2>Held-out bits per byte</h2>", _table(["domain", *columns], rows)]


def _figures(history: Sequence[Mapping[str, float]], summary: Mapping[str, Any], loads: Mapping[str, Any]) -> list[str]:
    problem = plotting_problem()
    if problem:
        return [f'<p class="note">No figures: {escape(problem)}</p>']
    domains = summary.get("bits_per_byte") or {}
    compressors = {d: {k: v for k, v in values.items() if k != "model"} for d, values in domains.items()}
    parts = ["<h2>Figures</h2>"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figure.png"
        plot_loss(history, path)
        parts.append(_image(path, "loss over tokens"))
        if compressors:
            plot_bits_per_byte(history, compressors, path)
            parts.append(_image(path, "held-out bits per byte by domain"))
        plot_max_violation(history, path)
        parts.append(_image(path, "load violation per training batch"))
        if loads:
            plot_expert_load(loads, path)
            parts.append(_image(path, "relative expert load by domain and layer"))
    return parts


def _loads(loads: Mapping[str, Any]) -> list[str]:
    """Tell how even each layer's load is, over all domains together."""
    if not loads.get("layers"):
        return []
    layers, domains = loads["layers"], loads["domains"]
    counts = [torch.tensor([loads["counts"][d][index] for d in domains]).sum(dim=0) for index in range(len(layers))]
    statistics = [values.tolist() for values in load_statistics(counts)]
    rows = [
        [layer, f"{len(counts_E)}", f"{violation:.3f}", f"{entropy:.4f}", f"{dead}"]
        for layer, counts_E, violation, entropy, dead in zip(layers, counts, *statistics, strict=True)
        if counts_E.any()
    ]
    note = f'<p class="note">Dead: {_DEAD}.</p>' if any(row[-1] != "0" for row in rows) else ""
    return [
        "<h2>Expert load on held-out text</h2>",
        _table(["layer", "experts", "MaxVio", "entropy (1 = even)", "dead"], rows, warn=4),
        note,
    ]


def _configuration(path: Path) -> list[str]:
    text = escape(path.read_text(encoding="utf-8"))
    summary = f"<summary>what <code>config={escape(path.name)}</code> reads back</summary>"
    return ["<h2>Configuration</h2>", f"<details>{summary}<pre>{text}</pre></details>"]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], warn: int | None = None) -> str:
    """Lay out a table; a cell of the column ``warn`` that is not 0 stands out."""
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    for row in rows:
        cells = [
            f'<td class="warn">{escape(cell)}</td>' if index == warn and cell != "0" else f"<td>{escape(cell)}</td>"
            for index, cell in enumerate(row)
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "<table>" + "\n".join(lines) + "</table>"


def _image(path: Path, title: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<p><img alt="{escape(title)}" src="data:image/png;base64,{data}"></p>'


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: cannot be read ({error}); take it out of the run folder or mend it") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold an object; take it out of the run folder or mend it")
    return values


def _read_history(path: Path) -> list[dict[str, float]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        try:
            return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read ({error}); a row of it is damaged") from error


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
