"""Does the callback balance the experts? The main job with AuxFreeBalanceCallback and without, side by side.

    python benchmarks/balance_on_off.py
    python benchmarks/balance_on_off.py --output benchmarks/results/balance_on_off.json -- train.total_tokens=200000

Both arms have the same seed, data and sequence-wise loss. Words behind ``--`` are passed to examples/train.py. A figure
of MaxVio over tokens is written beside the JSON file.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ARMS = {"aux_free": [], "callback off": ["study=no_aux_free"]}
EXAMPLE = Path(__file__).parent.parent / "examples" / "train.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one pair of runs per seed")
    parser.add_argument("--output", type=Path, help="JSON file for the result; a PNG goes beside it")
    parser.add_argument("words", nargs="*", help="key=value words for both arms, behind --")
    arguments = parser.parse_args()

    rows, curves = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            for arm, words in ARMS.items():
                run = train(Path(folder), [*arguments.words, *words, f"seed={seed}"])
                summary = json.loads((run / "summary.json").read_text())
                rows.append({"arm": arm, "seed": seed} | interesting(summary))
                curves[f"{arm}, seed {seed}"] = violation_curve(run)
                print(json.dumps(rows[-1], indent=2), flush=True)
    result = {
        "question": "MaxVio and held-out bits per byte of the main job with the callback and without",
        "command": "python benchmarks/balance_on_off.py --seeds " + " ".join(map(str, arguments.seeds)),
        "words": arguments.words,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "rows": rows,
    }
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
        draw(curves, arguments.output.with_suffix(".png"))


def train(folder: Path, words: list[str]) -> Path:
    """Run the main job in ``folder`` and return its run folder."""
    before = set(folder.glob("runs/*"))
    subprocess.run(
        [sys.executable, "-m", "lightning_dsv3", "run", "model", str(EXAMPLE), *words], cwd=folder, check=True
    )
    (run,) = set(folder.glob("runs/*")) - before
    return run


def interesting(summary: dict[str, Any]) -> dict[str, Any]:
    """Keep what the question asks for."""
    bits = {domain: round(values["model"], 4) for domain, values in summary["bits_per_byte"].items()}
    return {
        "max_violation": {key: round(value, 3) for key, value in summary["max_violation"].items()},
        "bits_per_byte": bits | {"mean": round(sum(bits.values()) / len(bits), 4)},
        "compressors_on_the_same_text": {
            name: {domain: round(values[name], 4) for domain, values in summary["bits_per_byte"].items()}
            for name in ("gzip", "xz")
        },
        "tokens": summary["tokens"],
    }


def violation_curve(run: Path) -> tuple[list[float], list[float]]:
    """Return tokens and MaxVio (mean of layers) of the logged steps."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("moe/max_violation")]
    return [float(row["train/tokens"]) for row in rows], [float(row["moe/max_violation"]) for row in rows]


def draw(curves: dict[str, tuple[list[float], list[float]]], path: Path) -> None:
    """Draw the arms' MaxVio over tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for name, (tokens, values) in curves.items():
        axes.plot(tokens, values, color="C0" if name.startswith("aux_free") else "C3", alpha=0.8, label=name)
    axes.set(xlabel="tokens seen", ylabel="MaxVio per training batch, mean of layers", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
