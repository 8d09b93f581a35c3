"""Writing the routing biases of a model: the report's rule, applied to all layers at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_dsv3.balance.discovery import ObservedRouter
from lightning_dsv3.ops.balance import bias_step


@torch.no_grad()
def update_biases(routers: Sequence[ObservedRouter], counts: Sequence[Tensor], update_rate: float | Tensor) -> None:
    """Move the bias of every router that has one by :func:`~lightning_dsv3.ops.balance.bias_step`, in place.

    Layers with the same number of experts are computed together, so that the cost hardly grows with their
    number.

    Args:
        routers: Routers; those without a bias are passed over.
        counts: Load of each router's experts, int64 ``[E]``, summed over ranks and micro-batches.
        update_rate: Bias update speed gamma. A tensor may hold 0 where the host does not know yet whether the
            optimizer has stepped.

    Raises:
        MisconfigurationException: A bias is not float32.
    """
    layers_by_width: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for router, counts_E in zip(routers, counts, strict=True):
        bias_E = require_float32_bias(router)
        if bias_E is not None:
            layers_by_width[router.num_experts].append((bias_E, counts_E.to(bias_E.device)))
    for layers in layers_by_width.values():
        biases = [bias_E for bias_E, _ in layers]
        moved_LE = bias_step(torch.stack(biases), torch.stack([counts_E for _, counts_E in layers]), update_rate)
        torch._foreach_copy_(biases, list(moved_LE.unbind()))


def require_float32_bias(router: ObservedRouter) -> Tensor | None:
    """Return the bias of ``router``, or None if it has none; refuse one that would swallow the steps.

    Raises:
        MisconfigurationException: The bias is not float32.
    """
    bias_E = router.bias
    if bias_E is not None and bias_E.dtype != torch.float32:
        raise MisconfigurationException(
            f"The routing bias of {router.name} ({router.path}) is {bias_E.dtype}, which swallows the "
            "updates: 5.0 + 0.001 == 5.0 in bfloat16. Keep it in float32; under FSDPStrategy that is "
            "`mixed_precision=MixedPrecision(..., buffer_dtype=torch.float32)`."
        )
    return bias_E
