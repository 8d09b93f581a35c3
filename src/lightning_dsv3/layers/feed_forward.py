"""SwiGLU feed-forward network: the dense layers and the shared experts."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def swiglu(gate_up: Tensor) -> Tensor:
    """Return ``silu(gate) * up`` for gate and up side by side in the last dimension: ``[..., 2F]`` to ``[..., F]``."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class FeedForward(nn.Module):
    """``down(silu(gate x) * up x)`` without biases; gate and up are one product.

    Args:
        dim: Width D of the residual stream.
        hidden_dim: Width F between the projections.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., D]`` to ``[..., D]``."""
        return self.down(swiglu(self.gate_up(x)))
