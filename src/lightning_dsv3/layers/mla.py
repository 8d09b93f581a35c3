"""Multi-head latent attention, in the form that training uses (report, section 2.1.1, eq. 1-11).

    c_KV = norm(W_DKV h)                    latent of keys and values, all that inference would cache besides k_R
    k_R  = RoPE(W_KR h)                     one rotary key for all heads
    [k_C ; v_C] = [W_UK ; W_UV] c_KV        per head
    c_Q  = norm(W_DQ h),  [q_C ; q_R] = [W_UQ ; RoPE W_QR] c_Q
    o    = softmax([q_C ; q_R] [k_C ; k_R]^T * scale) v_C,   u = W_O o

Shapes: B batch, S sequence, D model, H heads, Q = nope + rope query and key width, V value width.
"""

from __future__ import annotations

from torch import Tensor, nn

from lightning_dsv3.config import DeepSeekV3Config
from lightning_dsv3.layers.norm import RMSNorm
from lightning_dsv3.ops.attention import Positions, causal_attention, latent_heads
from lightning_dsv3.ops.rope import softmax_scale

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
            self.q = nn.Linear(d, query_rows, bias=False)
        else:
            self.q = nn.Sequential()
            self.q.add_module("down", nn.Linear(d, config.q_lora_rank, bias=False))
            self.q.add_module("norm", RMSNorm(config.q_lora_rank, _LATENT_EPS))
            self.q.add_module("up", nn.Linear(config.q_lora_rank, query_rows, bias=False))
        self.kv_down = nn.Linear(d, config.kv_lora_rank + config.qk_rope_head_dim, bias=False)
        self.kv_norm = RMSNorm(config.kv_lora_rank, _LATENT_EPS)
        self.kv_up = nn.Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), bias=False)
        self.output = nn.Linear(heads * config.v_head_dim, d, bias=False)

    def forward(self, x_BSD: Tensor, positions: Positions) -> Tensor:
        """Attend causally.

        Args:
            x_BSD: Normalised residual stream ``[B, S, D]``.
            positions: Where the S tokens stand, and the mask between documents.

        Returns:
            ``[B, S, D]``.
        """
        q_BSHQ = self.q(x_BSD).unflatten(-1, (self.num_heads, self.qk_nope_head_dim + self.qk_rope_head_dim))
        latent, k_rope_BSR = self.kv_down(x_BSD).split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        kv_BSHU = self.kv_up(self.kv_norm(latent)).unflatten(-1, (self.num_heads, -1))
        heads = latent_heads(q_BSHQ, kv_BSHU, k_rope_BSR, positions.cos, positions.sin, v_head_dim=self.v_head_dim)
        out_BHSV = causal_attention(heads, scale=self.scale, v_head_dim=self.v_head_dim, mask=positions.mask)
        return self.output(out_BHSV.transpose(1, 2).flatten(-2))
