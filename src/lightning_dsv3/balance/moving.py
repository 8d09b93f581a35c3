"""One optimizer step's movement of the biases, for a Trainer's callback and for loops alike."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from lightning_dsv3.balance.biases import Float32Biases, update_biases, valid_rate
from lightning_dsv3.balance.discovery import ObservedRouter
from lightning_dsv3.ops.balance import BIAS_RULES


def move_biases(
    routers: Sequence[ObservedRouter],
    counts: Sequence[Tensor],
    biases: Float32Biases,
    update_rate: float | Callable[[int], float],
    rule: str,
    *,
    tokens_seen: Tensor,
    stepped: bool | Tensor,
    broken_forwards: Tensor,
    held: Collection[str] = (),
    freeze_after_tokens: int | None = None,
) -> None:
    """Move the biases of all layers after a step of the optimizer, unless there is a reason not to.

    What only the device knows is a factor of 0 or 1 of the rate, and a rate of 0 leaves a bias as it is: the host waits
    for nothing, except to ask ``update_rate`` where that is a function.

    Args:
        routers: The routers, those without a bias among them.
        counts: Load of each router's experts in the step, int64 ``[E]``, summed over ranks and micro-batches.
        biases: What keeps the biases in float32.
        update_rate: Bias update speed gamma, or a function of the tokens seen.
        rule: Name of one of :data:`lightning_dsv3.ops.balance.BIAS_RULES`.
        tokens_seen: Tokens up to this step and with it, int64 ``[]``.
        stepped: Whether the optimizer has moved parameters, from :class:`OptimizerStepWatcher`.
        broken_forwards: Forwards of each router so far whose gate values were not finite, int64 ``[L]``. Such a
            router's bias stays.
        held: Names of routers whose bias stays.
        freeze_after_tokens: All biases stay where ``tokens_seen`` is greater.

    Raises:
        ValueError: The function ``update_rate`` returned a rate that is negative or not finite.
    """
    if stepped is False:
        return
    rate = valid_rate(update_rate(int(tokens_seen))) if callable(update_rate) else update_rate
    rates_L = rate * (broken_forwards == 0).to(torch.float32)
    if isinstance(stepped, Tensor):
        rates_L = stepped.to(torch.float32) * rates_L
    if freeze_after_tokens is not None:
        rates_L = (tokens_seen <= freeze_after_tokens).to(torch.float32) * rates_L
    moved = [router for router in routers if router.name not in held]
    written = [None if router.name in held else biases.of(router) for router in routers]
    update_biases(routers, counts, rates_L, BIAS_RULES[rule], written)
    biases.write_rounded(moved)
