"""Owning a bias, writing it, and knowing that the optimizer has stepped."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from tiny_moe import D, Gate, GateAdapter, MoE, make_router
from torch import nn

from lightning_dsv3.balance import (
    OptimizerStepWatcher,
    RouterObserver,
    bias_owner,
    claim_bias,
    find_routers,
    max_violations,
    release_bias,
    update_biases,
)


class Owner:
    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"Owner({self.name})"


class TestOwnership:
    def test_two_owners_are_an_error_that_names_both(self):
        router, first, second = make_router(), Owner("first"), Owner("second")
        claim_bias(router, first, "layer_3")
        with pytest.raises(
            MisconfigurationException, match=r"layer_3 has two owners: Owner\(first\) and Owner\(second\)"
        ):
            claim_bias(router, second, "layer_3")
        assert bias_owner(router) is first

    def test_claiming_again_is_fine(self):
        router, owner = make_router(), Owner("only")
        claim_bias(router, owner)
        claim_bias(router, owner)
        assert bias_owner(router) is owner

    def test_a_released_bias_can_be_claimed(self):
        router, first, second = make_router(), Owner("first"), Owner("second")
        assert bias_owner(router) is None
        claim_bias(router, first)
        release_bias(router, second)
        assert bias_owner(router) is first
        release_bias(router, first)
        claim_bias(router, second)
        assert bias_owner(router) is second

    def test_a_claim_ends_with_its_owner_and_keeps_no_model_alive(self):
        router, owner = make_router(), Owner("gone")
        claim_bias(router, owner)
        del owner
        gc.collect()
        assert bias_owner(router) is None
        keeper = Owner("keeper")
        keeper.router = router
        claim_bias(router, keeper)
        alive = weakref.ref(router)
        del router, keeper
        gc.collect()
        assert alive() is None


class TestUpdateBiases:
    def test_layers_of_different_widths_move_by_the_rule(self):
        model = MoE(num_experts=(6, 5, 6, 5))
        counts = [torch.randint(0, 9, (router.num_experts,)) for router in model.routers()]
        tensors = [router.bias for router in model.routers()]
        update_biases(find_routers(model), counts, 0.01)
        for router, tensor, count in zip(model.routers(), tensors, counts, strict=True):
            assert router.bias is tensor, "written in place"
            load = count.double()
            torch.testing.assert_close(router.bias, (0.01 * torch.sign(load.mean() - load)).float())

    def test_count_sum_and_update_never_read_the_device(self):
        # Meta tensors have no values: whatever would make the host wait for a GPU raises here.
        gates = nn.ModuleList([Gate(6), Gate(5), Gate(6)]).to("meta")
        observer = RouterObserver(find_routers(gates, [GateAdapter()]))
        observer.attach()
        observer.start("meta")
        observer.open()
        for gate in gates:
            gate(torch.empty(7, D, device="meta"))
        counts = observer.take()
        update_biases(observer.routers, counts, torch.tensor(0.001, device="meta"))
        assert max_violations(counts).shape == (3,)

    def test_a_bfloat16_bias_is_refused(self):
        model = MoE()
        model.routers()[1].bias = torch.zeros(5, dtype=torch.bfloat16)
        counts = [torch.randint(0, 9, (router.num_experts,)) for router in model.routers()]
        with pytest.raises(MisconfigurationException, match=r"mtp_1 .*bfloat16.*buffer_dtype"):
            update_biases(find_routers(model), counts, 0.01)

    def test_routers_without_a_bias_are_passed_over(self):
        model = MoE(topk_method="greedy")
        update_biases(find_routers(model), [torch.tensor([1] * n) for n in (6, 5)], 0.01)
        assert [router.bias for router in model.routers()] == [None, None]


class TestOptimizerStepWatcher:
    @staticmethod
    def run(fused: bool, gradient: float) -> tuple[bool, bool]:
        """Return whether the watcher saw a step, and whether the parameter moved."""
        weight = nn.Parameter(torch.ones(2))
        optimizer = torch.optim.AdamW([weight], fused=fused)
        watcher = OptimizerStepWatcher()
        watcher.watch([optimizer])
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale((weight * gradient).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        return bool(watcher.take()), bool((weight != 1).any())

    @pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
    @pytest.mark.parametrize("gradient", [1.0, float("inf")])
    def test_sees_a_step_exactly_when_the_parameters_move(self, fused, gradient):
        saw, moved = self.run(fused, gradient)
        assert moved == (gradient == 1.0), "the case does not do what its name says"
        assert saw == moved

    def test_take_forgets(self):
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        watcher = OptimizerStepWatcher()
        watcher.watch([optimizer])
        assert not watcher.seen
        optimizer.step()
        assert watcher.seen
        assert watcher.take() is True
        assert watcher.take() is False

    def test_one_real_step_of_several_optimizers_is_a_step(self):
        optimizers = [torch.optim.AdamW([nn.Parameter(torch.ones(1))], fused=True) for _ in range(3)]
        watcher = OptimizerStepWatcher()
        watcher.watch(optimizers)
        for found_infs in [(1, 1), (1, 0), (0, 1), (1, None)]:
            for optimizer, found_inf in zip(optimizers, found_infs, strict=False):
                if found_inf is not None:
                    optimizer.found_inf = torch.tensor([float(found_inf)])
                optimizer.step()
                optimizer.found_inf = None
            assert bool(watcher.take()) == (found_infs != (1, 1))

    def test_stop_takes_the_hooks_off(self):
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        watcher = OptimizerStepWatcher()
        watcher.watch([optimizer])
        watcher.stop()
        optimizer.step()
        assert watcher.take() is False

    def test_what_is_no_torch_optimizer_counts_as_stepping(self):
        watcher = OptimizerStepWatcher()
        watcher.watch([object()])
        assert watcher.take() is True
