"""Text to batches: corpus, tokenizer, packing, and a data module that resumes exactly.

Names are imported on first use: a tokenizer alone needs no Lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_dsv3.data.datamodule import DeepSeekV3DataModule, SourceReport
    from lightning_dsv3.data.tokenizer import load_tokenizer, save_tokenizer, token_bytes

__all__ = ["DeepSeekV3DataModule", "SourceReport", "load_tokenizer", "save_tokenizer", "token_bytes"]

_DATA_MODULE = ("DeepSeekV3DataModule", "SourceReport")


def __getattr__(name: str) -> Any:
    """Import a public name from its home at the first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "datamodule" if name in _DATA_MODULE else "tokenizer"
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value
