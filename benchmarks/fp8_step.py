"""What does FP8 bring to a training step of a mixture of experts, in time, memory and loss?

    python benchmarks/fp8_step.py                          the 3b preset on a GPU, four minutes at most
    python benchmarks/fp8_step.py --model 1b --batch 16
    python benchmarks/fp8_step.py --output benchmarks/results/fp8_step.json
    python benchmarks/fp8_step.py --small                  two layers of the tiny preset, on any machine, FP8 emulated

A step is forward, backward, clipping and fused AdamW on float32 weights under BF16 autocast, as the precisions
``bf16-mixed`` and ``fp8-block`` do it. Sides take turns, each time from the same weights and on the same text, which is
drawn from a made-up table of which id follows which, so that there is something to learn. Reported: the median step,
TFLOP/s by the operations of the activated parameters and of attention, the share of the measured BF16 product, the
largest memory, and both losses; the plain emulation is a side too where it is asked for (``--sides``).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from kernel_speed import Bench, measure_ceilings, name_of, versions
from torch import Tensor
from train_step import step_flops

from lightning_dsv3.config import DeepSeekV3Config
from lightning_dsv3.model import DeepSeekV3
from lightning_dsv3.parallel import checkpoint_blocks
from lightning_dsv3.parallel.fp8 import convert_to_fp8

SIDES = ("bf16", "te", "emulate")
SMALL = {"num_hidden_layers": 2, "vocab_size": 512}
_FOLLOWERS = 32


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="3b", help="preset")
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="by default bf16 and te, with --small emulate for te")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=12, help="steps of a turn; the first three are not counted")
    parser.add_argument("--turns", type=int, default=2, help="turns of each side")
    parser.add_argument("--checkpointing", action="store_true", help="run blocks again in the backward")
    parser.add_argument("--small", action="store_true", help="a tiny model, which says nothing of speed")
    parser.add_argument("--seconds", type=float, default=240.0, help="begin no further turn after this")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    arguments = parser.parse_args(words)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.small:
        arguments.model, arguments.batch, arguments.length = "tiny", 2, 64
    elif device.type == "cpu":
        parser.error("a model of this size needs a GPU; give --small to try the benchmark on this machine")
    sides = arguments.sides or ["bf16", "emulate" if arguments.small else "te"]
    end = time.perf_counter() + arguments.seconds
    config = DeepSeekV3Config.from_preset(arguments.model, **SMALL if arguments.small else {})
    ceilings = measure_ceilings(Bench(device, 8), small=arguments.small)
    ids = made_up_text(config.vocab_size, arguments.steps, arguments.batch, arguments.length, device)
    flops = step_flops(config, arguments.batch, arguments.length)
    turns: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    print(f"{arguments.model}: {config.num_parameters().total / 1e9:.2f}B parameters, {name_of(device)}\n")
    print(f"{'side':<10}{'ms a step':>12}{'tokens/s':>12}{'TFLOP/s':>10}{'of BF16':>9}{'GB':>8}{'loss':>18}")
    for _ in range(arguments.turns):
        for side in sides:
            if time.perf_counter() > end:
                print(f"{side:<10}left out: the {arguments.seconds:g} seconds were over")
                continue
            turns[side].append(turn(side, config, ids, checkpointing=arguments.checkpointing))
            row = figures(turns[side][-1], flops, ids[0].numel(), ceilings)
            print(
                f"{side:<10}{row['step_seconds'] * 1e3:>12,.1f}{row['tokens_per_second']:>12,.0f}"
                f"{row['tflops']:>10,.1f}{row['share_of_product']:>9.0%}{row['peak_bytes'] / 1e9:>8.1f}"
                f"{row['losses'][0]:>9.3f} ->{row['losses'][-1]:>6.3f}",
                flush=True,
            )
    rows = {side: figures(best(done), flops, ids[0].numel(), ceilings) for side, done in turns.items() if done}
    for side, row in rows.items():
        if side != "bf16" and "bf16" in rows:
            row["speed_over_bf16"] = rows["bf16"]["step_seconds"] / row["step_seconds"]
            row["largest_loss_difference"] = max(
                abs(a / b - 1) for a, b in zip(row["losses"], rows["bf16"]["losses"], strict=True)
            )
            print(f"\n{side}: {row['speed_over_bf16']:.2f} times BF16's speed, losses within "
                  f"{row['largest_loss_difference']:.2%}")  # fmt: skip
    result = {
        "question": "a training step in BF16 and in FP8: time, memory, loss",
        "command": " ".join(["python benchmarks/fp8_step.py", *(sys.argv[1:] if words is None else words)]),
        "machine": {"device": name_of(device), "threads": torch.get_num_threads()},
        "versions": versions(),
        "ceilings": ceilings,
        "model": arguments.model, "batch": arguments.batch, "sequence": arguments.length,
        "checkpointing": arguments.checkpointing,
        "rows": rows,
    }  # fmt: skip
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


def made_up_text(vocab_size: int, steps: int, batch: int, length: int, device: torch.device) -> list[Tensor]:
    """Return a batch ``[B, S]`` for each step, in which each id has some followers and no others."""
    generator = torch.Generator().manual_seed(1)
    followers = torch.randint(0, vocab_size, (vocab_size, _FOLLOWERS), generator=generator)
    picked = torch.randint(0, _FOLLOWERS, (length, steps * batch), generator=generator)
    ids = torch.randint(0, vocab_size, (steps * batch,), generator=generator)
    columns = []
    for pick in picked:
        columns.append(ids)
        ids = followers[ids, pick]
    return list(torch.stack(columns, dim=1).to(device).split(batch))


def turn(side: str, config: DeepSeekV3Config, batches: Sequence[Tensor], *, checkpointing: bool) -> dict[str, Any]:
    """Train a new model for some steps; return seconds and loss of each, and the largest memory."""
    device = batches[0].device
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    with device:
        model = DeepSeekV3(config)
    if checkpointing:
        checkpoint_blocks(model, "block")
    if side != "bf16":
        convert_to_fp8(model, backend=side)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    seconds, losses = [], []
    for ids in batches:
        taken, loss = timed(lambda ids=ids: step(model, optimizer, ids), device)
        seconds.append(taken)
        losses.append(loss)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return {"seconds": seconds, "losses": [float(loss) for loss in losses], "peak_bytes": peak}


def step(model: DeepSeekV3, optimizer: torch.optim.Optimizer, ids: Tensor) -> Tensor:
    """Make a training step and return its loss, on the device."""
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, cache_enabled=False):
        output = model(ids, labels=ids, return_logits=False)
    assert output.loss is not None
    loss = output.loss + 0.3 * sum(output.mtp_losses) / max(len(output.mtp_losses), 1)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return output.loss.detach()


def timed(run: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    """Return the seconds until a run is done on the device, and its result."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def best(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the turn with the smallest median; losses are those of all turns."""
    return min(turns, key=lambda one: statistics.median(counted(one)))


def counted(one: dict[str, Any]) -> list[float]:
    return one["seconds"][3:] or one["seconds"]


def figures(one: dict[str, Any], flops: float, tokens: int, ceilings: dict[str, float]) -> dict[str, Any]:
    """Return what is reported of a turn."""
    seconds = statistics.median(counted(one))
    product = ceilings.get("bfloat16 TFLOP/s", ceilings.get("float32 TFLOP/s", float("nan")))
    return {
        "step_seconds": seconds, "tokens_per_second": tokens / seconds, "tflops": flops / seconds / 1e12,
        "share_of_product": flops / seconds / 1e12 / product, "peak_bytes": one["peak_bytes"], "losses": one["losses"],
    }  # fmt: skip


if __name__ == "__main__":
    main()
