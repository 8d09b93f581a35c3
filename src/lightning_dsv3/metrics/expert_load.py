"""Load of experts: how uneven it is, how it is spread, and how much it depends on the domain.

All three take counts, integers ``[num_layers, num_experts]``: how many tokens chose each expert, as a
``RouterObserver`` or ``torch.bincount(chosen.flatten(), minlength=num_experts)`` gives them. They add the
counts up over updates and ranks before they compute anything, so that a value describes the whole set and is
no mean of batch values. Layers with different numbers of experts need a metric each.

Shapes: D domains, L layers, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_dsv3.ops.balance import max_violation


class _CountsMetric(Metric):
    """Adds up counts of shape ``[..., num_layers, num_experts]``."""

    is_differentiable = False
    full_state_update = False
    counts: Tensor

    def __init__(self, shape: tuple[int, ...], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("counts", default=torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def _checked(self, counts: Tensor, shape: torch.Size) -> Tensor:
        if counts.shape == shape[1:] and shape[0] == 1:
            counts = counts.unsqueeze(0)
        if counts.shape != shape or counts.is_floating_point():
            raise ValueError(
                f"{type(self).__name__}: counts are {counts.dtype} {list(counts.shape)}; give integer counts "
                f"{list(shape)}."
            )
        return counts


class MaxViolation(_CountsMetric):
    """MaxVio of the accumulated load: ``(max_i Load_i - mean) / mean``, mean over the layers.

    Over a validation set this is MaxVio_global, over one batch MaxVio_batch (arXiv 2408.15664, section 4.1).
    0 is balanced; ``E/K - 1`` is the worst.

    ``update`` takes counts ``[num_layers, num_experts]``, or ``[num_experts]`` of one layer. ``compute``
    returns a float32 scalar; layers without tokens are left out.

    Args:
        num_experts: Experts E of a layer.
        num_layers: Layers L.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = MaxViolation(num_experts=4)
        >>> metric.update(torch.tensor([6, 2, 4, 4]))
        >>> metric.update(torch.tensor([2, 6, 4, 4]))
        >>> metric.compute()
        tensor(0.)
    """

    higher_is_better = False

    def __init__(self, num_experts: int, num_layers: int = 1, **kwargs: Any) -> None:
        super().__init__((num_layers, num_experts), **kwargs)

    def update(self, counts: Tensor) -> None:
        """Add counts of tokens per expert."""
        self.counts += self._checked(counts, self.counts.shape)

    def compute(self) -> Tensor:
        """Return the mean MaxVio of the layers."""
        return max_violation(self.counts).nanmean()


class ExpertLoad(_CountsMetric):
    """Relative load of each expert: ``Load_i / mean`` (report, Figure 9). 1 is balanced.

    ``update`` takes counts ``[num_layers, num_experts]``, or ``[num_experts]`` of one layer. ``compute``
    returns float32 ``[num_layers, num_experts]``; nan for a layer without tokens.

    Args:
        num_experts: Experts E of a layer.
        num_layers: Layers L.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = ExpertLoad(num_experts=4)
        >>> metric.update(torch.tensor([6, 2, 4, 4]))
        >>> metric.compute()
        tensor([[1.5000, 0.5000, 1.0000, 1.0000]])
    """

    def __init__(self, num_experts: int, num_layers: int = 1, **kwargs: Any) -> None:
        super().__init__((num_layers, num_experts), **kwargs)

    def update(self, counts: Tensor) -> None:
        """Add counts of tokens per expert."""
        self.counts += self._checked(counts, self.counts.shape)

    def compute(self) -> Tensor:
        """Return the relative load of each expert."""
        return _expert_load_compute(self.counts)


class ExpertSpecialization(_CountsMetric):
    """How much the choice of experts depends on the domain, in bits.

    For each layer the Jensen-Shannon divergence of the domains' load distributions p_d: ``H(mean_d p_d) -
    mean_d H(p_d)``, every domain with the same weight, however many tokens it has; then the mean over layers.
    It is what one learns about a domain, all equally likely, from one chosen expert: 0 when all domains use
    the experts alike, ``log2 D`` when no two share one. The report shows the same thing by eye, in Figure 9;
    the relative loads there are :class:`ExpertLoad`, one per domain.

    ``update`` takes counts ``[num_layers, num_experts]`` and the index of their domain. ``compute`` returns a
    float32 scalar. A domain without tokens takes no part.

    Args:
        num_domains: Domains D.
        num_experts: Experts E of a layer.
        num_layers: Layers L.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = ExpertSpecialization(num_domains=2, num_experts=4)
        >>> metric.update(torch.tensor([8, 8, 0, 0]), domain=0)
        >>> metric.update(torch.tensor([0, 0, 1, 1]), domain=1)
        >>> metric.compute()
        tensor(1.)
    """

    higher_is_better = True

    def __init__(self, num_domains: int, num_experts: int, num_layers: int = 1, **kwargs: Any) -> None:
        super().__init__((num_domains, num_layers, num_experts), **kwargs)

    def update(self, counts: Tensor, domain: int) -> None:
        """Add counts of tokens per expert, all of one domain."""
        self.counts[domain] += self._checked(counts, self.counts.shape[1:])

    def compute(self) -> Tensor:
        """Return the mean divergence of the layers in bits."""
        return _expert_specialization_compute(self.counts)


def _expert_load_compute(counts_LE: Tensor) -> Tensor:
    counts_LE = counts_LE.to(torch.float32)
    return counts_LE / counts_LE.mean(dim=-1, keepdim=True)


def _expert_specialization_compute(counts_DLE: Tensor) -> Tensor:
    counts_DLE = counts_DLE.to(torch.float32)
    # A domain without tokens becomes nan here and is passed over by the means.
    p_DLE = counts_DLE / counts_DLE.sum(dim=-1, keepdim=True)
    divergence_L = _entropy_bits(p_DLE.nanmean(dim=0)) - _entropy_bits(p_DLE).nanmean(dim=0)
    return divergence_L.nanmean()


def _entropy_bits(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p).sum(dim=-1) / torch.log(torch.tensor(2.0, dtype=p.dtype, device=p.device))
