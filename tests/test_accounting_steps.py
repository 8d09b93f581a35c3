"""When a bias moves: real optimizer steps alone, in every precision, from whatever moment the callback is there."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, SingleDeviceStrategy
from tiny_moe import RATE, TinyMoE, assert_follows_the_rule, data, fit, make_trainer
from torch import Tensor

from lightning_dsv3.callbacks import AuxFreeBalanceCallback


class ManualWithScaler(TinyMoE):
    """Two optimizers under one scaler; in batch 1 the gradients of the `overflowing` ones are infinite."""

    automatic_optimization = False

    def __init__(self, overflowing: tuple[int, ...], fused: bool) -> None:
        super().__init__(fused=fused)
        self.overflowing = overflowing
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        self.weights: list[list[Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.scaler.scale(super().training_step(batch, batch_idx)).backward()
        for index, optimizer in enumerate(self.optimizers(use_pl_optimizer=False)):
            if batch_idx == 1 and index in self.overflowing:
                for parameter in optimizer.param_groups[0]["params"]:
                    parameter.grad.fill_(float("inf"))
            self.scaler.step(optimizer)
            optimizer.zero_grad()
        self.scaler.update()

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(layer.parameters(), lr=0.01, fused=self.fused) for layer in self.model.layers()]

    def on_train_batch_end(self, *arguments: Any) -> None:
        super().on_train_batch_end(*arguments)
        self.trace[-1] = (len(self.trace), *self.trace[-1][1:])
        self.weights.append([layer_vectors.detach().clone() for layer_vectors in self.vectors()])

    def vectors(self) -> list[Tensor]:
        return [self.model.blocks[0].vectors, self.model.mtp[0].block.vectors]


class TestSkippedSteps:
    @pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
    def test_of_several_optimizers_one_that_steps_is_enough(self, fused):
        module = ManualWithScaler(overflowing=(1,), fused=fused)
        fit(module)
        moved = [not torch.equal(*pair) for pair in zip(module.weights[0], module.weights[1], strict=True)]
        assert moved == [True, False], "the case does not do what its name says"
        assert_follows_the_rule(module, RATE, num_updates=4)

    def test_fused_optimizers_that_all_skip_move_nothing(self):
        # Their step hooks are called all the same.
        module = ManualWithScaler(overflowing=(0, 1), fused=True)
        _, callback = fit(module)
        assert all(torch.equal(*pair) for pair in zip(module.weights[0], module.weights[1], strict=True))
        assert_follows_the_rule(module, RATE, num_updates=3, skipped_steps=[2])
        assert callback.tokens_seen == 8 * 7

    def test_a_skipped_step_of_an_accumulated_window_uses_up_the_whole_window(self):
        class Overflows(TinyMoE):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                loss = super().training_step(batch, batch_idx)
                return loss * float("inf") if batch_idx == 2 else loss

        module = Overflows()
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        fit(module, rows=12, accumulate_grad_batches=2, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        assert_follows_the_rule(module, RATE, num_updates=2, skipped_steps=[2])

    @pytest.mark.parametrize("algorithm", ["norm", "value"])
    def test_clipping_of_scaled_gradients_changes_nothing(self, algorithm):
        module = TinyMoE()
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        fit(module, plugins=[plugin], gradient_clip_val=1e-3, gradient_clip_algorithm=algorithm)
        assert_follows_the_rule(module, RATE, num_updates=4)


class TestPrecision:
    def test_the_bias_stays_float32_under_16_mixed(self):
        module = TinyMoE()
        for router in module.model.routers():
            router.bias.fill_(5.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        fit(module, rate=0.001, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        assert {router.bias.dtype for router in module.model.routers()} == {torch.float32}
        assert_follows_the_rule(module, 0.001, num_updates=4, start=5.0)

    @pytest.mark.parametrize("precision", ["16-true", "64-true"])
    def test_the_bias_stays_float32_in_a_model_of_another_precision(self, precision):
        class Cast(TinyMoE):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                dtypes.add(self.model.blocks[0].vectors.dtype)
                return super().training_step(batch, batch_idx)

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=0.01)  # AdamW's epsilon is 0 in float16

        dtypes: set[torch.dtype] = set()
        module = Cast()
        for router in module.model.routers():
            router.bias.fill_(5.001)
        fit(module, rate=0.001, precision=precision)
        assert dtypes == {torch.float16 if precision == "16-true" else torch.float64}
        assert {router.bias.dtype for router in module.model.routers()} == {torch.float32}
        assert_follows_the_rule(module, 0.001, num_updates=4, start=float(torch.tensor(5.001)))


class TestMidRun:
    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_a_callback_that_is_added_while_it_trains_starts_with_the_next_batch(self, accumulate):
        class Adds(pl.Callback):
            def on_train_batch_start(self, trainer: Any, pl_module: TinyMoE, batch: Any, batch_idx: int) -> None:
                if batch_idx == 2:
                    trainer.callbacks.append(late)
                    for router in pl_module.model.routers():
                        router.bias.fill_(3.0)
                    pl_module.routed = [[0] * len(load) for load in pl_module.routed]
                    pl_module.trace.clear()

        late = AuxFreeBalanceCallback(RATE)
        module = TinyMoE()
        make_trainer(Adds(), accumulate_grad_batches=accumulate).fit(module, data(12))
        module.trace = [(step - 2 // accumulate, routed, biases) for step, routed, biases in module.trace]
        assert_follows_the_rule(module, RATE, num_updates=4 // accumulate, start=3.0)
        assert late.tokens_seen == 8 * 7
        assert not any(router._forward_hooks for router in module.model.routers())

    def test_a_callback_that_is_added_while_it_trains_is_refused_as_before(self):
        class Adds(pl.Callback):
            def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
                trainer.callbacks.append(AuxFreeBalanceCallback(2 * RATE))

        with pytest.raises(MisconfigurationException, match=r"update_rate=0.01, .*update_rate=0.02, "):
            fit(TinyMoE(), callbacks=[Adds()])

    def test_weights_that_are_loaded_while_it_trains_win(self):
        class Loads(pl.Callback):
            def on_train_batch_start(self, trainer: Any, pl_module: TinyMoE, batch: Any, batch_idx: int) -> None:
                if batch_idx == 2:
                    state = pl_module.state_dict()
                    biases = {name: torch.full_like(v, 3.0) for name, v in state.items() if name.endswith("bias")}
                    pl_module.load_state_dict(state | biases)
                    pl_module.routed = [[0] * len(load) for load in pl_module.routed]
                    pl_module.trace.clear()

        module = TinyMoE()
        fit(module, callbacks=[Loads()])
        module.trace = [(step - 2, routed, biases) for step, routed, biases in module.trace]
        assert_follows_the_rule(module, RATE, num_updates=2, start=3.0)


class TestDeepSpeed:
    def test_lightnings_strategy_is_one_that_accumulates_by_itself(self):
        # It steps its own engine's optimizer, and calls the step hooks on every micro-batch.
        assert DeepSpeedStrategy.handles_gradient_accumulation.fget(object.__new__(DeepSpeedStrategy)) is True

    def test_a_dry_run_is_refused_as_well_with_the_strategies_that_work(self):
        class Engine(SingleDeviceStrategy):
            handles_gradient_accumulation = True

        trainer = make_trainer(
            AuxFreeBalanceCallback(dry_run=True),
            accelerator="auto",
            strategy=Engine(device="cpu", accelerator=None),
        )
        with pytest.raises(MisconfigurationException, match="Use DDP, FSDP or ModelParallelStrategy"):
            trainer.fit(TinyMoE(), data(4))
