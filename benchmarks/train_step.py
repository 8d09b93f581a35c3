"""How fast and how large is a training step beside Hugging Face's DeepseekV3ForCausalLM, on equal weights and batch?

    python benchmarks/train_step.py                         print ratios
    python benchmarks/train_step.py --output benchmarks/results/train_step.json

A step is forward, backward, clipping and fused AdamW in float32. Both sides run in one process, in turn, on the same
weights; Hugging Face with its fastest settings here (experts ``grouped_mm``, attention ``sdpa``). Reported are the
median step and the median of the ratios pair by pair, which stands where a shared machine's speed drifts; the share of
the machine's measured matrix product that each side reaches, which bounds what can still be gained: a side at 60 % of
it can be beaten by a factor of 1 / 0.6 at the most; and the operators that our step's time goes to.

Memory is measured apart, each side in a process of its own: the largest resident size while steps are made, above the
size with model and optimizer built but no step made.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile

from lightning_dsv3.checkpoint import save_hf_checkpoint
from lightning_dsv3.config import DeepSeekV3Config
from lightning_dsv3.model import DeepSeekV3

BASE = {
    "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4, "q_lora_rank": None, "kv_lora_rank": 64, "qk_nope_head_dim": 48, "qk_rope_head_dim": 16,
    "v_head_dim": 48, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0,
    "max_position_embeddings": 4096, "initializer_range": 0.02,
}  # fmt: skip
# Equal activated size: routed experts of 512 hidden values a token, shared ones of 256, in every shape.
LARGE = {"moe_intermediate_size": 256, "num_experts_per_tok": 2, "n_shared_experts": 1}
SMALL = {"moe_intermediate_size": 64, "num_experts_per_tok": 8, "n_shared_experts": 4}
SHAPES: dict[str, tuple[dict[str, Any], int, int]] = {
    "16 experts, top 2": ({"n_routed_experts": 16} | LARGE, 8, 256),
    "64 experts, top 8": ({"n_routed_experts": 64} | SMALL, 8, 256),
    "128 experts, top 8": ({"n_routed_experts": 128} | SMALL, 8, 256),
    "64 experts, top 8, 1 x 2048": ({"n_routed_experts": 64} | SMALL, 1, 2048),
}
SIDES = ("ours", "hf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=9, help="counted steps per side and shape")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    parser.add_argument("--memory-of", nargs=2, metavar=("SHAPE", "SIDE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if arguments.memory_of:
        print(peak_memory(*arguments.memory_of))
        return

    rows: dict[str, dict[str, Any]] = {}
    print(f"{'':<30}{'tokens/s':>22}{'':>8}{'share of peak':>16}{'memory, MB':>14}")
    print(f"{'shape':<30}{'ours':>11}{'HF':>11}{'ratio':>8}{'ours':>8}{'HF':>8}{'ours':>7}{'HF':>7}")
    for name, (shape, batch, length) in SHAPES.items():
        row = measure(DeepSeekV3Config(**BASE | shape), batch, length, arguments.steps)
        row |= {f"{side}_peak_megabytes": memory_of(name, side, arguments.threads) / 1e6 for side in SIDES}
        rows[name] = {"shape": name, "batch": batch, "sequence": length} | row
        print(
            f"{name:<30}{row['ours_tokens_per_second']:>11,.0f}{row['hf_tokens_per_second']:>11,.0f}{row['ratio']:>8.2f}"
            f"{row['ours_share_of_peak']:>8.0%}{row['hf_share_of_peak']:>8.0%}"
            f"{row['ours_peak_megabytes']:>7.0f}{row['hf_peak_megabytes']:>7.0f}"
        )
    growth = growth_with_experts(arguments.steps)
    print("\nfrom 16 to 128 experts: " + ", ".join(f"{key} {value:+.1%}" for key, value in growth.items()))
    result = {
        "question": "training step, float32, ours over Hugging Face (ratio above 1: ours is faster)",
        "command": "python benchmarks/train_step.py",
        "machine": {"processor": processor(), "threads": arguments.threads},
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        },
        "growth_from_16_to_128_experts": growth,
        "rows": list(rows.values()),
    }  # fmt: skip
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


def measure(config: DeepSeekV3Config, batch: int, length: int, steps: int) -> dict[str, Any]:
    """Alternate steps of both models and return their figures."""
    peak = matmul_flops()
    torch.manual_seed(0)
    ours = DeepSeekV3(config)
    ids = torch.randint(0, config.vocab_size, (batch, length))
    steps_of = {"ours": stepper(ours, ids), "hf": stepper(hugging_face_twin(ours), ids)}
    losses = {name: [step()[0] for _ in range(2)] for name, step in steps_of.items()}  # warm-up
    if abs(losses["ours"][-1] / losses["hf"][-1] - 1) > 1e-3:
        raise RuntimeError(f"the two sides do not compute the same: losses {losses}")
    passes: dict[str, list[float]] = {side: [] for side in SIDES}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(steps):
        for side, step in steps_of.items():
            whole, forward_backward = timed(step)
            seconds[side].append(whole)
            passes[side].append(forward_backward)
    peak = max(peak, matmul_flops())
    row: dict[str, Any] = {"matmul_gflops": round(peak / 1e9, 1)}
    for side in SIDES:
        median = statistics.median(seconds[side])
        row[f"{side}_tokens_per_second"] = batch * length / median
        row[f"{side}_share_of_peak"] = step_flops(config, batch, length) / median / peak
        row[f"{side}_step_seconds"] = median
        row[f"{side}_forward_backward_seconds"] = statistics.median(passes[side])
    row["ratio"] = statistics.median(h / o for o, h in zip(seconds["ours"], seconds["hf"], strict=True))
    row["ratio_if_ours_were_at_the_peak"] = 1 / row["hf_share_of_peak"]
    row["ours_share_of_time_by_operator"] = time_by_operator(steps_of["ours"])
    return row


def growth_with_experts(steps: int) -> dict[str, float]:
    """Alternate the shapes with the fewest and the most experts: how much dearer is the second, pair by pair?"""
    growth = {}
    for side in SIDES:
        pair = []
        for shape in ("16 experts, top 2", "128 experts, top 8"):
            values, batch, length = SHAPES[shape]
            config = DeepSeekV3Config(**BASE | values)
            torch.manual_seed(0)
            model = DeepSeekV3(config) if side == "ours" else hugging_face_twin(DeepSeekV3(config))
            pair.append(stepper(model, torch.randint(0, config.vocab_size, (batch, length))))
        whole, passes = [], []
        for step in pair:
            step()
        for _ in range(steps):
            (few, few_passes), (many, many_passes) = (timed(step) for step in pair)
            whole.append(many / few - 1)
            passes.append(many_passes / few_passes - 1)
        growth[f"{side}_forward_backward"] = statistics.median(passes)
        growth[f"{side}_step"] = statistics.median(whole)
    return growth


def timed(step: Callable[[], tuple[float, float]]) -> tuple[float, float]:
    """Return the seconds of a step, and of its forward and backward."""
    start = time.perf_counter()
    _, forward_backward = step()
    return time.perf_counter() - start, forward_backward


def hugging_face_twin(ours: DeepSeekV3) -> torch.nn.Module:
    """Build Hugging Face's model with the weights of ours."""
    with tempfile.TemporaryDirectory() as folder:
        save_hf_checkpoint(ours, folder)
        theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(
            folder, attn_implementation="sdpa", experts_implementation="grouped_mm", dtype=torch.float32
        )
    return theirs.train()


def stepper(model: torch.nn.Module, ids: torch.Tensor) -> Callable[[], tuple[float, float]]:
    """Return a function that makes one training step and returns its loss and the seconds of forward and backward."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    options = {"return_logits": False} if isinstance(model, DeepSeekV3) else {"use_cache": False}

    def step() -> tuple[float, float]:
        start = time.perf_counter()
        loss = model(ids, labels=ids, **options).loss
        loss.backward()
        passed = time.perf_counter() - start
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach()), passed

    return step


def time_by_operator(step: Callable[[], object], most: int = 12) -> dict[str, float]:
    """Profile two steps: each operator's own share of the time, largest first."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(2):
            step()
    times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    total = sum(times.values())
    largest = sorted(times, key=lambda key: -times[key])[:most]
    return {key: round(times[key] / total, 4) for key in largest}


def memory_of(shape: str, side: str, threads: int) -> float:
    """Measure one side's memory in a process of its own, in bytes."""
    command = [sys.executable, __file__, "--threads", str(threads), "--memory-of", shape, side]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak_memory(shape: str, side: str) -> int:
    """Return how far steps raise this process's resident size over that before the first one, in bytes (Linux)."""
    values, batch, length = SHAPES[shape]
    torch.manual_seed(0)
    model: torch.nn.Module = DeepSeekV3(DeepSeekV3Config(**BASE | values))
    if side == "hf":
        model = hugging_face_twin(model)  # type: ignore[arg-type]
    gc.collect()
    step = stepper(model, torch.randint(0, BASE["vocab_size"], (batch, length)))  # type: ignore[call-overload]
    Path("/proc/self/clear_refs").write_text("5")  # the largest size so far is now the present one
    before = status("VmRSS")
    for _ in range(3):
        step()
    return status("VmHWM") - before


def status(field: str) -> int:
    """Read a size of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def step_flops(config: DeepSeekV3Config, batch: int, length: int) -> float:
    """Count operations of the matrix products, forward and backward: 6 per activated parameter, and attention."""
    activated = config.num_parameters().activated_without_embedding
    attention = config.num_hidden_layers * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    return 6.0 * batch * length * (activated + attention * length / 2)


def matmul_flops(seconds: float = 1.5) -> float:
    """Measure a large float32 matrix product, the ceiling of everything else: the best of many."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def processor() -> str:
    """Name the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
