"""The routed experts: one stack of SwiGLU networks, computed together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_dsv3.layers.feed_forward import swiglu
from lightning_dsv3.ops.dispatch import combine, grouped_matmul, permute, plan_dispatch


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
        plan = plan_dispatch(expert_TK, self.num_experts)
        h_NF = swiglu(grouped_matmul(permute(x_TD, plan), gate_up, plan.ends_E))
        # Scaling before the linear `down` equals scaling after it, on F instead of D values.
        gate_N = gate_TK.flatten().index_select(0, plan.slot_pair_N)
        h_NF = h_NF * gate_N.unsqueeze(-1).to(h_NF.dtype)
        return combine(grouped_matmul(h_NF, down, plan.ends_E), plan, x_TD.shape[0])
