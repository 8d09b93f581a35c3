"""What wraps a model, repeats its layers, copies its buffers or compiles it leaves the counts as they are."""

from __future__ import annotations

import functools
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from ranks import run_on_ranks
from tiny_moe import RATE, D, TinyMoE, assert_follows_the_rule, data, fit, make_trainer
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.data import DataLoader

from lightning_dsv3 import DeepSeekV3Config, DeepSeekV3Module
from lightning_dsv3.balance import Float32Biases, RouterObserver, find_routers, update_biases
from lightning_dsv3.callbacks import AuxFreeBalanceCallback
from lightning_dsv3.parallel import checkpoint_blocks

ROWS_PER_STEP = 8
STEPS = 3


# Activation checkpointing in a Trainer, beside the kinds in test_aux_free_balance.py.


def keeps_topk(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op == torch.ops.aten.topk.default else CheckpointPolicy.PREFER_RECOMPUTE


class Checkpointed(TinyMoE):
    """Counts how often each router is called, beside how often its forward is meant."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.calls = 0
        for router in self.model.routers():
            router.register_forward_hook(self._on_call)

    def _on_call(self, *_: Any) -> None:
        self.calls += 1

    def forward(self, x_BSD: Tensor, record: bool = False) -> Tensor:
        x_TD = x_BSD.flatten(0, 1)
        for index, layer in enumerate(self.model.layers()):
            x_TD, expert_TK = self.run(layer, x_TD)
            for expert in expert_TK.flatten().tolist() if record else ():
                self.routed[index][expert] += 1
        return x_TD

    def run(self, layer: nn.Module, x_TD: Tensor) -> Any:
        if self.kind == "selective":
            contexts = functools.partial(create_selective_checkpoint_contexts, keeps_topk)
            return checkpoint(layer, x_TD, use_reentrant=False, context_fn=contexts)
        if self.kind == "nested":
            return checkpoint(functools.partial(checkpoint, layer, use_reentrant=False), x_TD, use_reentrant=False)
        return checkpoint(layer, x_TD, use_reentrant=False, early_stop=self.kind == "early_stop")


@pytest.mark.parametrize("kind", ["selective", "early_stop", "no_early_stop", "nested"])
def test_every_kind_of_recompute_counts_once(kind):
    module = Checkpointed(kind)
    _, callback = fit(module, accumulate_grad_batches=2)
    assert module.calls > 4 * 2, "the case does not do what its name says"
    assert callback.tokens_seen == 8 * 7, "twice the counts give the same signs, and so the same biases"
    assert_follows_the_rule(module, RATE, num_updates=2)


TINY = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 3, "initializer_range": 0.5}


def biases_of_model(policy: str, **arguments: Any) -> Any:
    torch.manual_seed(0)
    module = DeepSeekV3Module(DeepSeekV3Config.from_preset("tiny", **TINY), learning_rate=0.0)
    checkpoint_blocks(module.model, policy)
    rows = torch.randint(0, 32, (8, 9), generator=torch.Generator().manual_seed(1))
    callback = AuxFreeBalanceCallback(RATE)
    make_trainer(callback, **arguments).fit(module, DataLoader([{"input_ids": row} for row in rows], batch_size=2))
    return [router.bias.tolist() for router in find_routers(module)], callback.tokens_seen


@pytest.mark.parametrize("policy", ["block", "keep_routing"])
def test_the_models_own_checkpointing_counts_once(policy):
    plain = biases_of_model("none", accumulate_grad_batches=2)
    assert biases_of_model(policy, accumulate_grad_batches=2) == plain
    assert plain[1] == 8 * 9
    assert all(any(layer) for layer in plain[0])


# torch.compile


class TestCompile:
    @pytest.fixture(autouse=True)
    def _nothing_compiled_yet(self) -> None:
        # Code that was compiled for another model of the same classes would be taken again, hooks or not.
        torch.compiler.reset()

    @pytest.mark.parametrize("part", ["module", "model", "router"])
    def test_compiled_before_the_callback_attaches(self, part):
        module = TinyMoE()
        if part == "model":
            module.model.blocks[0] = torch.compile(module.model.blocks[0], backend="aot_eager")
            module.model.mtp[0].compile(backend="aot_eager")
        elif part == "router":
            for router in module.model.routers():
                router.compile(backend="aot_eager")
        compiled = torch.compile(module, backend="eager") if part == "module" else module
        fit(compiled, accumulate_grad_batches=2)
        assert_follows_the_rule(module, RATE, num_updates=2)

    def test_compiled_after_the_callback_attached(self):
        class Compiles(TinyMoE):
            def on_train_start(self) -> None:
                for layer in self.model.layers():
                    layer.compile(backend="aot_eager")

        module = Compiles()
        fit(module, accumulate_grad_batches=2)
        assert_follows_the_rule(module, RATE, num_updates=2)

    def test_compiled_and_run_before_without_the_hooks_is_refused(self):
        module = TinyMoE()
        for layer in module.model.layers():
            layer.compile(backend="aot_eager")
        module(torch.randn(2, 7, D)).sum().backward()
        with pytest.raises(MisconfigurationException, match=r"layer_0 .*mtp_1 .*compiled only after the"):
            fit(module)
        assert module.biases() == [[0.0] * 6, [0.0] * 5]

    def test_a_compiled_model_is_counted_in_a_second_fit_as_well(self):
        module = TinyMoE()
        for layer in module.model.layers():
            layer.compile(backend="aot_eager")
        fit(module)
        module.trace.clear()
        module.routed = [[0] * len(load) for load in module.routed]
        for router in module.model.routers():
            router.bias.zero_()
        fit(module)
        assert_follows_the_rule(module, RATE, num_updates=4)


# Ranks, in processes of their own


class Probed(TinyMoE):
    """Has a buffer that each rank fills with its own number before each forward, and reads after it."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.register_buffer("probe", torch.zeros(()), persistent=False)
        self.probes: set[float] = set()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.probe.fill_(self.trainer.global_rank)

    def on_train_batch_end(self, *arguments: Any) -> None:
        super().on_train_batch_end(*arguments)
        self.probes.add(self.probe.item())


class Sharded(Probed):
    """Shards itself with FSDP2, in bfloat16 where asked."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if self.in_bfloat16 else MixedPrecisionPolicy()
        for layer in self.model.layers():
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(self.model, mesh=mesh, mp_policy=policy)

    in_bfloat16 = False


def rows_of(rank: int, shares: tuple[int, ...]) -> DataLoader:
    """Of the 8 rows of each step, rank r gets `shares[r]`."""
    rows = list(data(ROWS_PER_STEP * STEPS).dataset)
    begin = sum(shares[:rank])
    batches = [rows[step * ROWS_PER_STEP :][begin : begin + shares[rank]] for step in range(STEPS)]
    return DataLoader([row for batch in batches for row in batch], batch_size=shares[rank])


def train(kind: str, shares: tuple[int, ...] = (4, 4)) -> dict[str, Any]:
    """Train with weights that stay: other ranks' gradients round otherwise, and a rounding may choose anew."""
    strategies = {
        "ddp": lambda: DDPStrategy(broadcast_buffers=True),
        "ddp_static": lambda: DDPStrategy(broadcast_buffers=True, static_graph=True),
        "fsdp2": lambda: ModelParallelStrategy(data_parallel_size=len(shares), tensor_parallel_size=1),
    }
    module = (Sharded if kind == "fsdp2" else Probed)((6, 6, 5), lr=0)
    callback = AuxFreeBalanceCallback(RATE)
    distributed = {"strategy": strategies[kind](), "devices": len(shares)} if kind != "one" else {}
    trainer = make_trainer(callback, max_steps=STEPS, use_distributed_sampler=False, **distributed)
    trainer.fit(module, rows_of(trainer.global_rank, (ROWS_PER_STEP,) if kind == "one" else shares))
    return {
        "biases": [biases for _, _, biases in module.trace],
        "tokens_seen": callback.tokens_seen,
        "violation": trainer.callback_metrics["moe/max_violation"].item(),
        "probes": module.probes,
    }


@cache
def on_one_rank() -> dict[str, Any]:
    return train("one")


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "shares"),
    [
        ("ddp", (4, 4)),
        ("ddp_static", (4, 4)),
        ("ddp", (5, 3)),
        ("ddp", (1, 4, 1, 2)),
        ("fsdp2", (4, 4)),
        ("fsdp2", (6, 2)),
    ],
    ids=["broadcast_buffers", "static_graph", "uneven_batches", "uneven_batches_of_4_ranks", "fsdp2", "fsdp2_uneven"],
)
def test_ranks_count_as_one(kind, shares):
    one = on_one_rank()
    assert all(any(layer) for layer in one["biases"][-1])
    for rank, result in enumerate(run_on_ranks(len(shares), train, kind, shares)):
        probe = 0.0 if kind.startswith("ddp") else float(rank)
        assert result["probes"] == {probe}, "DDP overwrites a buffer of the model by that of rank 0"
        assert result | {"probes": one["probes"]} == one


class Fsdp1Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.moe = TinyMoE((6, 6, 5)).model

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.flatten(0, 1)
        for layer in self.moe.layers():
            x_TD, _ = layer(x_TD)
        return x_TD


def train_with_fsdp1(buffer_dtype: str | None, nested: bool) -> Any:
    """The pieces of the callback around the wrapper itself, as Lightning's strategy for it wants a GPU."""
    rank, world_size = 0, 1
    if buffer_dtype is not None:
        dist.init_process_group("gloo")
        rank, world_size = dist.get_rank(), dist.get_world_size()
    model: nn.Module = Fsdp1Model()
    for router in find_routers(model):
        router.bias.fill_(5.001)  # bfloat16 has 5.0 and 5.03125
    if buffer_dtype is not None:
        dtype = getattr(torch, buffer_dtype)
        wrap = functools.partial(
            FullyShardedDataParallel,
            device_id=torch.device("cpu"),
            mixed_precision=MixedPrecision(buffer_dtype=dtype),
            use_orig_params=True,
        )
        if nested:
            model.moe.blocks[1] = wrap(model.moe.blocks[1])
        model = wrap(model)
    routers, biases = find_routers(model), Float32Biases()
    for router in routers:
        biases.of(router)
    observer = RouterObserver(routers)
    observer.attach()
    observer.start("cpu")
    seen = set()
    history = []
    for batch in rows_of(rank, (ROWS_PER_STEP // world_size,) * world_size):
        observer.open()
        model(batch["x"]).pow(2).mean().backward()
        observer.close()
        seen |= {str(router.bias_tensor.dtype) for router in routers}
        counts = observer.take(dist.group.WORLD if buffer_dtype is not None else None)
        update_biases(routers, counts, 0.001, biases=[biases.of(router) for router in routers])
        history.append(([c.tolist() for c in counts], [router.bias.tolist() for router in routers]))
    return history, seen, {str(router.bias_tensor.dtype) for router in routers}, [router.path for router in routers]


@pytest.mark.distributed
@pytest.mark.parametrize(("buffer_dtype", "nested"), [("float32", True), ("bfloat16", False), ("bfloat16", True)])
def test_fsdp1_on_two_ranks_counts_as_one_and_keeps_the_bias_in_float32(buffer_dtype, nested):
    history, _, _, paths = train_with_fsdp1(None, nested)
    for ranks_history, seen, dtypes, ranks_paths in run_on_ranks(2, train_with_fsdp1, buffer_dtype, nested):
        assert (f"torch.{buffer_dtype}" in seen) is True, "the case does not do what its name says"
        assert dtypes == {"torch.float32"}
        assert ranks_paths == paths
        # The first forward may have run with the rounded bias; what it chose was counted as it was.
        totals = [[sum(layer) for layer in counts] for counts, _ in ranks_history]
        assert totals == [[sum(layer) for layer in counts] for counts, _ in history]
        if buffer_dtype == "float32":
            assert ranks_history == history
        moves = {round((b - 5.001) / 0.001, 1) for layer in ranks_history[-1][1] for b in layer}
        assert moves <= {-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0}
        assert moves - {0.0}


def test_lightnings_fsdp1_strategy_does_not_accumulate_by_itself():
    # It has no CPU, so that it is not refused is what can be seen here.
    assert FSDPStrategy.handles_gradient_accumulation.fget(object.__new__(FSDPStrategy)) is False
