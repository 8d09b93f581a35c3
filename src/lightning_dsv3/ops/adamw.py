"""AdamW with moments in BF16 (report, section 3.3.3): two bytes less for each moment of each parameter.

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
    p = p - lr (weight_decay p + (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps))

All of it is computed in float32, and a step uses the moments before they are rounded. Between steps they are kept to
8 bits, rounded to nearest: a gradient's share in a moment, 1 - b2 = 0.05 in the report's setting, is far above what
rounding loses; with b2 = 0.999 it would not be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_MOMENTS = ("exp_avg", "exp_avg_sq")


class BF16MomentsAdamW(torch.optim.Optimizer):
    """``torch.optim.AdamW`` whose two moments are kept in BF16; the names of its state are the same.

    Args:
        params: Parameters or groups of them, as for any optimizer of torch. Float32 for master weights.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.

    Raises:
        ValueError: A second decay rate of 0.999 or more: most of what a step adds would be rounded away.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for group in self.param_groups:
            if group["betas"][1] >= 0.999:
                raise ValueError(
                    f"betas={tuple(group['betas'])} with moments in BF16: what a step adds to the second moment would "
                    "be rounded away; take a second rate below 0.999 or moments in float32"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient; returns what ``closure`` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _update(parameter, self._state_of(parameter), group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this optimizer, or of ``torch.optim.AdamW``."""
        super().load_state_dict(state_dict)
        for state in self.state.values():  # torch has given them the parameters' dtype
            for name in _MOMENTS:
                state[name] = state[name].to(torch.bfloat16)

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            for name in _MOMENTS:
                state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        return state


def _update(parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    state["step"] += 1
    step = state["step"].item()
    beta1, beta2 = group["betas"]
    gradient = parameter.grad
    assert gradient is not None
    gradient = gradient.float()
    first, second = (state[name].float() for name in _MOMENTS)
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    for name, moment in zip(_MOMENTS, (first, second), strict=True):
        state[name].copy_(moment)
    root = second.sqrt_().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.addcdiv_(first, root, value=-group["lr"] / (1 - beta1**step))
