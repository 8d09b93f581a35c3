"""The kernels that compute causal attention; :mod:`lightning_dsv3.ops.backends` chooses among them.

    plain           explicit scores and a softmax in float32: the truth. Any device and dtype, S * S numbers per head;
                    can be differentiated twice
    sdpa            torch's scaled_dot_product_attention
    flex            torch's flex_attention, compiled, for packed rows on CUDA: skips blocks that no document reaches
    flash_attn_3    FlashAttention 3 on Hopper, if it is installed (https://github.com/Dao-AILab/flash-attention,
                    folder hopper); packed rows as sequences of various lengths

MLA's values are narrower than its queries (released models: 192 and 128). What takes which widths, read in the sources
of torch 2.13 and of FlashAttention's main branch:

    CPU, flash              one width; others go to a form that stores all scores
    CUDA, flash             one width up to 256, bfloat16 and float16, no mask
    CUDA, memory-efficient  any two widths, multiples of 8 (float32: of 4), also with a mask
    CUDA, cuDNN             192 and 128 on Hopper and Blackwell from cuDNN 9.11 on
    flex                    any two widths from 16 on
    FlashAttention 3        192 and 128 forward; backward since April 2025 (pull request 1604), by rounding both up

:func:`needs_one_width` says where zeros behind the narrower side serve best. They change neither scores nor values, and
are written with the rest of a head. cuDNN's two widths are not relied on, as its choice depends on the version that is
found. With a mask cuDNN is left out altogether: its backward gave NaN on Hopper for some lengths (torch issue 196678).

Shapes: B batch, S sequence, H heads, Q query and key width, V value width.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_dsv3.ops.documents import Documents, document_block_mask

_HALF = (torch.bfloat16, torch.float16)

Kernel = Callable[[Tensor, Tensor, Tensor, float, Documents | None], Tensor]
"""From queries ``[B, H, S, Q]``, keys, values ``[B, H, S, V]``, scale and documents to ``[B, H, S, V]``."""


def needs_one_width(
    name: str, *, device: str, dtype: torch.dtype, qk_head_dim: int, v_head_dim: int, packed: bool
) -> bool:
    """Whether a kernel wants queries, keys and values of one width.

    Args:
        name: Of the kernel.
        device: Type of the device.
        dtype: Of the operands.
        qk_head_dim: Width of queries and keys.
        v_head_dim: Width of values.
        packed: Whether documents share rows.
    """
    if name in ("plain", "flex") or qk_head_dim == v_head_dim:
        return False
    if name == "flash_attn_3":
        # A forward takes these two; a backward with two widths is too new to be relied on.
        takes_both = 128 < qk_head_dim <= 192 and 96 < v_head_dim <= 128
        return torch.is_grad_enabled() or not takes_both
    if device != "cuda":
        return True
    return not packed and dtype in _HALF and max(qk_head_dim, v_head_dim) <= 256


def plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Documents | None) -> Tensor:
    """Attend by the formula, in float32, or in float64 where the operands are."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        scores = q.to(dtype) @ k.to(dtype).mT * scale
        if documents is None:
            later_SS = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(later_SS, float("-inf"))
        else:
            scores = scores + documents.added_mask(dtype)
        return (scores.softmax(-1) @ v.to(dtype)).to(v.dtype)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Documents | None) -> Tensor:
    """Attend by torch's own choice of a kernel."""
    if documents is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    with _kernels_with_a_mask(q.device.type):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=documents.added_mask(q.dtype), scale=scale)


def flex_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Documents | None) -> Tensor:
    """Attend by a kernel compiled for the block mask; on the CPU by torch's form of it, which stores all scores."""
    from torch.nn.attention.flex_attention import flex_attention as eager

    if documents is None:
        block_mask = document_block_mask(torch.zeros(q.shape[0], q.shape[2], dtype=torch.int64, device=q.device))
    else:
        block_mask = documents.blocks()
    # Inside a graph that is being compiled it becomes part of that graph.
    if q.device.type == "cpu" or torch.compiler.is_compiling():
        return eager(q, k, v, block_mask=block_mask, scale=scale)
    return _compiled_flex_attention()(q, k, v, block_mask=block_mask, scale=scale)


def flash_attention_3(q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Documents | None) -> Tensor:
    """Attend by the installed FlashAttention 3."""
    import flash_attn_interface as flash  # type: ignore[import-not-found]

    options = {"softmax_scale": scale, "causal": True, "deterministic": torch.are_deterministic_algorithms_enabled()}
    q_BSHQ, k_BSHQ, v_BSHV = (x.transpose(1, 2) for x in (q, k, v))
    if documents is None:
        return _output(flash.flash_attn_func(q_BSHQ, k_BSHQ, v_BSHV, **options)).transpose(1, 2)
    starts, longest = documents.in_a_line()
    out = flash.flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in (q_BSHQ, k_BSHQ, v_BSHV)),
        cu_seqlens_q=starts,
        cu_seqlens_k=starts,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        **options,
    )
    return _output(out).unflatten(0, q_BSHQ.shape[:2]).transpose(1, 2)


ATTENTION_KERNELS: dict[str, Kernel] = {
    "plain": plain_attention,
    "sdpa": sdpa_attention,
    "flex": flex_attention,
    "flash_attn_3": flash_attention_3,
}


def _kernels_with_a_mask(device: str) -> AbstractContextManager[None]:
    if device != "cuda":
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention as eager

    # As one graph or not at all: a break would leave the form that stores all scores.
    return torch.compile(eager, fullgraph=True)


def _output(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    # Earlier releases return the logarithms of the softmax's sums as well.
    return result if isinstance(result, Tensor) else result[0]
