"""Which tokens of a batch are padding.

Padded positions are routed like any others, and all alike: counted, they would look like a load that the bias has to
work against. Hardly any router is told of them, but the batch mostly says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

COMMON_MASK_KEY = "attention_mask"
"""Where batches have their mask by custom (tokenizers and collators of Hugging Face). One without it has no padding."""


def padding_mask(batch: Any, key: str | None) -> Tensor | None:
    """Return the mask of a batch, bools or integers ``[B, S]`` with 0 for padding, or None if nothing is padding.

    Args:
        batch: A mapping with the mask under ``key``, or an object with such an attribute. Anything else has no mask.
        key: Its name; None: padding is not told from text.

    Raises:
        MisconfigurationException: What is there is no such mask, or nothing is there and ``key`` is not the common one.
    """
    if key is None:
        return None
    mask = batch.get(key) if isinstance(batch, Mapping) else getattr(batch, key, None)
    if mask is None and key == COMMON_MASK_KEY:
        return None
    if mask is None:
        has = (
            f"has the keys {', '.join(map(str, batch))}"
            if isinstance(batch, Mapping)
            else f"is a {type(batch).__name__}"
        )
        raise MisconfigurationException(f"mask_key={key!r}: the batch {has}, and no mask of that name.")
    # A mask of floats may be one that is added to scores: 0 for text and -inf for padding, the other way round.
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.is_floating_point():
        what = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise MisconfigurationException(
            f"The batch's {key!r} is {what}; a mask that tells padding is bools or integers [B, S] with 0 for padding. "
            "Put such a one into the batch and name it, mask_key=..., or count padding like text: mask_key=None."
        )
    return mask
