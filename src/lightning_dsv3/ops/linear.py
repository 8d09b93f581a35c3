"""Matrix products with few rows, as in decoding.

BLAS libraries take the many rows of a weight for columns there: with one row of x they use one thread, and with two or
three they are slower than one by one. The transposed product ``(W x^T)^T`` reads the weight once at full speed; with a
single row, that row twice. In float32 on a CPU it takes a fifth to two thirds of the time for up to three rows, and
with several threads less for up to some thirty.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows up to which the transposed product is used, with one thread and with several.
_FEW_ROWS_ONE_THREAD = 3
_FEW_ROWS = 32


def are_few_rows(x_TI: Tensor) -> bool:
    """Whether the transposed product is the quicker: on a CPU, in float32, without gradients, for few rows."""
    if x_TI.device.type != "cpu" or x_TI.dtype != torch.float32 or torch.is_grad_enabled():
        return False
    most = _FEW_ROWS if torch.get_num_threads() > 1 else _FEW_ROWS_ONE_THREAD
    few = 0 < x_TI.numel() <= most * x_TI.shape[-1]
    return few and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x W^T``: ``[..., I]`` and ``[O, I]`` to ``[..., O]``."""
    if weight.dtype == torch.float32 and are_few_rows(x):
        return few_rows_matmul(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[0])
    return F.linear(x, weight)


def few_rows_matmul(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """Return ``x W^T`` by the transposed product: ``[T, I]`` and ``[O, I]`` to ``[T, O]``."""
    if x_TI.shape[0] == 1:
        return torch.mm(weight_OI, torch.cat([x_TI, x_TI]).t())[:, 0].contiguous().unsqueeze(0)
    return torch.mm(weight_OI, x_TI.t()).t().contiguous()
