"""The router of a mixture-of-experts layer: affinity, biased choice, gate values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_dsv3.config import DeepSeekV3Config
from lightning_dsv3.ops.linear import linear
from lightning_dsv3.ops.routing import route


class RouterOutput(NamedTuple):
    """What a router decided for T tokens.

    Attributes:
        gate_TK: Gate values g of the chosen experts, float32 ``[T, K]``; carries the gradient.
        expert_TK: Chosen experts, int64 ``[T, K]``.
        affinity_TE: Affinities s without bias, float32 ``[T, E]``, for the balance losses.
        logits_TE: Logits that the affinities come from, float32 ``[T, E]``, for the z-loss.
        counts_E: Tokens of each expert in ``expert_TK``, int64 ``[E]``; None where they were not counted on the way.
    """

    gate_TK: Tensor
    expert_TK: Tensor
    affinity_TE: Tensor
    logits_TE: Tensor
    counts_E: Tensor | None = None


class Router(nn.Module):
    """Sigmoid or softmax gate with biased, group-limited top-k choice (report, section 2.1.2).

    ``weight`` ``[E, D]`` holds the centroids e_i. ``bias`` is a persistent float32 buffer ``[E]``, or None where the
    configuration's ``topk_method`` uses none. No gradient reaches the bias and nothing in this module moves it: that is
    the work of ``AuxFreeBalanceCallback``. It stays float32 under ``.to(dtype)``, ``.half()`` and ``bf16-true``.
    """

    bias: Tensor | None

    def __init__(self, config: DeepSeekV3Config) -> None:
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.n_group = 1 if config.topk_method == "greedy" else config.n_group
        self.topk_group = 1 if config.topk_method == "greedy" else config.topk_group
        self.experts_in_group_score = _experts_in_group_score(config)
        self.scoring_func = config.scoring_func
        self.norm_topk_prob = config.norm_topk_prob
        self.routed_scaling_factor = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))
        has_bias = config.has_routing_bias
        self.register_buffer("bias", torch.zeros(self.num_experts, dtype=torch.float32) if has_bias else None)

    def forward(self, x_TD: Tensor) -> RouterOutput:
        """Route tokens.

        Args:
            x_TD: Input of the feed-forward network u_t, ``[T, D]``, any floating dtype.

        Returns:
            Gate values, chosen experts and affinities; see :class:`RouterOutput`.
        """
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = linear(x_TD.float(), self.weight.float())
            routed = route(
                logits_TE,
                self.bias,
                num_experts_per_tok=self.num_experts_per_tok,
                n_group=self.n_group,
                topk_group=self.topk_group,
                experts_in_group_score=self.experts_in_group_score,
                scoring_func=self.scoring_func,
                norm_topk_prob=self.norm_topk_prob,
                routed_scaling_factor=self.routed_scaling_factor,
            )
        return RouterOutput(routed.gate_TK, routed.expert_TK, routed.affinity_TE, logits_TE, routed.counts_E)

    def extra_repr(self) -> str:
        """Show what decides the choice."""
        return (
            f"num_experts={self.num_experts}, num_experts_per_tok={self.num_experts_per_tok}, "
            f"groups={self.topk_group}/{self.n_group}, {self.scoring_func}, bias={self.bias is not None}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = self.bias
        super()._apply(fn, recurse)
        if before is not None and self.bias is not None and self.bias.dtype != torch.float32:
            # bfloat16 holds 5.0 + 0.001 as 5.0, so a cast bias would silently stop learning: take the device, keep
            # the dtype.
            self.bias = before.to(device=self.bias.device, dtype=torch.float32)
        return self


def _experts_in_group_score(config: DeepSeekV3Config) -> int:
    if config.topk_method == "group_limited_greedy":
        return 1
    return 2 if config.group_score == "top2" else config.num_experts_per_tok // config.topk_group
