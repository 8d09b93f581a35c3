"""Evaluation through lm-eval: the benchmarks of the report's Table 3, and the model that answers them.

``DSV3LM`` is imported at its first use: lm-eval reads the tasks of this package before it needs a model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_dsv3.evaluation.lm import DSV3LM

__all__ = ["DSV3LM"]


def __getattr__(name: str) -> Any:
    """Import the public name from its home (PEP 562)."""
    if name != "DSV3LM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lightning_dsv3.evaluation.lm import DSV3LM

    return DSV3LM
