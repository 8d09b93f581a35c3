"""How near do the kernels come to what the device can do, and to one another?

    python benchmarks/kernel_speed.py                        DeepSeek-V3's widths on a GPU, four minutes at most
    python benchmarks/kernel_speed.py --output benchmarks/results/kernel_speed.json
    python benchmarks/kernel_speed.py --small                tiny shapes, on any machine
    python benchmarks/kernel_speed.py --ops router permute   some operations

Measured first: the ceilings, a large copy in GB/s and large matrix products in TFLOP/s (BF16, and FP8 with a scale per
block where torch has it). Then each operation in each of its implementations (``kernels.<operation>=`` in a run's
configuration), in turn, beside Transformer Engine's where it has one: the median time, the rate that follows from the
bytes or operations that no implementation can do without, its share of the ceiling, and the error against the plain
form, as length of the difference over length. An implementation that refuses is listed with its reason.

``forward`` is without gradients; ``training`` is forward and backward. Caches are emptied before each run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from kernel_cases import Case, Shapes, cases
from torch import Tensor
from train_step import processor

from lightning_dsv3.config.kernels import KERNELS
from lightning_dsv3.ops.backends import forced_kernels
from lightning_dsv3.ops.libraries import library

SMALL = Shapes(
    tokens=96, hidden=128, experts=8, chosen=2, expert_width=64, groups=2, chosen_groups=1, heads=2, qk_nope=32,
    qk_rope=16, v_width=32, sequence=48, vocab=160, dtype=torch.float32,
)  # fmt: skip
# One rank's share of DeepSeek-V3: 32 of 256 experts, so that weights fit; the router sees all 256.
LARGE = Shapes(
    tokens=4096, hidden=7168, experts=32, chosen=8, expert_width=2048, groups=8, chosen_groups=4, heads=32,
    qk_nope=128, qk_rope=64, v_width=128, sequence=4096, vocab=32768, dtype=torch.bfloat16,
)  # fmt: skip
_FLUSHED_BYTES = 1 << 28
_TURNS = 4


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=list(KERNELS), default=list(KERNELS), help="which operations")
    parser.add_argument("--small", action="store_true", help="tiny shapes, which say nothing of speed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where")
    parser.add_argument("--repeats", type=int, default=20, help="counted runs of an implementation")
    parser.add_argument("--seconds", type=float, default=240.0, help="begin no further case after this")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    arguments = parser.parse_args(words)
    device = torch.device(arguments.device)
    if device.type == "cpu" and not arguments.small:
        parser.error("the full shapes need a GPU; give --small to try the benchmark on this machine")
    end = time.perf_counter() + arguments.seconds
    torch.manual_seed(0)
    bench = Bench(device, arguments.repeats)
    ceilings = measure_ceilings(bench, small=arguments.small)
    print(", ".join(f"{name}: {value:,.1f}" for name, value in ceilings.items()) + "\n")
    print(f"{'operation':<44}{'implementation':<20}{'pass':<10}{'us':>10}{'rate':>12}{'of ceiling':>12}{'error':>10}")
    rows: list[dict[str, Any]] = []
    for case in cases(SMALL if arguments.small else LARGE, device):
        if case.op not in arguments.ops:
            continue
        if time.perf_counter() > end:
            rows.append({"op": case.op, "case": case.name, "left_out": f"the {arguments.seconds:g} seconds were over"})
            print(f"{case.title:<44}left out: time is over")
            continue
        rows += measure(bench, case, ceilings)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    result = {
        "question": "each operation in each implementation: time, rate, share of the device's ceiling, error",
        "command": " ".join(["python benchmarks/kernel_speed.py", *(sys.argv[1:] if words is None else words)]),
        "machine": {"device": name_of(device), "threads": torch.get_num_threads()},
        "versions": versions(),
        "ceilings": ceilings,
        "rows": rows,
    }
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


class Bench:
    """Times functions on a device, in turn."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self._flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def seconds(
        self, runs: Mapping[str, Callable[[], object]], forced: Mapping[str, Mapping[str, str]] | None = None
    ) -> dict[str, float]:
        """Return each function's median; functions take turns of some runs each, the first of a turn uncounted.

        ``forced`` names the kernels that are forced meanwhile, of each function that wants some.
        """
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(_TURNS):
            for name, run in runs.items():
                with forced_kernels(**(forced or {}).get(name, {})):
                    run()
                    taken[name] += [self._once(run) for _ in range(-(-self.repeats // _TURNS))]
        return {name: statistics.median(values) for name, values in taken.items()}

    def _once(self, run: Callable[[], object]) -> float:
        if self._flushed is None:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        self._flushed.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def measure_ceilings(bench: Bench, *, small: bool) -> dict[str, float]:
    """Measure what bounds every kernel: GB/s of a copy, read and written together, and TFLOP/s of products."""
    device = bench.device
    source = torch.empty((1 << 22) if small else (1 << 30), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    ceilings = {"copy GB/s": 2 * source.numel() / bench.seconds({"": lambda: target.copy_(source)})[""] / 1e9}
    width = 256 if small else 8192
    dtypes = {"float32": torch.float32} if device.type == "cpu" else {"bfloat16": torch.bfloat16}
    for name, dtype in dtypes.items():
        a = torch.randn(width, width, device=device, dtype=dtype)
        ceilings[f"{name} TFLOP/s"] = 2 * width**3 / bench.seconds({"": lambda a=a: a @ a})[""] / 1e12
    if device.type == "cuda" and (product := scaled_product(width, device)) is not None:
        ceilings["fp8 TFLOP/s"] = 2 * width**3 / bench.seconds({"": product})[""] / 1e12
    return ceilings


def scaled_product(width: int, device: torch.device) -> Callable[[], Tensor] | None:
    """Return torch's own FP8 product with scales of 1 x 128 and 128 x 128 tiles; None, with a word, if it has none."""
    scaling = getattr(F, "ScalingType", None)
    a = torch.randn(width, width, device=device).to(torch.float8_e4m3fn)
    rows = torch.ones(width // 128, width, device=device).t()  # torch wants them outer dimension first
    blocks = torch.ones(width // 128, width // 128, device=device)

    def product() -> Tensor:
        assert scaling is not None
        return F.scaled_mm(
            a, a.t(), rows, scaling.BlockWise1x128, blocks, scaling.BlockWise128x128, output_dtype=torch.bfloat16
        )

    try:
        product()
    except Exception as error:
        print(f"torch has no FP8 product with block scales here: {type(error).__name__}: {error}")
        return None
    return product


@dataclass
class Run:
    """One implementation of a case.

    Attributes:
        function: Does it; None where it cannot run.
        forced: The kernels that make it this one.
        reason: Why it cannot run.
        compared: What implementations must agree on.
    """

    function: Callable[[], Any] | None
    forced: dict[str, str] = field(default_factory=dict)
    reason: str | None = None
    compared: list[Tensor] = field(default_factory=list)


def measure(bench: Bench, case: Case, ceilings: Mapping[str, float]) -> list[dict[str, Any]]:
    """Print and return a row for each implementation and pass of a case."""
    rows = []
    refused: set[str] = set()
    for training in (False, True) if case.differentiable else (False,):
        runs = {name: run for name, run in implementations(case, training) if name not in refused}
        for name, run in runs.items():
            try:
                with forced_kernels(**run.forced):
                    assert run.function is not None
                    run.compared = case.compare(run.function(), training=training)
            except Exception as error:  # whatever a library says: the others are still measured
                run.function, run.reason = None, reason_of(error, case.op, name)
                refused.add(name)
        plain = KERNELS[case.op][-1]
        seconds = bench.seconds(
            {name: run.function for name, run in runs.items() if run.function is not None},
            {name: run.forced for name, run in runs.items()},
        )
        for name, run in runs.items():
            row: dict[str, Any] = {
                "op": case.op, "case": case.name, "implementation": name, "pass": "training" if training else "forward",
            }  # fmt: skip
            if run.function is None:
                print(f"{case.title:<44}{name:<20}{row['pass']:<10}{run.reason}")
                rows.append(row | {"reason": run.reason})
                continue
            ceiling = next((ceilings[key] for key in case.ceilings if key in ceilings), math.nan)
            rate = case.work * (case.training_factor if training else 1.0) / seconds[name] / case.unit_size
            row |= {
                "seconds": seconds[name], "rate": rate, "unit": case.unit, "share_of_ceiling": rate / ceiling,
                "error": error_of(run.compared, runs[plain].compared),
                "ratio_to_plain": seconds[plain] / seconds[name],
            }  # fmt: skip
            rows.append(row)
            print(
                f"{case.title:<44}{name:<20}{row['pass']:<10}{seconds[name] * 1e6:>10,.1f}{rate:>7,.1f} {case.unit:<8}"
                f"{row['share_of_ceiling']:>8.0%}{row['error']:>10.1e}",
                flush=True,
            )
    return rows


def implementations(case: Case, training: bool) -> Iterator[tuple[str, Run]]:
    """Yield the implementations of a case by name, the peers behind them."""
    for name in KERNELS[case.op]:
        yield name, Run(lambda: case.run(case.function, training=training), {case.op: name})
    for name, peer in case.peers.items():
        yield name, Run(lambda peer=peer: case.run(peer, training=training))


def reason_of(error: Exception, op: str, name: str) -> str:
    """Return an error as a reason of one line; of our own refusals what stands between the key and the remedy."""
    told = str(error).partition("\n")[0]
    if told.startswith(key := f"kernels.{op}={name}: "):
        return told.removeprefix(key).partition(";")[0]
    return f"{type(error).__name__}: {told}"


def error_of(outputs: Sequence[Tensor], plain: Sequence[Tensor]) -> float:
    """Return the largest relative error of outputs that the plain form has too; nan without any."""
    errors = [
        float((output - expected).norm() / expected.norm().clamp(min=1e-30))
        for output, expected in zip(outputs, plain, strict=False)
        if output.shape == expected.shape
    ]
    return max(errors, default=math.nan)


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def versions() -> dict[str, str | None]:
    """Return what the figures depend on; of a library that does not load, the reason."""
    found: dict[str, str | None] = {
        "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
    }  # fmt: skip
    for name in ("triton", "liger_kernel", "flash_attn_3", "transformer_engine"):
        module, reason = library(name)
        found[name] = reason if module is None else str(getattr(module, "__version__", "loaded"))
    return found


if __name__ == "__main__":
    main()
