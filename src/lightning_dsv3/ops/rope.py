"""Rotary position embedding with YaRN (arXiv 2309.00071), in DeepSeek's interleaved pairing.

Dimensions (0, 1), (2, 3), ... of a head turn together, as in the released weights. The result is written first halves
first, ``[x0', x2', ..., x1', x3', ...]``: queries and keys get the same order, so no score changes, and one copy is
saved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def rope_table(
    positions: Tensor, *, dim: int, theta: float, scaling: Mapping[str, Any] | None = None
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines for positions.

    Args:
        positions: Token positions, integers ``[S]`` or ``[B, S]``.
        dim: Rotary width of a head, even.
        theta: Base of the frequencies.
        scaling: None, or YaRN's fields as in ``DeepSeekV3Config.rope_scaling``.

    Returns:
        ``(cos, sin)``, float32 ``[..., S, dim / 2]``, YaRN's attention factor included.
    """
    # Recomputed in float32 at each call: a buffer would be cast by `.to(bfloat16)` and turn far positions by wrong
    # angles.
    pair = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
    frequency = 1.0 / theta**pair
    factor = 1.0
    if scaling is not None:
        frequency = _yarn_frequency(frequency, dim, theta, scaling)
        factor = _table_factor(scaling)
    angle = positions.to(torch.float32).unsqueeze(-1) * frequency
    return angle.cos() * factor, angle.sin() * factor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn interleaved pairs by their angles, in float32.

    Args:
        x: ``[B, S, ..., dim]``, any floating dtype.
        cos: ``[S, dim / 2]`` or ``[B, S, dim / 2]`` of :func:`rope_table`.
        sin: Like ``cos``.

    Returns:
        Like ``x``, each pair's first parts in the first half of the last dimension.
    """
    cos, sin = _beside_heads(cos, x), _beside_heads(sin, x)
    a, b = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def unapply_rope(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn back and interleave again: the transpose of :func:`apply_rope`, and so its gradient.

    Args:
        y: ``[B, S, ..., dim]`` in the order that :func:`apply_rope` returns.
        cos: As there.
        sin: As there.

    Returns:
        Like ``y``, pairs interleaved.
    """
    cos, sin = _beside_heads(cos, y), _beside_heads(sin, y)
    a, b = y.float().chunk(2, dim=-1)
    return torch.stack([a * cos + b * sin, b * cos - a * sin], dim=-1).flatten(-2).to(y.dtype)


def _beside_heads(table: Tensor, x: Tensor) -> Tensor:
    """Give a table ``[..., S, dim / 2]`` the dimensions that ``x`` has between the sequence and the width."""
    for _ in range(x.dim() - 3):
        table = table.unsqueeze(-2)
    return table


def softmax_scale(qk_head_dim: int, scaling: Mapping[str, Any] | None = None) -> float:
    """Return the factor on attention scores: ``qk_head_dim^-0.5``, times m^2 where YaRN's ``mscale_all_dim`` is given.

    >>> round(softmax_scale(192, {"factor": 40, "mscale_all_dim": 1.0}), 6)
    0.135234
    """
    scale = qk_head_dim**-0.5
    if scaling is not None and scaling.get("mscale_all_dim"):
        scale *= _mscale(scaling["factor"], scaling["mscale_all_dim"]) ** 2
    return scale


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _table_factor(scaling: Mapping[str, Any]) -> float:
    factor, mscale, all_dim = scaling["factor"], scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and all_dim:
        return _mscale(factor, mscale) / _mscale(factor, all_dim)
    return _mscale(factor, 1.0)


def _yarn_frequency(frequency: Tensor, dim: int, theta: float, scaling: Mapping[str, Any]) -> Tensor:
    """Slow pairs are interpolated, fast ones kept, with a linear ramp between the two correction dimensions."""
    original = scaling["original_max_position_embeddings"]

    def correction(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(correction(scaling.get("beta_fast") or 32.0)), 0)
    high = min(math.ceil(correction(scaling.get("beta_slow") or 1.0)), dim - 1)
    width = (high - low) or 0.001
    ramp = ((torch.arange(dim // 2, device=frequency.device) - low) / width).clamp(0, 1)
    return frequency / scaling["factor"] * ramp + frequency * (1 - ramp)
