"""Lightning as its users expect: every stage, checkpoints by metric, accumulation, clipping, every precision.

More of it: averaging in test_weight_averaging.py, loggers in test_loggers.py, the command line in
test_lightning_cli.py, the other package in test_pytorch_lightning.py, steps and resume in test_module.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from tiny_run import LENGTH, assert_same, balance, biases, quiet_trainer, tiny_data, tiny_module, weights
from torch.utils.data import DataLoader

from lightning_dsv3 import DeepSeekV3Module
from lightning_dsv3.balance import find_routers

PRECISIONS = ["32-true", "bf16-mixed", "bf16-true"]


@pytest.fixture(scope="module")
def trained() -> tuple[Any, Any, Any]:
    trainer, module, data = quiet_trainer(balance(), limit_val_batches=1), tiny_module(), tiny_data()
    trainer.fit(module, data)
    return trainer, module, data


class TestStages:
    def test_validate_and_test_measure_their_own_split(self, trained: Any) -> None:
        _, module, data = trained
        (val,) = quiet_trainer().validate(module, data, verbose=False)
        (test,) = quiet_trainer().test(module, data, verbose=False)
        for stage, measured in (("val", val), ("test", test)):
            names = ("loss", "mtp_loss", "mtp_acceptance/1", "mtp_acceptance_sampled/1", "bpb", "prose/bpb", "code/bpb")
            keys = {f"{stage}/{name}" for name in names}
            assert measured.keys() == keys
            mean = (measured[f"{stage}/prose/bpb"] + measured[f"{stage}/code/bpb"]) / 2
            assert measured[f"{stage}/bpb"] == pytest.approx(mean)
        assert val["val/bpb"] != test["test/bpb"]

    def test_predictions_are_the_models_own(self, trained: Any) -> None:
        _, module, data = trained
        predictions = quiet_trainer().predict(module, data)
        batches = list(data.predict_dataloader())
        assert len(predictions) == len(batches) > 1
        for prediction, batch in zip(predictions, batches, strict=True):
            with torch.no_grad():
                output = module.model(batch["input_ids"], labels=batch["labels"])
            assert (prediction["token_losses"].dtype, prediction["predicted"].dtype) == (torch.float32, torch.int64)
            torch.testing.assert_close(prediction["token_losses"], output.token_losses, rtol=1e-4, atol=1e-5)
            assert torch.equal(prediction["predicted"], output.logits.argmax(-1))
            assert torch.equal(prediction["domain"], batch["domain"])

    def test_predicted_losses_are_those_of_the_test(self, trained: Any) -> None:
        _, module, data = trained
        (test,) = quiet_trainer().test(module, data, verbose=False)
        predictions = quiet_trainer().predict(module, data)
        targets = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in data.test_dataloader())
        total = sum(prediction["token_losses"].double().sum() for prediction in predictions)
        assert float(total) / targets == pytest.approx(test["test/loss"], rel=1e-5)

    def test_ids_alone_are_predicted_too(self, trained: Any) -> None:
        _, module, _ = trained
        ids = torch.randint(0, 300, (5, 9))
        loader = DataLoader([{"input_ids": row} for row in ids], batch_size=2)
        predictions = quiet_trainer().predict(module, loader)
        assert [len(prediction["predicted"]) for prediction in predictions] == [2, 2, 1]
        assert predictions[0].keys() == {"token_losses", "predicted"}
        losses = torch.cat([prediction["token_losses"] for prediction in predictions])
        assert (losses[:, -1] == 0).all()
        assert (losses[:, :-1] > 0).all()

    def test_one_rows_logits_at_a_time(self, trained: Any) -> None:
        _, module, _ = trained
        sizes: list[int] = []
        handle = module.model.head.register_forward_hook(lambda head, args, logits: sizes.append(logits.numel()))
        module.predict_step({"input_ids": torch.randint(0, 300, (5, 9))}, 0)
        handle.remove()
        assert sizes == [9 * 300] * 5


def test_a_checkpoint_alone_rebuilds_the_module(trained: Any, tmp_path: Path) -> None:
    trainer, module, data = trained
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    rebuilt = DeepSeekV3Module.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert_same(DeepSeekV3Module.load_from_checkpoint(tmp_path / "a.ckpt").state_dict(), module.state_dict())
    assert rebuilt.hparams == module.hparams
    before, after = (quiet_trainer().validate(m, data, verbose=False) for m in (module, rebuilt))
    assert before == after
    assert quiet_trainer().validate(tiny_module(), data, verbose=False, ckpt_path=tmp_path / "a.ckpt") == before


# Validation at every step. Without the second, Lightning takes an interval of 1 for the 1.0 of a whole epoch.
EVERY_STEP = {"val_check_interval": 1, "check_val_every_n_epoch": None}


class Watched(Callback):
    """Keep a metric of every validation."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.values: dict[int, float] = {}

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.values[trainer.global_step] = float(trainer.callback_metrics[self.key])


def rising_and_falling() -> list[dict[str, Any]]:
    """A learning rate that learns for three steps and then throws the weights about."""
    step = 4 * LENGTH
    return [{"until": 3 * step, "value": 1e-2}, {"until": 9 * step, "value": 3.0}]


def test_the_best_checkpoint_by_bits_per_byte_is_kept(tmp_path: Path) -> None:
    watched = Watched("val/bpb")
    best = ModelCheckpoint(tmp_path, monitor="val/bpb", mode="min", save_top_k=1, filename="{step}")
    trainer = quiet_trainer(balance(), watched, best, max_steps=6, enable_checkpointing=True, **EVERY_STEP)
    module = tiny_module(learning_rate=rising_and_falling())
    trainer.fit(module, tiny_data())
    step = min(watched.values, key=watched.values.__getitem__)
    assert 1 < step < 6
    assert [path.name for path in tmp_path.iterdir()] == [f"step={step}.ckpt"]
    assert float(best.best_model_score) == watched.values[step]
    (again,) = trainer.validate(module, tiny_data(), ckpt_path="best", verbose=False)
    assert again["val/bpb"] == pytest.approx(watched.values[step], rel=1e-6)


def test_early_stopping_ends_the_run_after_the_best_loss() -> None:
    watched = Watched("val/loss")
    stopping = EarlyStopping("val/loss", mode="min", patience=2)
    trainer = quiet_trainer(balance(), watched, stopping, max_steps=20, **EVERY_STEP)
    trainer.fit(tiny_module(learning_rate=rising_and_falling()), tiny_data())
    step = min(watched.values, key=watched.values.__getitem__)
    assert trainer.global_step == step + 2 < 20
    assert float(stopping.best_score) == watched.values[step]


def test_accumulated_micro_batches_are_one_batch() -> None:
    states = []
    for accumulate in (1, 2):
        module = tiny_module()
        trainer = quiet_trainer(balance(), accumulate_grad_batches=accumulate, limit_val_batches=0)
        trainer.fit(module, tiny_data())
        assert (trainer.global_step, module.tokens_seen) == (3, 3 * 4 * LENGTH)
        states.append((weights(module), biases(module)))
    assert_same(states[0][1], states[1][1])
    for name, tensor in states[0][0].items():
        torch.testing.assert_close(tensor, states[1][0][name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients_are_clipped(precision: str) -> None:
    class Norms(Callback):
        def __init__(self) -> None:
            self.before: list[float] = []
            self.after: list[float] = []

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            self.before.append(self.norm(pl_module))

        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            self.after.append(self.norm(pl_module))

        @staticmethod
        def norm(module: Any) -> float:
            norms = [p.grad.float().norm() for p in module.parameters() if p.grad is not None]
            return float(torch.stack(norms).norm()) if norms else 0.0

    norms = Norms()
    trainer = quiet_trainer(balance(), norms, gradient_clip_val=0.05, precision=precision, limit_val_batches=0)
    trainer.fit(tiny_module(), tiny_data())
    assert min(norms.before) > 0.1
    # Seen where the next step throws the gradients away; the first has none before it.
    assert norms.after == pytest.approx([0.0, 0.05, 0.05], rel=0.02)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_trains_measures_and_keeps_the_bias(precision: str, tmp_path: Path) -> None:
    module, data = tiny_module(), tiny_data()
    trainer = quiet_trainer(balance(), precision=precision, limit_val_batches=2)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    stored = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert saved["model.head.weight"].dtype == stored
    for router in find_routers(module):
        assert router.bias.dtype == saved[f"{router.path}.bias"].dtype == torch.float32
        assert router.bias.abs().max() > 0
    (measured,) = trainer.validate(module, data, verbose=False)
    (tested,) = trainer.test(module, data, verbose=False)
    assert 0 < measured["val/bpb"] < 20
    assert 0 < tested["test/bpb"] < 20
    (prediction, *_) = trainer.predict(module, data)
    assert prediction["token_losses"].dtype == torch.float32
    rebuilt = DeepSeekV3Module.load_from_checkpoint(tmp_path / "a.ckpt")
    assert_same(biases(rebuilt), biases(module))
