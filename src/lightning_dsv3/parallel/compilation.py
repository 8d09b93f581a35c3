"""``torch.compile`` on a built model, in place: parameters' names and hooks stay.

Blocks of one kind share their compiled code, so `compile_blocks` compiles two or three graphs however deep the model is
and is the quicker start; `compile_model` can also fuse across blocks.

A block is one graph without a break. A hook on its router that looks at Python state, as the counting hook of
``AuxFreeBalanceCallback`` does, splits that graph there: the counts stay exact, the block becomes several graphs.
Hooks must be attached before the first compiled call, which compiles; the callback does so in ``setup``.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_dsv3.layers.block import TransformerBlock


def compile_blocks(model: nn.Module, **options: Any) -> nn.Module:
    """Compile every transformer block of ``model``, those of MTP modules too.

    Args:
        model: Any module that holds transformer blocks; changed in place.
        options: Arguments of ``torch.compile``, as in ``backend="aot_eager"``.

    Returns:
        ``model``.

    Raises:
        ValueError: A model without transformer blocks.
    """
    blocks = [module for module in model.modules() if isinstance(module, TransformerBlock)]
    if not blocks:
        raise ValueError(f"{type(model).__name__} holds no TransformerBlock; give the DeepSeekV3 itself")
    for block in blocks:
        block.compile(**options)
    return model


def compile_model(model: nn.Module, **options: Any) -> nn.Module:
    """Compile the whole ``model`` in place.

    Args:
        model: The model.
        options: Arguments of ``torch.compile``.

    Returns:
        ``model``.
    """
    model.compile(**options)
    return model
