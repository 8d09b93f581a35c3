"""`pytorch_lightning.Trainer`: its own classes of ours, the same steps as with `lightning.Trainer`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning as L
import pytest
import pytorch_lightning
import torch
from pytorch_lightning.utilities.model_helpers import is_overridden
from tiny_run import RATE, assert_same, quiet_trainer, tiny_data, tiny_module

import lightning_dsv3.callbacks
import lightning_dsv3.pytorch_lightning

OURS: dict[str, tuple[ModuleType, ModuleType, type]] = {
    "lightning": (lightning_dsv3, lightning_dsv3.callbacks, L.Trainer),
    "pytorch_lightning": (
        lightning_dsv3.pytorch_lightning,
        lightning_dsv3.pytorch_lightning,
        pytorch_lightning.Trainer,
    ),
}


def fit(which: str, steps: int, ckpt_path: Path | None = None) -> tuple[Any, Any, Any]:
    package, callbacks, trainer_class = OURS[which]
    module, data = tiny_module(package), tiny_data(package)
    callbacks = [callbacks.AuxFreeBalanceCallback(RATE), callbacks.ExpertLoadMonitor()]
    trainer = quiet_trainer(*callbacks, trainer_class=trainer_class, max_steps=steps)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer, module, data


@pytest.fixture(scope="module")
def lightning_run() -> tuple[Any, Any, Any]:
    return fit("lightning", 4)


@pytest.fixture(scope="module")
def other_run() -> tuple[Any, Any, Any]:
    return fit("pytorch_lightning", 4)


def test_training_gives_the_same_bits(lightning_run: Any, other_run: Any) -> None:
    assert isinstance(other_run[1], pytorch_lightning.LightningModule)
    assert not isinstance(other_run[1], L.LightningModule)
    assert_same(other_run[1].state_dict(), lightning_run[1].state_dict())
    assert other_run[1].tokens_seen == lightning_run[1].tokens_seen
    assert any(bias.abs().max() > 0 for name, bias in other_run[1].state_dict().items() if name.endswith("bias"))


def test_validate_test_and_predict_say_the_same(lightning_run: Any, other_run: Any) -> None:
    results = []
    for trainer, module, data in (lightning_run, other_run):
        measured = [trainer.validate(module, data, verbose=False), trainer.test(module, data, verbose=False)]
        results.append((measured, trainer.predict(module, data)))
    assert results[0][0] == results[1][0]
    assert results[0][0][0][0]["val/moe/max_violation"] > 0
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("writer", OURS)
@pytest.mark.parametrize("reader", OURS)
def test_each_resumes_and_rebuilds_what_either_has_saved(
    reader: str, writer: str, lightning_run: Any, tmp_path: Path
) -> None:
    trainer, half, _ = fit(writer, 2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    rebuilt = OURS[reader][0].DeepSeekV3Module.load_from_checkpoint(tmp_path / "half.ckpt")
    assert_same(rebuilt.state_dict(), half.state_dict())
    assert_same(fit(reader, 4, tmp_path / "half.ckpt")[1].state_dict(), lightning_run[1].state_dict())


def test_only_what_we_override_counts_as_overridden() -> None:
    # Each package compares a hook with its own default. One that is the other package's default would be called.
    module, data = tiny_module(lightning_dsv3.pytorch_lightning), tiny_data(lightning_dsv3.pytorch_lightning)
    assert is_overridden("predict_step", module)
    for name in ("configure_model", "train_dataloader", "on_validation_model_eval", "optimizer_step"):
        assert not is_overridden(name, module), name
    assert is_overridden("predict_dataloader", data)
    assert not is_overridden("on_after_batch_transfer", data)


def test_a_callback_alone_needs_no_list() -> None:
    callback = lightning_dsv3.pytorch_lightning.AuxFreeBalanceCallback()
    trainer = pytorch_lightning.Trainer(callbacks=callback, logger=False, enable_checkpointing=False)
    assert callback in trainer.callbacks
    assert callback.state_key == lightning_dsv3.callbacks.AuxFreeBalanceCallback().state_key


def test_the_package_does_not_load_the_other_trainer() -> None:
    program = (
        "import sys, lightning_dsv3; from lightning_dsv3 import DeepSeekV3Module; import lightning_dsv3.callbacks;"
        "print([name for name in sys.modules if 'pytorch_lightning' in name])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_plain_module_is_refused_by_the_other_trainer() -> None:
    # What the classes here are for: if this changes, they have had their day.
    with pytest.raises(TypeError, match="must be a `LightningModule`"):
        quiet_trainer(trainer_class=pytorch_lightning.Trainer).fit(tiny_module(), torch.zeros(1))
