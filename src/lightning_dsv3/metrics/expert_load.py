"""Load of experts: how uneven it is, how it is spread, and how much it depends on the domain.

All three take counts, integers ``[num_layers, num_experts]``: how many tokens chose each expert, as a
``RouterObserver`` or ``torch.bincount(chosen.flatten(), minlength=num_experts)`` gives them. Unless a finer level is
asked of :class:`MaxViolation`, they add the counts up over updates and ranks before they compute anything, so that a
value describes the whole set and is no mean of batch values. Layers with different numbers of experts need a metric
each.

Shapes: D domains, L layers, E experts, G groups of experts, U updates, R ranks.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from lightning_dsv3.ops.balance import max_violation

Level = Literal["global", "batch", "micro_batch"]
"""What the counts are added up over before MaxVio is taken; see :class:`MaxViolation`."""


class MaxViolation(Metric):
    """MaxVio of the load, ``(max_i Load_i - mean) / mean``, mean over the layers.

    0 is balanced; ``E/K - 1`` is the worst. ``level`` says over what the counts are added up before the maximum is
    taken:

    ===============  =====================================================  ==========================================
    level            counts of                                              value
    ===============  =====================================================  ==========================================
    ``global``       all updates of all ranks                               MaxVio_global (arXiv 2408.15664, 4.1)
    ``batch``        one update, all ranks: the nth updates of the ranks    mean over batches: MaxVio_batch
                     are one batch
    ``micro_batch``  one update of one rank                                 mean over all updates of all ranks
    ===============  =====================================================  ==========================================

    The bias rule balances the batch. A step is as slow as the busiest device in its slowest micro-batch, so what
    decides speed is ``level="micro_batch"`` with ``num_groups`` = the devices that the experts lie on. A maximum only
    grows when less is added up: global <= batch <= micro_batch, as long as the updates have equally many tokens. With
    accumulated gradients, a batch is the sum of its micro-batches: update once per optimizer step. Where experts are
    spread over ranks that exchange tokens, a micro-batch is what those ranks dispatch together: give each the sum.

    ``update`` takes counts ``[num_layers, num_experts]``, or ``[num_experts]`` of one layer. ``compute`` returns a
    float32 scalar. A layer is left out where it has no tokens: its mean is over the updates in which it has some.

    Only ``batch`` keeps every update, int64 ``[L, G]`` (a hundred kB for 58 layers of 256 experts), and exchanges
    them in ``compute``; ranks may differ in their number of updates.

    Args:
        num_experts: Experts E of a layer.
        num_layers: Layers L.
        level: ``global``, ``batch`` or ``micro_batch``.
        num_groups: Groups G of neighbouring experts, equally large, whose loads are compared in place of the
            experts': the number of ranks, or of nodes, that the experts lie on. Default: every expert for itself.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: There is no such level, the groups are not equally large, or counts have another shape.

    Example:
        >>> metric, per_batch = MaxViolation(num_experts=4), MaxViolation(num_experts=4, level="micro_batch")
        >>> per_rank = MaxViolation(num_experts=4, level="micro_batch", num_groups=2)
        >>> for counts in ([6, 2, 4, 4], [2, 6, 4, 4]):
        ...     for each in (metric, per_batch, per_rank):
        ...         each.update(torch.tensor(counts))
        >>> metric.compute(), per_batch.compute(), per_rank.compute()
        (tensor(0.), tensor(0.5000), tensor(0.))
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    counts: Tensor
    batches: list[Tensor] | Tensor
    violation_sum: Tensor
    num_updates: Tensor

    def __init__(
        self,
        num_experts: int,
        num_layers: int = 1,
        *,
        level: Level = "global",
        num_groups: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if level not in get_args(Level):
            raise ValueError(f"MaxViolation: level={level!r}; give one of {', '.join(get_args(Level))}.")
        self.level = level
        self._num_experts = num_experts
        self._num_groups = num_experts if num_groups is None else num_groups
        if self._num_groups < 1 or num_experts % self._num_groups:
            raise ValueError(
                f"MaxViolation: num_groups={num_groups} does not divide num_experts={num_experts}; give the number of "
                "ranks or nodes that share the experts evenly."
            )
        self._num_layers = num_layers
        if level == "global":
            shape = (num_layers, self._num_groups)
            self.add_state("counts", default=torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")
        elif level == "batch":
            self.add_state("batches", default=[], dist_reduce_fx="cat")
        else:
            zeros = torch.zeros(num_layers, dtype=torch.float64)
            self.add_state("violation_sum", default=zeros, dist_reduce_fx="sum")
            self.add_state("num_updates", default=zeros.to(torch.int64), dist_reduce_fx="sum")

    def update(self, counts: Tensor) -> None:
        """Add counts of tokens per expert."""
        counts_LE = _checked_counts(self, counts, (self._num_layers, self._num_experts))
        counts_LG = counts_LE.to(torch.int64).unflatten(-1, (self._num_groups, -1)).sum(dim=-1)
        if self.level == "global":
            self.counts += counts_LG
        elif self.level == "batch":
            assert isinstance(self.batches, list)
            rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
            # The rank goes along, as torchmetrics lays the rows of all ranks end to end.
            self.batches.append(torch.cat([counts_LG.new_tensor([rank]), counts_LG.flatten()]).unsqueeze(0))
        else:
            violation_L = max_violation(counts_LG)
            self.violation_sum += violation_L.nan_to_num(0.0)
            self.num_updates += ~violation_L.isnan()

    def compute(self) -> Tensor:
        """Return the mean MaxVio of the layers, on all ranks the same."""
        if self.level == "global":
            return max_violation(self.counts).nanmean()
        if self.level == "batch":
            rows = [self.batches] if isinstance(self.batches, Tensor) else [*self.batches, self._no_batches()]
            counts_ULG = _sum_over_ranks(torch.cat(rows)).unflatten(-1, (self._num_layers, self._num_groups))
            return max_violation(counts_ULG).nanmean(dim=0).nanmean()
        return (self.violation_sum / self.num_updates).nanmean().to(torch.float32)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Exchange the counts; see ``torchmetrics.Metric``."""
        # For a rank that has had no batch torchmetrics would send an empty tensor of another shape and dtype.
        if self.level == "batch" and isinstance(self.batches, list) and not self.batches:
            self.batches.append(self._no_batches())
        super().sync(*args, **kwargs)

    def _no_batches(self) -> Tensor:
        return torch.zeros(0, 1 + self._num_layers * self._num_groups, dtype=torch.int64, device=self.device)


class _CountsMetric(Metric):
    """Adds up counts of shape ``[..., num_layers, num_experts]``."""

    is_differentiable = False
    full_state_update = False
    counts: Tensor

    def __init__(self, shape: tuple[int, ...], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("counts", default=torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")


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
        self.counts += _checked_counts(self, counts, self.counts.shape)

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
        num_domains = len(self.counts)
        if not 0 <= domain < num_domains:
            raise ValueError(f"ExpertSpecialization: domain={domain}; give the index of one of {num_domains} domains.")
        self.counts[domain] += _checked_counts(self, counts, self.counts.shape[1:])

    def compute(self) -> Tensor:
        """Return the mean divergence of the layers in bits."""
        return _expert_specialization_compute(self.counts)


def _checked_counts(metric: Metric, counts: Tensor, shape: tuple[int, ...]) -> Tensor:
    if counts.shape == shape[1:] and shape[0] == 1:
        counts = counts.unsqueeze(0)
    if counts.shape != shape or counts.is_floating_point():
        raise ValueError(
            f"{type(metric).__name__}: counts are {counts.dtype} {list(counts.shape)}; give integer counts "
            f"{list(shape)}."
        )
    return counts


def _sum_over_ranks(rows: Tensor) -> Tensor:
    """Add up the nth rows of all ranks.

    Args:
        rows: Integers ``[rows, 1 + n]``: a rank and its counts. Those of one rank are in order.

    Returns:
        ``[U, n]``, U the most rows that a rank has.
    """
    ranks = rows[:, 0]
    of_rank = [rows[ranks == rank, 1:] for rank in ranks.unique()]
    total = rows.new_zeros(max(map(len, of_rank), default=0), rows.shape[1] - 1)
    for counts in of_rank:
        total[: len(counts)] += counts
    return total


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
