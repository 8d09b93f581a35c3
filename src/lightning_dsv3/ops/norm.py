"""Root mean square normalisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dsv3.ops import liger
from lightning_dsv3.ops.backends import chosen


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return ``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension.

    torch has a fused kernel for GPUs; on a CPU it takes some twenty passes over memory, forward and backward, where
    nine do.

    Args:
        x: ``[..., D]``, any floating dtype.
        weight: ``[D]``, any floating dtype.
        eps: Added to the mean square.

    Returns:
        Like ``x``; computed in float32 (float64 for float64). On a CPU it can be differentiated once.
    """
    if chosen("norm", x) == "liger":
        return liger.rms_norm(x, weight, eps)
    if x.device.type == "cpu":
        if torch.is_grad_enabled():
            return _RMSNorm.apply(x, weight, eps)
        return _rms_norm(x, weight, eps)[0]
    if x.dtype == weight.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)
    # torch's kernel wants one dtype for both, which mixed precision does not give it.
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the result, and what x was multiplied with before the weight."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * scale).mul_(weight).to(x.dtype), scale


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):  # type: ignore[no-untyped-def]
        y, scale = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight, scale = ctx.saved_tensors
        # With n = x * scale:  d weight = sum grad * n,  d x = scale * (grad * weight - n * mean(grad * weight * n))
        n = x * scale
        product = (grad * n).flatten(0, -2)
        mean = torch.mv(product, weight.to(product.dtype)).div_(x.shape[-1]).view_as(scale)
        grad_x = (grad * weight).to(n.dtype).addcmul_(n, mean, value=-1).mul_(scale)
        return grad_x.to(x.dtype), product.sum(dim=0).to(weight.dtype), None
