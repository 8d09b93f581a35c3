"""The balance losses of a configuration, over all routers of a model.

:func:`balance_terms` adds each method up over the routers, as the report's total loss does. It is what
``DeepSeekV3Module`` and ``BalanceLossCallback`` share, and can be called in any training step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from lightning_dsv3.config.balance import BalanceArgs
from lightning_dsv3.ops.balance_losses import (
    Selection,
    batch_balance_loss,
    communication_balance_loss,
    count_choices,
    device_balance_loss,
    global_batch_balance_loss,
    importance_loss,
    router_z_loss,
    sequence_balance_loss,
    squared_variation,
)


class Routed(Protocol):
    """What one router decided for T tokens, as ``RouterOutput`` holds it."""

    @property
    def gate_TK(self) -> Tensor:
        """Gate values of the chosen experts."""

    @property
    def expert_TK(self) -> Tensor:
        """Chosen experts."""

    @property
    def affinity_TE(self) -> Tensor:
        """Affinities without bias."""

    @property
    def logits_TE(self) -> Tensor:
        """Logits before the affinity."""


@dataclass(frozen=True)
class BalanceTerms:
    """The losses of a micro-batch.

    Attributes:
        losses: By method, float32 scalars with their strengths, summed over the routers; their sum joins the loss.
        figures: Without gradient, for logs: ``v2_expert``, ``v2_device``, ``v2_communication`` (the parts of v2), and
            ``cv2_load``, the squared coefficient of variation of the loads, the routers' mean.
    """

    losses: dict[str, Tensor]
    figures: dict[str, Tensor]


class CountWindow:
    """The choices of each router's experts over all ranks since the last optimizer step, for ``global_batch``.

    Example:
        >>> window = CountWindow()
        >>> window.add([torch.tensor([3, 1])])
        [tensor([3, 1])]
        >>> window.add([torch.tensor([0, 2])])
        [tensor([3, 3])]
        >>> window.reset()
        >>> window.add([torch.tensor([0, 2])])
        [tensor([0, 2])]
    """

    def __init__(self) -> None:
        self._counts: list[Tensor] = []

    def add(self, counts: Sequence[Tensor], sum_over_ranks: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
        """Add a micro-batch and return the counts so far.

        Args:
            counts: int64 ``[E]`` per router, of this rank.
            sum_over_ranks: Adds a tensor up over the ranks; called once for all routers, on every rank.
        """
        flat = torch.cat(list(counts))
        if sum_over_ranks is not None:
            flat = sum_over_ranks(flat)
        added = list(flat.split([len(counts_E) for counts_E in counts]))
        # A sequence too short for an MTP module has one router less, the last one.
        sums = [counts_E + self._counts[i] if i < len(self._counts) else counts_E for i, counts_E in enumerate(added)]
        self._counts = [*sums, *self._counts[len(sums) :]]
        return sums

    def reset(self) -> None:
        """Begin a new accumulation window."""
        self._counts = []


def balance_terms(
    routing: Sequence[Routed],
    *,
    methods: Sequence[str],
    args: BalanceArgs,
    num_sequences: int,
    num_groups: int = 1,
    groups_per_token: int = 1,
    window: CountWindow | None = None,
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> BalanceTerms:
    """Return the balance losses of a micro-batch, summed over its routers.

    Args:
        routing: What each router decided; empty for a model without routers.
        methods: Any of ``sequence``, ``batch``, ``global_batch``, ``v2``, ``cv2`` and ``z``; others are passed over.
        args: Their parameters.
        num_sequences: Equally long sequences in each router's tokens.
        num_groups: Groups of experts, V2's devices.
        groups_per_token: Groups that a token may use.
        window: Counts of this accumulation window's earlier micro-batches; None counts this one alone. The caller
            resets it after each optimizer step.
        sum_over_ranks: Adds counts up over the ranks, for ``global_batch``.
    """
    losses: dict[str, Tensor] = {}
    figures: dict[str, Tensor] = {}
    if not routing:
        return BalanceTerms(losses, figures)
    for method in ("sequence", "batch"):
        if method in methods:
            losses[method] = _total(_mean_form(method, r, args, num_sequences) for r in routing)
    if "global_batch" in methods:
        selection = cast(Selection, args.global_batch.selection)
        counts = [count_choices(affinity_TE=r.affinity_TE, expert_TK=r.expert_TK, selection=selection) for r in routing]
        losses["global_batch"] = _total(
            global_batch_balance_loss(affinity_TE=r.affinity_TE, counts_E=counts_E, alpha=args.global_batch.alpha)
            for r, counts_E in zip(routing, (window or CountWindow()).add(counts, sum_over_ranks), strict=True)
        )
    if "v2" in methods:
        parts = _v2_parts(routing, args, num_sequences, num_groups, groups_per_token)
        losses["v2"] = _total(parts.values())
        figures |= {f"v2_{level}": loss.detach() for level, loss in parts.items()}
    if "cv2" in methods:
        losses["cv2"] = _total(
            importance_loss(
                gate_TK=r.gate_TK, expert_TK=r.expert_TK, num_experts=r.affinity_TE.shape[-1], alpha=args.cv2.alpha
            )
            for r in routing
        )
        loads = [count_choices(affinity_TE=r.affinity_TE, expert_TK=r.expert_TK, selection="executed") for r in routing]
        figures["cv2_load"] = torch.stack([squared_variation(counts_E) for counts_E in loads]).mean()
    if "z" in methods:
        losses["z"] = _total(router_z_loss(logits_TE=r.logits_TE, alpha=args.z.alpha) for r in routing)
    return BalanceTerms(losses, figures)


def _mean_form(method: str, routed: Routed, args: BalanceArgs, num_sequences: int) -> Tensor:
    chosen = args.sequence if method == "sequence" else args.batch
    selection = cast(Selection, chosen.selection)
    tokens = {"affinity_TE": routed.affinity_TE, "expert_TK": routed.expert_TK}
    if method == "sequence":
        return sequence_balance_loss(**tokens, num_sequences=num_sequences, alpha=chosen.alpha, selection=selection)
    return batch_balance_loss(**tokens, alpha=chosen.alpha, selection=selection)


def _v2_parts(
    routing: Sequence[Routed], args: BalanceArgs, num_sequences: int, num_groups: int, groups_per_token: int
) -> dict[str, Tensor]:
    """Return V2's losses by level, those with a strength of 0 left out."""
    v2, selection = args.v2, cast(Selection, args.v2.selection)
    parts: dict[str, list[Tensor]] = {"expert": [], "device": [], "communication": []}
    for routed in routing:
        tokens = {"affinity_TE": routed.affinity_TE, "expert_TK": routed.expert_TK}
        parts["expert"].append(
            sequence_balance_loss(**tokens, num_sequences=num_sequences, alpha=v2.expert_alpha, selection=selection)
        )
        if v2.device_alpha:
            parts["device"].append(
                device_balance_loss(
                    **tokens,
                    num_sequences=num_sequences,
                    num_groups=num_groups,
                    alpha=v2.device_alpha,
                    selection=selection,
                )
            )
        if v2.communication_alpha:
            parts["communication"].append(
                communication_balance_loss(
                    **tokens,
                    num_sequences=num_sequences,
                    num_groups=num_groups,
                    groups_per_token=groups_per_token,
                    alpha=v2.communication_alpha,
                    selection=selection,
                )
            )
    return {level: _total(losses) for level, losses in parts.items() if losses}


def _total(losses: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(losses)).sum()
