"""The gated activation of every feed-forward network here."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lightning_dsv3.ops import liger
from lightning_dsv3.ops.backends import chosen


def swiglu(gate_up: Tensor) -> Tensor:
    """Return ``silu(gate) * up`` for gate and up side by side in the last dimension: ``[..., 2F]`` to ``[..., F]``."""
    if chosen("swiglu", gate_up) == "liger":
        return liger.swiglu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
