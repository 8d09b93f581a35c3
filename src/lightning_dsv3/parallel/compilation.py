"""``torch.compile`` on a built model, in place: parameters' names and hooks stay.

A block is one graph without a break. The counting hook of ``AuxFreeBalanceCallback`` looks at Python state and may
split that graph; the counts stay exact. Hooks must be attached before the first compiled call, which compiles; the
callback does so in ``setup``.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_dsv3.layers.block import TransformerBlock


def compile_model(model: nn.Module, part: str = "model", **options: Any) -> nn.Module:
    """Compile ``model``.

    Args:
        model: The model, changed in place.
        part: ``model`` traces it as a whole; ``blocks`` compiles every transformer block by itself, those of MTP
            modules too; ``none`` leaves it as it is.
        options: Arguments of ``torch.compile``, as in ``backend="aot_eager"``.

    Returns:
        ``model``.

    Raises:
        ValueError: An unknown part, or ``blocks`` of a model without transformer blocks.
    """
    if part not in ("none", "blocks", "model"):
        raise ValueError(f"part={part!r} is not one of none, blocks, model")
    if part == "model":
        model.compile(**options)
    elif part == "blocks":
        blocks = [module for module in model.modules() if isinstance(module, TransformerBlock)]
        if not blocks:
            raise ValueError(f"{type(model).__name__} holds no TransformerBlock; give the DeepSeekV3 itself")
        for block in blocks:
            block.compile(**options)
    return model
