"""What AuxFreeBalanceCallback brings about: balance, logs, and runs that resume bit for bit."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from tiny_moe import (
    RATE,
    TinyMoE,
    assert_follows_the_rule,
    data,
    fit,
    make_trainer,
)
from torch import Tensor

from lightning_dsv3.callbacks import AuxFreeBalanceCallback


class TestBalancing:
    def test_the_load_becomes_balanced(self):
        violation = {}
        for rate in (0.0, 0.02):
            module = TinyMoE((8, 8), lr=0)
            trainer = make_trainer(AuxFreeBalanceCallback(rate))
            trainer.fit(module, data(640, rows_per_batch=16, offset=1.0))
            violation[rate] = trainer.callback_metrics["moe/max_violation"].item()
        assert violation[0.02] < 0.5 * violation[0.0]

    def test_rate_0_freezes_the_bias(self):
        module = TinyMoE()
        fit(module, rate=0)
        assert module.biases() == [[0.0] * 6, [0.0] * 5]

    def test_a_schedule_is_asked_with_this_steps_tokens_included(self):
        asked = []

        def rate(tokens: int) -> float:
            asked.append(tokens)
            return RATE if tokens <= 28 else 0.0

        module = TinyMoE()
        _, callback = fit(module, rate=rate)
        assert asked == [14, 28, 42, 56]
        assert callback.tokens_seen == 56
        first, second, third, fourth = (biases for _, _, biases in module.trace)
        assert first != second == third == fourth

    def test_dry_run_measures_and_moves_nothing(self):
        dry, off = TinyMoE(), TinyMoE()
        callback = AuxFreeBalanceCallback(RATE, dry_run=True)
        trainer = make_trainer(callback)
        trainer.fit(dry, data(8))
        fit(off, rate=0)
        assert dry.trace == off.trace
        assert callback.tokens_seen == 56
        assert trainer.callback_metrics["moe/max_violation"] > 0

    def test_dry_run_measures_whole_accumulation_windows(self):
        class Watch(pl.Callback):
            def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
                logged[-1].append(trainer.callback_metrics.get("moe/max_violation"))

        logged: list[list[Tensor]] = []
        for arguments in ({"dry_run": True}, {"update_rate": 0.0}):
            logged.append([])
            trainer = make_trainer(AuxFreeBalanceCallback(**arguments), Watch(), accumulate_grad_batches=3)
            trainer.fit(TinyMoE(), data(18))
        assert logged[0] == logged[1]
        assert len({value.item() for value in logged[0] if value is not None}) == 3

    def test_dry_run_needs_no_bias(self):
        module = TinyMoE(topk_method="greedy")
        trainer = make_trainer(AuxFreeBalanceCallback(dry_run=True))
        trainer.fit(module, data(8))
        assert trainer.callback_metrics["moe/max_violation"] > 0

    def test_routers_without_a_bias_are_measured_beside_those_with_one(self):
        module = TinyMoE()
        module.model.routers()[1].bias = None
        with pytest.warns(UserWarning, match=r"only measured: model\.mtp\.0\.block\.feed_forward\.router"):
            trainer, _ = fit(module)
        assert any(module.model.routers()[0].bias)
        assert "moe/mtp_1/max_violation" in trainer.callback_metrics

    @pytest.mark.parametrize("rate", [-0.1, float("nan"), float("inf")])
    def test_an_impossible_rate_is_refused(self, rate):
        with pytest.raises(ValueError, match="update_rate"):
            AuxFreeBalanceCallback(rate)
        with pytest.raises(ValueError, match="update_rate"):
            fit(TinyMoE(), rate=lambda tokens: rate)


class TestLogging:
    def test_logs_the_violation_of_the_steps_whole_batch(self):
        module = TinyMoE()
        trainer, _ = fit(module, rows=4, accumulate_grad_batches=2)
        violation = [max(load) * len(load) / sum(load) - 1 for load in module.routed]
        logged = {name: value.item() for name, value in trainer.logged_metrics.items()}
        assert logged == {
            "moe/max_violation": pytest.approx(sum(violation) / 2, rel=1e-6),
            "moe/layer_0/max_violation": pytest.approx(violation[0], rel=1e-6),
            "moe/mtp_1/max_violation": pytest.approx(violation[1], rel=1e-6),
        }

    def test_the_progress_bar_shows_every_steps_mean(self):
        class Watch(pl.Callback):
            def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
                shown.append(trainer.progress_bar_metrics.get("MaxVio"))

        shown: list[float | None] = []
        module = TinyMoE()
        trainer, _ = fit(module, enable_progress_bar=True, log_every_n_steps=100, callbacks=[Watch()])
        routed = [[[0] * 6, [0] * 5], *(routed for _, routed, _ in module.trace)]
        expected = []
        for before, after in itertools.pairwise(routed):
            loads = [[a - b for a, b in zip(*layer, strict=True)] for layer in zip(after, before, strict=True)]
            expected.append(sum(max(load) * len(load) / sum(load) - 1 for load in loads) / 2)
        assert [*shown[1:], trainer.progress_bar_metrics["MaxVio"]] == pytest.approx(expected, rel=1e-6)
        assert "moe/max_violation" not in trainer.callback_metrics, "nothing was due to be written"

    def test_layers_are_logged_whenever_the_trainer_writes(self, tmp_path):
        logger = pl.loggers.CSVLogger(tmp_path, name="", version="")
        fit(TinyMoE(), rows=14, logger=logger, log_every_n_steps=3)
        header, *lines = (tmp_path / "metrics.csv").read_text().splitlines()
        assert "moe/layer_0/max_violation" in header
        assert "MaxVio" not in header
        assert len(lines) == 2
        assert all("" not in line.split(",") for line in lines)


class SaveAfterBatch(pl.Callback):
    def __init__(self, batch: int, path: Path) -> None:
        self.batch = batch
        self.path = path
        self.routed: list[list[int]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready == self.batch:
            self.routed = [list(load) for load in pl_module.routed]
            trainer.save_checkpoint(self.path)


class TestResume:
    @pytest.mark.parametrize(
        "rate", [RATE, lambda tokens: RATE if tokens < 70 else RATE / 10], ids=["constant", "schedule"]
    )
    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_resume_is_bit_equal(self, tmp_path, rate, accumulate):
        straight = TinyMoE()
        _, straight_callback = fit(straight, rows=24, rate=rate, accumulate_grad_batches=accumulate)

        half = tmp_path / "half.ckpt"
        save = SaveAfterBatch(6, half)
        fit(TinyMoE(), rows=24, rate=rate, accumulate_grad_batches=accumulate, callbacks=[save])
        resumed = TinyMoE()
        _, callback = fit(
            resumed, rows=24, rate=rate, accumulate_grad_batches=accumulate, ckpt_path=half, start_batch=6
        )
        assert len(resumed.trace) == 6
        assert [biases for *_, biases in resumed.trace] == [biases for *_, biases in straight.trace[6:]]
        for name, tensor in straight.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], tensor), name
        assert callback.tokens_seen == straight_callback.tokens_seen == 24 * 7

    def test_the_checkpoint_of_a_step_has_that_steps_bias(self, tmp_path):
        checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
        module = TinyMoE()
        trainer = make_trainer(checkpoint, AuxFreeBalanceCallback(RATE), enable_checkpointing=True)
        trainer.fit(module, data(6))
        for step, (_, _, biases) in enumerate(module.trace, start=1):
            content = torch.load(tmp_path / f"epoch=0-step={step}.ckpt", weights_only=True)
            saved = [v.tolist() for name, v in content["state_dict"].items() if name.endswith("router.bias")]
            assert saved == biases
            assert content["callbacks"]["AuxFreeBalanceCallback"] == {
                "tokens_seen": 14 * step,
                "window_counts": {},
            }

    def test_a_checkpoint_within_a_window_keeps_its_counts(self, tmp_path):
        module = TinyMoE(lr=0)
        save = SaveAfterBatch(3, tmp_path / "window.ckpt")
        fit(module, rows=10, accumulate_grad_batches=4, callbacks=[save])
        content = torch.load(tmp_path / "window.ckpt", weights_only=True)
        state = content["callbacks"]["AuxFreeBalanceCallback"]
        assert {name: counts.tolist() for name, counts in state["window_counts"].items()} == {
            "layer_0": save.routed[0],
            "mtp_1": save.routed[1],
        }

        # Lightning goes on in the window: the step's load includes the batches before the checkpoint.
        resumed = TinyMoE(lr=0)
        window = tmp_path / "window.ckpt"
        _, callback = fit(resumed, rows=10, accumulate_grad_batches=4, ckpt_path=window, start_batch=3)
        assert [biases for *_, biases in resumed.trace] == [biases for *_, biases in module.trace[3:]]
        assert callback.tokens_seen == 10 * 7

    def test_counts_of_another_model_are_refused(self, tmp_path):
        save = SaveAfterBatch(1, tmp_path / "window.ckpt")
        fit(TinyMoE(), accumulate_grad_batches=2, callbacks=[save])
        content = torch.load(tmp_path / "window.ckpt", weights_only=True)
        window = content["callbacks"]["AuxFreeBalanceCallback"]["window_counts"]
        window["layer_7"] = window.pop("layer_0")
        torch.save(content, tmp_path / "window.ckpt")
        with pytest.raises(MisconfigurationException, match=r"layer_7.*layer_0"):
            fit(TinyMoE(), ckpt_path=tmp_path / "window.ckpt", max_epochs=2)

    def test_an_interrupted_batch_is_not_in_the_checkpoint(self, tmp_path):
        class Interrupted(TinyMoE):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                loss = super().training_step(batch, batch_idx)
                if batch_idx == 1:
                    raise RuntimeError("power cut")
                return loss

        class SaveOnException(pl.Callback):
            def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
                trainer.save_checkpoint(tmp_path / "crash.ckpt")

        module = Interrupted()
        with pytest.raises(RuntimeError, match="power cut"):
            fit(module, accumulate_grad_batches=2, callbacks=[SaveOnException()])
        content = torch.load(tmp_path / "crash.ckpt", weights_only=True)
        window = content["callbacks"]["AuxFreeBalanceCallback"]["window_counts"]
        # Lightning repeats the batch after a resume.
        assert [counts.tolist() for counts in window.values()] == module.trace[0][1]

    def test_a_callback_added_later_starts_from_the_bias_it_finds(self, tmp_path):
        module = TinyMoE()
        for router in module.model.routers():
            router.bias.fill_(3.0)
        trainer = make_trainer()
        trainer.fit(module, data(8))
        trainer.save_checkpoint(tmp_path / "without.ckpt")
        later = TinyMoE()
        _, callback = fit(later, ckpt_path=tmp_path / "without.ckpt", max_epochs=2)
        later.trace = [(step - 4, routed, biases) for step, routed, biases in later.trace]
        assert_follows_the_rule(later, RATE, num_updates=4, start=3.0)
        assert callback.tokens_seen == 56


class PytorchLightningMoE(pytorch_lightning.LightningModule):
    """The same model as a module of the other package."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TinyMoE()
        self.model = self.inner.model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.inner.training_step(batch, batch_idx)

    def on_train_batch_end(self, *_: Any) -> None:
        routed = [list(load) for load in self.inner.routed]
        self.inner.trace.append((self.trainer.global_step, routed, self.inner.biases()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


class TestPytorchLightningPackage:
    def test_works_in_its_trainer(self, tmp_path):
        module = PytorchLightningMoE()
        callback = AuxFreeBalanceCallback(RATE)
        trainer = make_trainer(callback, cls=pytorch_lightning.Trainer)
        trainer.fit(module, data(8))
        assert_follows_the_rule(module.inner, RATE, num_updates=4)
        assert trainer.callback_metrics["moe/max_violation"] > 0
        trainer.save_checkpoint(tmp_path / "last.ckpt")

        resumed = AuxFreeBalanceCallback(RATE)
        trainer = make_trainer(resumed, cls=pytorch_lightning.Trainer, max_epochs=2)
        trainer.fit(PytorchLightningMoE(), data(8), ckpt_path=tmp_path / "last.ckpt")
        assert resumed.tokens_seen == 2 * 8 * 7
