"""Hugging Face models on several ranks, sharded, and under PEFT: the same biases as on one rank without any of that."""

from __future__ import annotations

import copy
import importlib.util
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from foreign_training import RATE, LanguageModel, build_model, fit
from lightning.pytorch.strategies import ModelParallelStrategy
from ranks import run_on_ranks
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, fully_shard

from lightning_dsv3.balance import Float32Biases, RouterObserver, find_routers, install_biases, update_biases
from lightning_dsv3.callbacks import AuxFreeBalanceCallback


class Sharded(LanguageModel):
    """Shards itself with FSDP2; `leaves_out_bias` keeps biases that are parameters whole."""

    def __init__(self, family: str, leaves_out_bias: bool) -> None:
        # Weights stay: gradients of other ranks round otherwise, and a rounding may choose another expert.
        super().__init__(build_model(family), lr=0.0)
        self.leaves_out_bias = leaves_out_bias

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        biases = {router.bias_tensor for router in find_routers(self.model)}
        ignored = {bias for bias in biases if isinstance(bias, nn.Parameter)} if self.leaves_out_bias else set()
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh, ignored_params=ignored)
        fully_shard(self.model, mesh=mesh, ignored_params=ignored)


def train(family: str, kind: str) -> Any:
    callback = AuxFreeBalanceCallback(RATE, install_bias=True)
    if kind == "one":
        module = LanguageModel(build_model(family), lr=0.0)
        fit(module, callback, rows=12, accumulate_grad_batches=2)
    elif kind == "ddp":
        module = LanguageModel(build_model(family), lr=0.0)
        fit(module, callback, rows=12, devices=2, strategy="ddp")
    else:
        module = Sharded(family, leaves_out_bias=kind == "fsdp2")
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        try:
            fit(module, callback, rows=12, devices=2, strategy=strategy)
        except Exception as error:
            return str(error)
    return {router.name: router.bias.tolist() for router in find_routers(module)}


@cache
def on_one_rank(family: str) -> Any:
    return train(family, "one")


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("minimax_m2", "ddp"),
        ("ernie4_5_moe", "ddp"),
        ("minimax_m2", "fsdp2"),
        ("afmoe", "fsdp2"),
        ("qwen3_moe", "fsdp2"),
    ],
)
def test_two_ranks_equal_one(family, kind):
    one = on_one_rank(family)
    assert any(one["layer_1"])
    for rank in run_on_ranks(2, train, family, kind):
        assert rank == one


def test_a_bias_that_is_sharded_is_refused_with_the_remedy():
    for said in run_on_ranks(2, train, "afmoe", "fsdp2-with-bias"):
        assert "layer_0" in said
        assert "4 of 8 values" in said
        assert "ignored_params" in said


def train_with_fsdp1() -> Any:
    """FullyShardedDataParallel casts buffers to bfloat16 in its first forward, as Lightning's strategy asks it to."""
    dist.init_process_group("gloo")
    model = build_model("minimax_m2")
    [first, _] = routers = find_routers(model)
    for router in routers:
        router.bias.fill_(5.001)
    precision = MixedPrecision(param_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16)
    sharded = FullyShardedDataParallel(
        model, mixed_precision=precision, device_id=torch.device("cpu"), use_orig_params=True
    )
    routers, biases = find_routers(sharded), Float32Biases()
    paths = [router.path for router in routers]
    for router in routers:
        biases.of(router)
    observer = RouterObserver(routers)
    observer.attach()
    observer.start("cpu")
    dtypes = []
    for step in range(2):
        ids = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(step))
        observer.open()
        sharded(input_ids=ids, labels=ids).loss.backward()
        observer.close()
        dtypes.append(first.bias_tensor.dtype)
        update_biases(routers, observer.take(), 0.001, biases=[biases.of(router) for router in routers])
    moves = [round((value - 5.001) / 0.001, 2) for value in first.bias.tolist()]
    return paths, dtypes, first.bias.dtype, moves


def test_fsdp1_which_casts_buffers_swallows_no_step():
    [(paths, dtypes, dtype, moves)] = run_on_ranks(1, train_with_fsdp1)
    assert paths == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    assert dtypes == [torch.bfloat16, torch.float32]  # cast once, put back once
    assert dtype == torch.float32
    assert set(moves) <= {-2.0, -1.0, 0.0, 1.0, 2.0}
    assert any(moves)


class SavedCopy(nn.Module):
    """What PEFT puts in the place of a module that `modules_to_save` names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(module)})

    def forward(self, *args: Any) -> Any:
        return self.modules_to_save["default"](*args)


@pytest.mark.parametrize("family", ["minimax_m2", "deepseek_v3"])
def test_peft_with_and_without_the_router_among_the_modules_to_save(family):
    """With real PEFT where it is installed."""
    plain = LanguageModel(build_model(family), lr=0.0)
    fit(plain, AuxFreeBalanceCallback(RATE))
    for saved in ([], ["gate"]):
        model = build_model(family)
        if importlib.util.find_spec("peft"):
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=saved or None)
            model = get_peft_model(model, config)
        else:
            for layer in model.model.layers:
                if saved and hasattr(layer.mlp, "gate"):
                    layer.mlp.gate = SavedCopy(layer.mlp.gate)
        module = LanguageModel(model, lr=0.0)
        fit(module, AuxFreeBalanceCallback(RATE))
        routers = find_routers(module)
        assert [router.name for router in routers] == [router.name for router in find_routers(plain)]
        assert [router.bias.tolist() for router in routers] == [r.bias.tolist() for r in find_routers(plain)]
        assert all("modules_to_save" not in router.path for router in routers)


def test_install_biases_works_on_a_model_before_it_is_sharded():
    model = build_model("mixtral")
    assert install_biases(model) == ["layer_0", "layer_1"]
