"""Which layers have stopped making sense: NaN where routers choose."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_dsv3.balance.discovery import ObservedRouter


def broken_layers(routers: Sequence[ObservedRouter], broken_forwards: Tensor) -> list[str]:
    """Return what is wrong with routers, by layer; empty if all is well. It waits for the device.

    Args:
        routers: The routers.
        broken_forwards: For each, the forwards whose gate values were not all finite, int64 ``[L]``.
    """
    biases = {router.name: bias_E for router in routers if (bias_E := router.bias) is not None}
    # A sum is not finite if a part of it is not: one number tells for all layers.
    total = torch.cat(list(biases.values())).sum(dtype=torch.float64).item() if biases else 0.0
    if math.isfinite(total) and not bool(broken_forwards.any()):
        return []
    problems = []
    for router, forwards in zip(routers, broken_forwards.tolist(), strict=True):
        bias_E = biases.get(router.name)
        if bias_E is not None and not bool(bias_E.isfinite().all()):
            problems.append(f"{router.name} ({router.path}): its bias is not finite")
        elif forwards:
            problems.append(f"{router.name} ({router.path}): its gate values were not finite in {forwards} forward(s)")
    return problems


def require_finite_routing(routers: Sequence[ObservedRouter], broken_forwards: Tensor) -> None:
    """Refuse to go on where :func:`broken_layers` finds a layer.

    Raises:
        RuntimeError: A router's gate values or its bias are not finite; the layers are named.
    """
    if problems := broken_layers(routers, broken_forwards):
        raise RuntimeError(
            f"Routing has broken down in {'; '.join(problems)}. Their biases have not moved since. Go back to a "
            "checkpoint before that, and look at the learning rate, the loss scale and the data of these steps."
        )
