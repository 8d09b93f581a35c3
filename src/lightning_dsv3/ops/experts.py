"""The routed experts of a layer as one operation: ``y[t] = sum_k gate[t, k] * FFN_expert[t, k](x[t])``.

:func:`routed_experts_grouped` is the plain form: gather every (token, expert) pair, one grouped product for all
experts, combine. It keeps the gathered rows, which are K times the tokens, for the backward.

:func:`routed_experts` is what the layer calls. On a CPU it goes through the experts in blocks of some thousand pairs,
with one piece of memory for all blocks: fresh memory of the size of all pairs costs a page fault every 4 KB, which is
more time than the copy that fills it, and what a block writes is still in the cache when it is read. Gathered rows
are not kept but gathered again in the backward. Everywhere else it is the plain form.

Shapes: T tokens, K chosen experts per token, N = T*K pairs sorted by expert, E experts, D and F widths.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from lightning_dsv3.ops.dispatch import DispatchPlan, combine, grouped_matmul, permute
from lightning_dsv3.ops.linear import are_few_rows, few_rows_matmul
from lightning_dsv3.ops.swiglu import swiglu

# Rows of a block, unless one expert has more. A block's widest operand is then 2 MB per 256 columns of float32.
_BLOCK_ROWS = 2048


def routed_experts(x_TD: Tensor, gate_TK: Tensor, plan: DispatchPlan, gate_up_EGD: Tensor, down_EDF: Tensor) -> Tensor:
    """Compute every chosen (token, expert) pair and sum each token's.

    Args:
        x_TD: Tokens ``[T, D]``.
        gate_TK: Gate values, float32 ``[T, K]``.
        plan: Where each pair stands, of :func:`~lightning_dsv3.ops.dispatch.plan_dispatch`.
        gate_up_EGD: Gate above up projection of each expert, ``[E, 2F, D]``, dtype of ``x_TD``.
        down_EDF: Down projection of each expert, ``[E, D, F]``, dtype of ``x_TD``.

    Returns:
        ``[T, D]``, dtype of ``x_TD``. On a CPU it can be differentiated once.
    """
    if x_TD.device.type != "cpu":
        return routed_experts_grouped(x_TD, gate_TK, plan, gate_up_EGD, down_EDF)
    gate_N = _gate_of_pairs(gate_TK, plan, x_TD.dtype)
    if are_few_rows(x_TD):
        return _experts_of_few(x_TD, gate_N, plan, gate_up_EGD, down_EDF)
    y_TD, _ = _experts_in_blocks(x_TD, gate_N, plan.slot_token_N, plan.ends_E, gate_up_EGD, down_EDF)
    return y_TD


def routed_experts_grouped(
    x_TD: Tensor, gate_TK: Tensor, plan: DispatchPlan, gate_up_EGD: Tensor, down_EDF: Tensor
) -> Tensor:
    """As :func:`routed_experts`, by one grouped product per projection."""
    h_NF = swiglu(grouped_matmul(permute(x_TD, plan), gate_up_EGD, plan.ends_E))
    # Scaling before the linear `down` equals scaling after it, on F instead of D values.
    h_NF = h_NF * _gate_of_pairs(gate_TK, plan, h_NF.dtype).unsqueeze(-1)
    return combine(grouped_matmul(h_NF, down_EDF, plan.ends_E), plan, x_TD.shape[0])


def _experts_of_few(x_TD: Tensor, gate_N: Tensor, plan: DispatchPlan, gate_up_EGD: Tensor, down_EDF: Tensor) -> Tensor:
    """As :func:`routed_experts`, for so few tokens that reading the weights of the experts in use is all the work."""
    ends = plan.ends_E.tolist()
    used = [(e, slice(begin, end)) for e, (begin, end) in enumerate(pairwise([0, *ends])) if begin < end]
    x_ND = x_TD.index_select(0, plan.slot_token_N)
    z_NG = torch.cat([few_rows_matmul(x_ND[rows], gate_up_EGD[expert]) for expert, rows in used])
    h_NF = swiglu(z_NG) * gate_N.unsqueeze(-1)
    y_ND = torch.cat([few_rows_matmul(h_NF[rows], down_EDF[expert]) for expert, rows in used])
    return torch.zeros_like(x_TD).index_add_(0, plan.slot_token_N, y_ND)


def _gate_of_pairs(gate_TK: Tensor, plan: DispatchPlan, dtype: torch.dtype) -> Tensor:
    return gate_TK.flatten().index_select(0, plan.slot_pair_N).to(dtype)


# Registered operators, so that torch.compile takes the loops, whose lengths depend on the data, as a whole.
@torch.library.custom_op("lightning_dsv3::experts_in_blocks", mutates_args=())
def _experts_in_blocks(
    x_TD: Tensor, gate_N: Tensor, token_N: Tensor, ends_E: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the experts' sum ``[T, D]``, and gate and up of every pair ``[N, 2F]`` for the backward."""
    blocks = _Blocks(ends_E, x_TD, down_EDF.shape[2], skip_idle=True)
    y_TD = torch.zeros_like(x_TD, dtype=_sum_dtype(x_TD))
    z_NG = x_TD.new_empty(token_N.shape[0], gate_up_EGD.shape[1])
    gate_ups, downs = gate_up_EGD.mT.unbind(0), down_EDF.mT.unbind(0)
    for pairs, experts in blocks:
        tokens_n, z_nG = token_N[pairs], z_NG[pairs]
        x_nD, y_nD, h_nF = blocks.rows("x"), blocks.rows("y"), blocks.rows("h", wide=False)
        torch.index_select(x_TD, 0, tokens_n, out=x_nD)
        for expert, rows in experts:
            torch.mm(x_nD[rows], gate_ups[expert], out=z_nG[rows])
        gate_nF, up_nF = z_nG.chunk(2, dim=-1)
        torch.ops.aten.silu.out(gate_nF, out=h_nF)
        h_nF.mul_(up_nF).mul_(gate_N[pairs].unsqueeze(-1))
        for expert, rows in experts:
            torch.mm(h_nF[rows], downs[expert], out=y_nD[rows])
        y_TD.index_add_(0, tokens_n, y_nD.to(y_TD.dtype))
    return y_TD.to(x_TD.dtype), z_NG


@_experts_in_blocks.register_fake
def _(
    x_TD: Tensor, gate_N: Tensor, token_N: Tensor, ends_E: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_TD), x_TD.new_empty(token_N.shape[0], gate_up_EGD.shape[1])


@torch.library.custom_op("lightning_dsv3::experts_in_blocks_backward", mutates_args=())
def _experts_in_blocks_backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    gate_N: Tensor,
    token_N: Tensor,
    ends_E: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    z_NG: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of ``x_TD``, ``gate_N``, ``gate_up_EGD`` and ``down_EDF``."""
    blocks = _Blocks(ends_E, x_TD, down_EDF.shape[2])
    grad_x_TD = torch.zeros_like(x_TD, dtype=_sum_dtype(x_TD))
    grad_gate_N, grad_gate_up, grad_down = (torch.empty_like(t) for t in (gate_N, gate_up_EGD, down_EDF))
    gate_ups, downs = gate_up_EGD.unbind(0), down_EDF.unbind(0)
    grad_gate_ups, grad_downs = grad_gate_up.unbind(0), grad_down.unbind(0)
    for pairs, experts in blocks:
        tokens_n, gate_n1 = token_N[pairs], gate_N[pairs].unsqueeze(-1)
        gate_nF, up_nF = z_NG[pairs].chunk(2, dim=-1)
        x_nD, grad_nD = blocks.rows("x"), blocks.rows("y")
        h_nF, silu_nF, grad_h_nF = (blocks.rows(name, wide=False) for name in ("h", "silu", "grad_h"))
        grad_z_nG = blocks.rows("grad_z", wide=False, times=2)
        torch.index_select(grad_TD, 0, tokens_n, out=grad_nD)
        torch.ops.aten.silu.out(gate_nF, out=silu_nF)
        torch.mul(silu_nF, up_nF, out=h_nF)  # without the gate value
        for expert, rows in experts:
            torch.mm(grad_nD[rows], downs[expert], out=grad_h_nF[rows])
        grad_gate_N[pairs] = (grad_h_nF * h_nF).sum(dim=-1)
        h_nF.mul_(gate_n1)
        grad_h_nF.mul_(gate_n1)
        grad_gate_nF, grad_up_nF = grad_z_nG.chunk(2, dim=-1)
        torch.mul(grad_h_nF, silu_nF, out=grad_up_nF)
        torch.ops.aten.silu_backward.grad_input(grad_h_nF.mul_(up_nF), gate_nF, grad_input=grad_gate_nF)
        torch.index_select(x_TD, 0, tokens_n, out=x_nD)
        for expert, rows in experts:
            torch.mm(grad_nD[rows].mT, h_nF[rows], out=grad_downs[expert])
            torch.mm(grad_z_nG[rows].mT, x_nD[rows], out=grad_gate_ups[expert])
        for expert, rows in experts:
            torch.mm(grad_z_nG[rows], gate_ups[expert], out=grad_nD[rows])
        grad_x_TD.index_add_(0, tokens_n, grad_nD.to(grad_x_TD.dtype))
    return grad_x_TD.to(x_TD.dtype), grad_gate_N, grad_gate_up, grad_down


@_experts_in_blocks_backward.register_fake
def _(
    grad_TD: Tensor,
    x_TD: Tensor,
    gate_N: Tensor,
    token_N: Tensor,
    ends_E: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    z_NG: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradients = [torch.empty_like(t) for t in (x_TD, gate_N, gate_up_EGD, down_EDF)]
    return gradients[0], gradients[1], gradients[2], gradients[3]


def _save_for_backward(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_TD, _):  # type: ignore[no-untyped-def]
    x_TD, gate_N, token_N, ends_E, gate_up_EGD, down_EDF, z_NG = ctx.saved_tensors
    grad_x_TD, grad_gate_N, grad_gate_up, grad_down = _experts_in_blocks_backward(
        grad_TD.contiguous(), x_TD, gate_N, token_N, ends_E, gate_up_EGD, down_EDF, z_NG
    )
    return grad_x_TD, grad_gate_N, None, None, grad_gate_up, grad_down


_experts_in_blocks.register_autograd(_backward, setup_context=_save_for_backward)


class _Blocks:
    """Neighbouring experts in blocks of at least one expert and about ``_BLOCK_ROWS`` pairs, and memory for a block.

    Iterating yields the slice of a block's pairs, and its experts with the slice of each one's rows in the block;
    ``skip_idle`` leaves out experts without rows, so that a few tokens touch the weights of the few experts they use.
    """

    def __init__(self, ends_E: Tensor, like_TD: Tensor, expert_dim: int, *, skip_idle: bool = False) -> None:
        ends = ends_E.tolist()
        self._plan: list[tuple[slice, list[tuple[int, slice]]]] = []
        start, begin = 0, 0
        experts: list[tuple[int, slice]] = []
        for expert, end in enumerate(ends):
            if skip_idle and end == begin:
                continue
            if experts and end - start > _BLOCK_ROWS:
                self._plan.append((slice(start, begin), experts))
                start, experts = begin, []
            experts.append((expert, slice(begin - start, end - start)))
            begin = end
        self._plan.append((slice(start, begin), experts))
        self._most = max(pairs.stop - pairs.start for pairs, _ in self._plan)
        self._size = 0
        self._like, self._dim, self._expert_dim = like_TD, like_TD.shape[1], expert_dim
        self._memory: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[tuple[slice, list[tuple[int, slice]]]]:
        for pairs, experts in self._plan:
            self._size = pairs.stop - pairs.start
            yield pairs, experts

    def rows(self, name: str, *, wide: bool = True, times: int = 1) -> Tensor:
        """Return the memory ``name`` cut to this block: rows of D (``wide``) or ``times`` F values."""
        if name not in self._memory:
            width = self._dim if wide else times * self._expert_dim
            self._memory[name] = self._like.new_empty(self._most, width)
        return self._memory[name][: self._size]


def _sum_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that a token's K experts are summed in: bfloat16 would round after each."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
