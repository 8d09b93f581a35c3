"""Causal attention of MLA's heads: from projections to queries, keys and values, and the attention itself.

torch's fused kernels want one width for queries, keys and values and otherwise fall back to a form that stores all
scores. Zeros behind the narrower side change neither scores nor values, and keep the fused kernel.

Documents that are packed into one row are kept apart by a mask that all blocks share: one more tensor of B * S * S
numbers (4096 positions in bfloat16: 34 MB per row) and no more per block. A causal kernel leaves out the half of the
scores above the diagonal, and one with a mask does not: in long rows scores then cost up to twice the time.

Shapes: B batch, S sequence, H heads, Q = nope + rope query and key width, R rotary width, V value width, U = nope + V.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dsv3.ops.rope import apply_rope, unapply_rope


class Positions(NamedTuple):
    """Where the tokens of a row stand and whom they attend to, which is the same in every block.

    Attributes:
        cos: Cosines ``[S, R / 2]`` or ``[B, S, R / 2]``, of :func:`~lightning_dsv3.ops.rope.rope_table`.
        sin: Sines, likewise.
        mask: What is added to the scores, ``[B, 1, S, S]``, of :func:`document_mask`; None where every position
            attends to itself and to all before it.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | None = None

    def first(self, length: int) -> Positions:
        """Return what holds for the first ``length`` positions alone."""
        mask = None if self.mask is None else self.mask[..., :length, :length]
        return Positions(self.cos[..., :length, :], self.sin[..., :length, :], mask)

    def unpacked(self, unpack: Callable[[Tensor], Tensor]) -> Positions:
        """Return the positions of rows that ``unpack`` puts side by side; those that all rows share stay."""
        if self.cos.dim() == 2:
            return self
        return Positions(unpack(self.cos), unpack(self.sin), self.mask)


class Heads(NamedTuple):
    """Queries, keys and values of one width W, the larger of query and value width; zeros fill up the narrower.

    Attributes:
        q_BHSW: Queries, rotary part turned.
        k_BHSW: Keys, the shared rotary part turned and given to every head.
        v_BHSW: Values.
    """

    q_BHSW: Tensor
    k_BHSW: Tensor
    v_BHSW: Tensor


def latent_heads(
    q_BSHQ: Tensor, kv_BSHU: Tensor, k_rope_BSR: Tensor, cos: Tensor, sin: Tensor, *, v_head_dim: int
) -> Heads:
    """Turn rotary parts and put each head's parts together (report, eq. 3-9), one copy of each element.

    Args:
        q_BSHQ: Per head the part without position, then the R rotary values, ``[B, S, H, Q]``.
        kv_BSHU: Per head the key without position (Q - R values), then the value, ``[B, S, H, Q - R + V]``.
        k_rope_BSR: The rotary key that all heads share, ``[B, S, R]``.
        cos: Cosines ``[S, R / 2]`` or ``[B, S, R / 2]``, of :func:`~lightning_dsv3.ops.rope.rope_table`.
        sin: Sines, likewise.
        v_head_dim: Value width V.

    Returns:
        Queries, keys and values for :func:`causal_attention`; can be differentiated once.
    """
    return Heads(*_LatentHeads.apply(q_BSHQ, kv_BSHU, k_rope_BSR, cos, sin, v_head_dim))


def document_mask(document_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask by which a position attends to itself and to earlier positions of its own document.

    Args:
        document_BS: Number of each position's document, int64 ``[B, S]``.
        dtype: What attention computes in.

    Returns:
        0 or minus infinity, ``[B, 1, S, S]``: query, then key. No row is without a 0, as a position attends to itself.

    >>> document_mask(torch.tensor([[0, 0, 1]]), torch.float32)[0, 0]
    tensor([[0., -inf, -inf],
            [0., 0., -inf],
            [-inf, -inf, 0.]])
    """
    # Not boolean: torch would make this very tensor from it anew in every block, and keep each one for the backward.
    attended_BSS = (document_BS.unsqueeze(2) == document_BS.unsqueeze(1)).tril()
    mask_BSS = torch.zeros(attended_BSS.shape, dtype=dtype, device=document_BS.device)
    return mask_BSS.masked_fill_(~attended_BSS, float("-inf")).unsqueeze(1)


def causal_attention(heads: Heads, *, scale: float, v_head_dim: int, mask: Tensor | None = None) -> Tensor:
    """Attend to this and earlier positions.

    Args:
        heads: Queries, keys and values.
        scale: Factor on the scores.
        v_head_dim: Value width V.
        mask: What is added to the scores, ``[B, 1, S, S]``, and alone says who attends to whom
            (:func:`document_mask`); None for all earlier positions.

    Returns:
        ``[B, H, S, V]``.
    """
    q, k, v = heads
    if mask is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype), scale=scale)
    return out[..., :v_head_dim]


# Autograd's own way here is a copy for every slice, concatenation and padding, and as many zero-filled tensors back.
class _LatentHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BSHQ, kv_BSHU, k_rope_BSR, cos, sin, v_head_dim):  # type: ignore[no-untyped-def]
        nope = kv_BSHU.shape[-1] - v_head_dim
        width = max(q_BSHQ.shape[-1], v_head_dim)
        q, k, v = (q_BSHQ.new_empty(*q_BSHQ.shape[:3], width) for _ in range(3))
        q[..., :nope] = q_BSHQ[..., :nope]
        q[..., nope : q_BSHQ.shape[-1]] = apply_rope(q_BSHQ[..., nope:], cos, sin)
        k[..., :nope] = kv_BSHU[..., :nope]
        k[..., nope : q_BSHQ.shape[-1]] = apply_rope(k_rope_BSR, cos, sin).unsqueeze(2)
        v[..., :v_head_dim] = kv_BSHU[..., nope:]
        for padded, used in ((q, q_BSHQ.shape[-1]), (k, q_BSHQ.shape[-1]), (v, v_head_dim)):
            padded[..., used:] = 0
        ctx.save_for_backward(cos, sin)
        ctx.nope, ctx.qk_dim, ctx.v_head_dim = nope, q_BSHQ.shape[-1], v_head_dim
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_q, grad_k, grad_v):  # type: ignore[no-untyped-def]
        cos, sin = ctx.saved_tensors
        nope, rope = ctx.nope, slice(ctx.nope, ctx.qk_dim)
        grad_q, grad_k, grad_v = (grad.transpose(1, 2) for grad in (grad_q, grad_k, grad_v))
        q_BSHQ = grad_q.new_empty(*grad_q.shape[:3], ctx.qk_dim)
        q_BSHQ[..., :nope] = grad_q[..., :nope]
        q_BSHQ[..., nope:] = unapply_rope(grad_q[..., rope], cos, sin)
        kv_BSHU = grad_q.new_empty(*grad_q.shape[:3], nope + ctx.v_head_dim)
        kv_BSHU[..., :nope] = grad_k[..., :nope]
        kv_BSHU[..., nope:] = grad_v[..., : ctx.v_head_dim]
        # Every head has had the one rotary key; the sum over heads is made in float32.
        k_rope_BSR = unapply_rope(grad_k[..., rope].sum(dim=2, dtype=torch.float32), cos, sin)
        return q_BSHQ, kv_BSHU, k_rope_BSR.to(grad_k.dtype), None, None, None
