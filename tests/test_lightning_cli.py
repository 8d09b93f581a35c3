"""LightningCLI: typed constructors that its command line and its files can fill in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning.cli
import yaml
from lightning.pytorch.cli import LightningCLI
from tiny_run import SHAPE, TEXTS

import lightning_dsv3.pytorch_lightning
from lightning_dsv3 import DeepSeekV3DataModule, DeepSeekV3Module
from lightning_dsv3.callbacks import AuxFreeBalanceCallback
from lightning_dsv3.config import DeepSeekV3Config, Mark, Schedule

PROGRAM = """
from lightning.pytorch.cli import LightningCLI
from lightning_dsv3 import DeepSeekV3DataModule, DeepSeekV3Module
LightningCLI(DeepSeekV3Module, DeepSeekV3DataModule)
"""
CALLBACK = "--trainer.callbacks+=lightning_dsv3.callbacks.AuxFreeBalanceCallback"


def cli(*words: str) -> LightningCLI:
    return LightningCLI(DeepSeekV3Module, DeepSeekV3DataModule, run=False, args=list(words), save_config_callback=None)


def quiet(folder: Path) -> list[str]:
    settings = {"accelerator": "cpu", "logger": "false", "enable_progress_bar": "false", "max_steps": "2"}
    settings |= {"num_sanity_val_steps": "0", "default_root_dir": str(folder)}
    return [f"--trainer.{key}={value}" for key, value in settings.items()]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Words for a model from a file and data from another, two steps."""
    model, text = tmp_path / "model.yaml", tmp_path / "text.jsonl"
    model.write_text(yaml.safe_dump(DeepSeekV3Config.from_preset("tiny", **SHAPE).to_dict()))
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in TEXTS["prose"]))
    sources = f"[{{domain: prose, kind: jsonl, path: {text}}}]"
    data = [f"--data.config.sources={sources}", "--data.vocab_size=300", "--data.sequence_length=24"]
    return [f"--model.config={model}", *data, "--data.batch_size=4"]


def test_a_preset_by_name_with_values_of_every_kind() -> None:
    built = cli(
        "--model.config=tiny",
        "--model.balance=[aux_free,sequence]",
        "--model.balance_args={sequence: {alpha: 0.01}}",
        "--model.learning_rate=1e-3",
        "--model.mtp_loss_weight=[{until: 100, value: 0.3}, {until: 900, value: 0.1, shape: linear}]",
        "--model.optimizer={weight_decay: 0.2}",
        "--data.batch_size=4",
        "--data.vocab_size=8192",
        "--data.config.weights={english: 0.5, code: 0.5}",
        CALLBACK,
        "--trainer.callbacks.update_rate=0.01",
        "--trainer.accelerator=cpu",
    )
    assert built.model.model.config == DeepSeekV3Config.from_preset("tiny")
    assert built.model.balance == ("aux_free", "sequence")
    assert built.model.balance_args.sequence.alpha == 0.01
    assert built.model.learning_rate == Schedule.constant(1e-3)
    assert built.model.mtp_loss_weight == Schedule([Mark(100, 0.3), Mark(900, 0.1, "linear")])
    assert built.model.optimizer_config.weight_decay == 0.2
    assert built.datamodule.batch_size == 4
    assert built.datamodule.weights == {"english": 0.5, "code": 0.5}
    (callback,) = [c for c in built.trainer.callbacks if isinstance(c, AuxFreeBalanceCallback)]
    assert callback.update_rate == 0.01


def test_two_steps_from_files(files: list[str], tmp_path: Path) -> None:
    built = cli(*files, CALLBACK, "--model.learning_rate=1e-2", *quiet(tmp_path))
    built.trainer.fit(built.model, built.datamodule)
    assert built.model.tokens_seen == 2 * 4 * 24
    assert built.model.model.config.hidden_size == SHAPE["hidden_size"]
    (measured,) = built.trainer.validate(built.model, built.datamodule, verbose=False)
    assert measured["val/prose/bpb"] > 0
    assert max(bias.abs().max() for name, bias in built.model.state_dict().items() if name.endswith("bias")) > 0


def test_a_wrong_value_is_refused_with_its_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli("--model.config=tiny", "--model.learning_rate=fast")
    assert "learning_rate" in capsys.readouterr().err


def test_the_printed_configuration_reads_back_and_trains(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    schedule = [{"until": 96.0, "value": 0.3, "shape": "linear"}, {"until": 900.0, "value": 0.1, "shape": "constant"}]
    words = [*files, CALLBACK, *quiet(tmp_path), "--model.learning_rate=1e-2", "--print_config"]
    words.append(f"--model.mtp_loss_weight={json.dumps(schedule)}")
    command = [sys.executable, "-c", PROGRAM, "fit", *words]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    values: dict[str, Any] = yaml.safe_load(result.stdout)
    assert values["model"]["config"]["hidden_size"] == SHAPE["hidden_size"]
    assert (values["model"]["learning_rate"], values["model"]["mtp_loss_weight"]) == (0.01, schedule)

    Path("printed.yaml").write_text(result.stdout)
    with pytest.raises(SystemExit):
        LightningCLI(DeepSeekV3Module, DeepSeekV3DataModule, args=["fit", "--config=printed.yaml", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out) == values
    trained = LightningCLI(DeepSeekV3Module, DeepSeekV3DataModule, args=["fit", "--config=printed.yaml"])
    assert trained.trainer.global_step == 2
    # Lightning keeps the configuration beside the checkpoint.
    assert yaml.safe_load(Path("config.yaml").read_text())["model"] == values["model"]
    assert DeepSeekV3Module.load_from_checkpoint(next(tmp_path.glob("**/*.ckpt"))).tokens_seen == 2 * 4 * 24


def test_the_other_packages_command_line_takes_its_classes(files: list[str], tmp_path: Path) -> None:
    package = lightning_dsv3.pytorch_lightning
    built = pytorch_lightning.cli.LightningCLI(
        package.DeepSeekV3Module,
        package.DeepSeekV3DataModule,
        run=False,
        args=[*files, "--trainer.callbacks+=lightning_dsv3.pytorch_lightning.AuxFreeBalanceCallback", *quiet(tmp_path)],
        save_config_callback=None,
    )
    built.trainer.fit(built.model, built.datamodule)
    assert built.model.tokens_seen == 2 * 4 * 24
