"""Causal attention for heads whose value width differs from their query and key width."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def causal_attention(q_BHSQ: Tensor, k_BHSQ: Tensor, v_BHSV: Tensor, *, scale: float) -> Tensor:
    """Attend to this and earlier positions.

    torch's fused kernels want one width for queries, keys and values and otherwise fall back to a form that stores all
    scores. Zeros behind the narrower side change neither scores nor values, and keep the fused kernel.

    Args:
        q_BHSQ: Queries ``[B, H, S, Q]``.
        k_BHSQ: Keys ``[B, H, S, Q]``.
        v_BHSV: Values ``[B, H, S, V]``.
        scale: Factor on the scores.

    Returns:
        ``[B, H, S, V]``.
    """
    qk_dim, v_dim = q_BHSQ.shape[-1], v_BHSV.shape[-1]
    if v_dim < qk_dim:
        v_BHSV = F.pad(v_BHSV, (0, qk_dim - v_dim))
    elif qk_dim < v_dim:
        q_BHSQ, k_BHSQ = F.pad(q_BHSQ, (0, v_dim - qk_dim)), F.pad(k_BHSQ, (0, v_dim - qk_dim))
    out = F.scaled_dot_product_attention(q_BHSQ, k_BHSQ, v_BHSV, is_causal=True, scale=scale)
    return out[..., :v_dim]
