"""DeepSeek-V3-style mixture-of-experts language models for PyTorch Lightning.

The names below are imported on first use, so that ``import lightning_dsv3`` and the command line stay quick
and do not load torch:

>>> from lightning_dsv3 import DeepSeekV3Config
>>> DeepSeekV3Config.__name__
'DeepSeekV3Config'
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_dsv3.config import DeepSeekV3Config
    from lightning_dsv3.data import DeepSeekV3DataModule
    from lightning_dsv3.model import DeepSeekV3
    from lightning_dsv3.module import DeepSeekV3Module

__version__ = "0.1.0"

__all__ = ["DeepSeekV3", "DeepSeekV3Config", "DeepSeekV3DataModule", "DeepSeekV3Module", "__version__"]

_HOME_OF_NAME = {
    "DeepSeekV3": "lightning_dsv3.model",
    "DeepSeekV3Config": "lightning_dsv3.config",
    "DeepSeekV3DataModule": "lightning_dsv3.data",
    "DeepSeekV3Module": "lightning_dsv3.module",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its home at the first use (PEP 562)."""
    if name not in _HOME_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF_NAME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
