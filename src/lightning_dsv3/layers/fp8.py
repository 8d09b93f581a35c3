"""Linear maps and experts whose products take FP8 operands; see :mod:`lightning_dsv3.ops.fp8` for the recipe.

Each class adds nothing to the plain one but another ``forward``: the same parameters in the same precision under the
same names. So a built module becomes one by a change of its class, and back, and a checkpoint does not tell the
difference. ``weight`` is the plain parameter, as MLA's absorbed decoding reads it.

``backend`` says what computes the products: ``emulate``, ``te`` (:mod:`lightning_dsv3.layers.te`), or ``auto`` for what
can where the input is.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from lightning_dsv3.layers.experts import Experts
from lightning_dsv3.layers.linear import Linear
from lightning_dsv3.layers.norm import RMSNorm
from lightning_dsv3.layers.te import te_experts, te_linear, te_norm_linear, uses_te
from lightning_dsv3.ops.dispatch import plan_dispatch
from lightning_dsv3.ops.fp8 import fp8_experts, fp8_linear


class FP8Products:
    """What the products of a module are computed with."""

    pow2_scales = True
    backend = "emulate"


class FP8TorchLinear(FP8Products, nn.Linear):
    """``nn.Linear`` with FP8 operands; a bias is added afterwards."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``, in autocast's dtype if that is on."""
        y = _linear(self, x)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class FP8Linear(FP8Products, Linear):
    """:class:`~lightning_dsv3.layers.linear.Linear` with FP8 operands."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``, in autocast's dtype if that is on."""
        return _linear(self, x)


class FP8Experts(FP8Products, Experts):
    """:class:`~lightning_dsv3.layers.experts.Experts` with FP8 operands."""

    def forward(self, x_TD: Tensor, gate_TK: Tensor, expert_TK: Tensor) -> Tensor:
        """As the plain experts, in autocast's dtype if that is on."""
        return products_of_experts(self, x_TD, gate_TK, expert_TK, self.gate_up, self.down)


FP8_CLASS_OF: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FP8TorchLinear,
    Linear: FP8Linear,
    Experts: FP8Experts,
}
"""The FP8 form of each plain class of ours and of torch."""


class FP8Sequential(nn.Sequential):
    """``nn.Sequential`` in which a norm and the FP8 linear map behind it are one operation, where TE computes.

    Where one of the two has a hook, or something else computes, they are called one after the other.
    """

    def forward(self, x: Tensor) -> Tensor:
        """As the plain container."""
        layers = list(self)
        while layers:
            layer = layers.pop(0)
            following = layers[0] if layers else None
            if type(layer) is RMSNorm and type(following) is FP8Linear and _are_one(layer, following, x):
                x = _norm_linear(layer, following, x)
                layers.pop(0)
            else:
                x = layer(x)
        return x


def has_norm_before_linear(module: nn.Module) -> bool:
    """Whether a plain ``nn.Sequential`` has two layers that :class:`FP8Sequential` can take as one."""
    if type(module) is not nn.Sequential:
        return False
    return any(type(a) is RMSNorm and type(b) is FP8Linear for a, b in pairwise(module))


def products_of_experts(
    module: nn.Module, x_TD: Tensor, gate_TK: Tensor, expert_TK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> Tensor:
    """Compute routed experts in FP8 with the backend and scales of ``module``, in autocast's dtype if that is on."""
    x_TD, pow2_scales = x_TD.to(compute_dtype(x_TD)), bool(module.pow2_scales)
    if uses_te(str(module.backend), x_TD):
        return te_experts(module, x_TD, gate_TK, expert_TK, gate_up_EGD, down_EDF, pow2_scales)
    plan = plan_dispatch(expert_TK, gate_up_EGD.shape[0])
    return fp8_experts(x_TD, gate_TK, plan, gate_up_EGD, down_EDF, pow2_scales)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that an activation is in before it is rounded to FP8."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _linear(module: FP8Linear | FP8TorchLinear, x: Tensor) -> Tensor:
    # Only the activation is rounded to BF16 before its tiles are made: the weight's come from the float32 master.
    rows = x.to(compute_dtype(x)).reshape(-1, x.shape[-1])
    if uses_te(module.backend, rows):
        y = te_linear(module, rows, module.weight, module.pow2_scales)
    else:
        y = fp8_linear(rows, module.weight, module.pow2_scales)
    return y.view(*x.shape[:-1], module.weight.shape[0])


def _are_one(norm: RMSNorm, linear: FP8Linear, x: Tensor) -> bool:
    if _has_hooks(norm) or _has_hooks(linear):
        return False
    return uses_te(linear.backend, torch.empty(0, dtype=compute_dtype(x), device=x.device))


def _has_hooks(module: nn.Module) -> bool:
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def _norm_linear(norm: RMSNorm, linear: FP8Linear, x: Tensor) -> Tensor:
    rows = x.to(compute_dtype(x)).reshape(-1, x.shape[-1])
    y = te_norm_linear(linear, rows, norm.weight, norm.eps, linear.weight, linear.pow2_scales)
    return y.view(*x.shape[:-1], linear.weight.shape[0])
