"""Optional libraries: loaded when first asked for, and if that fails, with the reason.

That a package is found says nothing: Transformer Engine's wheel imports only beside the CUDA libraries it was built
for, and its modules exist only with a driver. So a library counts as there once it has been imported, and any error on
the way is the reason why it is not: RuntimeError, OSError, FileNotFoundError and AssertionError all occur.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch


class Library(NamedTuple):
    """What came of loading a library.

    Attributes:
        module: The module, None where it cannot be used.
        reason: Why not; None where it can.
    """

    module: ModuleType | None
    reason: str | None


def _gpu_reason() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device" if torch.version.cuda else "this torch is built without CUDA"
    return None


def _block_scaling_reason(module: ModuleType) -> str | None:
    available, reason = module.is_fp8_block_scaling_available(return_reason=True)
    return None if available else reason or "no FP8 block scaling here"


# Module to import, what the machine must have, what the module itself says.
_LIBRARIES: dict[str, tuple[str, Callable[[], str | None] | None, Callable[[ModuleType], str | None] | None]] = {
    "triton": ("triton", None, None),
    "liger_kernel": ("liger_kernel.ops", _gpu_reason, None),
    "flash_attn_3": ("flash_attn_interface", _gpu_reason, None),
    "transformer_engine": ("transformer_engine.pytorch", _gpu_reason, _block_scaling_reason),
}


@functools.cache
def library(name: str) -> Library:
    """Return a library, or why it cannot be used. The first call may take seconds.

    Args:
        name: ``triton``, ``liger_kernel``, ``flash_attn_3`` or ``transformer_engine``.
    """
    module_name, machine_reason, own_reason = _LIBRARIES[name]
    if machine_reason is not None and (reason := machine_reason()):
        return Library(None, reason)
    try:
        module = importlib.import_module(module_name)
        reason = own_reason(module) if own_reason is not None else None
    except ModuleNotFoundError as error:
        package = module_name.partition(".")[0]
        return Library(None, f"{package} is not installed" if error.name == package else f"{package}: {error}")
    except Exception as error:
        return Library(None, f"{module_name} does not load: {type(error).__name__}: {error}")
    return Library(None if reason else module, reason)
