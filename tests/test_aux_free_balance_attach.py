"""What AuxFreeBalanceCallback attaches to, owns, lets go of, and refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.demos.boring_classes import BoringModel
from tiny_moe import (
    RATE,
    Gate,
    GateAdapter,
    TinyMoE,
    assert_follows_the_rule,
    data,
    fit,
    make_trainer,
)
from torch import Tensor

from lightning_dsv3.balance import bias_owner
from lightning_dsv3.callbacks import AuxFreeBalanceCallback


class TestAttaching:
    def test_a_model_without_routers_is_an_error(self):
        module = BoringModel()
        with pytest.raises(MisconfigurationException, match=r"BoringModel: searched its \d+ modules"):
            make_trainer(AuxFreeBalanceCallback()).fit(module)

    def test_routers_without_any_bias_are_an_error_with_the_remedy(self):
        with pytest.raises(MisconfigurationException, match=r"None of the 2 .*noaux_tc.*dry_run=True"):
            fit(TinyMoE(topk_method="greedy"))

    def test_a_bias_that_a_wrapper_casts_swallows_no_step(self):
        class CastsItsBuffers(TinyMoE):
            """As FSDP does, in every forward."""

            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                for router in self.model.routers():
                    router.bias.data = router.bias.data.bfloat16()
                return super().training_step(batch, batch_idx)

        module = CastsItsBuffers()
        for router in module.model.routers():
            router.bias.fill_(5.001)  # 5.001 + 0.01 is 5.0 in bfloat16, and so is 5.001
        fit(module)
        assert_follows_the_rule(module, RATE, num_updates=4, start=float(torch.tensor(5.001)))

    def test_two_owners_in_one_trainer_are_an_error_that_names_both(self):
        with pytest.raises(MisconfigurationException, match=r"update_rate=0.01, .*update_rate=0.02, "):
            fit(TinyMoE(), callbacks=[AuxFreeBalanceCallback(0.02)])

    def test_a_second_callback_may_measure(self):
        module = TinyMoE()
        fit(module, callbacks=[AuxFreeBalanceCallback(dry_run=True)])
        assert_follows_the_rule(module, RATE, num_updates=4)

    def test_owns_the_bias_from_setup_on_and_not_after_fit(self):
        owners = []

        class Watched(TinyMoE):
            def setup(self, stage: str) -> None:
                owners.extend(bias_owner(router) for router in self.model.routers())

        module = Watched()
        _, callback = fit(module)
        assert owners == [callback, callback]
        assert [bias_owner(router) for router in module.model.routers()] == [None, None]

    def test_a_dry_run_owns_nothing(self):
        owners = []

        class Watched(TinyMoE):
            def on_train_start(self) -> None:
                owners.extend(bias_owner(router) for router in self.model.routers())

        make_trainer(AuxFreeBalanceCallback(dry_run=True)).fit(Watched(), data(4))
        assert owners == [None, None]

    @pytest.mark.parametrize("fails", [False, True])
    def test_lets_go_of_the_model(self, fails):
        class MayFail(TinyMoE):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                if fails:
                    raise RuntimeError("out of memory")
                return super().training_step(batch, batch_idx)

        module = MayFail()
        if fails:
            with pytest.raises(RuntimeError, match="out of memory"):
                fit(module)
        else:
            fit(module)
        assert not any(router._forward_hooks for router in module.model.routers())
        assert not any(bias_owner(router) for router in module.model.routers())

    def test_one_callback_serves_one_fit_after_the_other(self):
        callback = AuxFreeBalanceCallback(RATE)
        for num_experts in [(6, 5), (6, 5), (4, 4)]:
            module = TinyMoE(num_experts)
            make_trainer(callback).fit(module, data(8))
            assert_follows_the_rule(module, RATE, num_updates=4)

    def test_every_fit_looks_for_routers_that_are_not_counted(self):
        callback, module = AuxFreeBalanceCallback(RATE), TinyMoE()
        make_trainer(callback).fit(module, data(4))
        module.model.mtp.eval()
        with pytest.raises(MisconfigurationException, match="mtp_1"):
            make_trainer(callback).fit(module, data(4))

    def test_validation_alone_needs_no_router(self):
        module = BoringModel()
        make_trainer(AuxFreeBalanceCallback()).validate(module, verbose=False)

    @pytest.mark.parametrize(
        ("break_it", "reason"),
        [
            (lambda model: model.mtp.eval(), r"mtp_1 .*eval\(\) mode; call .train\(\)"),
            (lambda model: model.__setattr__("layers", lambda: [*model.blocks]), r"mtp_1 .*was not seen"),
        ],
        ids=["eval_mode", "unused"],
    )
    def test_a_router_that_is_not_counted_is_an_error(self, break_it, reason):
        module = TinyMoE()
        break_it(module.model)
        with pytest.raises(MisconfigurationException, match=reason):
            fit(module)

    def test_a_private_router_is_balanced_through_its_adapter(self):
        class WithGate(TinyMoE):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                weights, indices = self.gate(batch["x"])
                chosen.extend(indices.flatten().tolist())
                return super().training_step(batch, batch_idx) + weights.sum()

        chosen: list[int] = []
        module = WithGate()
        module.gate = Gate()
        callback = AuxFreeBalanceCallback(RATE, routers=[GateAdapter()])
        trainer = make_trainer(callback, max_steps=1)
        trainer.fit(module, data(2))
        mean = len(chosen) / 4
        sign = [(mean > n) - (mean < n) for n in map(chosen.count, range(4))]
        assert module.gate.correction.tolist() == pytest.approx([RATE * s for s in sign])
        assert any(module.biases()[0])
        assert {"moe/gate/max_violation", "moe/layer_0/max_violation"} <= set(trainer.callback_metrics)
