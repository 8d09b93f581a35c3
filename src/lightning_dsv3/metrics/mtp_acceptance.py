"""Acceptance of the MTP modules' drafts, by draft position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class MTPAcceptance(Metric):
    """Acceptance rate of drafts in speculative decoding, for each position behind the last verified token.

    The rate a_k of position k is that of the drafts which were tried there, all before them having been accepted; the
    report's module has a_1 = 85 to 90 % (section 5.4.3). :func:`~lightning_dsv3.ops.acceptance.tokens_per_pass` makes
    the expected tokens per pass of it. Counts come from :mod:`lightning_dsv3.ops.acceptance`:

    - of a decoder, ``update(*length_counts(accepted, drafted, num_drafts))``;
    - on given text, without decoding, ``update(*chain_counts(acceptance, counted))`` of ``teacher_forced_acceptance``.

    ``update`` takes two tensors ``[n]`` for the first n positions: drafts tried, and those of them accepted. Integers,
    or expected values where acceptance is a probability. ``compute`` returns float64 ``[num_drafts]``, of which
    torchmetrics makes a scalar where it is one; nan where nothing was tried. Sums are kept in float64, exact for counts
    up to 2^53.

    Args:
        num_drafts: Draft positions. May exceed the number of MTP modules, as a module can be run in a chain.
        conditional: Drafts are counted where all before them were accepted, which ``compute`` checks. False: every
            draft is counted, whatever became of those before it; such rates say how good each depth is by itself.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: There are no positions, counts have another shape, or they cannot be those of chained drafts.

    Example:
        >>> from lightning_dsv3.ops.acceptance import length_counts
        >>> metric = MTPAcceptance(num_drafts=2)
        >>> # Four steps of two drafts kept 0, 1, 2 and 2 of them: 3 of 4 first ones, and 2 of 3 second ones.
        >>> metric.update(*length_counts(torch.tensor([0, 1, 2, 2]), 2, num_drafts=2))
        >>> metric.compute()
        tensor([0.7500, 0.6667], dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    num_drafted: Tensor
    num_accepted: Tensor

    def __init__(self, num_drafts: int, *, conditional: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_drafts < 1:
            raise ValueError(f"MTPAcceptance: num_drafts={num_drafts}; give the number of draft positions, at least 1.")
        self.conditional = conditional
        zeros = torch.zeros(num_drafts, dtype=torch.float64)
        self.add_state("num_drafted", default=zeros, dist_reduce_fx="sum")
        self.add_state("num_accepted", default=zeros.clone(), dist_reduce_fx="sum")

    def update(self, num_drafted: Tensor, num_accepted: Tensor) -> None:
        """Add drafts tried and drafts accepted."""
        n = num_drafted.numel()
        if num_drafted.dim() != 1 or num_drafted.shape != num_accepted.shape or n > len(self.num_drafted):
            raise ValueError(
                f"MTPAcceptance: num_drafted has shape {list(num_drafted.shape)} and num_accepted "
                f"{list(num_accepted.shape)}; give a number for each of the first draft positions, at most "
                f"num_drafts={len(self.num_drafted)}."
            )
        self.num_drafted[:n] += num_drafted
        self.num_accepted[:n] += num_accepted

    def compute(self) -> Tensor:
        """Return the acceptance rate of each position, on all ranks the same."""
        return _mtp_acceptance_compute(self.num_drafted, self.num_accepted, self.conditional)


def _mtp_acceptance_compute(drafted_K: Tensor, accepted_K: Tensor, conditional: bool) -> Tensor:
    # Expected values are sums of products that may round the other way.
    largest = 1 + 1e-9
    possible = accepted_K <= drafted_K * largest
    if conditional:
        possible[1:] &= drafted_K[1:] <= accepted_K[:-1] * largest
    # A model that has become nan is no wrong count.
    if not bool((possible | drafted_K.isnan() | accepted_K.isnan()).all()):
        rule = "and drafted behind accepted ones only (or set conditional=False)" if conditional else ""
        raise ValueError(
            f"MTPAcceptance: num_drafted={drafted_K.tolist()}, num_accepted={accepted_K.tolist()}; accepted drafts "
            f"must be among the drafted {rule}".rstrip()
            + "; `length_counts` counts so."
        )
    return accepted_K / drafted_K
