"""From tokens to experts and back: permutation, one matrix product for all experts, combination.

    expert_TK --sort--> slots sorted by expert      every chosen (token, expert) pair has one slot, none is dropped
    x_TD --permute--> x_ND --grouped_matmul--> y_ND --combine--> y_TD

Products of FP8 tiles want each expert's rows in multiples of 16: then some slots are padding, which belongs to no
token. Rows there are zero on the way to the experts, and whatever they are on the way back, nobody reads them.

Shapes: T tokens, K chosen experts per token, N slots (T*K without padding), E experts, D and F widths.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dsv3.ops.backends import chosen


class DispatchPlan(NamedTuple):
    """Where each chosen (token, expert) pair stands once slots are sorted by expert.

    Attributes:
        slot_token_N: Token in each slot, int64 ``[N]``; -1 in padding.
        slot_pair_N: Pair ``token * K + k`` in each slot, int64 ``[N]``; -1 in padding.
        pair_slot_N: Slot of each pair; without padding the inverse permutation, int64 ``[T * K]``.
        ends_E: End of each expert's slots, its padding included, int32 ``[E]``; an expert without tokens has an empty
            range.
    """

    slot_token_N: Tensor
    slot_pair_N: Tensor
    pair_slot_N: Tensor
    ends_E: Tensor


def plan_dispatch(expert_TK: Tensor, num_experts: int, align: int = 1) -> DispatchPlan:
    """Sort pairs by expert; within an expert tokens keep their order, so that results are reproducible.

    The number of slots is known without a look at the choices, so that the host never waits for the GPU: with ``align``
    it is the largest that the padding of ``min(E, T*K)`` experts can need, ``T*K + min(E, T*K) * (align - 1)`` rounded
    down to a multiple. What is not needed stands behind ``ends_E[-1]`` and is padding too.

    Args:
        expert_TK: Chosen experts, int64 ``[T, K]``.
        num_experts: E.
        align: Each expert's slots are padded to a multiple of this; 16 for products of FP8 tiles.

    Raises:
        ValueError: ``align`` is below 1.

    >>> plan = plan_dispatch(torch.tensor([[2], [0], [2]]), num_experts=3, align=2)
    >>> plan.ends_E.tolist(), plan.slot_token_N.tolist()
    ([2, 2, 4], [1, -1, 0, 2, -1, -1])
    """
    if align < 1:
        raise ValueError(f"align={align}: give what each expert's slots are a multiple of, 1 or more")
    sorted_P, pair_P = expert_TK.flatten().sort(stable=True)
    experts_E = torch.arange(num_experts, device=expert_TK.device)
    # searchsorted, not bincount: it needs no synchronisation with the host on a GPU.
    ends_E = torch.searchsorted(sorted_P, experts_E, right=True)
    slot_P = torch.arange(pair_P.numel(), device=pair_P.device)
    slot_pair_N = pair_P
    if align > 1:
        counts_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1))
        padding_E = -counts_E % align
        slot_P += (padding_E.cumsum(0) - padding_E)[sorted_P]
        ends_E = ends_E + padding_E.cumsum(0)
        most = pair_P.numel() + min(num_experts, pair_P.numel()) * (align - 1)
        slot_pair_N = pair_P.new_full((most // align * align,), -1).scatter_(0, slot_P, pair_P)
    pair_slot_N = torch.empty_like(pair_P).scatter_(0, pair_P, slot_P)
    # The floor of -1 / K is -1.
    return DispatchPlan(slot_pair_N // expert_TK.shape[1], slot_pair_N, pair_slot_N, ends_E.to(torch.int32))


def permute(x_TD: Tensor, plan: DispatchPlan) -> Tensor:
    """Copy each token's row into its K slots: ``[T, D]`` to ``[N, D]``; zeros where a slot is padding."""
    return _Permute.apply(x_TD, None, plan.slot_token_N, plan.pair_slot_N)


def combine(y_ND: Tensor, plan: DispatchPlan, num_tokens: int, gate_TK: Tensor | None = None) -> Tensor:
    """Sum each token's K slots: ``[N, D]`` to ``[T, D]``. Without gate values, the transpose of :func:`permute`.

    Args:
        y_ND: Rows sorted by expert; those in padding are not read.
        plan: Where each pair stands.
        num_tokens: T.
        gate_TK: What each slot's row is multiplied with, ``[T, K]``. Products are summed in float32 (float64 for
            float64) and rounded once, to the dtype of ``y_ND``.
    """
    return _Combine.apply(y_ND, gate_TK, plan.slot_token_N, plan.pair_slot_N, num_tokens)


# permute and combine are each other's transposes, with gate values too, and the gradient of a gate value is the product
# of two rows; so these three are each other's gradients. Autograd's own backward of indexing would scatter with atomics
# or one by one; as the index is a permutation, gathering and summing K neighbours is the same, quick and reproducible.
class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, gate_TK, slot_token_N, pair_slot_N):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(None if gate_TK is None else x_TD, gate_TK, slot_token_N, pair_slot_N)
        ctx.num_tokens = x_TD.shape[0]
        if chosen("permute", x_TD) == "triton":
            from lightning_dsv3.ops.triton import permute as kernels

            return kernels.permute(x_TD, gate_TK, slot_token_N, pair_slot_N)
        return _permuted(x_TD, gate_TK, slot_token_N, pair_slot_N)

    @staticmethod
    def backward(ctx, grad_ND):  # type: ignore[no-untyped-def]
        x_TD, gate_TK, slot_token_N, pair_slot_N = ctx.saved_tensors
        grad_x_TD = _Combine.apply(grad_ND, gate_TK, slot_token_N, pair_slot_N, ctx.num_tokens)
        grad_gate_TK = None
        if ctx.needs_input_grad[1]:
            grad_gate_TK = _Dots.apply(x_TD, grad_ND, slot_token_N, pair_slot_N).to(gate_TK.dtype).view(gate_TK.shape)
        return grad_x_TD, grad_gate_TK, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_ND, gate_TK, slot_token_N, pair_slot_N, num_tokens):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(None if gate_TK is None else y_ND, gate_TK, slot_token_N, pair_slot_N)
        if chosen("permute", y_ND) == "triton":
            from lightning_dsv3.ops.triton import permute as kernels

            return kernels.combine(y_ND, gate_TK, pair_slot_N, num_tokens)
        return _combined(y_ND, gate_TK, pair_slot_N, num_tokens)

    @staticmethod
    def backward(ctx, grad_TD):  # type: ignore[no-untyped-def]
        y_ND, gate_TK, slot_token_N, pair_slot_N = ctx.saved_tensors
        grad_y_ND = _Permute.apply(grad_TD, gate_TK, slot_token_N, pair_slot_N)
        grad_gate_TK = None
        if ctx.needs_input_grad[1]:
            grad_gate_TK = _Dots.apply(grad_TD, y_ND, slot_token_N, pair_slot_N).to(gate_TK.dtype).view(gate_TK.shape)
        return grad_y_ND, grad_gate_TK, None, None, None


class _Dots(torch.autograd.Function):
    """Products of each token's row with its slots' rows, ``[T, K]``, in the dtype that sums have."""

    @staticmethod
    def forward(ctx, a_TD, b_ND, slot_token_N, pair_slot_N):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(a_TD, b_ND, slot_token_N, pair_slot_N)
        if chosen("permute", a_TD) == "triton":
            from lightning_dsv3.ops.triton import permute as kernels

            return kernels.dots(a_TD, b_ND, pair_slot_N)
        return _dots(a_TD, b_ND, pair_slot_N)

    @staticmethod
    def backward(ctx, grad_TK):  # type: ignore[no-untyped-def]
        a_TD, b_ND, slot_token_N, pair_slot_N = ctx.saved_tensors
        grad_a_TD = _Combine.apply(b_ND, grad_TK, slot_token_N, pair_slot_N, a_TD.shape[0])
        return grad_a_TD, _Permute.apply(a_TD, grad_TK, slot_token_N, pair_slot_N), None, None


def _permuted(x_TD: Tensor, gate_TK: Tensor | None, slot_token_N: Tensor, pair_slot_N: Tensor) -> Tensor:
    slots = slot_token_N.shape[0]
    padding_N1 = None
    if slots != pair_slot_N.shape[0]:
        padding_N1 = (slot_token_N < 0).unsqueeze(-1)
        slot_token_N = slot_token_N.clamp(min=0)
    x_ND = x_TD.index_select(0, slot_token_N)
    if gate_TK is not None:
        gate_N = gate_TK.new_zeros(slots).scatter_(0, pair_slot_N, gate_TK.flatten())
        x_ND = (x_ND.to(_sum_dtype(x_ND)) * gate_N.unsqueeze(-1)).to(x_ND.dtype)
    return x_ND if padding_N1 is None else x_ND.masked_fill_(padding_N1, 0)


def _combined(y_ND: Tensor, gate_TK: Tensor | None, pair_slot_N: Tensor, num_tokens: int) -> Tensor:
    y_TKD = _pair_rows(y_ND, pair_slot_N, num_tokens)
    if gate_TK is None:
        return y_TKD.sum(dim=1)
    return (y_TKD.to(_sum_dtype(y_TKD)) * gate_TK.unsqueeze(-1)).sum(dim=1).to(y_ND.dtype)


def _dots(a_TD: Tensor, b_ND: Tensor, pair_slot_N: Tensor) -> Tensor:
    b_TKD = _pair_rows(b_ND, pair_slot_N, a_TD.shape[0])
    return (a_TD.unsqueeze(1).to(_sum_dtype(a_TD)) * b_TKD).sum(dim=-1)


def _pair_rows(y_ND: Tensor, pair_slot_N: Tensor, num_tokens: int) -> Tensor:
    choices = pair_slot_N.shape[0] // max(num_tokens, 1)
    return y_ND.index_select(0, pair_slot_N).view(num_tokens, choices, y_ND.shape[-1])


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


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
    if _takes_grouped_mm(x_ND, weight_EFD):
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
    if _takes_grouped_mm(a_NF, b_ND):
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


def _takes_grouped_mm(a: Tensor, b: Tensor) -> bool:
    if not a.numel():  # no rows, in this call: nothing to choose
        return False
    choice = chosen(
        "grouped_matmul",
        a,
        mixed=a.dtype != b.dtype,
        a_width=a.shape[-1],
        b_width=b.shape[-1],
        b_rows=b.shape[-2] if b.dim() == 3 else 0,
    )
    return choice == "grouped_mm"
