"""Transformer block: attention, then a dense or mixture-of-experts network, each on a pre-norm residual."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_dsv3.config import DeepSeekV3Config
from lightning_dsv3.layers.feed_forward import FeedForward
from lightning_dsv3.layers.mla import MultiHeadLatentAttention
from lightning_dsv3.layers.moe import MixtureOfExperts
from lightning_dsv3.layers.norm import RMSNorm
from lightning_dsv3.layers.router import RouterOutput
from lightning_dsv3.ops.attention import Positions
from lightning_dsv3.ops.latent_attention import LayerCache


class TransformerBlock(nn.Module):
    """One block.

    Args:
        config: The model's configuration.
        dense: A dense feed-forward network in place of experts.
    """

    def __init__(self, config: DeepSeekV3Config, *, dense: bool) -> None:
        super().__init__()
        d = config.hidden_size
        self.attention_norm = RMSNorm(d, config.rms_norm_eps)
        self.attention = MultiHeadLatentAttention(config)
        self.feed_forward_norm = RMSNorm(d, config.rms_norm_eps)
        self.feed_forward = FeedForward(d, config.intermediate_size) if dense else MixtureOfExperts(config)

    def forward(
        self, x_BSD: Tensor, positions: Positions, cache: LayerCache | None = None
    ) -> tuple[Tensor, RouterOutput | None]:
        """Map the residual stream ``[B, S, D]`` to itself; the second result is None for a dense block."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), positions, cache)
        y_BSD = self.feed_forward(self.feed_forward_norm(x_BSD))
        routing = None
        if isinstance(y_BSD, tuple):
            y_BSD, routing = y_BSD
        return x_BSD + y_BSD, routing
