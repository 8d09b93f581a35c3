"""What does importing the package cost beyond what it must import?

    python benchmarks/import_time.py                         print seconds
    python benchmarks/import_time.py --output benchmarks/results/import_time.json

Each line is imported in fresh interpreters, in turn with what it cannot do without; the medians are compared.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

# What is imported -> what it must import in any case.
LINES = {
    "import lightning_dsv3": "pass",
    "from lightning_dsv3 import DeepSeekV3Config": "pass",
    "from lightning_dsv3 import DeepSeekV3": "import torch",
    "from lightning_dsv3.callbacks import AuxFreeBalanceCallback": "import torch, lightning.pytorch",
    "from lightning_dsv3 import DeepSeekV3Module": "import torch, torchmetrics, lightning.pytorch",
    "from lightning_dsv3 import DeepSeekV3DataModule": "import torch, lightning.pytorch, tokenizers, tqdm, numpy",
}
_TIMED = "import time; start = time.perf_counter(); {line}; print(time.perf_counter() - start)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="interpreters per line")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    rows = []
    print(f"{'':<64}{'all':>8}{'must':>8}{'ours':>8}   seconds")
    for line, needed in LINES.items():
        pairs = [(seconds(line), seconds(needed)) for _ in range(arguments.rounds)]
        whole, must = (statistics.median(column) for column in zip(*pairs, strict=True))
        rows.append({"line": line, "must": needed, "seconds": whole, "must_seconds": must, "ours": whole - must})
        print(f"{line:<64}{whole:>8.3f}{must:>8.3f}{whole - must:>8.3f}")
    result = {
        "question": "seconds of an import beyond what it must import",
        "command": "python benchmarks/import_time.py",
        "versions": {"python": platform.python_version()},
        "rows": rows,
    }
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


def seconds(line: str) -> float:
    """Time one line in a fresh interpreter."""
    command = [sys.executable, "-c", _TIMED.format(line=line)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
