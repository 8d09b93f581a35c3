"""What ``liger_kernel.ops`` 0.8.5 is asked for, in plain torch: its signatures, its arithmetic and its habits.

The habits are the reason for the arguments in ``ops/liger.py``: gradients written over what was given, rounding in the
middle of a norm, gradients by the flags of the operands. Read in liger-kernel 0.8.5; ``test_liger.py`` compares the
signatures with the installed package's, where it is, and its kernels' results too.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F

VERSION = "0.8.5"


class LigerRMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
        assert casting_mode in ("llama", "gemma", "none")
        x = X.float() if casting_mode != "none" else X
        rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        normed = x * rstd
        if casting_mode == "llama":
            normed = normed.to(X.dtype)
        ctx.save_for_backward(X, W, rstd)
        ctx.offset, ctx.in_place = offset, in_place
        return (normed * (offset + W)).to(X.dtype)

    @staticmethod
    def backward(ctx, dY):
        X, W, rstd = ctx.saved_tensors
        x, m = X.float() * rstd, dY.float() * (W + ctx.offset)
        dW = (dY.float() * x).flatten(0, -2).sum(0).to(W.dtype)
        dX = dY if ctx.in_place else torch.zeros_like(dY)
        dX.copy_(rstd * (m - x * (m * x).mean(-1, keepdim=True)))
        return dX, dW, None, None, None, None, None


class LigerSiLUMulFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, gate_multiplier: float = 1.0, down_multiplier: float = 1.0):
        assert gate_multiplier == down_multiplier == 1.0
        a, b = a.contiguous(), b.contiguous()
        ctx.save_for_backward(a, b)
        return F.silu(a.float()).to(b.dtype) * b

    @staticmethod
    def backward(ctx, dc):
        a, b = ctx.saved_tensors
        s = torch.sigmoid(a.float())
        da, db = dc * (a * s * (1 - s) + s) * b, dc * a * s
        with torch.autograd._unsafe_preserve_version_counter((a, b)):  # a kernel writes behind autograd's back
            a.copy_(da)
            b.copy_(db)
        return a, b, None, None


def fused_linear_cross_entropy_forward(
    _input, weight, target, ce_weight=None, bias=None, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0,
    reduction="mean", softcap=None, return_z_loss=False, accum_dtype=None, use_token_scaling=False,
    return_token_accuracy=False, return_predicted_tokens=False, ce_impl=None, ce_mode=None, token_grad_output=None,
    compute_gradients=None, weight_requires_grad=None, chunk_mem_const: int = 1,
):  # fmt: skip
    assert _input.shape[0] > 0  # its number of chunks would be 0 / 0
    assert _input.dtype == weight.dtype
    assert ce_weight is bias is softcap is ce_impl is ce_mode is token_grad_output is None
    counted = target != ignore_index
    logits = (_input @ weight.T).float()
    losses = F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none")
    grad = torch.softmax(logits, -1) - F.one_hot(target.clamp(min=0), len(weight))
    grad = (grad * counted[:, None]).to(_input.dtype)
    if reduction == "mean":
        grad = grad / counted.sum()
    wants, weight_wants = _input.requires_grad, weight.requires_grad
    grad_input = grad @ weight if wants else torch.zeros_like(_input)
    grad_weight = grad.T.to(accum_dtype or weight.dtype) @ _input.to(accum_dtype or weight.dtype)
    loss = losses if reduction == "none" else losses.sum() / (counted.sum() if reduction == "mean" else 1)
    return loss, None, None, None, grad_input, grad_weight.to(weight.dtype) if wants and weight_wants else None, None


def standin() -> dict[str, ModuleType]:
    """The package, for ``sys.modules``."""
    package, ops = ModuleType("liger_kernel"), ModuleType("liger_kernel.ops")
    for member in (LigerRMSNormFunction, LigerSiLUMulFunction, fused_linear_cross_entropy_forward):
        setattr(ops, member.__name__, member)
    package.ops = ops
    return {"liger_kernel": package, "liger_kernel.ops": ops}
