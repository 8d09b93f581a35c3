"""Multi-head latent attention (report, section 2.1.1, eq. 1-11).

    c_KV = norm(W_DKV h)                    latent of keys and values, all that inference would cache besides k_R
    k_R  = RoPE(W_KR h)                     one rotary key for all heads
    [k_C ; v_C] = [W_UK ; W_UV] c_KV        per head
    c_Q  = norm(W_DQ h),  [q_C ; q_R] = [W_UQ ; RoPE W_QR] c_Q
    o    = softmax([q_C ; q_R] [k_C ; k_R]^T * scale) v_C,   u = W_O o

Training and the first tokens of a text make each head's keys and values. Later tokens of a cached text attend to the
latents: :mod:`lightning_dsv3.ops.latent_attention` tells how.

Shapes: B batch, S sequence, D model, H heads, Q = nope + rope query and key width, V value width, C latent width, R
rotary width, U = nope + V, W = C + R.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_dsv3.config import DeepSeekV3Config
from lightning_dsv3.layers.linear import Linear
from lightning_dsv3.layers.norm import RMSNorm
from lightning_dsv3.ops.attention import Positions, attention_kernel, causal_attention, latent_heads
from lightning_dsv3.ops.latent_attention import (
    LayerCache,
    Segment,
    absorbed_attention,
    absorbed_is_cheaper,
    expanded_attention,
)
from lightning_dsv3.ops.rope import apply_rope, softmax_scale

# DeepSeek's code and Hugging Face's use this epsilon for the latents whatever rms_norm_eps says (Moonlight: 1e-5).
_LATENT_EPS = 1e-6


class MultiHeadLatentAttention(nn.Module):
    """MLA with or without a compressed query.

    Row order of the fused projections is the released one: ``kv_down`` holds the latent rows, then the rotary rows;
    ``q_up`` holds nope, then rope rows of each head; ``kv_up`` key rows, then value rows of each head.
    """

    def __init__(self, config: DeepSeekV3Config) -> None:
        super().__init__()
        d, heads = config.hidden_size, config.num_attention_heads
        self.num_heads = heads
        self.kv_lora_rank = config.kv_lora_rank
        self.qk_nope_head_dim = config.qk_nope_head_dim
        self.qk_rope_head_dim = config.qk_rope_head_dim
        self.v_head_dim = config.v_head_dim
        self.scale = softmax_scale(config.qk_head_dim, config.rope_scaling)
        query_rows = heads * config.qk_head_dim
        self.q: nn.Module
        if config.q_lora_rank is None:
            self.q = Linear(d, query_rows)
        else:
            self.q = nn.Sequential()
            self.q.add_module("down", Linear(d, config.q_lora_rank))
            self.q.add_module("norm", RMSNorm(config.q_lora_rank, _LATENT_EPS))
            self.q.add_module("up", Linear(config.q_lora_rank, query_rows))
        self.kv_down = Linear(d, config.kv_lora_rank + config.qk_rope_head_dim)
        self.kv_norm = RMSNorm(config.kv_lora_rank, _LATENT_EPS)
        self.kv_up = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.output = Linear(heads * config.v_head_dim, d)

    def forward(self, x_BSD: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """Attend causally.

        Args:
            x_BSD: Normalised residual stream ``[B, S, D]``.
            positions: Where the S tokens stand, and which of a row's documents they belong to.
            cache: What is kept of the tokens before them, and will be of these.

        Returns:
            ``[B, S, D]``.
        """
        q_BSHQ = self.q(x_BSD).unflatten(-1, (self.num_heads, self.qk_nope_head_dim + self.qk_rope_head_dim))
        latent_BSC, k_rope_BSR = self.kv_down(x_BSD).split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        latent_BSC = self.kv_norm(latent_BSC)
        if cache is None:
            out_BSHV = self._attend(q_BSHQ, self._expand(latent_BSC), k_rope_BSR, positions)
        else:
            turned_BSR = apply_rope(k_rope_BSR, positions.cos, positions.sin)
            segments = cache.append(torch.cat([latent_BSC, turned_BSR.to(latent_BSC.dtype)], dim=-1))
            if segments is None:
                q_BSHQ, kv_BSHU, k_rope_BSR = map(cache.unpack, (q_BSHQ, self._expand(latent_BSC), k_rope_BSR))
                rows = positions.unpacked(cache.unpack)
                out_BSHV = cache.pack(self._attend(q_BSHQ, kv_BSHU, k_rope_BSR, rows))
            else:
                out_BSHV = self._attend_to_cache(q_BSHQ, segments, positions, cache)
        return self.output(out_BSHV.flatten(-2))

    def _attend(self, q_BSHQ: Tensor, kv_BSHU: Tensor, k_rope_BSR: Tensor, positions: Positions) -> Tensor:
        """Return ``[B, S, H, V]`` of tokens that attend to one another alone."""
        cos, sin, documents = positions
        qk_dim, v_dim = q_BSHQ.shape[-1], self.v_head_dim
        kernel = attention_kernel(q_BSHQ, qk_head_dim=qk_dim, v_head_dim=v_dim, packed=documents is not None)
        heads = latent_heads(q_BSHQ, kv_BSHU, k_rope_BSR, cos, sin, v_head_dim=v_dim, one_width=kernel.one_width)
        out_BHSV = causal_attention(heads, scale=self.scale, v_head_dim=v_dim, documents=documents, kernel=kernel)
        return out_BHSV.transpose(1, 2)

    def _expand(self, latent: Tensor) -> Tensor:
        """Return each head's key without position and value: ``[..., C]`` to ``[..., H, U]``."""
        return self.kv_up(latent).unflatten(-1, (self.num_heads, -1))

    def _attend_to_cache(
        self, q_BSHQ: Tensor, segments: Sequence[Segment], positions: Positions, cache: LayerCache
    ) -> Tensor:
        """Return ``[B, S, H, V]``, by the form that takes less work."""
        nope, rope, latent_dim = self.qk_nope_head_dim, self.qk_rope_head_dim, self.kv_lora_rank
        q_nope_BSHN, q_rope_BSHR = q_BSHQ.split([nope, rope], dim=-1)
        q_rope_BSHR = apply_rope(q_rope_BSHR, positions.cos, positions.sin)
        widths = {"latent_dim": latent_dim, "rope_dim": rope, "nope_dim": nope, "v_head_dim": self.v_head_dim}
        if not absorbed_is_cheaper(segments, cache.num_queries, **widths):
            q_BSHQ = cache.unpack(torch.cat([q_nope_BSHN, q_rope_BSHR], dim=-1) * self.scale)
            return cache.pack(
                expanded_attention(q_BSHQ, segments, self._expand, latent_dim=latent_dim, v_head_dim=self.v_head_dim)
            )
        weight_HUC = self.kv_up.weight.unflatten(0, (self.num_heads, -1))
        key_HNC, value_HVC = weight_HUC.split([nope, self.v_head_dim], dim=1)
        q_BSHC = _by_head(q_nope_BSHN, key_HNC)
        q_BSHW = cache.unpack(torch.cat([q_BSHC, q_rope_BSHR.to(q_BSHC.dtype)], dim=-1) * self.scale)
        out_BSHC = cache.pack(absorbed_attention(q_BSHW, segments, latent_dim=latent_dim))
        return _by_head(out_BSHC, value_HVC.mT)


def _by_head(x_BSHI: Tensor, weight_HIO: Tensor) -> Tensor:
    """Multiply each head's vector with the head's matrix: ``[B, S, H, I]`` to ``[B, S, H, O]``."""
    x_HTI = x_BSHI.flatten(0, 1).transpose(0, 1)
    return (x_HTI @ weight_HIO).transpose(0, 1).unflatten(0, x_BSHI.shape[:2])
