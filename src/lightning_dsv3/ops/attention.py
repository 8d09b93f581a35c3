"""Causal attention of MLA's heads: from projections to queries, keys and values, and the attention itself.

torch's fused kernels want one width for queries, keys and values and otherwise fall back to a form that stores all
scores. Zeros behind the narrower side change neither scores nor values, and keep the fused kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dsv3.ops.rope import apply_rope, unapply_rope


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


def causal_attention(heads: Heads, *, scale: float, v_head_dim: int) -> Tensor:
    """Attend to this and earlier positions.

    Args:
        heads: Queries, keys and values.
        scale: Factor on the scores.
        v_head_dim: Value width V.

    Returns:
        ``[B, H, S, V]``.
    """
    out = F.scaled_dot_product_attention(heads.q_BHSW, heads.k_BHSW, heads.v_BHSW, is_causal=True, scale=scale)
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
