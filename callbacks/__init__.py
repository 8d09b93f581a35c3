"""Callbacks for any Lightning Trainer."""

from __future__ import annotations

from lightning_dsv3.callbacks.aux_free_balance import AuxFreeBalanceCallback
from lightning_dsv3.callbacks.balance_losses import BalanceLossCallback
from lightning_dsv3.callbacks.expert_load_monitor import ExpertLoadMonitor
from lightning_dsv3.callbacks.fp8_monitor import FP8Monitor
from lightning_dsv3.callbacks.kernel_choice import KernelChoice
from lightning_dsv3.callbacks.lm_eval import LMEvalCallback
from lightning_dsv3.callbacks.run_folder import RunFolder
from lightning_dsv3.callbacks.step_progress_bar import StepProgressBar

__all__ = [
    "AuxFreeBalanceCallback",
    "BalanceLossCallback",
    "ExpertLoadMonitor",
    "FP8Monitor",
    "KernelChoice",
    "LMEvalCallback",
    "RunFolder",
    "StepProgressBar",
]
