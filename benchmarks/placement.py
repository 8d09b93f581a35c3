"""How near to the lower bound are plans of redundant experts, and how long do they take?

    python benchmarks/placement.py                          print a table
    python benchmarks/placement.py --output benchmarks/results/placement.json
    python benchmarks/placement.py --tables 30              quick

A thousand load tables of 58 layers x 256 experts, a third each random (uniform), Zipf-like (an exponent of 0.3 to 1.5
for each layer) and spiky (three experts of a layer 5 to 100 times above uniform ones), with seeds 0, 1, 2, ... Each is
planned for the report's two deployments (section 3.4), and a tenth as many for 320 GPUs with two slots each:

    prefill    256 experts in 288 slots on 32 GPUs, 4 nodes, 8 groups
    decode     256 experts and the shared one, which has an eighth of the routed load, in 320 slots on 320 GPUs
    two slots  256 experts in 640 slots on 320 GPUs

The gap of a plan is its busiest GPU's load over the lower bound, less one; mean over layers and tables. The published
plan is the better of hierarchical and global for each layer. With one slot on a GPU, greedy replication is the optimum:
both plans reach the bound, and no plan could halve the gap.

What a plan is worth while traffic drifts from domain to domain is shown by the command itself, on the loads that a run
of 150 steps measured on held-out text (``lightning run model examples/train.py trainer.max_steps=150``):

    dsv3 plan simulate benchmarks/results/placement_loads.json --gpus 8 --slots 40 --model tiny --dtype bf16 \\
        --output benchmarks/results/placement_drift.json --figure benchmarks/results/placement_drift.png
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from train_step import processor

from lightning_dsv3.inference.placement import Placement, lower_bound, plan_placement

LAYERS, EXPERTS, CHOSEN = 58, 256, 8
KINDS = ("random", "zipf", "spiky")
DEPLOYMENTS: dict[str, dict[str, int]] = {
    "prefill": {"num_slots": 288, "num_gpus": 32, "num_nodes": 4, "num_groups": 8},
    "decode": {"num_slots": 320, "num_gpus": 320, "num_nodes": 40, "num_groups": 8},
    "two slots": {"num_slots": 640, "num_gpus": 320, "num_nodes": 40, "num_groups": 8},
}
AIM = {"milliseconds": 20, "gap_ratio": 0.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, default=1000, help="load tables for each deployment")
    parser.add_argument("--only", choices=DEPLOYMENTS, help="one deployment")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    rows = []
    print(
        f"{'deployment':<11}{'tables':<8}{'gap, published':>16}{'balanced':>10}{'ratio':>8}{'worst':>17}{'':>10}"
        f"{'above':>7}{'twins':>15}{'':>4}{'ms':>9}{'balanced':>10}"
    )
    for name in DEPLOYMENTS:
        if arguments.only not in (None, name):
            continue
        num_tables = max(len(KINDS), arguments.tables // 10) if name == "two slots" else arguments.tables
        by_kind = {kind: measure(name, kind, num_tables) for kind in KINDS}
        for kind, row in (by_kind | {"all": together(by_kind)}).items():
            rows.append({"deployment": name, "kind": kind} | row)
            print(
                f"{name:<11}{kind:<8}{row['published_gap']:>16.3%}{row['balanced_gap']:>10.3%}"
                f"{'-' if row['gap_ratio'] is None else format(row['gap_ratio'], '.3f'):>8}"
                f"{row['published_worst_gap']:>17.2%}{row['balanced_worst_gap']:>10.2%}{row['layers_above_published']:>7}"
                f"{row['published_twins']:>15,}{row['balanced_twins']:>4}{row['published_milliseconds']:>9.1f}"
                f"{row['balanced_milliseconds']:>10.1f}",
                flush=True,
            )
    result = {
        "question": "gap of plans of redundant experts to the lower bound, and time for a plan of 58 x 256 experts",
        "aim": AIM,
        "command": "python benchmarks/placement.py --output benchmarks/results/placement.json",
        "machine": {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__},
        "deployments": DEPLOYMENTS,
        "rows": rows,
    }
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


def load_tables(kind: str, num_tables: int) -> Iterator[np.ndarray]:
    """Yield this kind's share of the tables; table number s of all has seed s."""
    for seed in range(KINDS.index(kind), num_tables, len(KINDS)):
        rng = np.random.default_rng(seed)
        load = rng.random((LAYERS, EXPERTS))
        if kind == "zipf":
            load = rng.permuted(np.arange(1, EXPERTS + 1) ** -rng.uniform(0.3, 1.5, (LAYERS, 1)), axis=1)
        elif kind == "spiky":
            for row in load:
                row[rng.choice(EXPERTS, 3, replace=False)] *= rng.uniform(5, 100, 3)
        yield load


def measure(name: str, kind: str, num_tables: int) -> dict[str, Any]:
    """Plan every table by the published policies and by ours."""
    cluster = DEPLOYMENTS[name]
    sums: dict[str, list[float]] = {
        key: [] for key in ("published", "balanced", "published_ms", "balanced_ms", "published_twins", "balanced_twins")
    }
    above = 0
    for load in load_tables(kind, num_tables):
        if name == "decode":
            load = np.concatenate([load, load.sum(axis=1, keepdims=True) / CHOSEN], axis=1)
        bound = lower_bound(load, num_slots=cluster["num_slots"], num_gpus=cluster["num_gpus"])
        hierarchical, _ = timed(load, "hierarchical", cluster)
        published, published_ms = timed(load, "global", cluster)
        balanced, balanced_ms = timed(load, "balanced", cluster)
        best = torch.minimum(hierarchical.imbalance(load), published.imbalance(load))
        above += int((balanced.imbalance(load) > best * (1 + 1e-9)).sum())
        sums["published"] += (best / bound - 1).tolist()
        sums["balanced"] += (balanced.imbalance(load) / bound - 1).tolist()
        for key, value in (
            ("published_ms", published_ms), ("balanced_ms", balanced_ms),
            ("published_twins", int(published.twins.sum())), ("balanced_twins", int(balanced.twins.sum())),
        ):  # fmt: skip
            sums[key].append(value)
    gaps = {key: statistics.fmean(sums[key]) for key in ("published", "balanced")}
    return {
        "tables": len(sums["balanced_ms"]),
        "published_gap": gaps["published"],
        "balanced_gap": gaps["balanced"],
        "gap_ratio": ratio(gaps["published"], gaps["balanced"]),
        "published_worst_gap": max(sums["published"]),
        "balanced_worst_gap": max(sums["balanced"]),
        "layers_above_published": above,
        "published_twins": int(sum(sums["published_twins"])),
        "balanced_twins": int(sum(sums["balanced_twins"])),
        "published_milliseconds": statistics.median(sums["published_ms"]),
        "balanced_milliseconds": statistics.median(sums["balanced_ms"]),
    }


def together(by_kind: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of all kinds of tables."""
    rows = list(by_kind.values())
    counts = [row["tables"] for row in rows]
    mean = {
        key: sum(count * row[key] for count, row in zip(counts, rows, strict=True)) / sum(counts)
        for key in ("published_gap", "balanced_gap", "published_milliseconds", "balanced_milliseconds")
    }
    worst = {key: max(row[key] for row in rows) for key in ("published_worst_gap", "balanced_worst_gap")}
    total = {
        key: sum(row[key] for row in rows)
        for key in ("tables", "layers_above_published", "published_twins", "balanced_twins")
    }
    return mean | worst | total | {"gap_ratio": ratio(mean["published_gap"], mean["balanced_gap"])}


def ratio(published: float, balanced: float) -> float | None:
    """Return the gaps' ratio; None where the published plan has no gap beyond rounding."""
    return balanced / published if published > 1e-9 else None


def timed(load: np.ndarray, policy: str, cluster: dict[str, int]) -> tuple[Placement, float]:
    start = time.perf_counter()
    placement = plan_placement(load, policy=policy, **cluster)
    return placement, 1e3 * (time.perf_counter() - start)


if __name__ == "__main__":
    main()
