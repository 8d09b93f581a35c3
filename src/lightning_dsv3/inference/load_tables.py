"""Load tables from files: the ``loads.json`` of a run or an evaluation, or CSV.

A load file has counts per domain. Domains are added up as they were counted, or as shares with weights: the expected
traffic of a deployment need not be the text that was measured.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_dsv3.config.errors import did_you_mean
from lightning_dsv3.inference.placement import PlacementError, load_table
from lightning_dsv3.inference.placement_policies import Floats

FORMAT = 1


@dataclass(frozen=True, eq=False)
class LoadTable:
    """Loads of all experts, by domain.

    Attributes:
        layers: Names of the layers.
        by_domain: For each domain the load ``[L, E]``, float64; one domain, ``all``, for CSV.
        experts_per_token: K, as far as the file tells: a token counts in K experts of a layer. None if it does not.
        origin: The file.
        has_shared_expert: The last expert is the shared one.
    """

    layers: tuple[str, ...]
    by_domain: dict[str, Floats]
    experts_per_token: int | None
    origin: str
    has_shared_expert: bool = False

    def mixture(self, weights: Mapping[str, float] | None = None) -> Floats:
        """Return the load ``[L, E]`` of all domains together.

        Args:
            weights: Each domain's share of the tokens, scaled to 1; domains that are not named have none. Without
                weights the counts are added up.

        Raises:
            PlacementError: An unknown domain, or weights that are negative or all zero.

        Example:
            >>> table = LoadTable(("a",), {"en": np.array([[3.0, 1.0]]), "zh": np.array([[0.0, 2.0]])}, 1, "loads.json")
            >>> table.mixture(), table.mixture({"en": 1, "zh": 1})
            (array([[3., 3.]]), array([[0.375, 0.625]]))
        """
        if weights is None:
            return np.sum(list(self.by_domain.values()), axis=0)
        for domain, weight in weights.items():
            if domain not in self.by_domain:
                raise PlacementError(
                    f"domain weights: {self.origin} has no domain {domain!r}; {did_you_mean(domain, self.by_domain)}"
                )
            if not 0 <= weight < float("inf"):
                raise PlacementError(f"domain weights: {domain}={weight} must be 0 or more")
        total = sum(weights.values())
        if not total:
            raise PlacementError("domain weights: one of them must be above 0")
        return np.sum([weight / total * self.shares(domain) for domain, weight in weights.items()], axis=0)

    def shares(self, domain: str) -> Floats:
        """Return each expert's share of its layer's load in a domain, ``[L, E]``; zeros for a layer without load."""
        load_LE = self.by_domain[domain]
        total_L1 = load_LE.sum(axis=1, keepdims=True)
        return load_LE / np.where(total_L1 > 0, total_L1, 1)

    def with_shared_expert(self, experts_per_token: int) -> LoadTable:
        """Return the table with the shared expert as one more expert that every token chooses (report, section 3.4).

        Args:
            experts_per_token: K. A layer's routed load is K times its tokens, and the shared expert's its tokens.
        """
        by_domain = {
            domain: np.concatenate([load_LE, load_LE.sum(axis=1, keepdims=True) / experts_per_token], axis=1)
            for domain, load_LE in self.by_domain.items()
        }
        return LoadTable(self.layers, by_domain, experts_per_token, self.origin, has_shared_expert=True)


def read_load_table(path: Path) -> LoadTable:
    """Read ``loads.json``, a run folder that holds one, or CSV with a row per layer.

    CSV: numbers separated by commas; a first line of names is skipped; a first column of names gives the layers' names.

    Raises:
        PlacementError: The file cannot be read, is of another form, or its numbers are not loads.
    """
    if path.is_dir():
        path = path / "loads.json"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PlacementError(
            f"{path}: the load table cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from error
    if path.suffix.lower() == ".csv":
        return _read_csv(text, path)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise PlacementError(f"{path}: neither JSON ({error}) nor named .csv") from error
    return _read_json(content, path)


def _read_json(content: Any, path: Path) -> LoadTable:
    if not isinstance(content, dict) or not {"format", "layers", "domains", "counts"} <= set(content):
        raise PlacementError(
            f"{path}: not a load file: it must have format, layers, domains and counts, as a run writes it"
        )
    if content["format"] != FORMAT:
        raise PlacementError(f"{path}: load file of format {content['format']!r}; this version reads format {FORMAT}")
    layers, domains, counts = content["layers"], content["domains"], content["counts"]
    if not layers or not domains:
        raise PlacementError(f"{path}: the load file has no {'domains' if layers else 'layers'}: nothing was counted")
    missing = [domain for domain in domains if domain not in counts or len(counts[domain]) != len(layers)]
    if missing:
        raise PlacementError(
            f"{path}: counts of domain {missing[0]!r} must have one row for each of {len(layers)} layers"
        )
    by_domain = {domain: _table(counts[domain], layers, f"{path}, domain {domain!r}") for domain in domains}
    widths = {domain: load_LE.shape[1] for domain, load_LE in by_domain.items()}
    if len(set(widths.values())) > 1:
        raise PlacementError(f"{path}: domains have different numbers of experts: {widths}")
    return LoadTable(tuple(map(str, layers)), by_domain, _experts_per_token(content, by_domain), str(path))


def _experts_per_token(content: Mapping[str, Any], by_domain: Mapping[str, Floats]) -> int | None:
    tokens = content.get("tokens", {})
    for domain, load_LE in by_domain.items():
        if count := tokens.get(domain):
            # `tokens` is that of the first layer.
            return round(float(load_LE[0].sum()) / count)
    return None


def _read_csv(text: str, path: Path) -> LoadTable:
    rows = [
        [cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if any(cell.strip() for cell in row)
    ]
    header = rows[0] if rows and _is_header(rows[0]) else None
    rows = rows[1:] if header else rows
    # A column without a name is the index that table programs write.
    index = header is not None and not header[0]
    named = bool(rows) and len(rows[0]) > 1 and (index or all(not _is_number(row[0]) for row in rows))
    layers = [row[0] for row in rows] if named else [f"row_{number}" for number in range(1, len(rows) + 1)]
    values = [row[1:] if named else row for row in rows]
    for layer, row in zip(layers, values, strict=True):
        for number, cell in enumerate(row):
            if not _is_number(cell):
                raise PlacementError(f"{path}: layer {layer}, expert {number}: {cell!r} is not a number")
    table = _table([[float(cell) for cell in row] for row in values], layers, str(path))
    return LoadTable(tuple(layers), {"all": table}, None, str(path))


def _is_header(cells: list[str]) -> bool:
    """Whether a first row names columns: no number in it, or experts' numbers after a first cell that is no number."""
    if _is_number(cells[0]):
        return False
    others = cells[1:]
    return not any(map(_is_number, others)) or others == [str(number) for number in range(len(others))]


def _table(rows: Any, layers: list[str], origin: str) -> Floats:
    """Return rows as a table; a row of another length is an error that names the layers."""
    try:
        widths = {layer: len(row) for layer, row in zip(layers, rows, strict=True)}
    except TypeError as error:
        raise PlacementError(f"{origin}: every layer must be a list of counts") from error
    by_width: dict[int, list[str]] = {}
    for layer, width in widths.items():
        by_width.setdefault(width, []).append(layer)
    if len(by_width) > 1:
        described = "; ".join(f"{width} in {', '.join(names)}" for width, names in by_width.items())
        raise PlacementError(f"{origin}: layers have different numbers of experts ({described}); plan them one by one")
    try:
        return load_table(rows)
    except PlacementError as error:
        raise PlacementError(f"{origin}: {error}") from error


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
