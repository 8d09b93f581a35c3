"""`trainer.precision=fp8-block`: whole runs on a CPU."""

from __future__ import annotations

import copy
import runpy
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import pytorch_lightning
import torch
from conftest import ROOT
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins import MixedPrecision
from tiny_run import SHAPE, assert_same, differ, quiet_trainer, tiny_data

import lightning_dsv3.pytorch_lightning
from lightning_dsv3 import DeepSeekV3Config, DeepSeekV3Module
from lightning_dsv3.callbacks import AuxFreeBalanceCallback
from lightning_dsv3.cli.trainer_arguments import trainer_arguments
from lightning_dsv3.config import ConfigError
from lightning_dsv3.parallel.fp8 import convert_to_fp8, is_fp8
from lightning_dsv3.precision import FP8BlockPrecision

FITTING = SHAPE | {"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}


class Losses(L.Callback):
    """Keeps every training loss, and what computed it."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.in_fp8: set[str] = set()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.values.append(float(outputs["loss"].detach()))
        self.in_fp8 |= {name for name, part in module.named_modules() if is_fp8(part)}


def fitting_module(package: Any = lightning_dsv3) -> Any:
    torch.manual_seed(0)
    config = DeepSeekV3Config.from_preset("tiny", **FITTING)
    return package.DeepSeekV3Module(config, learning_rate=1e-2)


def fit(plugin: Any, steps: int = 4, ckpt_path: Path | None = None, **arguments: Any) -> tuple[Any, Any, Losses]:
    losses, module = Losses(), fitting_module()
    plugins = {"plugins": [plugin]} if plugin is not None else {}
    trainer = quiet_trainer(AuxFreeBalanceCallback(0.01), losses, max_steps=steps, **plugins, **arguments)
    trainer.fit(module, tiny_data(), ckpt_path=ckpt_path)
    return trainer, module, losses


@pytest.fixture(scope="module")
def run() -> tuple[Any, Any, Losses]:
    return fit(FP8BlockPrecision(), 4)


def test_a_run_learns_as_one_in_bf16():
    def curve(plugin: Any) -> torch.Tensor:
        trainer = quiet_trainer(losses := Losses(), max_steps=16, max_epochs=-1, plugins=[plugin])
        trainer.fit(fitting_module(), tiny_data())
        return torch.tensor(losses.values)

    fp8, bf16 = curve(FP8BlockPrecision()), curve(MixedPrecision("bf16-mixed", "cpu"))
    assert fp8[:3].mean() - fp8[-5:].mean() > 2
    # The first losses come from the same weights; later ones are two different runs that learn as fast.
    assert 0 < (fp8[0] - bf16[0]).abs() < 0.01 * bf16[0]
    assert (fp8[-5:].mean() - bf16[-5:].mean()).abs() < 0.02 * bf16[-5:].mean()


def test_products_are_fp8_while_the_trainer_works_and_plain_afterwards(run):
    trainer, module, losses = run
    assert losses.in_fp8 == set(trainer.precision_plugin.conversion.converted)
    assert "model.blocks.1.feed_forward.experts" in losses.in_fp8
    assert not any(map(is_fp8, module.modules()))
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert trainer.precision == "fp8-block"


def test_it_is_bf16_mixed_with_converted_modules():
    _, module, losses = fit(FP8BlockPrecision(), 1)
    by_hand = fitting_module()
    conversion = convert_to_fp8(by_hand)
    assert set(conversion.converted) == losses.in_fp8
    trainer = quiet_trainer(max_steps=1, plugins=[MixedPrecision("bf16-mixed", "cpu")])
    trainer.fit(by_hand, tiny_data())
    # Lightning's bf16-mixed gives the same but for AdamW, which is not fused there.
    for name, tensor in module.state_dict().items():
        if not name.endswith("bias"):
            torch.testing.assert_close(by_hand.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def test_validation_computes_as_training_does(run):
    trainer, module, _ = run
    (ours,) = trainer.validate(module, tiny_data(), verbose=False)
    (bf16,) = quiet_trainer(plugins=[MixedPrecision("bf16-mixed", "cpu")]).validate(module, tiny_data(), verbose=False)
    assert 0 < abs(ours["val/loss"] - bf16["val/loss"]) < 0.05 * bf16["val/loss"]
    assert not any(map(is_fp8, module.modules()))


def test_what_was_converted_by_hand_stays():
    module = fitting_module()
    by_hand = set(convert_to_fp8(module, include=["*.experts"]).converted)
    trainer = quiet_trainer(losses := Losses(), max_steps=1, plugins=[FP8BlockPrecision()])
    trainer.fit(module, tiny_data())
    assert by_hand < losses.in_fp8
    assert {name for name, part in module.named_modules() if is_fp8(part)} == by_hand


def test_the_list_is_told_once(caplog):
    plugin = FP8BlockPrecision(exclude=["*.kv_up"])
    with caplog.at_level("INFO"):
        trainer, module, _ = fit(plugin, 1)
        trainer.validate(module, tiny_data(), verbose=False)
    told = [record.getMessage() for record in caplog.records if "FP8" in record.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("FP8 products (emulate, as te: ")
    for line in ("model.blocks.*.attention.kv_down (2)", "model.blocks.*.attention.kv_up (2): excluded", "output head"):
        assert line in told[0]


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("half") / "half.ckpt"
    trainer, *_ = fit(FP8BlockPrecision(), 2)
    trainer.save_checkpoint(path)
    return path


class TestCheckpoint:
    def test_resume_is_exact(self, run, half):
        _, resumed, losses = fit(FP8BlockPrecision(), 4, half)
        assert_same(resumed.state_dict(), run[1].state_dict())
        assert losses.values == run[2].values[2:]

    def test_it_holds_the_list_and_loads_with_weights_only(self, run, half):
        state = torch.load(half, weights_only=True)["FP8BlockPrecision"]
        assert state == {"converted": list(run[0].precision_plugin.conversion.converted), "pow2_scales": True}

    def test_it_loads_without_fp8(self, half):
        rebuilt = DeepSeekV3Module.load_from_checkpoint(half)
        assert not any(map(is_fp8, rebuilt.modules()))
        plain = torch.load(half, weights_only=True)["state_dict"]
        assert_same(rebuilt.state_dict(), plain)
        assert list(plain) == list(fitting_module().state_dict())
        _, resumed, _ = fit(None, 4, half)  # an FP8 run goes on in float32
        assert not any(map(is_fp8, resumed.modules()))

    @pytest.mark.parametrize(
        ("plugin", "message"),
        [
            (FP8BlockPrecision(exclude=["*.kv_up"]), r"computed model.blocks.0.attention.kv_up and 2 more in FP8 that"),
            (FP8BlockPrecision(include=["*.experts"]), "and this one nothing that it did not; give include= and exclu"),
            (FP8BlockPrecision(pow2_scales=False), "pow2_scales=False.*the checkpoint's run had True"),
        ],
        ids=["exclude", "include", "scales"],
    )
    def test_resuming_with_another_list_is_an_error(self, half, plugin, message):
        with pytest.raises(ConfigError, match=message):
            fit(plugin, 4, half)

    def test_going_over_to_fp8_is_said(self, tmp_path):
        trainer, *_ = fit(None, 2)
        trainer.save_checkpoint(tmp_path / "plain.ckpt")
        with pytest.warns(UserWarning, match="did not compute in FP8; from here on"):
            _, _, losses = fit(FP8BlockPrecision(), 3, tmp_path / "plain.ckpt")
        assert losses.in_fp8


def test_pytorch_lightning_gives_the_same_bits(run):
    theirs = lightning_dsv3.pytorch_lightning
    module = fitting_module(theirs)
    trainer = quiet_trainer(
        theirs.AuxFreeBalanceCallback(0.01), trainer_class=pytorch_lightning.Trainer, max_steps=4,
        plugins=[theirs.FP8BlockPrecision()],
    )  # fmt: skip
    trainer.fit(module, tiny_data(theirs))
    assert_same(module.state_dict(), run[1].state_dict())
    assert trainer.precision_plugin.conversion == run[0].precision_plugin.conversion


def test_scales_that_are_no_powers_of_two_train_otherwise(run):
    _, module, _ = fit(FP8BlockPrecision(pow2_scales=False), 4)
    assert differ(module.state_dict(), run[1].state_dict())


def test_accumulation_and_clipping_work():
    _, module, losses = fit(FP8BlockPrecision(), 2, accumulate_grad_batches=2, gradient_clip_val=0.1)
    assert len(losses.values) == 4
    assert differ(module.state_dict(), fitting_module().state_dict())


@pytest.mark.parametrize("plugin", [FP8BlockPrecision("te"), FP8BlockPrecision(include=["x"])], ids=["te", "include"])
def test_what_cannot_be_converted_ends_the_run_before_it_begins(plugin):
    with pytest.raises(ConfigError, match="of FP8"):
        fit(plugin, 1)


class TestConfiguration:
    def test_the_word_becomes_a_plugin(self):
        arguments = trainer_arguments({"max_steps": 3}, {"precision": "fp8-block"})
        (plugin,) = arguments.pop("plugins")
        assert isinstance(plugin, FP8BlockPrecision)
        assert arguments == {"max_steps": 3}

    def test_the_launcher_s_word_too_and_the_script_s_plugins_stay(self, monkeypatch):
        monkeypatch.setenv("LT_CLI_USED", "1")
        monkeypatch.setenv("LT_PRECISION", "fp8-block")
        script = {"plugins": ["one"]}
        arguments = trainer_arguments(copy.deepcopy(script), {"precision": "32-true"})
        assert arguments["plugins"][0] == "one"
        assert isinstance(arguments["plugins"][1], FP8BlockPrecision)
        assert script == {"plugins": ["one"]}

    def test_other_precisions_are_the_trainer_s_matter(self):
        assert trainer_arguments({}, {"precision": "bf16-mixed"}) == {"precision": "bf16-mixed"}
        with pytest.raises((ValueError, MisconfigurationException), match="fp8-blocks"):
            L.Trainer(**trainer_arguments({}, {"precision": "fp8-blocks"}), logger=False)

    def test_the_example_trains_and_resumes(self, tmp_path, monkeypatch, caplog):
        (tmp_path / "songs.txt").write_text("The old songs are sung at the gate. " * 200)
        (tmp_path / "tales.txt").write_text("And nobody knows who wrote them down. " * 200)
        words = [
            "data.sources=[{domain: prose, kind: text, path: '*.txt'}]", "data.val_windows=1",
            "trainer.precision=fp8-block", "trainer.accelerator=cpu", "train.sequence_length=32", "train.batch_size=4",
            "train.validate_every_steps=2", "model.hidden_size=32", "model.intermediate_size=48",
            "model.moe_intermediate_size=16", "model.num_hidden_layers=2", "model.n_routed_experts=8",
        ]  # fmt: skip
        monkeypatch.chdir(tmp_path)

        def example(*more: str) -> dict[str, Any]:
            monkeypatch.setattr(sys, "argv", ["train.py", *words, *more])
            runpy.run_path(str(ROOT / "examples" / "train.py"), run_name="__main__")
            newest = max((tmp_path / "runs").glob("*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
            loaded: dict[str, Any] = torch.load(newest, weights_only=True)
            return loaded

        with caplog.at_level("INFO"):
            first = example("trainer.max_steps=2")
        assert caplog.text.count("FP8 products (emulate, as te: ") == 1  # though it validates at the end as well
        assert "model.blocks.0.attention.output" in first["FP8BlockPrecision"]["converted"]
        (folder,) = (tmp_path / "runs").iterdir()
        second = example("trainer.max_steps=3", f"resume={folder}")
        assert (first["global_step"], second["global_step"]) == (2, 3)
        assert second["FP8BlockPrecision"] == first["FP8BlockPrecision"]
