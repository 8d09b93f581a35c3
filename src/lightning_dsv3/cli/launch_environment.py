"""What the launcher tells the script: the ``LT_*`` environment values as arguments of a Trainer.

Lightning's launcher starts one process per device and leaves its options in the environment. ``Fabric`` reads
them itself, ``Trainer`` does not; a script does it in one line:

    trainer = Trainer(**trainer_arguments, **launcher_trainer_arguments())

With several processes it should end with ``torch.distributed.destroy_process_group()``: Lightning does so for NCCL
only, and gloo's threads abort about one exiting process in ten.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

_VARIABLE_OF_ARGUMENT = {
    "accelerator": "LT_ACCELERATOR",
    "strategy": "LT_STRATEGY",
    "devices": "LT_DEVICES",
    "num_nodes": "LT_NUM_NODES",
    "precision": "LT_PRECISION",
}
_INTEGERS = ("devices", "num_nodes")


def launcher_trainer_arguments(environ: Mapping[str, str] | None = None) -> dict[str, str | int]:
    """Read the launcher's choices as keyword arguments of a Trainer.

    Args:
        environ: the environment to read; by default that of this process.

    Returns:
        Those of ``accelerator``, ``strategy``, ``devices``, ``num_nodes`` and ``precision`` that the launcher
        has set. Empty when the script was started in any other way, so that a Trainer keeps its own defaults.

    Example:
        >>> launcher_trainer_arguments({"LT_CLI_USED": "1", "LT_DEVICES": "2", "LT_NUM_NODES": "1",
        ...                             "LT_ACCELERATOR": "cpu"})
        {'accelerator': 'cpu', 'devices': 2, 'num_nodes': 1}
        >>> launcher_trainer_arguments({"LT_DEVICES": "2"})
        {}
    """
    environ = os.environ if environ is None else environ
    if environ.get("LT_CLI_USED") != "1":
        return {}
    arguments: dict[str, str | int] = {}
    for argument, variable in _VARIABLE_OF_ARGUMENT.items():
        value = environ.get(variable)
        if value is not None:
            # A list of devices such as "0,1" stays text: the Trainer reads it as the launcher did.
            is_number = argument in _INTEGERS and value.lstrip("-").isdigit()
            arguments[argument] = int(value) if is_number else value
    return arguments
