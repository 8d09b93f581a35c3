"""Linear maps and experts whose products take FP8 operands; see :mod:`lightning_dsv3.ops.fp8` for the recipe.

Each class adds nothing to the plain one but another ``forward``: the same parameters in the same precision under the
same names. So a built module becomes one by a change of its class, and back, and a checkpoint does not tell the
difference. ``weight`` is the plain parameter, as MLA's absorbed decoding reads it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_dsv3.layers.experts import Experts
from lightning_dsv3.layers.linear import Linear
from lightning_dsv3.ops.dispatch import plan_dispatch
from lightning_dsv3.ops.fp8 import fp8_experts, fp8_linear


class FP8TorchLinear(nn.Linear):
    """``nn.Linear`` with FP8 operands; a bias is added afterwards."""

    pow2_scales = True

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``, in autocast's dtype if that is on."""
        return _linear(x, self.weight, self.bias, self.pow2_scales)


class FP8Linear(Linear):
    """:class:`~lightning_dsv3.layers.linear.Linear` with FP8 operands."""

    pow2_scales = True

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``, in autocast's dtype if that is on."""
        return _linear(x, self.weight, None, self.pow2_scales)


class FP8Experts(Experts):
    """:class:`~lightning_dsv3.layers.experts.Experts` with FP8 operands."""

    pow2_scales = True

    def forward(self, x_TD: Tensor, gate_TK: Tensor, expert_TK: Tensor) -> Tensor:
        """As the plain experts, in autocast's dtype if that is on."""
        plan = plan_dispatch(expert_TK, self.num_experts)
        x_TD = x_TD.to(compute_dtype(x_TD))
        return fp8_experts(x_TD, gate_TK, plan, self.gate_up, self.down, self.pow2_scales)


FP8_CLASS_OF: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FP8TorchLinear,
    Linear: FP8Linear,
    Experts: FP8Experts,
}
"""The FP8 form of each plain class."""


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, pow2_scales: bool) -> Tensor:
    # Only the activation is rounded to BF16 before its tiles are made: the weight's come from the float32 master.
    dtype = compute_dtype(x)
    y = fp8_linear(x.to(dtype).reshape(-1, x.shape[-1]), weight, pow2_scales).view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias.to(dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that an activation is in before it is rounded to FP8."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
