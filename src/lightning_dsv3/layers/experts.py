"""The routed experts: one stack of SwiGLU networks, computed together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_dsv3.ops.dispatch import plan_dispatch
from lightning_dsv3.ops.experts import routed_experts


class Experts(nn.Module):
    """E SwiGLU networks of width F. Every chosen (token, expert) pair is computed; nothing has a capacity.

    Args:
        num_experts: E.
        dim: Width D of the residual stream.
        hidden_dim: Width F of one expert.
    """

    def __init__(self, num_experts: int, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * hidden_dim, dim))
        self.down = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))

    def forward(self, x_TD: Tensor, gate_TK: Tensor, expert_TK: Tensor) -> Tensor:
        """Return ``sum_k gate[t, k] * FFN_expert[t, k](x[t])``.

        Args:
            x_TD: Tokens ``[T, D]``.
            gate_TK: Gate values, float32 ``[T, K]``.
            expert_TK: Chosen experts, int64 ``[T, K]``.

        Returns:
            ``[T, D]`` in the dtype that the experts compute in.
        """
        gate_up: Tensor = self.gate_up
        down: Tensor = self.down
        if torch.is_autocast_enabled(x_TD.device.type):  # our operator is on no autocast list
            dtype = torch.get_autocast_dtype(x_TD.device.type)
            x_TD, gate_up, down = x_TD.to(dtype), gate_up.to(dtype), down.to(dtype)
        return routed_experts(x_TD, gate_TK, plan_dispatch(expert_TK, self.num_experts), gate_up, down)
