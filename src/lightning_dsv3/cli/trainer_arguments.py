"""The arguments of a script's Trainer: its own, then ``trainer.*`` of the configuration, then the launcher's."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer

from lightning_dsv3.cli.launch_environment import launcher_trainer_arguments
from lightning_dsv3.config import ConfigError, did_you_mean
from lightning_dsv3.precision import FP8_BLOCK, FP8BlockPrecision

# Objects that a configuration cannot spell, and that the script already gives.
_TAKEN = ("callbacks", "logger", "plugins", "profiler")


def trainer_arguments(script: Mapping[str, Any], configured: Mapping[str, Any]) -> dict[str, Any]:
    """Merge a Trainer's arguments; what the user says wins over the script.

    Args:
        script: The script's own choices.
        configured: ``trainer.*`` of the run's configuration.

    Returns:
        Keyword arguments for ``lightning.Trainer``. What the launcher says (``--devices``, ...) wins over both. A
        precision that the Trainer does not know, ``fp8-block``, is among its plugins.

    Raises:
        ConfigError: A name that the Trainer does not have, or one that the script sets by itself.

    >>> trainer_arguments({"max_steps": 100}, {"max_steps": 5})
    {'max_steps': 5}
    """
    known = [name for name in inspect.signature(Trainer).parameters if name not in _TAKEN]
    for name, value in configured.items():
        if name in _TAKEN:
            raise ConfigError(f"trainer.{name}={value!r}: the script sets it; change the script's list of {name}")
        if name not in known:
            raise ConfigError(
                f"trainer.{name}={value!r}: the Trainer has no such argument; {did_you_mean(name, known)}"
            )
    arguments = {**script, **configured, **launcher_trainer_arguments()}
    if arguments.get("precision") == FP8_BLOCK:
        del arguments["precision"]
        plugins = arguments.get("plugins") or []
        arguments["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), FP8BlockPrecision()]
    return arguments
