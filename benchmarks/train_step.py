"""How fast is a training step beside Hugging Face's DeepseekV3ForCausalLM, on equal weights and the same batch?

    python benchmarks/train_step.py                         print ratios
    python benchmarks/train_step.py --output benchmarks/results/train_step.json

A step is forward, backward, clipping and fused AdamW in float32. Both sides run in one process, in turn, on the same
weights; Hugging Face with its fastest settings here (experts ``grouped_mm``, attention ``sdpa``). Reported are the
median step and the median of the ratios pair by pair, which stands where a shared machine's speed drifts; and the share
of the machine's measured matrix product that our step reaches.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from lightning_dsv3.checkpoint import save_hf_checkpoint
from lightning_dsv3.config import DeepSeekV3Config
from lightning_dsv3.model import DeepSeekV3

BASE = {
    "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4, "q_lora_rank": None, "kv_lora_rank": 64, "qk_nope_head_dim": 48, "qk_rope_head_dim": 16,
    "v_head_dim": 48, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0,
    "max_position_embeddings": 4096, "initializer_range": 0.02,
}  # fmt: skip
# Equal activated size: K * F is 512 everywhere.
SHAPES: dict[str, tuple[dict[str, Any], int, int]] = {
    "16 experts, top 2": ({"n_routed_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 256}, 8, 256),
    "64 experts, top 8": ({"n_routed_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 64}, 8, 256),
    "128 experts, top 8": ({"n_routed_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 64}, 8, 256),
    "64 experts, top 8, 1 x 2048": (
        {"n_routed_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 64}, 1, 2048,
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7, help="counted steps per side and shape")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    peak = matmul_flops()
    rows = []
    print(f"matrix product {peak / 1e9:.0f} GFLOP/s, {arguments.threads} threads\n")
    print(f"{'shape':<30}{'ours':>11}{'HF':>11}{'ratio':>8}{'of peak':>9}")
    for name, (shape, batch, length) in SHAPES.items():
        row = measure(DeepSeekV3Config(**BASE | shape), batch, length, arguments.steps, peak)
        rows.append({"shape": name, "batch": batch, "sequence": length} | row)
        print(
            f"{name:<30}{row['ours_tokens_per_second']:>7,.0f} t/s{row['hf_tokens_per_second']:>7,.0f} t/s"
            f"{row['ratio']:>8.2f}{row['ours_share_of_peak']:>9.0%}"
        )
    result = {
        "question": "training step, float32, ours over Hugging Face (ratio above 1: ours is faster)",
        "command": "python benchmarks/train_step.py",
        "machine": {"processor": processor(), "threads": arguments.threads, "matmul_gflops": round(peak / 1e9, 1)},
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        },
        "rows": rows,
    }  # fmt: skip
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


def measure(config: DeepSeekV3Config, batch: int, length: int, steps: int, peak: float) -> dict[str, float]:
    """Alternate steps of both models and return their figures."""
    torch.manual_seed(0)
    ours = DeepSeekV3(config)
    with tempfile.TemporaryDirectory() as folder:
        save_hf_checkpoint(ours, folder)
        theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(
            folder, attn_implementation="sdpa", experts_implementation="grouped_mm", dtype=torch.float32
        )
    theirs.train()
    ids = torch.randint(0, config.vocab_size, (batch, length))
    steps_of = {
        "ours": stepper(ours, lambda: ours(ids, labels=ids, return_logits=False).loss),
        "hf": stepper(theirs, lambda: theirs(input_ids=ids, labels=ids, use_cache=False).loss),
    }
    seconds: dict[str, list[float]] = {"ours": [], "hf": []}
    losses = {name: [step() for _ in range(2)] for name, step in steps_of.items()}  # warm-up
    if abs(losses["ours"][-1] / losses["hf"][-1] - 1) > 1e-3:
        raise RuntimeError(f"the two sides do not compute the same: losses {losses}")
    for _ in range(steps):
        for name, step in steps_of.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    tokens = batch * length
    return {
        "ours_tokens_per_second": tokens / median["ours"],
        "hf_tokens_per_second": tokens / median["hf"],
        "ratio": statistics.median(h / o for o, h in zip(seconds["ours"], seconds["hf"], strict=True)),
        "ours_share_of_peak": step_flops(config, batch, length) / median["ours"] / peak,
        "hf_share_of_peak": step_flops(config, batch, length) / median["hf"] / peak,
    }


def stepper(model: torch.nn.Module, loss_of: Callable[[], torch.Tensor]) -> Callable[[], float]:
    """Return a function that makes one training step and returns its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def step_flops(config: DeepSeekV3Config, batch: int, length: int) -> float:
    """Count operations of the matrix products, forward and backward: 6 per activated parameter, and attention."""
    activated = config.num_parameters().activated_without_embedding
    attention = config.num_hidden_layers * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    return 6.0 * batch * length * (activated + attention * length / 2)


def matmul_flops() -> float:
    """Measure a large float32 matrix product, the ceiling of everything else."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    best = float("inf")
    for _ in range(6):
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
