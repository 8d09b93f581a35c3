"""DeepSeekMoE: shared experts for every token, routed experts by choice (report, section 2.1.2, eq. 12)."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_dsv3.config import DeepSeekV3Config
from lightning_dsv3.layers.experts import Experts
from lightning_dsv3.layers.feed_forward import FeedForward
from lightning_dsv3.layers.router import Router, RouterOutput


class MixtureOfExperts(nn.Module):
    """``sum_shared FFN_s(u) + sum_chosen g_i FFN_i(u)``.

    The shared experts are one network that is ``n_shared_experts`` times as wide, which is the same and quicker.
    """

    def __init__(self, config: DeepSeekV3Config) -> None:
        super().__init__()
        d, width = config.hidden_size, config.moe_intermediate_size
        self.router = Router(config)
        self.experts = Experts(config.n_routed_experts, d, width)
        self.shared = FeedForward(d, config.n_shared_experts * width) if config.n_shared_experts else None

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, RouterOutput]:
        """Map ``[B, S, D]`` to ``[B, S, D]`` and say how the tokens were routed."""
        x_TD = x_BSD.flatten(0, -2)
        routing = self.router(x_TD)
        y_TD = self.experts(x_TD, routing.gate_TK, routing.expert_TK)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return y_TD.view_as(x_BSD), routing
