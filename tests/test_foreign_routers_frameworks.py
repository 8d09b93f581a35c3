"""Routers of other training frameworks, and what happens where the framework moves the bias itself."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from foreign_frameworks import (
    CHOSEN,
    DIM,
    EXPERTS,
    Gate,
    MegatronMoE,
    Mixer,
    Model,
    MoELinearRouter,
    TitanMoE,
    litgpt_moe,
    register_titan_hook,
    torchtitan_moe,
)
from foreign_training import RATE, moved
from lightning.fabric.utilities.exceptions import MisconfigurationException
from tiny_moe import make_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_dsv3.balance import bias_owner, find_routers
from lightning_dsv3.callbacks import AuxFreeBalanceCallback

MOES = {
    "torchtitan": torchtitan_moe,
    "torchtitan-0.2": lambda: TitanMoE("expert_bias"),
    "litgpt": litgpt_moe,
    "automodel": lambda: Mixer(Gate(bias_update_factor=0)),
    "olmo_core": lambda: Mixer(MoELinearRouter(bias_gamma=None)),
    "megatron": MegatronMoE,
}


class Regression(pl.LightningModule):
    """Trains a model of layers; `native` is called after each step, as the framework's own trainer would."""

    def __init__(self, model: nn.Module, hook: bool = False, native: Any = None) -> None:
        super().__init__()
        self.model, self.hook, self.native = model, hook, native
        self.chosen: list[list[int]] = []
        for router in find_routers(model):
            router.module.register_forward_hook(self.record)

    def record(self, module: nn.Module, args: Any, output: Any) -> None:
        if output[1].dtype == torch.bool:
            self.chosen.append(output[1].sum(0).tolist())
        else:
            self.chosen.append(torch.bincount(output[1].flatten(), minlength=EXPERTS).tolist())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(batch).float().square().mean()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.native is not None:
            self.native()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        if self.hook:
            register_titan_hook(optimizer, self.model)
        return optimizer


def run(module: Regression, callback: AuxFreeBalanceCallback) -> list[float]:
    rows = torch.randn(6, 9, DIM, generator=torch.Generator().manual_seed(0)) + torch.linspace(-1, 1, DIM)
    make_trainer(callback).fit(module, DataLoader(rows, batch_size=2))
    [router] = find_routers(module.model)
    return router.bias.tolist()


def by_the_rule(module: Regression, rate: float = RATE) -> list[float]:
    bias = [0.0] * EXPERTS
    for load in module.chosen:
        assert sum(load) == 2 * 9 * CHOSEN
        bias = moved(bias, load, rate)
    return bias


@pytest.mark.parametrize("framework", MOES)
def test_a_router_that_nothing_else_moves_follows_the_rule(framework):
    torch.manual_seed(0)
    module = Regression(Model(MOES[framework]()))
    for router in find_routers(module.model):
        if framework == "megatron":
            router.module.frozen_expert_bias = True
    bias = run(module, AuxFreeBalanceCallback(RATE))
    assert bias == by_the_rule(module)
    assert len(module.chosen) == 3
    assert any(bias)


def test_the_layer_is_named_by_its_index():
    assert [router.name for router in find_routers(Model(torchtitan_moe(), torchtitan_moe()))] == ["layer_0", "layer_1"]


def test_a_megatron_router_that_drops_tokens_is_refused():
    with pytest.raises(MisconfigurationException, match=r"TopKRouter\) cannot .*moe_expert_capacity_factor.*None"):
        find_routers(Model(MegatronMoE(capacity_factor=1.0)))


class Natively:
    """One layer of each framework with its own update switched on."""

    def __init__(self, framework: str) -> None:
        torch.manual_seed(0)
        self.framework = framework
        moe = {
            "torchtitan": torchtitan_moe,
            "automodel": lambda: Mixer(Gate()),
            "olmo_core": lambda: Mixer(MoELinearRouter()),
            "megatron": MegatronMoE,
        }[framework]()
        model = Model(moe)
        [self.router] = find_routers(model)
        native = {
            "automodel": lambda: self.router.module.update_bias(),
            "olmo_core": lambda: self.router.module.post_batch(),
            "megatron": self.finalize,
        }.get(framework)
        self.module = Regression(model, hook=framework == "torchtitan", native=native)

    def finalize(self) -> None:
        """Megatron's finalize_model_grads passes over routers with the flag set."""
        router = self.router.module
        if not router.frozen_expert_bias:
            load = torch.tensor(self.module.chosen[-1]).float()
            router.expert_bias += 0.001 * torch.sign(load.mean() - load)


@pytest.mark.parametrize("framework", ["torchtitan", "automodel", "olmo_core", "megatron"])
class TestNativeUpdate:
    def test_it_is_left_alone_measured_and_said_once(self, framework):
        natively = Natively(framework)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            bias = run(natively.module, AuxFreeBalanceCallback(RATE))
        said = [str(w.message) for w in caught if "take_over=True" in str(w.message)]
        assert len(said) == 1
        assert "layer_0" in said[0]
        expected = [0.0] * EXPERTS
        # Lightning runs the forward inside of optimizer.step, after torchtitan's hook, which so is one step late.
        loads = natively.module.chosen[:-1] if framework == "torchtitan" else natively.module.chosen
        for load in loads:
            step = torch.tensor(moved([0.0] * EXPERTS, load, 0.001))
            step = step - step.mean() if framework == "torchtitan" else step
            expected = (torch.tensor(expected) + step).tolist()
        assert bias == pytest.approx(expected, abs=1e-7)
        assert bias_owner(natively.router.module) is None

    def test_take_over_moves_it_alone(self, framework):
        natively = Natively(framework)
        bias = run(natively.module, AuxFreeBalanceCallback(RATE, take_over=True))
        assert bias == by_the_rule(natively.module)
        assert any(bias)

    def test_a_dry_run_touches_neither(self, framework):
        natively, alone = Natively(framework), Natively(framework)
        bias = run(natively.module, AuxFreeBalanceCallback(RATE, dry_run=True, take_over=True))
        run(alone.module, AuxFreeBalanceCallback(dry_run=True))
        assert bias == alone.router.bias.tolist()
        assert any(bias)


def test_torchtitans_hook_is_seen_inside_its_container_of_optimizers():
    natively = Natively("torchtitan")
    inner = torch.optim.SGD(natively.module.model.parameters(), lr=0.1)
    register_titan_hook(inner, natively.module.model)

    class Container:
        optimizers = (inner,)

    updater = natively.router.adapter.native_updater(natively.router.module, natively.router.holder, [Container()])
    assert "register_moe_load_balancing_hook" in updater.name
    updater.stop()
    assert not inner._optimizer_step_pre_hooks
