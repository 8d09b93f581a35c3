"""A linear map without bias."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_dsv3.ops.linear import linear


class Linear(nn.Linear):
    """``x W^T``, quick with few rows too; ``weight`` ``[out_features, in_features]``."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``."""
        return linear(x, self.weight)
