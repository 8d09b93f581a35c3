"""The run folder: everything that a training run leaves behind, and the table that it ends with.

    runs/<time>-<name>/
        config.yaml  tokenizer.json           what was run; written first
        metrics.csv                           every logged figure
        checkpoints/last.ckpt, step-N.ckpt    resumable
        tensorboard/  wandb/                  the same figures, where `loggers` asks for it
        loads.json  figures/*.png             expert load by domain; curves
        summary.json                          the closing table

Ctrl-C (or SIGTERM) ends training after the optimizer step at hand, with a checkpoint; the folder is then as
complete as after the last step.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import inspect
import json
import lzma
import math
import os
import platform
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from lightning_dsv3.callbacks.expert_load_monitor import ExpertLoadMonitor
from lightning_dsv3.callbacks.lm_eval import LMEvalCallback
from lightning_dsv3.config import ConfigError, RunConfig
from lightning_dsv3.module import DeepSeekV3Module
from lightning_dsv3.plots import (
    plot_bits_per_byte,
    plot_expert_load,
    plot_loss,
    plot_max_violation,
    plotting_problem,
)

_REPEAT_SECONDS = 5.0  # a launcher passes one Ctrl-C on as a second signal; what comes later is the user's impatience
_ENDS = 0.1  # share of the logged steps that "at the start" and "at the end" average over


class RunFolder(Callback):
    """Keep a run in one folder, stop it in good order, and sum it up.

    Args:
        config: The run's configuration. With ``resume`` the folder of that checkpoint is continued.

    Attributes:
        path: The folder.
        checkpoint: Checkpoint to resume from, or None.
        stopped_by: Signal that ended training, or None.

    Example:
        >>> run = RunFolder(RunConfig(name="demo"))
        >>> run.path.name.endswith("-demo"), run.checkpoint
        (True, None)
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.checkpoint = find_checkpoint(Path(config.resume)) if config.resume else None
        if self.checkpoint is not None:
            self.path = self.checkpoint.parent.parent
        else:
            self.path = _unused(Path(config.runs_dir), f"{time.strftime('%Y%m%d-%H%M%S')}-{config.name}")
        self.stopped_by: signal.Signals | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        self._first_signal = 0.0
        self._earlier_rows: list[dict[str, str]] = []
        self._clock = 0.0
        self._paused = 0.0
        self._tokens = 0
        self._seconds = 0.0
        self._trained_tokens = 0
        self._validated_at = -1

    def loggers(self) -> list[Logger]:
        """Return the Trainer's loggers: what writes ``metrics.csv``, and beside it what the configuration asks for.

        TensorBoard and W&B write into the folder too. W&B is offline (``wandb sync`` uploads later), unless
        ``WANDB_MODE`` says otherwise.

        Raises:
            ConfigError: A logger's package is not installed.
        """
        return [self._csv_logger(), *(self._logger(name) for name in self.config.loggers if name != "csv")]

    def _logger(self, name: str) -> Logger:
        try:
            if name == "tensorboard":
                return TensorBoardLogger(self.path, name="tensorboard", version="")
            mode = os.environ.get("WANDB_MODE", "offline")
            return WandbLogger(self.path.name, save_dir=self.path, project="lightning-dsv3", mode=mode)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"loggers={self.config.loggers}: {name} is not installed; pip install 'lightning-dsv3[loggers]'"
            ) from error

    def _csv_logger(self) -> CSVLogger:
        """Return the logger of ``metrics.csv``, which keeps a resumed run's earlier rows."""
        metrics, backup = self.path / "metrics.csv", self.path / "metrics.before-resume.csv"
        if self.checkpoint is not None and getattr(rank_zero_only, "rank", 0) == 0:
            if metrics.exists() and not backup.exists():
                metrics.replace(backup)  # the logger deletes a file that it finds, before any hook of ours runs
            self._earlier_rows = _read_rows(backup)
        return CSVLogger(self.path.parent, name=self.path.name, version="", flush_logs_every_n_steps=10)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the folder."""
        self.path = Path(trainer.strategy.broadcast(str(self.path)))
        if stage != "fit" or not trainer.is_global_zero:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        # Without `resume`: the file says what was run, and must not carry who reads it on into this folder.
        _write(self.path / "config.yaml", dataclasses.replace(self.config, resume=None).to_yaml())

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the tokenizer beside the configuration, so that the folder needs nothing else."""
        tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        if tokenizer is not None and trainer.is_global_zero:
            _write(self.path / "tokenizer.json", tokenizer.to_str())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue the metrics of a resumed run, and take over Ctrl-C."""
        if self._earlier_rows and isinstance(trainer.logger, CSVLogger):
            rows = [_numbers(row) for row in self._earlier_rows if int(row["step"]) < trainer.global_step]
            trainer.logger.experiment.metrics = rows + trainer.logger.experiment.metrics
            trainer.logger.save()
            (self.path / "metrics.before-resume.csv").unlink(missing_ok=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._on_signal)
        self._clock = _training_clock(trainer)
        self._tokens = getattr(pl_module, "tokens_seen", 0)
        counts = self.config.model.num_parameters()
        rank_zero_info(
            f"{self.config.name}: {_millions(counts.total)} parameters, {_millions(counts.activated)} activated per "
            f"token, {_millions(counts.mtp)} in MTP modules; "
            f"balance: {', '.join(self.config.balance) or 'none'}; run folder {self.path}"
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure throughput over optimizer steps; stop where a signal asked for it."""
        tokens = getattr(pl_module, "tokens_seen", 0)
        if tokens == self._tokens:
            return  # in the middle of an accumulation window
        now = _training_clock(trainer)
        elapsed = now - self._clock
        # The first steps allocate memory and are not what the rest is like, but they are part of the run.
        self._seconds += elapsed
        self._trained_tokens += tokens - self._tokens
        pl_module.log("tokens/s", (tokens - self._tokens) / elapsed, prog_bar=True, logger=False)
        pl_module.log("train/tokens_per_second", (tokens - self._tokens) / elapsed)
        self._clock, self._tokens = now, tokens
        # Ranks hear a signal at different moments: all stop at the same step or none does.
        if trainer.strategy.reduce_boolean_decision(self.stopped_by is not None, all=False):
            self.stopped_by = self.stopped_by or signal.SIGINT
            trainer.should_stop = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave validation out of the throughput."""
        self._paused = _training_clock(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave validation out of the throughput."""
        self._clock += _training_clock(trainer) - self._paused
        self._validated_at = trainer.global_step

    def validated(self, trainer: Trainer) -> bool:
        """Return whether the last validation was of the weights that training ended with."""
        return self._validated_at == trainer.global_step

    @property
    def safe_loading(self) -> dict[str, Any]:
        """Arguments of ``Trainer.fit`` and ``Trainer.validate`` that let a checkpoint unpickle nothing."""
        if "weights_only" in inspect.signature(Trainer.fit).parameters:
            return {"weights_only": True}
        os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # Lightning 2.5 has no argument for it
        return {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last state, whatever ended training, and give Ctrl-C back."""
        trainer.save_checkpoint(self.path / "checkpoints" / "last.ckpt", weights_only=False)  # with optimizer state
        self._restore_signals()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give Ctrl-C back."""
        self._restore_signals()

    def finish(self, trainer: Trainer, module: DeepSeekV3Module, monitor: ExpertLoadMonitor) -> None:
        """Write loads, figures and summary, and print the closing table. Call it on every rank after validation.

        Args:
            trainer: The Trainer, its data module attached.
            module: The trained module.
            monitor: What the last validation measured.
        """
        if not trainer.is_global_zero:
            return
        if monitor.loads is not None:  # None where the user turned validation off
            monitor.save(self.path / "loads.json")
        history = [_numbers(row) for row in _read_rows(self.path / "metrics.csv")]
        compressors = {d: _compressed(trainer.datamodule.heldout_bytes(d)) for d in trainer.datamodule.domains}  # type: ignore[attr-defined]
        summary = self._summary(trainer, module, history, compressors)
        _write(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")
        problem = plotting_problem()
        if problem:
            rank_zero_info(problem)
        else:
            figures = self.path / "figures"
            plot_loss(history, figures / "loss.png")
            plot_bits_per_byte(history, compressors, figures / "bits_per_byte.png")
            plot_max_violation(history, figures / "max_violation.png")
            if monitor.loads is not None:
                plot_expert_load(monitor.loads, figures / "expert_load.png")
        print(closing_table(summary, self.path), flush=True)

    def _summary(
        self,
        trainer: Trainer,
        module: DeepSeekV3Module,
        history: list[dict[str, float]],
        compressors: Mapping[str, Any],
    ) -> dict[str, Any]:
        measured = {key: float(value) for key, value in trainer.callback_metrics.items()}
        counts = module.model.config.num_parameters()
        violation = [row["moe/max_violation"] for row in history if "moe/max_violation" in row]
        width = max(1, round(len(violation) * _ENDS))
        speed = self._trained_tokens / self._seconds if self._seconds else None
        return {
            "name": self.config.name,
            "balance": list(self.config.balance),
            "steps": trainer.global_step,
            "tokens": getattr(module, "tokens_seen", None),
            "bits_per_byte": {
                domain: {"model": measured.get(f"val/{domain}/bpb"), **others} for domain, others in compressors.items()
            },
            "max_violation": {
                "training_batch_start": _mean(violation[:width]),
                "training_batch_end": _mean(violation[-width:]),
                "held_out_end": measured.get("val/moe/max_violation"),
            },
            "parameters": counts._asdict(),
            "tokens_per_second": speed,
            "training_seconds": self._seconds,
            "stopped_by": self.stopped_by.name if self.stopped_by else None,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }

    def _on_signal(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.stopped_by is None:
            self.stopped_by = signal.Signals(number)
            self._first_signal = now
            rank_zero_info(f"\n{self.stopped_by.name}: saving after this step; press Ctrl-C again to stop at once")
        elif number == signal.SIGINT and now - self._first_signal > _REPEAT_SECONDS:
            raise KeyboardInterrupt

    def _restore_signals(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


def _training_clock(trainer: Trainer) -> float:
    """Read a clock, in seconds, that stands still while lm-eval's benchmarks run."""
    callbacks = [callback for callback in trainer.callbacks if isinstance(callback, LMEvalCallback)]  # type: ignore[attr-defined]
    return time.monotonic() - sum(callback.seconds for callback in callbacks)


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that a user names: a ``.ckpt``, or the last one of a run folder.

    Raises:
        ConfigError: There is none.
    """
    if path.is_file():
        return path.resolve()
    last = path / "checkpoints" / "last.ckpt"
    if last.is_file():
        return last.resolve()
    raise ConfigError(
        f"resume={str(path)!r}: no such checkpoint, and no checkpoints/last.ckpt in it; give a run folder"
    )


def closing_table(summary: Mapping[str, Any], path: Path) -> str:
    """Return the table that a run ends with."""
    parameters, violation = summary["parameters"], summary["max_violation"]
    lines = ["", f"{'held-out bits per byte':<24}{'model':>9}{'gzip':>9}{'xz':>9}"]
    for domain, values in summary["bits_per_byte"].items():
        lines.append(f"  {domain:<22}" + "".join(f"{_number(values.get(k)):>9}" for k in ("model", "gzip", "xz")))
    lines += [
        "",
        f"MaxVio, training batches   start {_number(violation['training_batch_start'])}"
        f"   end {_number(violation['training_batch_end'])}   (mean of layers, first and last tenth of the steps)",
        f"MaxVio, held-out text      end   {_number(violation['held_out_end'])}",
        f"parameters                 {_millions(parameters['total'])} total, "
        f"{_millions(parameters['activated'])} activated, {_millions(parameters['mtp'])} MTP",
        f"tokens                     {summary['tokens']:,} in {summary['steps']} steps, "
        f"{_number(summary['tokens_per_second'], 0)} tokens/s",
        f"run folder                 {path}",
        "",
        "next:",
        f"  go on         lightning run model examples/train.py resume={path} "
        f"train.total_tokens={2 * (summary['tokens'] or 1)}",
        "  compare       lightning run model examples/train.py study=no_aux_free",
        "  bigger        lightning run model examples/train.py model.hidden_size=256 train.total_tokens=4000000",
        f"  look          {path / 'figures'}",
    ]
    return "\n".join(lines)


def _compressed(text: bytes) -> dict[str, float]:
    """Bits per byte of general compressors on the same text: what a model must beat to have learned anything."""
    if not text:
        return {}
    return {
        "gzip": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz": 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text),
    }


def _unused(parent: Path, name: str) -> Path:
    path, number = parent / name, 2
    while path.exists():
        path, number = parent / f"{name}-{number}", number + 1
    return path


def _read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _numbers(row: Mapping[str, str]) -> dict[str, float]:
    values = {key: float(value) for key, value in row.items() if value}
    return values | {key: int(values[key]) for key in ("step", "epoch") if key in values}


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f}M" if count < 1e9 else f"{count / 1e9:.1f}B"
