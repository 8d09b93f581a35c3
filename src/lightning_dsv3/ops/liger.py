"""liger-kernel's Triton kernels behind three operations, with the arguments that give this package's arithmetic.

Written for release 0.8 and read there. Taken by ``kernels.norm=liger``, ``kernels.swiglu=liger`` and
``kernels.cross_entropy=liger``; docs/kernels.md tells why not by default.

- Its RMSNorm rounds before the weight is multiplied in, except in its casting mode ``gemma``, which is float32
  throughout, as here.
- Its backward passes write gradients over what they are given. That may be a gradient that another branch reads too, or
  a view of what came before, so RMSNorm is told not to, and SwiGLU gets copies of its halves, which it would make
  itself of all but a single row.
- Its loss of a linear head gives a loss per token only with ``reduction="none"``. The gradients that it takes on the
  way are then those of the sum; the autograd function around it changed its mind about them between releases. So only
  the computation is used, and the sum is divided here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_dsv3.ops.libraries import library


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As :func:`lightning_dsv3.ops.norm.rms_norm`; can be differentiated once."""
    return _ops().LigerRMSNormFunction.apply(x, weight, eps, 0.0, "gemma", False)


def swiglu(gate_up: Tensor) -> Tensor:
    """As :func:`lightning_dsv3.ops.swiglu.swiglu`; can be differentiated once."""
    gate, up = (half.clone(memory_format=torch.contiguous_format) for half in gate_up.chunk(2, dim=-1))
    return _ops().LigerSiLUMulFunction.apply(gate, up)


def linear_cross_entropy_sum(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, ignore_index: int, needs_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return token losses, and the gradients of their sum.

    Args:
        hidden_ND: Hidden states ``[N, D]``.
        weight_VD: Head ``[V, D]``, of the same dtype.
        targets_N: Target ids, int64 ``[N]``.
        ignore_index: The target whose loss is 0.
        needs_grad: Take both gradients.

    Returns:
        Float32 ``[N]``; like ``hidden_ND`` and like ``weight_VD``, or without gradients None.
    """
    # It goes by the flags of its operands, and takes no gradient of a head below a trunk that wants none.
    hidden_ND, weight_VD = (operand.detach().requires_grad_(needs_grad) for operand in (hidden_ND, weight_VD))
    token_losses, _, _, _, grad_hidden, grad_weight, _ = _ops().fused_linear_cross_entropy_forward(
        hidden_ND, weight_VD, targets_N, ignore_index=ignore_index, reduction="none", accum_dtype=torch.float32
    )
    return token_losses, grad_hidden if needs_grad else None, grad_weight if needs_grad else None


def _ops() -> Any:
    module, reason = library("liger_kernel")
    assert module is not None, reason
    return module
