"""Which share of a training step does AuxFreeBalanceCallback take, by number of layers and of experts?

    python benchmarks/balance_overhead.py                         print shares
    python benchmarks/balance_overhead.py --output benchmarks/results/balance_overhead.json
    python benchmarks/balance_overhead.py --only tiny_16x64       one shape

A Trainer makes real steps of DeepSeekV3, alternately with the callback and without it. The parts are timed where they
run: the hooks on the routers (counting), the sum over ranks (reduction), and the rest of what the callback does before
and after a batch (update). Their sum over the time of the step is the share. Logging is apart: a Trainer writes every
50th step, unless it is told otherwise, and here every step. The ratio of steps with the callback to those without it,
pair by pair, is there as a check: it has the noise of whole steps, which on a shared machine is far above the share.

One process has no reduction to make, so the collective is timed apart, between two processes with gloo.

On a GPU the parts are timed between two synchronisations, so that they hold what the device does and not the launches
alone. Then steps are made in which every operation of the callback that would make the host wait is an error.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader
from train_step import processor

from lightning_dsv3.balance import find_routers, observer, sum_over_ranks
from lightning_dsv3.callbacks import AuxFreeBalanceCallback
from lightning_dsv3.config import DeepSeekV3Config
from lightning_dsv3.model import DeepSeekV3

BATCH, LENGTH = 8, 256
# Every layer has experts, and no group, which 64 and 256 experts would share out differently.
TINY: dict[str, Any] = {"first_k_dense_replace": 0, "num_nextn_predict_layers": 0, "n_group": 1, "topk_group": 1}
# 58 layers of 256 experts in the memory of a small machine: narrow, so the step is short and the share an upper bound.
NARROW = TINY | {
    "hidden_size": 64, "moe_intermediate_size": 16, "q_lora_rank": 32, "kv_lora_rank": 32, "num_attention_heads": 2,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    f"{name}_{layers}x{experts}": base | {"num_hidden_layers": layers, "n_routed_experts": experts}
    for name, base, layers in (("tiny", TINY, 1), ("tiny", TINY, 16), ("narrow", NARROW, 58))
    for experts in (64, 256)
}
PARTS = ("counting", "reduction", "update", "logging")
AIM = {"shape": "tiny_16x64", "share": 0.002}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="counted steps per shape with the callback, and without")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--only", choices=SHAPES, help="measure one shape")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    rows = []
    print(
        f"{'microseconds a step':<22}"
        + "".join(f"{part:>11}" for part in PARTS)
        + f"{'step':>12}{'share':>9}{'ratio':>8}"
    )
    for name, shape in SHAPES.items():
        if arguments.only in (None, name):
            rows.append(
                {"shape": name} | measure(DeepSeekV3Config.from_preset("tiny", **shape), arguments.steps, device)
            )
            row = rows[-1]
            print(
                f"{name:<22}" + "".join(f"{row[f'{part}_seconds'] * 1e6:>11,.0f}" for part in PARTS)
                + f"{row['step_seconds'] * 1e6:>12,.0f}{row['share']:>9.3%}{row['ratio']:>8.4f}"
            )  # fmt: skip
    result = {
        "question": "share of a training step for counting, reduction and update",
        "aim": AIM,
        "command": "python benchmarks/balance_overhead.py",
        "machine": {
            "processor": processor(), "threads": arguments.threads,
            "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "lightning": L.__version__},
        "batch": BATCH,
        "sequence": LENGTH,
        "rows": rows,
    }  # fmt: skip
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


def measure(config: DeepSeekV3Config, steps: int, device: torch.device) -> dict[str, Any]:
    """Alternate steps with and without the callback and return their figures."""
    torch.manual_seed(0)
    module = Module(config)
    clock = Clock(device)
    callback = EveryOtherBatch(clock)
    timer = StepTimer(device)
    first, last = 2, 2 + 2 * steps  # one warm-up pair
    with (
        mock.patch.object(observer, "sum_over_ranks", clock.timed("reduction", sum_over_ranks)),
        mock.patch.object(callback, "_log_violation", clock.timed("logging", callback._log_violation)),
    ):
        fit(module, [callback, timer], last, device)
    seconds = timer.seconds[first:]
    with_callback, without = seconds[::2], seconds[1::2]
    parts = {part: statistics.median(clock.of_steps[part][1:]) for part in PARTS}
    parts["reduction"] += collective_seconds(config)
    step = statistics.median(with_callback)
    row = {f"{part}_seconds": value for part, value in parts.items()} | {
        "step_seconds": step,
        "share": (sum(parts.values()) - parts["logging"]) / step,
        "share_if_every_step_is_logged": sum(parts.values()) / step,
        "ratio": statistics.median(on / off for on, off in zip(with_callback, without, strict=True)),
    }
    if device.type == "cuda":
        fit(module, [WithoutWaiting()], 3, device)
        row["host_synchronisations"] = 0
    return row


def fit(module: L.LightningModule, callbacks: list[L.Callback], steps: int, device: torch.device) -> None:
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    trainer = L.Trainer(
        max_steps=steps, callbacks=callbacks, accelerator=device.type, devices=1, log_every_n_steps=1,
        enable_progress_bar=False, **quiet,
    )  # fmt: skip
    ids = torch.randint(0, 4096, (steps * BATCH, LENGTH))
    trainer.fit(module, DataLoader(ids, batch_size=BATCH))


class Module(L.LightningModule):
    """DeepSeekV3 with its next-token loss and AdamW."""

    def __init__(self, config: DeepSeekV3Config) -> None:
        super().__init__()
        self.model = DeepSeekV3(config)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(batch, labels=batch, return_logits=False).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=True)


def waiter(device: torch.device) -> Callable[[], None]:
    """Return a function that waits for the device."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


class Clock:
    """Adds up the seconds of parts within a step."""

    def __init__(self, device: torch.device) -> None:
        self._wait = waiter(device)
        self._now = dict.fromkeys(PARTS, 0.0)
        self.of_steps: dict[str, list[float]] = {part: [] for part in PARTS}

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function`` so that each call's time goes to ``part`` and to no other."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._wait()
            before, start = sum(self._now.values()), time.perf_counter()
            result = function(*args, **kwargs)
            self._wait()
            seconds = time.perf_counter() - start
            inside = sum(self._now.values()) - before  # not a part of what is timed
            self._now[part] += seconds - inside
            return result

        return call

    def end_step(self) -> None:
        for part, seconds in self._now.items():
            self.of_steps[part].append(seconds)
        self._now = dict.fromkeys(PARTS, 0.0)


class EveryOtherBatch(AuxFreeBalanceCallback):
    """The callback, timed, which sees even batches alone. On odd ones its hooks return at once."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        for router in find_routers(pl_module):
            hooks = router.module._forward_hooks
            hooks.update({key: self.clock.timed("counting", hook) for key, hook in hooks.items()})

    def on_train_batch_start(self, *arguments: Any) -> None:
        if arguments[-1] % 2 == 0:
            self.clock.timed("update", super().on_train_batch_start)(*arguments)

    def on_train_batch_end(self, *arguments: Any) -> None:
        if arguments[-1] % 2 == 0:
            self.clock.timed("update", super().on_train_batch_end)(*arguments)
            self.clock.end_step()


class StepTimer(L.Callback):
    """Times whole batches, from one's end to the next one's."""

    def __init__(self, device: torch.device) -> None:
        self._wait = waiter(device)
        self._start = 0.0
        self.seconds: list[float] = []

    def on_train_start(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self._wait()
        now = time.perf_counter()
        self.seconds.append(now - self._start)
        self._start = now


class WithoutWaiting(AuxFreeBalanceCallback):
    """The callback, for which an operation that makes the host wait for the device is an error.

    Steps whose logs are written read the device to say what is broken; so this one does not let them be written.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        trainer.log_every_n_steps = 1000
        for router in find_routers(pl_module):
            hooks = router.module._forward_hooks
            hooks.update({key: without_waiting(hook) for key, hook in hooks.items()})

    def on_train_batch_end(self, *arguments: Any) -> None:
        without_waiting(super().on_train_batch_end)(*arguments)


def without_waiting(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return function(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return call


def collective_seconds(config: DeepSeekV3Config, repeats: int = 50) -> float:
    """Time the one collective of a step between two processes on this machine (gloo)."""
    layers = config.num_hidden_layers - config.first_k_dense_replace
    numel = layers * (config.n_routed_experts + 1)  # the counts, and one number per layer for broken forwards
    context = multiprocessing.get_context("spawn")
    with TemporaryDirectory() as folder:
        queue = context.Queue()
        arguments = (f"file://{folder}/store", numel, repeats, queue)
        processes = [context.Process(target=reduce_on_rank, args=(rank, *arguments)) for rank in range(2)]
        for process in processes:
            process.start()
        seconds = max(queue.get(timeout=120) for _ in processes)
        for process in processes:
            process.join()
    return float(seconds)


def reduce_on_rank(rank: int, store: str, numel: int, repeats: int, queue: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    counts = torch.ones(numel, dtype=torch.int64)
    seconds = []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        sum_over_ranks(counts, dist.group.WORLD)
        seconds.append(time.perf_counter() - start)
    queue.put(statistics.median(seconds))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
