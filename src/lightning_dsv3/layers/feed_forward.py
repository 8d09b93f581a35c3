"""SwiGLU feed-forward network: the dense layers and the shared experts."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_dsv3.layers.linear import Linear
from lightning_dsv3.ops.swiglu import swiglu


class FeedForward(nn.Module):
    """``down(silu(gate x) * up x)`` without biases; gate and up are one product.

    Args:
        dim: Width D of the residual stream.
        hidden_dim: Width F between the projections.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_up = Linear(dim, 2 * hidden_dim)
        self.down = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., D]`` to ``[..., D]``."""
        return self.down(swiglu(self.gate_up(x)))
