"""Optional libraries: loaded when first asked for, and if that fails, with the reason.

That a package is found says nothing: Transformer Engine's wheel imports only beside the CUDA libraries it was built
for, and its modules exist only with a driver. So a library counts as there once it has been imported, and any error on
the way is the reason why it is not: RuntimeError, OSError, FileNotFoundError and AssertionError all occur.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
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


class _Recipe(NamedTuple):
    """How a library is had: the module to import, its package, how that is installed, what must be true besides."""

    module: str
    package: str
    install: str
    machine: Callable[[], str | None] = lambda: None
    loaded: Callable[[ModuleType], str | None] = lambda module: None


def is_interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def gpu_reason() -> str | None:
    """Return why no CUDA device can be used; None where one can."""
    try:
        if torch.cuda.is_available():
            return None
    except Exception as error:
        return f"CUDA cannot be asked: {type(error).__name__}: {_first_line(error)}"
    return "no CUDA device" if torch.version.cuda else "this torch is built without CUDA"


def _gpu_or_interpreter_reason() -> str | None:
    return None if is_interpreted() else gpu_reason()


def _block_scaling_reason(module: ModuleType) -> str | None:
    available, reason = module.is_fp8_block_scaling_available(return_reason=True)
    return None if available else reason or "no FP8 block scaling here"


def _liger_reason(module: ModuleType) -> str | None:
    # Its kernels' arguments change between releases, and a wrong one need not be an error.
    version = importlib.metadata.version("liger-kernel")
    return None if version.startswith("0.8.") else f"liger-kernel {version} is not 0.8, which its use is written for"


LIBRARIES: dict[str, _Recipe] = {
    "triton": _Recipe("triton", "triton", "pip install triton"),
    "liger_kernel": _Recipe(
        "liger_kernel.ops",
        "liger-kernel",
        "pip install 'liger-kernel==0.8.*'",
        _gpu_or_interpreter_reason,
        _liger_reason,
    ),
    "flash_attn_3": _Recipe(
        "flash_attn_interface", "flash-attn-3", "build it from the folder hopper/ of flash-attention", gpu_reason
    ),
    "transformer_engine": _Recipe(
        "transformer_engine.pytorch",
        "transformer-engine",
        "pip install --no-build-isolation 'transformer-engine[pytorch]==2.20.*', after a torch with CUDA",
        gpu_reason,
        _block_scaling_reason,
    ),
}
"""The optional libraries, by the names that :func:`library` takes."""


@functools.cache
def library(name: str) -> Library:
    """Return a library, or why it cannot be used. The first call may take seconds.

    Args:
        name: ``triton``, ``liger_kernel``, ``flash_attn_3`` or ``transformer_engine``.
    """
    recipe = LIBRARIES[name]
    try:
        # Transformer Engine imports without a driver and then fails at every call.
        if reason := recipe.machine():
            return Library(None, reason)
        module = importlib.import_module(recipe.module)
        reason = recipe.loaded(module)
    except ModuleNotFoundError as error:
        if error.name == recipe.module.partition(".")[0]:
            return Library(None, f"not installed ({recipe.install})")
        return Library(None, f"{recipe.module} does not load: {error}")
    except Exception as error:
        return Library(None, f"{recipe.module} does not load: {type(error).__name__}: {_first_line(error)}")
    return Library(None if reason else module, reason)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")
