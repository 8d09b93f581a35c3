"""Balance over real processes: N ranks count and move exactly as one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from test_expert_load_monitor import Data, domain_of, val_data
from test_expert_load_monitor import MoE as ValidatedMoE
from tiny_moe import RATE, RestOf, TinyMoE, data, make_trainer
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader, IterableDataset

from lightning_dsv3.balance import data_parallel_group
from lightning_dsv3.callbacks import AuxFreeBalanceCallback, ExpertLoadMonitor
from lightning_dsv3.metrics import BitsPerByte, ExpertLoad, ExpertSpecialization, MaxViolation

pytestmark = pytest.mark.distributed

ROWS_PER_STEP = 8
STEPS = 3


class SavesWithinWindow(TinyMoE):
    path: str | None = None

    def on_train_batch_end(self, *arguments: Any) -> None:
        super().on_train_batch_end(*arguments)
        if self.path and len(self.trace) == 1:
            self.trainer.save_checkpoint(self.path)


def train(
    world_size: int,
    accumulate: int = 1,
    checkpointing: str | None = None,
    save_to: str | None = None,
    ckpt_path: str | None = None,
) -> dict[str, Any]:
    """Train on the same rows per step for any number of ranks.

    The weights stay (lr=0): gradients of other ranks round otherwise, and a rounding may choose another
    expert."""
    module = SavesWithinWindow((6, 6, 5), lr=0, checkpointing=checkpointing)
    module.path = save_to
    callback = AuxFreeBalanceCallback(RATE)
    trainer = make_trainer(
        callback,
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        accumulate_grad_batches=accumulate,
        max_steps=STEPS,
        use_distributed_sampler=False,
    )
    rows = list(data(ROWS_PER_STEP * STEPS).dataset)[trainer.global_rank :: world_size]
    loader = DataLoader(rows, batch_size=ROWS_PER_STEP // world_size // accumulate)
    if ckpt_path:
        loader = RestOf(loader, start=1)
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        trainer.fit(module, loader, ckpt_path=ckpt_path)
    return {
        "biases": [biases for _, _, biases in module.trace[accumulate - 1 :: accumulate]],
        "final": module.biases(),
        "routed": module.routed,
        "tokens_seen": callback.tokens_seen,
        "logged": {name: value.item() for name, value in trainer.callback_metrics.items()},
        # Lightning itself sums a few scalars while it sets up.
        "collectives": sum(call.args[0].numel() > 1 for call in all_reduce.call_args_list),
    }


@cache
def on_one_rank() -> dict[str, Any]:
    return train(1)


@pytest.mark.parametrize(
    ("world_size", "accumulate", "checkpointing"),
    [(2, 1, None), (2, 2, "non_reentrant"), (4, 2, None)],
    ids=["2_ranks", "2_ranks_accumulate_checkpoint", "4_ranks_accumulate"],
)
def test_n_ranks_equal_one(world_size, accumulate, checkpointing):
    one = on_one_rank()
    assert len(one["biases"]) == STEPS
    assert all(any(layer) for layer in one["final"])
    for rank in run_on_ranks(world_size, train, world_size, accumulate, checkpointing):
        assert rank["biases"] == one["biases"]
        assert rank["tokens_seen"] == one["tokens_seen"] == STEPS * ROWS_PER_STEP * 7
        assert rank["logged"] == one["logged"]
        assert rank["routed"] != one["routed"], "each rank routes its own rows"
        assert rank["collectives"] == STEPS, "one for all layers"


def test_a_checkpoint_within_a_window_has_the_counts_of_all_ranks(tmp_path):
    path = str(tmp_path / "window.ckpt")
    ranks = run_on_ranks(2, train, 2, 2, None, path)
    state = torch.load(path, weights_only=True)["callbacks"]["AuxFreeBalanceCallback"]
    assert {int(counts.sum()) for counts in state["window_counts"].values()} == {4 * 7 * 2}
    # Both ranks take the counts up again, and together just once.
    resumed = run_on_ranks(2, train, 2, 2, None, None, path)
    assert [rank["final"] for rank in resumed] == [rank["final"] for rank in ranks]
    assert {rank["tokens_seen"] for rank in resumed} == {STEPS * ROWS_PER_STEP * 7}


class Stream(IterableDataset):
    """A data set without a length, which may come to nothing on a rank."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def validate(world_size: int, batches_of_rank_1: int = 2) -> tuple[dict[str, Any], dict[str, float]]:
    """Validate on rows 0..7 in batches of 2: the even batches on rank 0, the odd ones on rank 1."""

    class Sharded(Data):
        def val_dataloader(self) -> DataLoader:
            rank = self.trainer.global_rank
            batches = list(self.val)[rank::world_size][: batches_of_rank_1 if rank else None]
            return DataLoader(Stream(batches), batch_size=None)

    monitor = ExpertLoadMonitor()
    trainer = make_trainer(
        monitor, devices=world_size, strategy="ddp" if world_size > 1 else "auto", use_distributed_sampler=False
    )
    val = val_data(8, domain=domain_of(8), rows_per_batch=2)
    module = ValidatedMoE()
    for router in module.model.routers():
        router.bias.copy_(0.01 * torch.arange(router.num_experts))
    trainer.validate(module, Sharded(val), verbose=False)
    assert monitor.loads is not None
    return monitor.loads, {name: value.item() for name, value in trainer.callback_metrics.items()}


def test_loads_of_two_ranks_equal_those_of_one():
    loads, logged = validate(1)
    assert {"val/moe/layer_0/load_entropy", "val/moe/dead_experts", "moe/layer_0/bias_norm"} <= set(logged)
    for rank_loads, rank_logged in run_on_ranks(2, validate, 2):
        assert rank_loads == loads
        assert rank_logged == pytest.approx(logged)


def test_a_rank_without_a_validation_batch_takes_part():
    (loads, _), (same, _) = run_on_ranks(2, validate, 2, 0)
    assert loads == same
    assert sum(loads["tokens"].values()) == 4 * 7


def compute_metrics() -> dict[str, Any]:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    counts = torch.tensor([[4, 0, 2], [0, 3, 3]])[rank]
    violation, load = MaxViolation(num_experts=3), ExpertLoad(num_experts=3)
    specialization = ExpertSpecialization(num_domains=2, num_experts=3)
    bits = BitsPerByte()
    violation.update(counts)
    load.update(counts)
    specialization.update(counts, domain=rank)
    bits.update(torch.tensor([1.0, 2.0]) * (rank + 1), torch.tensor([2, 3 - 3 * rank]))
    return {
        "violation": violation.compute().item(),
        "load": load.compute().tolist(),
        "specialization": specialization.compute().item(),
        "bits": bits.compute().item(),
    }


def test_metrics_are_those_of_all_ranks():
    first, second = run_on_ranks(2, compute_metrics)
    assert first == second
    specialization = ExpertSpecialization(num_domains=2, num_experts=3)
    specialization.update(torch.tensor([4, 0, 2]), 0)
    specialization.update(torch.tensor([0, 3, 3]), 1)
    assert first["violation"] == pytest.approx(5 / 4 - 1)
    assert first["load"] == [[1.0, 0.75, 1.25]]
    assert first["specialization"] == pytest.approx(specialization.compute().item())
    assert first["bits"] == pytest.approx((1 + 2 + 2) / (2 + 3 + 2) / torch.tensor(2.0).log().item())


def data_ranks() -> list[int]:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    trainer = SimpleNamespace(world_size=4, strategy=SimpleNamespace(device_mesh=mesh))
    return dist.get_process_group_ranks(data_parallel_group(trainer))


def test_tensor_parallel_ranks_are_not_counted_twice():
    assert run_on_ranks(4, data_ranks) == [[0, 2], [1, 3], [0, 2], [1, 3]]
