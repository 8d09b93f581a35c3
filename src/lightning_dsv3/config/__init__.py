"""Configuration: typed dataclasses, presets and the ``key=value`` grammar. Imports no torch."""

from lightning_dsv3.config.balance import AlphaArgs, AuxFreeArgs, AuxLossArgs, BalanceArgs, V2Args
from lightning_dsv3.config.batch_ramp import BatchRamp, BatchSizes
from lightning_dsv3.config.errors import ConfigError, did_you_mean
from lightning_dsv3.config.kernels import KERNELS, KernelConfig
from lightning_dsv3.config.model import DeepSeekV3Config, ParameterCount
from lightning_dsv3.config.presets import preset_names, read_preset
from lightning_dsv3.config.run import (
    DataConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    SourceConfig,
    TrainConfig,
    load_run_config,
)
from lightning_dsv3.config.schedule import Mark, Schedule

__all__ = [
    "KERNELS",
    "AlphaArgs",
    "AuxFreeArgs",
    "AuxLossArgs",
    "BalanceArgs",
    "BatchRamp",
    "BatchSizes",
    "ConfigError",
    "DataConfig",
    "DeepSeekV3Config",
    "KernelConfig",
    "Mark",
    "OptimizerConfig",
    "ParameterCount",
    "RunConfig",
    "Schedule",
    "ScheduleConfig",
    "SourceConfig",
    "TrainConfig",
    "V2Args",
    "did_you_mean",
    "load_run_config",
    "preset_names",
    "read_preset",
]
