"""Averaged copies of a model, as EMA and SWA keep them: the weights are averages, the routing bias never is.

A bias is no weight that training converges to. It is the state of a controller, a sum of steps of one fixed size, which
balances the router that it has followed. An average lags behind that by as many steps as the average reaches back, so a
copy gets the bias of the live model instead, at every moment at which the copy is read.

The bias is copied, and not shared between the two models: an averaging function writes what it computes in place, and
one that rounds would then move the live bias.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_dsv3.balance.adapter import RouterAdapter
from lightning_dsv3.balance.discovery import NATIVE_ADAPTERS, ObservedRouter, find_routers


def averaged_copies(holders: Iterable[object]) -> list[nn.Module]:
    """Return the model inside every torch ``AveragedModel`` that one of ``holders`` has as an attribute.

    Lightning's ``WeightAveraging`` is such a holder, in both of its packages, and so is any callback written likewise.
    """
    held = [value for holder in holders for value in vars(holder).values()]
    return [value.module for value in held if isinstance(value, AveragedModel)]


@torch.no_grad()
def copy_biases(
    routers: Sequence[ObservedRouter], copy: nn.Module, adapters: Sequence[RouterAdapter] = NATIVE_ADAPTERS
) -> None:
    """Give the routers of ``copy`` the biases of ``routers``, in place and by layer name, on whatever device it is.

    Args:
        routers: Routers of the live model.
        copy: A copy of it, or of a part of it.
        adapters: What ``routers`` were found with.
    """
    live = {router.name: router.bias for router in routers}
    for router in find_routers(copy, adapters):
        bias_E, live_E = router.bias, live.get(router.name)
        if bias_E is not None and live_E is not None:
            bias_E.copy_(live_E)
