"""The report's FP8 products, emulated on any device: operands rounded to FP8 tiles, multiplied in float32.

Each of the three products of a linear map takes both operands in E4M3 (report, section 3.3.1 and Figure 6), in tiles
that lie along the dimension that it sums over:

    product             sums over   operands
    forward  y = x W^T  inputs I    x  1 x 128,    W  128 x 128
    dgrad   dx = dy W   outputs O   dy 1 x 128,    W  128 x 128
    wgrad   dW = dy^T x tokens T    dy 128 x 1,    x  128 x 1

Each tile is rounded from the operand in its own precision, none is rounded twice (the report's 128 x 1 tiles of x are
made from the 1 x 128 ones; Transformer Engine does as here). Products of E4M3 numbers are exact in float32 and are
summed there, which the report's promotion of partial sums is meant to achieve. Results are rounded once, to the dtype
of x; a weight's gradient to the dtype of the weight, which is float32 for master weights.

Kept for the backward are x and the weight, as in BF16; the tiles are made again there. Rows go through in bands of
some thousand, experts one by one, so that float32 copies are those of one band and one matrix. On a GPU the loop over
experts waits for the device once per layer: this is for studies and tests, not for speed.

Shapes: T tokens, I inputs, O outputs; N pairs of a token and an expert sorted by expert, E experts, D and F widths.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dsv3.ops.dispatch import DispatchPlan
from lightning_dsv3.ops.quantize import (
    ACTIVATION_BLOCK,
    TRANSPOSED_BLOCK,
    WEIGHT_BLOCK,
    quantize_dequantize_blocks,
)

# Rows of a band; whole tiles of 128, so that bands do not move tiles.
_BAND_ROWS = 4096


@torch.library.custom_op("lightning_dsv3::fp8_linear", mutates_args=())
def fp8_linear(x_TI: Tensor, weight_OI: Tensor, pow2_scales: bool = True) -> Tensor:
    """Return ``x W^T`` of FP8 operands; its gradients are FP8 products too. It can be differentiated once.

    Args:
        x_TI: ``[T, I]``.
        weight_OI: ``[O, I]``, any floating dtype; float32 for a master weight.
        pow2_scales: Scales of tiles are powers of two.

    Returns:
        ``[T, O]``, dtype of ``x_TI``.
    """
    weight = quantize_dequantize_blocks(weight_OI, WEIGHT_BLOCK, pow2_scales)
    y_TO = x_TI.new_empty(x_TI.shape[0], weight_OI.shape[0])
    for rows in _bands(0, x_TI.shape[0]):
        y_TO[rows] = _times(x_TI[rows], weight.mT, pow2_scales)
    return y_TO


@fp8_linear.register_fake
def _(x_TI: Tensor, weight_OI: Tensor, pow2_scales: bool = True) -> Tensor:
    return x_TI.new_empty(x_TI.shape[0], weight_OI.shape[0])


@torch.library.custom_op("lightning_dsv3::fp8_linear_input_grad", mutates_args=())
def _input_grad(grad_TO: Tensor, weight_OI: Tensor, pow2_scales: bool) -> Tensor:
    weight = quantize_dequantize_blocks(weight_OI, WEIGHT_BLOCK, pow2_scales)
    grad_TI = grad_TO.new_empty(grad_TO.shape[0], weight_OI.shape[1])
    for rows in _bands(0, grad_TO.shape[0]):
        grad_TI[rows] = _times(grad_TO[rows], weight, pow2_scales)
    return grad_TI


@_input_grad.register_fake
def _(grad_TO: Tensor, weight_OI: Tensor, pow2_scales: bool) -> Tensor:
    return grad_TO.new_empty(grad_TO.shape[0], weight_OI.shape[1])


@torch.library.custom_op("lightning_dsv3::fp8_linear_weight_grad", mutates_args=())
def _weight_grad(grad_TO: Tensor, x_TI: Tensor, weight_OI: Tensor, pow2_scales: bool) -> Tensor:
    grad_OI = torch.zeros_like(weight_OI, dtype=torch.float32)
    for rows in _bands(0, grad_TO.shape[0]):
        _add_outer(grad_OI, grad_TO[rows], x_TI[rows], pow2_scales)
    return grad_OI.to(weight_OI.dtype)


@_weight_grad.register_fake
def _(grad_TO: Tensor, x_TI: Tensor, weight_OI: Tensor, pow2_scales: bool) -> Tensor:
    return torch.empty_like(weight_OI)


def _save_linear(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x_TI, weight_OI, ctx.pow2_scales = inputs
    ctx.save_for_backward(x_TI, weight_OI)


def _linear_backward(ctx, grad_TO):  # type: ignore[no-untyped-def]
    x_TI, weight_OI = ctx.saved_tensors
    grad_x = _input_grad(grad_TO, weight_OI, ctx.pow2_scales) if ctx.needs_input_grad[0] else None
    grad_weight = _weight_grad(grad_TO, x_TI, weight_OI, ctx.pow2_scales) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight, None


fp8_linear.register_autograd(_linear_backward, setup_context=_save_linear)


def fp8_experts(
    x_TD: Tensor,
    gate_TK: Tensor,
    plan: DispatchPlan,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    pow2_scales: bool = True,
) -> Tensor:
    """As :func:`~lightning_dsv3.ops.experts.routed_experts`, each product of FP8 operands.

    Tiles of 128 rows begin anew with each expert's tokens. SwiGLU and the gate value are computed in float32 between
    the products and rounded once, to the dtype of ``x_TD``.

    Args:
        x_TD: Tokens ``[T, D]``.
        gate_TK: Gate values, float32 ``[T, K]``.
        plan: Where each pair stands.
        gate_up_EGD: Gate above up projection of each expert, ``[E, 2F, D]``, any floating dtype.
        down_EDF: Down projection of each expert, ``[E, D, F]``.
        pow2_scales: Scales of tiles are powers of two.

    Returns:
        ``[T, D]``, dtype of ``x_TD``. It can be differentiated once.
    """
    gate_N = gate_TK.flatten().index_select(0, plan.slot_pair_N).float()
    y_TD, _ = _experts(x_TD, gate_N, plan.slot_token_N, plan.ends_E, gate_up_EGD, down_EDF, pow2_scales)
    return y_TD


@torch.library.custom_op("lightning_dsv3::fp8_experts", mutates_args=())
def _experts(
    x_TD: Tensor,
    gate_N: Tensor,
    token_N: Tensor,
    ends_E: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    pow2_scales: bool,
) -> tuple[Tensor, Tensor]:
    """Return the experts' sum ``[T, D]``, and gate and up of every pair ``[N, 2F]`` for the backward."""
    y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
    z_NG = x_TD.new_empty(token_N.shape[0], gate_up_EGD.shape[1])
    for expert, bands in _experts_with_rows(ends_E):
        gate_up = quantize_dequantize_blocks(gate_up_EGD[expert], WEIGHT_BLOCK, pow2_scales)
        down = quantize_dequantize_blocks(down_EDF[expert], WEIGHT_BLOCK, pow2_scales)
        for rows in bands:
            tokens = token_N[rows]
            z_NG[rows] = _times(x_TD[tokens], gate_up.mT, pow2_scales)
            gate_nF, up_nF = z_NG[rows].float().chunk(2, dim=-1)
            h_nF = (F.silu(gate_nF) * up_nF * gate_N[rows].unsqueeze(-1)).to(x_TD.dtype)
            y_nD = _times(h_nF, down.mT, pow2_scales).to(x_TD.dtype)
            y_TD.index_add_(0, tokens, y_nD.float())
    return y_TD.to(x_TD.dtype), z_NG


@_experts.register_fake
def _(
    x_TD: Tensor,
    gate_N: Tensor,
    token_N: Tensor,
    ends_E: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    pow2_scales: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_TD), x_TD.new_empty(token_N.shape[0], gate_up_EGD.shape[1])


@torch.library.custom_op("lightning_dsv3::fp8_experts_backward", mutates_args=())
def _experts_backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    gate_N: Tensor,
    token_N: Tensor,
    ends_E: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    z_NG: Tensor,
    pow2_scales: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of ``x_TD``, ``gate_N``, ``gate_up_EGD`` and ``down_EDF``."""
    dtype = x_TD.dtype
    grad_x_TD = torch.zeros_like(x_TD, dtype=torch.float32)
    grad_gate_N, grad_gate_up, grad_down = (torch.zeros_like(t) for t in (gate_N, gate_up_EGD, down_EDF))
    for expert, bands in _experts_with_rows(ends_E):
        gate_up = quantize_dequantize_blocks(gate_up_EGD[expert], WEIGHT_BLOCK, pow2_scales)
        down = quantize_dequantize_blocks(down_EDF[expert], WEIGHT_BLOCK, pow2_scales)
        grad_gate_up_e, grad_down_e = torch.zeros_like(gate_up), torch.zeros_like(down)
        for rows in bands:
            tokens, gate_n1 = token_N[rows], gate_N[rows].unsqueeze(-1)
            grad_nD = grad_TD[tokens]
            grad_h_nF = _times(grad_nD, down, pow2_scales).to(dtype).float()
            gate_nF, up_nF = z_NG[rows].float().chunk(2, dim=-1)
            silu_nF = F.silu(gate_nF)
            h_nF = silu_nF * up_nF  # without the gate value
            grad_gate_N[rows] = (grad_h_nF * h_nF).sum(dim=-1)
            _add_outer(grad_down_e, grad_nD, (h_nF * gate_n1).to(dtype), pow2_scales)
            grad_h_nF *= gate_n1
            grad_gate_nF = torch.ops.aten.silu_backward(grad_h_nF * up_nF, gate_nF)
            grad_z_nG = torch.cat([grad_gate_nF, grad_h_nF * silu_nF], dim=-1).to(dtype)
            _add_outer(grad_gate_up_e, grad_z_nG, x_TD[tokens], pow2_scales)
            grad_x_TD.index_add_(0, tokens, _times(grad_z_nG, gate_up, pow2_scales).to(dtype).float())
        grad_gate_up[expert], grad_down[expert] = grad_gate_up_e, grad_down_e
    return grad_x_TD.to(dtype), grad_gate_N, grad_gate_up, grad_down


@_experts_backward.register_fake
def _(
    grad_TD: Tensor,
    x_TD: Tensor,
    gate_N: Tensor,
    token_N: Tensor,
    ends_E: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    z_NG: Tensor,
    pow2_scales: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradients = [torch.empty_like(t) for t in (x_TD, gate_N, gate_up_EGD, down_EDF)]
    return gradients[0], gradients[1], gradients[2], gradients[3]


def _save_experts(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.pow2_scales = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _backward_of_experts(ctx, grad_TD, _):  # type: ignore[no-untyped-def]
    x_TD, gate_N, token_N, ends_E, gate_up_EGD, down_EDF, z_NG = ctx.saved_tensors
    grad_x_TD, grad_gate_N, grad_gate_up, grad_down = _experts_backward(
        grad_TD, x_TD, gate_N, token_N, ends_E, gate_up_EGD, down_EDF, z_NG, ctx.pow2_scales
    )
    return grad_x_TD, grad_gate_N, None, None, grad_gate_up, grad_down, None


_experts.register_autograd(_backward_of_experts, setup_context=_save_experts)


def gated_swiglu(z_NG: Tensor, gate_N: Tensor) -> Tensor:
    """Return ``silu(gate) * up``, times each row's gate value, in float32 and rounded once.

    What stands between the products of :func:`fp8_experts`, for products that are computed elsewhere. Kept for the
    backward are the arguments alone. It can be differentiated once.

    Args:
        z_NG: Gate and up side by side, ``[N, 2F]``.
        gate_N: Gate values, float32 ``[N]``.

    Returns:
        ``[N, F]``, dtype of ``z_NG``.
    """
    return _GatedSwiglu.apply(z_NG, gate_N)


class _GatedSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z_NG, gate_N):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(z_NG, gate_N)
        gate_NF, up_NF = z_NG.float().chunk(2, dim=-1)
        return (F.silu(gate_NF) * up_NF * gate_N.unsqueeze(-1)).to(z_NG.dtype)

    @staticmethod
    def backward(ctx, grad_NF):  # type: ignore[no-untyped-def]
        z_NG, gate_N = ctx.saved_tensors
        gate_NF, up_NF = z_NG.float().chunk(2, dim=-1)
        silu_NF, grad_NF = F.silu(gate_NF), grad_NF.float()
        grad_gate_N = (grad_NF * (silu_NF * up_NF)).sum(dim=-1)
        grad_NF = grad_NF * gate_N.unsqueeze(-1)
        grad_gate_NF = torch.ops.aten.silu_backward(grad_NF * up_NF, gate_NF)
        return torch.cat([grad_gate_NF, grad_NF * silu_NF], dim=-1).to(z_NG.dtype), grad_gate_N


def _times(x: Tensor, weight: Tensor, pow2_scales: bool) -> Tensor:
    """Return ``x @ weight`` in float32, x rounded to 1 x 128 tiles; the weight is already what its tiles hold."""
    x = quantize_dequantize_blocks(x, ACTIVATION_BLOCK, pow2_scales)
    with torch.autocast(x.device.type, enabled=False):  # would round scales and sums to bfloat16
        return x @ weight


def _add_outer(total: Tensor, a_nO: Tensor, b_nI: Tensor, pow2_scales: bool) -> None:
    """Add ``a^T b`` in float32, both in 128 x 1 tiles."""
    a = quantize_dequantize_blocks(a_nO, TRANSPOSED_BLOCK, pow2_scales)
    b = quantize_dequantize_blocks(b_nI, TRANSPOSED_BLOCK, pow2_scales)
    total.addmm_(a.mT, b)  # in place, so autocast leaves it in float32


def _experts_with_rows(ends_E: Tensor) -> Iterator[tuple[int, list[slice]]]:
    begin = 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > begin:
            yield expert, list(_bands(begin, end))
        begin = end


def _bands(begin: int, end: int) -> Iterator[slice]:
    for start in range(begin, end, _BAND_ROWS):
        yield slice(start, min(start + _BAND_ROWS, end))
