"""Loggers of a run: TensorBoard and offline W&B beside metrics.csv, with the expert load as an image."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning.loggers
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import balance, quiet_trainer, tiny_data, tiny_module

import lightning_dsv3.pytorch_lightning
from lightning_dsv3 import plots
from lightning_dsv3.callbacks import ExpertLoadMonitor, RunFolder, expert_load_monitor, run_folder
from lightning_dsv3.config import ConfigError, RunConfig, load_run_config
from lightning_dsv3.plots import expert_load_figure, figure_pixels

LOADS = {
    "format": 1,
    "layers": ["layer_1", "mtp_1"],
    "domains": ["prose", "code"],
    "counts": {"prose": [[8, 0, 0, 0], [2, 2, 2]], "code": [[2, 2, 2, 2], [0, 0, 6]]},
    "tokens": {"prose": 4, "code": 4},
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Nothing reaches the network, nothing is written outside of the test's folder, no W&B process outlives it."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb_home"))
    yield
    wandb.finish()
    wandb.teardown()


def fit(loggers: Any, *callbacks: Any, package: Any = lightning_dsv3, **arguments: Any) -> Any:
    arguments = {"max_steps": 2, "val_check_interval": 1, "limit_val_batches": 2} | arguments
    trainer = quiet_trainer(*callbacks, logger=loggers, **arguments)
    trainer.fit(tiny_module(package), tiny_data(package))
    return trainer


def events(folder: Path) -> EventAccumulator:
    read = EventAccumulator(str(folder))
    read.Reload()
    return read


def test_every_configured_logger_gets_scalars_and_the_figure(tmp_path: Path) -> None:
    config = load_run_config([f"runs_dir={tmp_path}", "loggers=[wandb,tensorboard]"])
    run = RunFolder(config)
    loggers = run.loggers()
    assert [type(logger) for logger in loggers] == [CSVLogger, WandbLogger, TensorBoardLogger]
    fit(loggers, balance(), ExpertLoadMonitor(), run)
    loggers[1].experiment.finish()

    with (run.path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {"train/loss", "val/bpb", "val/prose/bpb", "moe/max_violation", "val/moe/max_violation"} <= rows[-1].keys()

    board = events(run.path / "tensorboard")
    assert {"train/loss", "val/bpb", "moe/layer_1/max_violation"} <= set(board.Tags()["scalars"])
    written = [float(row["val/bpb"]) for row in rows if row["val/bpb"]]
    assert [event.value for event in board.Scalars("val/bpb")] == pytest.approx(written, rel=1e-6)
    assert [image.step for image in board.Images("val/expert_load")] == [1, 2]
    assert board.Images("val/expert_load")[0].width > 500

    (wandb_run,) = (run.path / "wandb").glob("offline-run-*")
    assert len(list(wandb_run.glob("files/media/images/val/expert_load_*.png"))) == 2
    assert (wandb_run / f"run-{loggers[1].version}.wandb").stat().st_size > 0


def test_both_packages_board_gets_the_figure(tmp_path: Path) -> None:
    package = lightning_dsv3.pytorch_lightning
    logger = pytorch_lightning.loggers.TensorBoardLogger(tmp_path, name="", version="")
    monitor = package.ExpertLoadMonitor()
    fit(logger, monitor, package=package, trainer_class=pytorch_lightning.Trainer)
    assert [image.step for image in events(tmp_path).Images("val/expert_load")] == [1, 2]


def test_a_logger_without_images_costs_no_drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(*_: Any) -> None:
        raise AssertionError("drawn")

    monkeypatch.setattr(expert_load_monitor, "expert_load_figure", drawn)
    fit([CSVLogger(tmp_path)], ExpertLoadMonitor())
    fit(False, ExpertLoadMonitor())


def test_missing_matplotlib_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_load_monitor, "plotting_problem", lambda: "pip install it")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(TensorBoardLogger(tmp_path, name="", version=""), ExpertLoadMonitor(), max_steps=3)
    assert len([warning for warning in caught if "pip install it" in str(warning.message)]) == 1
    assert events(tmp_path).Tags()["images"] == []
    assert "val/moe/max_violation" in events(tmp_path).Tags()["scalars"]


def test_wandb_is_offline_unless_the_user_says_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mode() -> str:
        return RunFolder(RunConfig(runs_dir=str(tmp_path), loggers=["wandb"])).loggers()[1]._wandb_init["mode"]

    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert mode() == "disabled"
    monkeypatch.delenv("WANDB_MODE")
    assert mode() == "offline"


@pytest.mark.parametrize(("name", "logger"), [("tensorboard", "TensorBoardLogger"), ("wandb", "WandbLogger")])
def test_a_missing_package_is_one_error_with_the_command(
    name: str, logger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(run_folder, logger, missing)
    run = RunFolder(RunConfig(runs_dir=str(tmp_path), loggers=[name]))
    with pytest.raises(ConfigError, match=rf"{name} is not installed; pip install 'lightning-dsv3\[loggers\]'"):
        run.loggers()


def test_an_unknown_logger_is_named() -> None:
    with pytest.raises(ConfigError, match="'tensorbord': did you mean 'tensorboard'"):
        load_run_config(["loggers=[csv,tensorbord]"])


def test_pixels_show_who_is_busy() -> None:
    pixels = figure_pixels(expert_load_figure(LOADS))
    assert (pixels.dtype, pixels.ndim, pixels.shape[2]) == (np.uint8, 3, 3)
    # "Blues" is dark where an expert has four times the mean load, and nowhere in a figure without such an expert.
    balanced = LOADS | {"counts": {"prose": [[1] * 4, [1] * 3], "code": [[1] * 4, [1] * 3]}}

    def dark_share(image: Any) -> float:
        red, blue = image[:, :-200, 0].astype(int), image[:, :-200, 2].astype(int)
        return float(((red < 40) & (blue > 80)).mean())

    assert dark_share(pixels) > 0.01 > dark_share(figure_pixels(expert_load_figure(balanced)))


def test_many_layers_are_the_rows_of_one_map_per_domain() -> None:
    def titles(num_layers: int) -> list[str]:
        layers = [f"layer_{index}" for index in range(num_layers)]
        counts = [[1] * (3 + index % 2) for index in range(num_layers)]
        loads = LOADS | {"layers": layers, "counts": {"prose": counts, "code": counts}}
        return [axes.get_title("left") for axes in expert_load_figure(loads).axes if axes.get_title("left")]

    assert titles(16) == [f"layer_{index}" for index in range(16)]
    assert titles(17) == ["prose", "code"]


def test_only_violations_are_drawn_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = []
    monkeypatch.setattr(plots, "_finish", lambda figure, axes, path: labels.extend(axes.get_legend_handles_labels()[1]))
    row = {"train/tokens": 1.0, "moe/max_violation": 2.0, "moe/model.layers.1/max_violation": 2.0}
    plots.plot_max_violation([row | {"moe/model.layers.1/bias_norm": 9.0, "moe/bias_norm": 9.0}], tmp_path / "it.png")
    assert labels == ["model.layers.1", "mean of layers"]
