"""Matrix products with few rows, as in decoding.

BLAS libraries take the many rows of a weight for columns there: with one row of x they use one thread, and with two or
three they are slower than one by one. The transposed product ``(W x^T)^T`` reads the weight once at full speed; with a
single row, that row twice. Measured on a CPU in float32, it is 1.5 to 5 times as fast for up to some 30 rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows up to which the transposed product is used.
FEW_ROWS = 32


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x W^T``: ``[..., I]`` and ``[O, I]`` to ``[..., O]``.

    Few rows take the transposed product where it is the quicker: on a CPU, in float32, without gradients.
    """
    if (
        x.device.type != "cpu"
        or torch.is_grad_enabled()
        or x.dtype != torch.float32
        or weight.dtype != torch.float32
        or not 0 < x.numel() <= FEW_ROWS * weight.shape[1]
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
    ):
        return F.linear(x, weight)
    return few_rows_matmul(x.reshape(-1, weight.shape[1]), weight).view(*x.shape[:-1], weight.shape[0])


def few_rows_matmul(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """Return ``x W^T`` by the transposed product: ``[T, I]`` and ``[O, I]`` to ``[T, O]``."""
    num_rows = x_TI.shape[0]
    if num_rows == 1:
        x_TI = x_TI.repeat(2, 1)
    return torch.mm(weight_OI, x_TI.t()).t()[:num_rows].contiguous()
