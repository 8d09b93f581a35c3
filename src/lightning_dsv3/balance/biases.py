"""Writing the routing biases of a model: a rule applied to all layers at once, in float32 whatever the model's dtype.

The module's own tensor is the truth wherever it is float32. In a model of lower precision it often is not:
``bf16-true``, ``.to(bfloat16)`` and FSDP's ``buffer_dtype`` cast it, then 5.0 + 0.001 == 5.0. :class:`Float32Biases`
keeps the float32 values and puts them back: in place of the cast tensor, where the router's forward takes that
(all routers that are recognised by themselves), else beside it, writing rounded values into the module.

Whatever the module holds wins: values that are not the rounded form of those kept here have come from a checkpoint or
from the user, and are taken over.
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_dsv3.balance.discovery import ObservedRouter
from lightning_dsv3.ops.balance import BiasRule, bias_step


@torch.no_grad()
def update_biases(
    routers: Sequence[ObservedRouter],
    counts: Sequence[Tensor],
    update_rate: float | Tensor,
    rule: BiasRule = bias_step,
    biases: Sequence[Tensor | None] | None = None,
) -> None:
    """Move the bias of every router that has one by a rule, in place.

    Layers with the same number of experts are computed together, so that the cost hardly grows with their
    number. Layers may differ in it.

    Args:
        routers: Routers; those without a bias are passed over.
        counts: Load of each router's experts, int64 ``[E]``, summed over ranks and micro-batches.
        update_rate: Bias update speed gamma. A tensor may hold 0 where the host does not know yet whether the
            optimizer has stepped; one of shape ``[L]`` has a rate for each router.
        rule: One of :data:`lightning_dsv3.ops.balance.BIAS_RULES`, or another function of its form.
        biases: float32 tensors to write to, None for no bias. Default: the routers' own.

    Raises:
        MisconfigurationException: A bias is not float32.
    """
    if biases is None:
        biases = [require_float32_bias(router) for router in routers]
    layers_by_width: dict[int, list[int]] = defaultdict(list)
    for index, bias_E in enumerate(biases):
        if bias_E is not None:
            layers_by_width[routers[index].num_experts].append(index)
    for layers in layers_by_width.values():
        written = [bias_E for index in layers if (bias_E := biases[index]) is not None]
        device = written[0].device
        rate = update_rate
        if isinstance(rate, Tensor) and rate.dim() == 1:
            rates = rate if len(layers) == len(routers) else torch.stack([rate[index] for index in layers])
            rate = rates.to(device).unsqueeze(-1)
        counts_LE = torch.stack([counts[index] for index in layers]).to(device)
        moved_LE = rule(torch.stack(written), counts_LE, rate)
        torch._foreach_copy_(written, list(moved_LE.unbind()))


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


class Float32Biases:
    """Keeps the biases of models in float32.

    Example:
        >>> from lightning_dsv3.balance import find_routers
        >>> from lightning_dsv3.config import DeepSeekV3Config
        >>> from lightning_dsv3.layers.router import Router
        >>> [router] = find_routers(Router(DeepSeekV3Config.from_preset("tiny")))
        >>> biases = Float32Biases()
        >>> _ = biases.of(router).fill_(5.001)
        >>> router.module.bias.data = router.module.bias.bfloat16()  # what a wrapper may do
        >>> bool((biases.of(router) == torch.tensor(5.001)).all())
        True
    """

    def __init__(self) -> None:
        # Of a float32 bias this is the module's own storage, so it is up to date without a copy, and stays when a
        # wrapper casts the module's tensor.
        self._kept: weakref.WeakKeyDictionary[nn.Module, Tensor] = weakref.WeakKeyDictionary()
        self._loaded: dict[str, Tensor] = {}
        self._writes_rounded = False

    @torch.no_grad()
    def of(self, router: ObservedRouter) -> Tensor | None:
        """Return the bias of ``router`` in float32 ``[E]``, to be written in place; None without one.

        A bias that the module holds in lower precision is put back into float32, or else has to be written back with
        :meth:`write_rounded` after a change.
        """
        tensor = router.bias_tensor
        if tensor is None:
            return None
        bias_E = router.as_row(tensor)
        if bias_E.dtype == torch.float32:
            kept = self._kept.get(router.module)
            # Asked for at every step, and the same storage almost always, which cannot be another's while it is kept.
            if kept is None or kept.data_ptr() != bias_E.data_ptr() or kept.device != bias_E.device:
                self._kept[router.module] = bias_E.detach()
            return bias_E
        float_E = self._matching(router, bias_E)
        if _can_replace(router, tensor):
            # The same tensor object gets other storage: a parameter stays the one that a wrapper knows.
            tensor.data = float_E.clone().view(tensor.shape)
            float_E = router.as_row(tensor).detach()
        else:
            self._writes_rounded = True
        self._kept[router.module] = float_E
        return float_E

    @torch.no_grad()
    def write_rounded(self, routers: Sequence[ObservedRouter]) -> None:
        """Write the biases to the modules that hold them in lower precision."""
        for router in routers if self._writes_rounded else ():
            bias_E = router.bias
            if bias_E is not None and bias_E.dtype != torch.float32:
                bias_E.copy_(self._kept[router.module])

    def state(self, routers: Sequence[ObservedRouter]) -> dict[str, Tensor]:
        """Return the float32 values of the biases that the modules hold in lower precision; for a checkpoint."""
        return {
            router.name: kept.cpu().clone()
            for router in routers
            if (bias_E := router.bias) is not None
            and bias_E.dtype != torch.float32
            and (kept := self.of(router)) is not None
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state` returned. It counts where the module holds its rounded form."""
        self._loaded = dict(state)

    def _matching(self, router: ObservedRouter, bias_E: Tensor) -> Tensor:
        float_E = bias_E.float()
        # Those of a checkpoint come last and win: its rounded values may have been loaded into a float32 tensor.
        for known_E in (self._kept.get(router.module), self._loaded.pop(router.name, None)):
            if known_E is not None and known_E.shape == bias_E.shape:
                known_E = known_E.to(bias_E.device)
                # Compared on the device, without waiting for it.
                float_E = torch.where((known_E.to(bias_E.dtype) == bias_E).all(), known_E, float_E)
        return float_E


def _can_replace(router: ObservedRouter, tensor: Tensor) -> bool:
    return router.adapter.takes_float32_bias and not isinstance(tensor, DTensor)


def valid_rate(rate: float) -> float:
    """Return a bias update rate that can be used: finite and not negative."""
    if not (math.isfinite(rate) and rate >= 0):
        raise ValueError(f"update_rate={rate!r} must be a finite number, at least 0 (the report uses 0.001).")
    return float(rate)
