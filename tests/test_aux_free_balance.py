"""What AuxFreeBalanceCallback counts in a real Trainer, and when it moves the bias."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from tiny_moe import (
    RATE,
    D,
    MoE,
    TinyMoE,
    ValidatedMoE,
    assert_follows_the_rule,
    data,
    fit,
    make_trainer,
)
from torch import Tensor, nn

from lightning_dsv3.callbacks import AuxFreeBalanceCallback


class TestCounting:
    def test_bias_follows_the_rule_at_every_step(self):
        module = TinyMoE(num_experts=(6, 6, 5))
        fit(module)
        assert_follows_the_rule(module, RATE, num_updates=4)
        assert any(module.biases()[2]), "the MTP layer is balanced too"

    @pytest.mark.parametrize("batches", [4, 5], ids=["whole_windows", "short_last_window"])
    def test_accumulation_windows_add_up(self, batches):
        module = TinyMoE()
        fit(module, rows=2 * batches, accumulate_grad_batches=2)
        assert_follows_the_rule(module, RATE, num_updates=math.ceil(batches / 2))

    def test_k_micro_batches_equal_one_batch(self):
        biases = []
        for rows_per_batch, accumulate in [(4, 1), (2, 2), (1, 4)]:
            module = TinyMoE(lr=0)
            fit(module, rows=16, rows_per_batch=rows_per_batch, accumulate_grad_batches=accumulate)
            biases.append(module.biases())
        assert biases[0] == biases[1] == biases[2]

    def test_several_forwards_per_step_add_up(self):
        module = TinyMoE(forwards_per_step=3)
        _, callback = fit(module)
        assert_follows_the_rule(module, RATE, num_updates=4)
        assert callback.tokens_seen == 3 * 8 * 7

    @pytest.mark.parametrize("checkpointing", ["reentrant", "non_reentrant", "first_layer"])
    def test_recompute_does_not_count_twice(self, checkpointing):
        plain, checkpointed = TinyMoE((6, 6, 5)), TinyMoE((6, 6, 5), checkpointing=checkpointing)
        for module in (plain, checkpointed):
            fit(module, accumulate_grad_batches=2)
        assert_follows_the_rule(checkpointed, RATE, num_updates=2)
        assert checkpointed.trace == plain.trace

    @pytest.mark.parametrize("stays_in_training_mode", [False, True])
    def test_validation_and_sanity_check_do_not_count(self, stays_in_training_mode):
        class Validated(ValidatedMoE):
            def on_validation_model_eval(self) -> None:
                if not stays_in_training_mode:
                    super().on_validation_model_eval()

        module = Validated()
        trainer = make_trainer(
            callback := AuxFreeBalanceCallback(RATE),
            accumulate_grad_batches=2,
            val_check_interval=1,
            num_sanity_val_steps=2,
        )
        trainer.fit(module, data(12), data(6, seed=9))
        # Validation runs within every window.
        assert_follows_the_rule(module, RATE, num_updates=3)
        assert callback.tokens_seen == 12 * 7

    def test_forwards_outside_a_training_batch_do_not_count(self):
        class Sampler(pl.Callback):
            def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
                pl_module(torch.randn(5, 7, D))

            def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
                pl_module.train()(torch.randn(5, 7, D))
                ran.append(trainer.global_step)

        ran: list[int] = []
        module = ValidatedMoE()
        trainer = make_trainer(Sampler(), AuxFreeBalanceCallback(RATE), val_check_interval=1)
        trainer.fit(module, data(8), data(2))
        assert ran == [1, 2, 3, 4]
        assert_follows_the_rule(module, RATE, num_updates=4)

    def test_a_batch_without_a_loss_does_not_count(self):
        class SkipsBatch(TinyMoE):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
                if batch_idx not in (1, 4, 5):
                    return super().training_step(batch, batch_idx)
                self(batch["x"])  # routed, and not recorded
                return None

        module = SkipsBatch()
        _, callback = fit(module, rows=16, accumulate_grad_batches=2)
        # Batch 1 leaves half a window, batches 4 and 5 a whole one empty: its update is the identity.
        assert_follows_the_rule(module, RATE, num_updates=4)
        assert module.trace[3][2] == module.trace[5][2]
        assert callback.tokens_seen == 5 * 2 * 7

    def test_batches_without_a_forward_move_nothing(self):
        class Starts(TinyMoE):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
                return super().training_step(batch, batch_idx) if batch_idx > 1 else None

        module = Starts()
        _, callback = fit(module, rows=10)
        assert_follows_the_rule(module, RATE, num_updates=5)
        assert callback.tokens_seen == 3 * 2 * 7

    def test_hooks_attached_before_compilation_count(self):
        class Compiled(TinyMoE):
            def configure_model(self) -> None:
                self.model.blocks[0] = torch.compile(self.model.blocks[0], backend="eager")

        module = Compiled()
        fit(module, accumulate_grad_batches=2)
        assert_follows_the_rule(module, RATE, num_updates=2)

    @pytest.mark.parametrize("hook", ["setup", "configure_model"])
    def test_a_model_that_is_built_late_is_found(self, hook):
        def build(self: TinyMoE, stage: str | None = None) -> None:
            self.model = MoE()

        module = type("BuiltLate", (TinyMoE,), {hook: build})(model=nn.Identity())
        fit(module)
        assert_follows_the_rule(module, RATE, num_updates=4)


class TestOptimizerSteps:
    @pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
    def test_a_step_that_the_scaler_skips_moves_no_bias(self, fused):
        class Overflows(TinyMoE):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                loss = super().training_step(batch, batch_idx)
                return loss * float("inf") if batch_idx == 1 else loss

            def on_train_batch_end(self, *arguments: Any) -> None:
                super().on_train_batch_end(*arguments)
                weights.append(self.model.blocks[0].vectors.detach().clone())

        weights: list[Tensor] = []
        module = Overflows(fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        _, callback = fit(module, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        biases = [biases for _, _, biases in module.trace]
        assert module.trace[1][0] == 2, "Lightning counts the skipped step"
        assert torch.equal(weights[1], weights[0]), "the case does not do what its name says"
        assert biases[1] == biases[0]
        assert_follows_the_rule(module, RATE, num_updates=3, skipped_steps=[2])
        assert callback.tokens_seen == 8 * 7, "skipped tokens were seen"

    def test_gradient_clipping_changes_nothing(self):
        module = TinyMoE()
        fit(module, gradient_clip_val=1e-3)
        assert_follows_the_rule(module, RATE, num_updates=4)

    @pytest.mark.parametrize("num_optimizers", [1, 2])
    @pytest.mark.parametrize("through_trainer", [True, False])
    def test_manual_optimization_updates_once_per_stepping_batch(self, num_optimizers, through_trainer):
        class Manual(TinyMoE):
            automatic_optimization = False
            steps = 0

            def training_step(self, batch: Any, batch_idx: int) -> None:
                self.manual_backward(super().training_step(batch, batch_idx))
                if batch_idx % 2 == 0:
                    return
                self.steps += 1
                optimizers = self.optimizers(use_pl_optimizer=through_trainer)
                for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
                    optimizer.step()
                    optimizer.zero_grad()

            def configure_optimizers(self) -> Any:
                layers = self.model.layers()
                parts = [self] if num_optimizers == 1 else layers
                return [torch.optim.SGD(part.parameters(), lr=0.1) for part in parts]

            def on_train_batch_end(self, *arguments: Any) -> None:
                super().on_train_batch_end(*arguments)
                self.trace[-1] = (self.steps, *self.trace[-1][1:])

        module = Manual()
        fit(module, rows=12)
        assert_follows_the_rule(module, RATE, num_updates=3)

    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
    def test_the_bias_stays_float32_and_takes_small_steps(self, precision):
        module = TinyMoE()
        for router in module.model.routers():
            router.bias.fill_(5.0)
        fit(module, rate=0.001, precision=precision)
        assert {router.bias.dtype for router in module.model.routers()} == {torch.float32}
        assert_follows_the_rule(module, 0.001, num_updates=4, start=5.0)

    def test_the_optimizer_does_not_know_the_bias(self):
        module = TinyMoE()
        trainer, _ = fit(module)
        held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
        assert not held & {id(router.bias) for router in module.model.routers()}

    def test_a_strategy_that_accumulates_by_itself_is_refused(self):
        class Engine(SingleDeviceStrategy):
            handles_gradient_accumulation = True

        with pytest.raises(MisconfigurationException, match="Engine accumulates gradients"):
            fit(TinyMoE(), accelerator="auto", strategy=Engine(device="cpu", accelerator=None))
