"""The same classes for ``pytorch_lightning.Trainer``, which takes none of ``lightning.pytorch``'s.

Everything else of this package serves both. Checkpoints are the same too: each package's class loads the other's.
"""

from __future__ import annotations

import pytorch_lightning as pl
from pytorch_lightning.plugins import Precision

from lightning_dsv3 import callbacks
from lightning_dsv3.data.datamodule import PackedText
from lightning_dsv3.module import DeepSeekV3Steps
from lightning_dsv3.precision import FP8BlockSteps

__all__ = [
    "AuxFreeBalanceCallback",
    "DeepSeekV3DataModule",
    "DeepSeekV3Module",
    "ExpertLoadMonitor",
    "FP8BlockPrecision",
    "LMEvalCallback",
]

# Each package declares its hooks with its own types, which mypy holds against what inherits from both.


class DeepSeekV3Module(DeepSeekV3Steps, pl.LightningModule):  # type: ignore[misc]
    """:class:`lightning_dsv3.module.DeepSeekV3Module` as a ``pytorch_lightning.LightningModule``.

    Example:
        >>> trainer = pl.Trainer(callbacks=AuxFreeBalanceCallback(), logger=False, enable_checkpointing=False)
        >>> isinstance(DeepSeekV3Module("tiny"), pl.LightningModule)
        True
    """


class DeepSeekV3DataModule(PackedText, pl.LightningDataModule):  # type: ignore[misc]
    """:class:`lightning_dsv3.data.DeepSeekV3DataModule` as a ``pytorch_lightning.LightningDataModule``."""


class AuxFreeBalanceCallback(callbacks.AuxFreeBalanceCallback, pl.Callback):  # type: ignore[misc]
    """:class:`lightning_dsv3.callbacks.AuxFreeBalanceCallback` as a ``pytorch_lightning.Callback``.

    The plain one works in that package's Trainer too, in a list; this one also alone, and in its LightningCLI.
    """


class LMEvalCallback(callbacks.LMEvalCallback, pl.Callback):  # type: ignore[misc]
    """:class:`lightning_dsv3.callbacks.LMEvalCallback` as a ``pytorch_lightning.Callback``."""


class ExpertLoadMonitor(callbacks.ExpertLoadMonitor, pl.Callback):  # type: ignore[misc]
    """:class:`lightning_dsv3.callbacks.ExpertLoadMonitor` as a ``pytorch_lightning.Callback``."""


class FP8BlockPrecision(FP8BlockSteps, Precision):  # type: ignore[misc]
    """:class:`lightning_dsv3.precision.FP8BlockPrecision` as a plugin of ``pytorch_lightning.Trainer``.

    Example:
        >>> trainer = pl.Trainer(plugins=[FP8BlockPrecision()], accelerator="cpu", logger=False)
        >>> trainer.precision
        'fp8-block'
    """
