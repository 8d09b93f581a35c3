"""From tokens to experts and back: permutation, one matrix product for all experts, combination.

    expert_TK --argsort--> slots sorted by expert          every chosen (token, expert) pair is one slot, none is
    dropped x_TD --permute--> x_ND --grouped_matmul--> y_ND --combine--> y_TD

Shapes: T tokens, K chosen experts per token, N = T*K slots, E experts, D and F widths.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class DispatchPlan(NamedTuple):
    """Where each chosen (token, expert) pair stands once slots are sorted by expert.

    Attributes:
        slot_token_N: Token in each slot, int64 ``[N]``.
        slot_pair_N: Pair ``token * K + k`` in each slot, int64 ``[N]``.
        pair_slot_N: Slot of each pair; the inverse permutation, int64 ``[N]``.
        ends_E: End of each expert's slots, int32 ``[E]``; an expert without tokens has an empty range.
    """

    slot_token_N: Tensor
    slot_pair_N: Tensor
    pair_slot_N: Tensor
    ends_E: Tensor


def plan_dispatch(expert_TK: Tensor, num_experts: int) -> DispatchPlan:
    """Sort pairs by expert; within an expert tokens keep their order, so that results are reproducible.

    Args:
        expert_TK: Chosen experts, int64 ``[T, K]``.
        num_experts: E.
    """
    sorted_N, slot_pair_N = expert_TK.flatten().sort(stable=True)
    pair_slot_N = torch.empty_like(slot_pair_N).scatter_(
        0, slot_pair_N, torch.arange(slot_pair_N.numel(), device=slot_pair_N.device)
    )
    experts_E = torch.arange(num_experts, device=expert_TK.device)
    # searchsorted, not bincount: it needs no synchronisation with the host on a GPU.
    ends_E = torch.searchsorted(sorted_N, experts_E, right=True).to(torch.int32)
    return DispatchPlan(slot_pair_N // expert_TK.shape[1], slot_pair_N, pair_slot_N, ends_E)


def permute(x_TD: Tensor, plan: DispatchPlan) -> Tensor:
    """Copy each token's row into its K slots: ``[T, D]`` to ``[N, D]``."""
    return _Permute.apply(x_TD, plan.slot_token_N, plan.pair_slot_N)


def combine(y_ND: Tensor, plan: DispatchPlan, num_tokens: int) -> Tensor:
    """Sum each token's K slots: ``[N, D]`` to ``[T, D]``. The transpose of :func:`permute`."""
    return _Combine.apply(y_ND, plan.slot_token_N, plan.pair_slot_N, num_tokens)


# Each is the other's backward. Autograd's own backward of indexing would scatter with atomics or one by one; as the
# index is a permutation, gathering and summing K neighbours is the same, quick and reproducible.
class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, slot_token_N, pair_slot_N):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(slot_token_N, pair_slot_N)
        ctx.num_tokens = x_TD.shape[0]
        return x_TD.index_select(0, slot_token_N)

    @staticmethod
    def backward(ctx, grad_ND):  # type: ignore[no-untyped-def]
        slot_token_N, pair_slot_N = ctx.saved_tensors
        return _Combine.apply(grad_ND, slot_token_N, pair_slot_N, ctx.num_tokens), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_ND, slot_token_N, pair_slot_N, num_tokens):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(slot_token_N, pair_slot_N)
        return y_ND.index_select(0, pair_slot_N).view(num_tokens, -1, y_ND.shape[-1]).sum(dim=1)

    @staticmethod
    def backward(ctx, grad_TD):  # type: ignore[no-untyped-def]
        slot_token_N, pair_slot_N = ctx.saved_tensors
        return _Permute.apply(grad_TD, slot_token_N, pair_slot_N), None, None, None


def grouped_matmul_loop(x_ND: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply expert by expert: the reference of :func:`grouped_matmul`."""
    sizes = torch.diff(ends_E, prepend=ends_E.new_zeros(1)).tolist()
    # unbind, not weight_EFD[e]: indexing's backward fills a whole [E, F, D] of zeros for every expert.
    parts = [x @ w.mT for x, w in zip(x_ND.split(sizes), weight_EFD.unbind(0), strict=True)]
    return torch.cat(parts)


@torch.library.custom_op("lightning_dsv3::grouped_matmul", mutates_args=())
def grouped_matmul(x_ND: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply each expert's rows with its matrix: ``y[n] = weight[e] @ x[n]`` for the expert e of slot n.

    Uses torch's grouped matrix product, and the loop where that refuses (float64; rows that are no multiple of 16
    bytes). A registered operator, so that ``torch.compile`` and meta tensors work in every dtype.

    Args:
        x_ND: Rows sorted by expert, ``[N, D]``.
        weight_EFD: One matrix per expert, ``[E, F, D]``, same dtype.
        ends_E: End of each expert's rows, int32 ``[E]``.

    Returns:
        ``[N, F]``.
    """
    if _fits_grouped_mm(x_ND, weight_EFD):
        return F.grouped_mm(x_ND, weight_EFD.mT, offs=ends_E)
    return grouped_matmul_loop(x_ND, weight_EFD, ends_E)


@grouped_matmul.register_fake
def _(x_ND: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    return x_ND.new_empty(x_ND.shape[0], weight_EFD.shape[1])


@torch.library.custom_op("lightning_dsv3::grouped_outer", mutates_args=())
def grouped_outer(a_NF: Tensor, b_ND: Tensor, ends_E: Tensor) -> Tensor:
    """Sum the outer products of each expert's rows: ``a_e^T b_e``, the weight gradient of :func:`grouped_matmul`.

    Args:
        a_NF: Rows sorted by expert, ``[N, F]``.
        b_ND: Rows sorted by expert, ``[N, D]``.
        ends_E: End of each expert's rows, int32 ``[E]``.

    Returns:
        ``[E, F, D]``; zero for an expert without rows.
    """
    if _fits_grouped_mm(a_NF, b_ND):
        return F.grouped_mm(a_NF.mT, b_ND, offs=ends_E)
    sizes = torch.diff(ends_E, prepend=ends_E.new_zeros(1)).tolist()
    return torch.stack([a.mT @ b for a, b in zip(a_NF.split(sizes), b_ND.split(sizes), strict=True)])


@grouped_outer.register_fake
def _(a_NF: Tensor, b_ND: Tensor, ends_E: Tensor) -> Tensor:
    return a_NF.new_empty(ends_E.shape[0], a_NF.shape[1], b_ND.shape[1])


def _save_operands(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _matmul_backward(ctx, grad_NF):  # type: ignore[no-untyped-def]
    x_ND, weight_EFD, ends_E = ctx.saved_tensors
    grad_NF = grad_NF.contiguous()  # grouped_mm refuses an expanded gradient
    grad_x = grouped_matmul(grad_NF, weight_EFD.mT, ends_E) if ctx.needs_input_grad[0] else None
    grad_weight = grouped_outer(grad_NF, x_ND, ends_E) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight, None


def _outer_backward(ctx, grad_EFD):  # type: ignore[no-untyped-def]
    a_NF, b_ND, ends_E = ctx.saved_tensors
    grad_EFD = grad_EFD.contiguous()
    return grouped_matmul(b_ND, grad_EFD, ends_E), grouped_matmul(a_NF, grad_EFD.mT, ends_E), None


grouped_matmul.register_autograd(_matmul_backward, setup_context=_save_operands)
grouped_outer.register_autograd(_outer_backward, setup_context=_save_operands)


def _fits_grouped_mm(a: Tensor, b: Tensor) -> bool:
    """Whether torch's grouped product takes these operands: 16- or 32-bit floats in rows of whole 16 bytes."""
    if a.dtype not in (torch.float32, torch.bfloat16, torch.float16) or a.dtype != b.dtype:
        return False
    step = 16 // a.element_size()
    return a.numel() > 0 and all(
        size % step == 0 for size in (a.shape[-1], b.shape[-1], b.shape[-2] if b.dim() == 3 else step)
    )
