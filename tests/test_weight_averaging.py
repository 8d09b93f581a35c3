"""EMA and SWA of Lightning beside the callback: the weights are averaged, the routing bias is always the live one.

A run with averaging is held against the same run without it, which training does not feel.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from tiny_run import assert_same, balance, biases, differ, quiet_trainer, tiny_data, tiny_module, weights
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import lightning_dsv3.pytorch_lightning
from lightning_dsv3.balance import averaged_copies, copy_biases, find_routers
from lightning_dsv3.callbacks import AuxFreeBalanceCallback

STEPS = 5


class Recorder(Callback):
    """Keep bias and weights at the end of each step, and those that validation saw."""

    def __init__(self) -> None:
        self.trained: dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
        self.validated: dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.trained[trainer.global_step] = biases(pl_module), weights(pl_module)

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.validated[trainer.global_step] = biases(pl_module), weights(pl_module)


def fit(*callbacks: Any, **arguments: Any) -> tuple[nn.Module, Recorder]:
    module, recorder = tiny_module(), Recorder()
    ckpt_path = arguments.pop("ckpt_path", None)
    defaults = {"max_steps": STEPS, "val_check_interval": 2, "limit_val_batches": 1}
    trainer = quiet_trainer(*callbacks, recorder, **(defaults | arguments))
    trainer.fit(module, tiny_data(), ckpt_path=ckpt_path)
    return module, recorder


@pytest.fixture(scope="module")
def plain() -> Recorder:
    """The run without averaging."""
    _, recorder = fit(balance())
    return recorder


def ordered(averaging: Any, first: str) -> list[Any]:
    return [averaging, balance()] if first == "averaging" else [balance(), averaging]


def every_step(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


def doubling(averaged: Tensor, current: Tensor, num_averaged: Tensor) -> Tensor:
    """An averaging function that does not even leave equal values alone."""
    return averaged + current


class AtEpochEnds(WeightAveraging):
    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return epoch_idx is not None


AVERAGING = {
    "ema": lambda: EMAWeightAveraging(decay=0.5),
    "ema, parameters alone": lambda: EMAWeightAveraging(decay=0.5, use_buffers=False),
    "ema, late": lambda: EMAWeightAveraging(decay=0.5, update_starting_at_step=2),
    "mean, device given": lambda: WeightAveraging(device="cpu"),
    "any function": lambda: WeightAveraging(avg_fn=doubling),
    "any function, at epoch ends": lambda: AtEpochEnds(avg_fn=doubling),
}
# Two batches per epoch, so that what averages at its end does so more than once.
EPOCHS = {"limit_train_batches": 2}


@pytest.mark.parametrize("first", ["averaging", "balance"])
@pytest.mark.parametrize("kind", AVERAGING)
def test_averaged_weights_are_validated_and_end_with_the_bias_as_it_is(kind: str, first: str, plain: Recorder) -> None:
    module, recorder = fit(*ordered(AVERAGING[kind](), first), **EPOCHS)
    for step, (bias, trained) in plain.trained.items():
        assert_same(recorder.trained[step][0], bias)
        assert_same(recorder.trained[step][1], trained)
    assert sorted(recorder.validated) == [2, 4]
    for step, (bias, validated) in recorder.validated.items():
        assert_same(bias, plain.trained[step][0])
        assert differ(validated, plain.trained[step][1])
    last_bias, last_weights = plain.trained[STEPS]
    assert_same(biases(module), last_bias)
    assert differ(weights(module), last_weights)
    assert any(bias.abs().max() > 0 for bias in last_bias.values())


@pytest.mark.parametrize("first", ["averaging", "balance"])
@pytest.mark.parametrize("kind", ["ema", "ema, parameters alone", "any function"])
def test_checkpoints_hold_averaged_weights_with_the_bias_as_it_is(
    kind: str, first: str, plain: Recorder, tmp_path: Path
) -> None:
    fit(*ordered(AVERAGING[kind](), first), every_step(tmp_path), enable_checkpointing=True)
    for step, (bias, trained) in plain.trained.items():
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        for state in (saved["state_dict"], saved["current_model_state"]):
            assert_same({path: state[f"{path}.bias"] for path in bias}, bias)
        assert_same({name: saved["current_model_state"][name] for name in trained}, trained)


@pytest.mark.parametrize("first", ["averaging", "balance"])
@pytest.mark.parametrize("use_buffers", [True, False])
def test_a_resumed_run_is_the_unbroken_one(first: str, use_buffers: bool, tmp_path: Path) -> None:
    def run(steps: int, ckpt_path: Path | None = None) -> dict[str, Any]:
        averaging = EMAWeightAveraging(decay=0.5, use_buffers=use_buffers)
        fit(
            *ordered(averaging, first),
            every_step(tmp_path),
            max_steps=steps,
            ckpt_path=ckpt_path,
            enable_checkpointing=True,
        )
        return torch.load(tmp_path / f"step={steps}.ckpt", weights_only=True)

    unbroken = run(STEPS)
    run(2)
    resumed = run(STEPS, tmp_path / "step=2.ckpt")
    for part in ("state_dict", "current_model_state", "averaging_state"):
        assert_same(resumed[part], unbroken[part])


@pytest.mark.parametrize("first", ["averaging", "balance"])
def test_a_checkpoint_with_an_averaged_bias_is_put_right(first: str, plain: Recorder, tmp_path: Path) -> None:
    # Such as a run without the care of this callback has left behind.
    fit(EMAWeightAveraging(), balance(), every_step(tmp_path), max_steps=3, enable_checkpointing=True)
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    for name in saved["state_dict"]:
        if name.endswith("router.bias"):
            saved["state_dict"][name] += 7
    torch.save(saved, tmp_path / "wrong.ckpt")
    module, recorder = fit(
        *ordered(EMAWeightAveraging(update_every_n_steps=9), first), ckpt_path=tmp_path / "wrong.ckpt"
    )
    assert_same(recorder.validated[4][0], plain.trained[4][0])
    assert_same(biases(module), plain.trained[STEPS][0])


@pytest.mark.parametrize("first", ["averaging", "balance"])
def test_a_checkpoint_of_a_failed_run_has_the_bias(first: str, plain: Recorder, tmp_path: Path) -> None:
    class Fails(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                raise RuntimeError("power cut")

    saves = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(*ordered(EMAWeightAveraging(), first), Fails(), saves, enable_checkpointing=True)
    state = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)["state_dict"]
    bias, _ = plain.trained[3]
    assert_same({path: state[f"{path}.bias"] for path in bias}, bias)


def test_stochastic_weight_averaging_leaves_the_bias_alone(tmp_path: Path) -> None:
    # It works by epochs and averages parameters; the module's own schedule still sets the learning rate.
    def run(*callbacks: Any) -> nn.Module:
        epochs = {"max_steps": -1, "max_epochs": 3, "limit_train_batches": 2, "val_check_interval": 1.0}
        return fit(balance(), *callbacks, **epochs)[0]

    plain, averaged = run(), run(StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1))
    assert_same(biases(averaged), biases(plain))
    assert differ(weights(averaged), weights(plain))


def test_pytorch_lightnings_averaging_gets_the_bias_too(plain: Recorder) -> None:
    package = lightning_dsv3.pytorch_lightning
    averaging = pytorch_lightning.callbacks.EMAWeightAveraging(decay=0.5)
    trainer = quiet_trainer(
        averaging, balance(), trainer_class=pytorch_lightning.Trainer, max_steps=STEPS, limit_val_batches=0
    )
    module = tiny_module(package)
    trainer.fit(module, tiny_data(package))
    assert_same(biases(module), plain.trained[STEPS][0])
    assert differ(weights(module), plain.trained[STEPS][1])


def test_measuring_alone_writes_no_bias() -> None:
    measuring = AuxFreeBalanceCallback(dry_run=True)
    module = tiny_module(balance=["sequence"])
    averaging = EMAWeightAveraging(use_buffers=False)
    quiet_trainer(averaging, measuring, limit_val_batches=0).fit(module, tiny_data())
    (copy,) = averaged_copies([averaging])
    for router in find_routers(copy):
        router.bias.fill_(5.0)
    measuring.on_save_checkpoint(module.trainer, module, {})
    assert all((bias == 5.0).all() for bias in biases(copy).values())


def test_a_copy_of_a_part_gets_the_bias_by_layer() -> None:
    module = tiny_module()
    for router in find_routers(module):
        router.bias.uniform_(generator=torch.Generator().manual_seed(len(router.name)))
    part = AveragedModel(module.model)
    copy_biases(find_routers(module), part.module)
    assert list(biases(part.module).values()) != []
    for copied, live in zip(biases(part.module).values(), biases(module).values(), strict=True):
        assert torch.equal(copied, live)
