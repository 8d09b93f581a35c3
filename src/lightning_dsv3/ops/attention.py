"""Causal attention of MLA's heads: from projections to queries, keys and values, and the attention itself.

:mod:`lightning_dsv3.ops.attention_kernels` lists the kernels, with what they want of the heads' widths, and
:mod:`lightning_dsv3.ops.documents` what they are told of documents that share a row.

Shapes: B batch, S sequence, H heads, Q = nope + rope query and key width, R rotary width, V value width, U = nope + V.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dsv3.ops.attention_kernels import ATTENTION_KERNELS, needs_one_width
from lightning_dsv3.ops.backends import chosen
from lightning_dsv3.ops.documents import Documents
from lightning_dsv3.ops.rope import apply_rope, unapply_rope


class Positions(NamedTuple):
    """Where the tokens of a row stand and whom they attend to, which is the same in every block.

    Attributes:
        cos: Cosines ``[S, R / 2]`` or ``[B, S, R / 2]``, of :func:`~lightning_dsv3.ops.rope.rope_table`.
        sin: Sines, likewise.
        documents: Which of a row's documents they belong to; None where every position attends to itself and to all
            before it.
    """

    cos: Tensor
    sin: Tensor
    documents: Documents | None = None

    def first(self, length: int) -> Positions:
        """Return what holds for the first ``length`` positions alone."""
        documents = None if self.documents is None else self.documents.first(length)
        return Positions(self.cos[..., :length, :], self.sin[..., :length, :], documents)

    def unpacked(self, unpack: Callable[[Tensor], Tensor]) -> Positions:
        """Return the positions of rows that ``unpack`` puts side by side; those that all rows share stay."""
        if self.cos.dim() == 2:
            return self
        return Positions(unpack(self.cos), unpack(self.sin), self.documents)


class Heads(NamedTuple):
    """Queries, keys and values, each head's in the widths that the kernel wants.

    Attributes:
        q_BHSW: Queries, rotary part turned.
        k_BHSW: Keys, the shared rotary part turned and given to every head.
        v_BHSW: Values.
    """

    q_BHSW: Tensor
    k_BHSW: Tensor
    v_BHSW: Tensor


class AttentionKernel(NamedTuple):
    """What computes attention.

    Attributes:
        name: Implementation of ``attention`` in :data:`lightning_dsv3.config.kernels.KERNELS`.
        one_width: It wants queries, keys and values of one width.
    """

    name: str
    one_width: bool


def attention_kernel(like: Tensor, *, qk_head_dim: int, v_head_dim: int, packed: bool) -> AttentionKernel:
    """Choose what computes attention.

    Args:
        like: A tensor with the queries' device and dtype.
        qk_head_dim: Width Q of queries and keys.
        v_head_dim: Width V of values.
        packed: Whether documents share rows.

    Raises:
        ValueError: ``kernels.attention`` names one that cannot take this.

    >>> attention_kernel(torch.empty(1), qk_head_dim=192, v_head_dim=128, packed=False)
    AttentionKernel(name='sdpa', one_width=True)
    """
    widths = {"qk_head_dim": qk_head_dim, "v_head_dim": v_head_dim}
    name = chosen("attention", like, packed=packed, **widths)
    one_width = needs_one_width(name, device=like.device.type, dtype=like.dtype, packed=packed, **widths)
    return AttentionKernel(name, one_width)


def latent_heads(
    q_BSHQ: Tensor,
    kv_BSHU: Tensor,
    k_rope_BSR: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    v_head_dim: int,
    one_width: bool = True,
) -> Heads:
    """Turn rotary parts and put each head's parts together (report, eq. 3-9), one copy of each element.

    Args:
        q_BSHQ: Per head the part without position, then the R rotary values, ``[B, S, H, Q]``.
        kv_BSHU: Per head the key without position (Q - R values), then the value, ``[B, S, H, Q - R + V]``.
        k_rope_BSR: The rotary key that all heads share, ``[B, S, R]``.
        cos: Cosines ``[S, R / 2]`` or ``[B, S, R / 2]``, of :func:`~lightning_dsv3.ops.rope.rope_table`.
        sin: Sines, likewise.
        v_head_dim: Value width V.
        one_width: Fill up the narrower of Q and V with zeros.

    Returns:
        Queries, keys and values for :func:`causal_attention`; can be differentiated once.
    """
    return Heads(*_LatentHeads.apply(q_BSHQ, kv_BSHU, k_rope_BSR, cos, sin, v_head_dim, one_width))


def causal_attention(
    heads: Heads,
    *,
    scale: float,
    v_head_dim: int,
    documents: Documents | None = None,
    kernel: AttentionKernel | None = None,
) -> Tensor:
    """Attend to this and earlier positions.

    Args:
        heads: Queries, keys and values.
        scale: Factor on the scores.
        v_head_dim: Value width V.
        documents: Documents of packed rows; a position then attends to its own document alone.
        kernel: What the heads were made for; None chooses by the widths they have.

    Returns:
        ``[B, H, S, V]``.
    """
    q, k, v = heads
    if kernel is None:
        packed = documents is not None
        kernel = attention_kernel(q, qk_head_dim=q.shape[-1], v_head_dim=v.shape[-1], packed=packed)
    return ATTENTION_KERNELS[kernel.name](q, k, v, scale, documents)[..., :v_head_dim]


# Autograd's own way here is a copy for every slice, concatenation and padding, and as many zero-filled tensors back.
class _LatentHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BSHQ, kv_BSHU, k_rope_BSR, cos, sin, v_head_dim, one_width):  # type: ignore[no-untyped-def]
        nope, qk_dim = kv_BSHU.shape[-1] - v_head_dim, q_BSHQ.shape[-1]
        used = (qk_dim, qk_dim, v_head_dim)
        widths = (max(used),) * 3 if one_width else used
        q, k, v = (q_BSHQ.new_empty(*q_BSHQ.shape[:3], width) for width in widths)
        q[..., :nope] = q_BSHQ[..., :nope]
        q[..., nope:qk_dim] = apply_rope(q_BSHQ[..., nope:], cos, sin)
        k[..., :nope] = kv_BSHU[..., :nope]
        k[..., nope:qk_dim] = apply_rope(k_rope_BSR, cos, sin).unsqueeze(2)
        v[..., :v_head_dim] = kv_BSHU[..., nope:]
        for padded, width in zip((q, k, v), used, strict=True):
            padded[..., width:] = 0
        ctx.save_for_backward(cos, sin)
        ctx.nope, ctx.qk_dim, ctx.v_head_dim = nope, qk_dim, v_head_dim
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
        return q_BSHQ, kv_BSHU, k_rope_BSR.to(grad_k.dtype), None, None, None, None
