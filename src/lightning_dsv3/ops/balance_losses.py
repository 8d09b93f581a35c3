"""The balance losses: what pulls affinities towards an even load by gradients.

Most have one form, ``L = alpha * sum_i f_i P_i``: f_i is the share of the tokens that chose expert i and carries no
gradient, P_i is the mean normalised affinity, both scaled so that a balanced load gives ``L = alpha``. They differ in
what f_i and P_i are taken over:

===================================  ==============================================  ==============================
function                             f over, P over                                  source
===================================  ==============================================  ==============================
:func:`sequence_balance_loss`        each sequence                                   report, eq. 17-20
:func:`batch_balance_loss`           the batch at hand                               report, section 4.5.3
:func:`global_batch_balance_loss`    all ranks and micro-batches, the batch at hand  arXiv 2501.11873
:func:`device_balance_loss`          groups of experts, each sequence                DeepSeek-V2, section 2.2.3
:func:`communication_balance_loss`   groups that tokens go to, each sequence         DeepSeek-V2, section 2.2.3
===================================  ==============================================  ==============================

Over a sequence it guards against extreme imbalance within it; over more it leaves sequences free to specialise.

Two more are of another form: :func:`importance_loss` (the squared coefficient of variation of gate values, Shazeer et
al. 2017) and :func:`router_z_loss` (the size of router logits, ST-MoE).

f_i has two readings. ``unbiased`` counts the K highest affinities, as eq. 18 of the report is printed: without bias and
group limit. ``executed`` counts the experts that compute.

Batches of different sizes: a loss is a mean over the tokens that it is given (sequences have one length), so the mean
over several batches, each weighted by its tokens, is that of all tokens together. That is exact for the sequence-wise
losses and the z-loss, and for the global batch's once its counts are whole. The batch-wise loss and the importance loss
are not means: they depend on how tokens are cut into batches.

All of it is float32, whatever the dtype of the arguments and the default dtype are.

Shapes: T tokens, E experts, K chosen experts, N sequences, G groups of E/G neighbouring experts.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Selection = Literal["unbiased", "executed"]


def sequence_balance_loss(
    *,
    affinity_TE: Tensor,
    expert_TK: Tensor,
    num_sequences: int,
    alpha: float,
    selection: Selection = "unbiased",
) -> Tensor:
    """Return the complementary sequence-wise balance loss (report, section 2.1.2, eq. 17-20).

    ::

        f_i = N_r / (K_r T) * sum_t 1[token t chooses expert i]          T tokens of one sequence, no gradient
        P_i = 1/T * sum_t s_i,t / sum_j s_j,t
        L   = alpha * sum_i f_i P_i

    It is also the expert-level loss of DeepSeek-V2 (arXiv 2405.04434, section 2.2.3), with alpha_1 = 0.003 (V2-Lite:
    0.001) and the executed choice.

    Args:
        affinity_TE: Affinities s before bias and top-k, float32 ``[T, E]``; whole sequences one after the
            other.
        expert_TK: Experts that the router chose, integers ``[T, K]``.
        num_sequences: Number of equally long sequences in T.
        alpha: Balance factor, 0.0001 in the report.
        selection: Choice that f_i counts. ``unbiased``: the K highest s, as eq. 18 is printed, without bias
            and group limit. ``executed``: ``expert_TK``, the experts that really compute.

    Returns:
        float32 scalar, the mean over the sequences; alpha when they are balanced. Its gradient reaches the
        affinities through P_i alone.

    Raises:
        ValueError: T is not a multiple of ``num_sequences``, or the choice of ``selection`` is unknown.

    Example:
        >>> affinity_TE = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
        >>> sequence_balance_loss(
        ...     affinity_TE=affinity_TE, expert_TK=affinity_TE.topk(1).indices, num_sequences=1, alpha=1.0
        ... )
        tensor(1.)
    """
    f_NE = _relative_load(affinity_TE, expert_TK, num_sequences, selection)
    return alpha * (f_NE * _mean_affinity(affinity_TE, num_sequences)).sum(dim=-1).mean()


def batch_balance_loss(
    *, affinity_TE: Tensor, expert_TK: Tensor, alpha: float, selection: Selection = "unbiased"
) -> Tensor:
    """Return the batch-wise balance loss (report, section 4.5.3): f_i and P_i over all tokens of the batch.

    The batch is what is given: one rank's micro-batch in training. See :func:`global_batch_balance_loss` for more.

    Args:
        affinity_TE: Affinities s before bias and top-k, float32 ``[T, E]``.
        expert_TK: Experts that the router chose, integers ``[T, K]``.
        alpha: Balance factor; the report gives none.
        selection: ``unbiased`` or ``executed``, see :func:`sequence_balance_loss`.

    Returns:
        float32 scalar; alpha for a balanced batch.

    Raises:
        ValueError: The choice of ``selection`` is unknown.
    """
    return sequence_balance_loss(
        affinity_TE=affinity_TE, expert_TK=expert_TK, num_sequences=1, alpha=alpha, selection=selection
    )


def global_batch_balance_loss(*, affinity_TE: Tensor, counts_E: Tensor, alpha: float) -> Tensor:
    """Return the global-batch balance loss (arXiv 2501.11873): f_i over more tokens than are at hand.

    ::

        f_i = N_r / sum_j Load_j * Load_i            Load: choices on all ranks and in all micro-batches, no gradient
        P_i = 1/T * sum_t s_i,t / sum_j s_j,t        T tokens at hand
        L   = alpha * sum_i f_i P_i

    L is linear in P_i, so with the counts of the whole batch the mean of the parts' losses, weighted by their tokens,
    is the loss of the whole batch, and so is its gradient. Averaging gradients over ranks of equally many tokens, as
    DDP does, is that mean. Where a later micro-batch's counts are not known yet, as in gradient accumulation, the paper
    counts what has been seen so far (:class:`~lightning_dsv3.ops.balance_methods.CountWindow`): the first micro-batch
    then has its own f_i, synchronised over the ranks, and the last one that of the whole batch.

    Args:
        affinity_TE: Affinities s of the tokens at hand, float32 ``[T, E]``.
        counts_E: Choices of each expert, integers ``[E]``, see :func:`count_choices`; summed over ranks and
            micro-batches.
        alpha: Balance factor.

    Returns:
        float32 scalar; alpha where the counts are balanced, whatever the affinities are.

    Example:
        >>> affinity_TE = torch.tensor([[0.9, 0.1]])
        >>> global_batch_balance_loss(affinity_TE=affinity_TE, counts_E=torch.tensor([30, 10]), alpha=1.0)
        tensor(1.4000)
    """
    counts_E = counts_E.to(torch.float32)
    f_E = counts_E * (counts_E.shape[-1] / counts_E.sum().clamp_min(1))
    return alpha * (f_E * _mean_affinity(affinity_TE, 1)[0]).sum()


def count_choices(*, affinity_TE: Tensor, expert_TK: Tensor, selection: Selection = "unbiased") -> Tensor:
    """Return how many tokens chose each expert, int64 ``[E]``.

    Args:
        affinity_TE: Affinities s before bias and top-k, float32 ``[T, E]``.
        expert_TK: Experts that the router chose, integers ``[T, K]``.
        selection: ``unbiased`` or ``executed``, see :func:`sequence_balance_loss`.

    Raises:
        ValueError: The choice of ``selection`` is unknown.

    Example:
        >>> count_choices(affinity_TE=torch.tensor([[0.9, 0.1], [0.8, 0.1]]), expert_TK=torch.tensor([[0], [1]]))
        tensor([2, 0])
    """
    bins = _chosen(affinity_TE, expert_TK, selection).flatten().to(torch.int64)
    return torch.zeros(affinity_TE.shape[-1], dtype=torch.int64, device=bins.device).scatter_add_(
        0, bins, torch.ones_like(bins)
    )


def device_balance_loss(
    *,
    affinity_TE: Tensor,
    expert_TK: Tensor,
    num_sequences: int,
    num_groups: int,
    alpha: float,
    selection: Selection = "executed",
) -> Tensor:
    """Return DeepSeek-V2's device-level balance loss (arXiv 2405.04434, section 2.2.3): even work of devices.

    ::

        f'_d = mean of f_i over the experts of device d
        P'_d = sum of P_i over the experts of device d
        L    = alpha_2 * sum_d f'_d P'_d

    with f_i and P_i of :func:`sequence_balance_loss`.

    Args:
        affinity_TE: Affinities s before bias and top-k, float32 ``[T, E]``; whole sequences one after the other.
        expert_TK: Experts that the router chose, integers ``[T, K]``.
        num_sequences: Number of equally long sequences in T.
        num_groups: Devices D, each with E/D neighbouring experts.
        alpha: Balance factor alpha_2, 0.05 in V2; V2-Lite, on one device, has no such loss.
        selection: ``executed``, as in V2, or ``unbiased``; see :func:`sequence_balance_loss`.

    Returns:
        float32 scalar, the mean over the sequences; alpha when the devices are balanced.

    Raises:
        ValueError: T is not a multiple of ``num_sequences``, or E not of ``num_groups``, or ``selection`` is unknown.
    """
    _require_groups(affinity_TE, num_groups)
    f_NG = _relative_load(affinity_TE, expert_TK, num_sequences, selection).unflatten(-1, (num_groups, -1)).mean(-1)
    P_NG = _mean_affinity(affinity_TE, num_sequences).unflatten(-1, (num_groups, -1)).sum(-1)
    return alpha * (f_NG * P_NG).sum(dim=-1).mean()


def communication_balance_loss(
    *,
    affinity_TE: Tensor,
    expert_TK: Tensor,
    num_sequences: int,
    num_groups: int,
    groups_per_token: int,
    alpha: float,
    selection: Selection = "executed",
) -> Tensor:
    """Return DeepSeek-V2's communication balance loss (arXiv 2405.04434, section 2.2.3): devices receive alike.

    ::

        f''_d = D / (M T) * sum_t 1[token t is sent to device d]     at most M devices per token
        P''_d = sum of P_i over the experts of device d
        L     = alpha_3 * sum_d f''_d P''_d

    A token is sent to a device once, however many of its experts are there. Tokens that use fewer than M devices make
    the loss smaller.

    Args:
        affinity_TE: Affinities s before bias and top-k, float32 ``[T, E]``; whole sequences one after the other.
        expert_TK: Experts that the router chose, integers ``[T, K]``.
        num_sequences: Number of equally long sequences in T.
        num_groups: Devices D, each with E/D neighbouring experts.
        groups_per_token: Devices M that a token may use, 3 in V2.
        alpha: Balance factor alpha_3, 0.02 in V2; V2-Lite, on one device, has no such loss.
        selection: ``executed``, as in V2, or ``unbiased``, which knows no limit M; see :func:`sequence_balance_loss`.

    Returns:
        float32 scalar, the mean over the sequences; alpha when every token uses M devices and these are balanced.

    Raises:
        ValueError: T is not a multiple of ``num_sequences``, or E not of ``num_groups``, or ``selection`` is unknown.
    """
    _require_groups(affinity_TE, num_groups)
    num_tokens, num_experts = affinity_TE.shape
    _require_sequences(num_tokens, num_sequences)
    group_TK = _chosen(affinity_TE, expert_TK, selection) // (num_experts // num_groups)
    sent_TG = torch.zeros(num_tokens, num_groups, dtype=torch.float32, device=group_TK.device)
    sent_TG = sent_TG.scatter(1, group_TK.to(torch.int64), 1.0)
    f_NG = sent_TG.unflatten(0, (num_sequences, -1)).mean(dim=1) * (num_groups / groups_per_token)
    P_NG = _mean_affinity(affinity_TE, num_sequences).unflatten(-1, (num_groups, -1)).sum(-1)
    return alpha * (f_NG * P_NG).sum(dim=-1).mean()


def importance_loss(*, gate_TK: Tensor, expert_TK: Tensor, num_experts: int, alpha: float) -> Tensor:
    """Return the importance loss (Shazeer et al. 2017, arXiv 1701.06538, eq. 6-7): even sums of gate values.

    ::

        Importance_i = sum_t g_i,t                       gate values of the tokens that chose expert i, over the batch
        L            = w * CV(Importance)^2              CV = standard deviation / mean over the experts

    The paper's second term, ``CV(Load)^2``, is left out: its Load is a smooth estimate that exists only with the noise
    that its gate adds to the logits. Without noise the load is a count and has no gradient; :func:`squared_variation`
    measures it. Where the loads themselves have to be pulled together, :func:`batch_balance_loss` does it.

    Args:
        gate_TK: Gate values g of the chosen experts, ``[T, K]``. A common factor changes nothing. With one expert per
            token and normalised gate values all are 1 and no gradient flows.
        expert_TK: Chosen experts, integers ``[T, K]``.
        num_experts: Number of experts E.
        alpha: The weight w_importance.

    Returns:
        float32 scalar; 0 when balanced, at most ``alpha * (E - 1)``.

    Example:
        >>> importance_loss(
        ...     gate_TK=torch.tensor([[0.9], [0.3]]), expert_TK=torch.tensor([[0], [1]]), num_experts=2, alpha=1.0
        ... )
        tensor(0.2500)
    """
    gates = gate_TK.to(torch.float32).flatten()
    zeros = torch.zeros(num_experts, dtype=torch.float32, device=gates.device)
    return alpha * squared_variation(zeros.scatter_add(0, expert_TK.flatten().to(torch.int64), gates))


def squared_variation(values_E: Tensor) -> Tensor:
    """Return CV^2, the variance over the squared mean (arXiv 1701.06538), with the variance of a whole population.

    Args:
        values_E: Loads or importances, ``[..., E]``, not negative.

    Returns:
        float32 ``[...]``; 0 when all are equal, ``E - 1`` when one has everything, 0 when all are 0.

    Example:
        >>> squared_variation(torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0]]))
        tensor([0., 3.])
    """
    values_E = values_E.to(torch.float32)
    total = values_E.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    share_E = values_E / total * values_E.shape[-1]
    return (share_E - share_E.mean(dim=-1, keepdim=True)).square().mean(dim=-1)


def router_z_loss(*, logits_TE: Tensor, alpha: float) -> Tensor:
    """Return the router z-loss (ST-MoE, arXiv 2202.08906, eq. 5): router logits stay small.

    ::

        L = c_z * 1/T * sum_t (log sum_i exp z_i,t)^2

    It was made for softmax gates, where a number added to a token's logits changes nothing. A sigmoid gate is moved by
    it: the loss is least where the logits are about -log(E), affinities of 1/E.

    Args:
        logits_TE: Router logits before the affinity, ``[T, E]``.
        alpha: The coefficient c_z, 0.001 in the paper.

    Returns:
        float32 scalar, the mean over the tokens; 0 where each token's ``sum exp z`` is 1.

    Example:
        >>> round(router_z_loss(logits_TE=torch.zeros(3, 2), alpha=1.0).item(), 4)  # log(2)^2
        0.4805
    """
    return alpha * logits_TE.to(torch.float32).logsumexp(dim=-1).square().mean()


def _relative_load(affinity_TE: Tensor, expert_TK: Tensor, num_sequences: int, selection: str) -> Tensor:
    """Return f, the share of each sequence's choices times E, float32 ``[N, E]``."""
    num_tokens, num_experts = affinity_TE.shape
    _require_sequences(num_tokens, num_sequences)
    chosen_TK = _chosen(affinity_TE, expert_TK, selection)
    # One histogram for all sequences: expert i of sequence n has bin n * E + i.
    sequence_T1 = torch.arange(num_tokens, device=chosen_TK.device).unsqueeze(-1) // (num_tokens // num_sequences)
    bins = (sequence_T1 * num_experts + chosen_TK).flatten()
    counts_NE = torch.zeros(num_sequences * num_experts, dtype=torch.float32, device=bins.device)
    counts_NE = counts_NE.scatter_add(0, bins, torch.ones_like(bins, dtype=torch.float32)).view(num_sequences, -1)
    return counts_NE * (num_experts / (chosen_TK.numel() // num_sequences))


def _mean_affinity(affinity_TE: Tensor, num_sequences: int) -> Tensor:
    """Return P, each sequence's mean of the affinities that are normalised over experts, float32 ``[N, E]``."""
    affinity_TE = affinity_TE.to(torch.float32)
    # Every sigmoid of a token underflows to 0 below logits of about -104; the floor keeps 0/0 out of the
    # loss.
    total_T1 = affinity_TE.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return (affinity_TE / total_T1).unflatten(0, (num_sequences, -1)).mean(dim=1)


def _chosen(affinity_TE: Tensor, expert_TK: Tensor, selection: str) -> Tensor:
    if selection == "executed":
        return expert_TK
    if selection == "unbiased":
        return affinity_TE.detach().to(torch.float32).topk(expert_TK.shape[-1], dim=-1, sorted=False).indices
    raise ValueError(f"selection={selection!r} is unknown; use 'unbiased' (eq. 18) or 'executed'.")


def _require_sequences(num_tokens: int, num_sequences: int) -> None:
    if num_sequences < 1 or num_tokens % num_sequences:
        raise ValueError(
            f"sequence_balance_loss: num_sequences={num_sequences} does not divide the {num_tokens} tokens; "
            "give whole sequences of one length."
        )


def _require_groups(affinity_TE: Tensor, num_groups: int) -> None:
    if num_groups < 1 or affinity_TE.shape[-1] % num_groups:
        raise ValueError(
            f"num_groups={num_groups} does not divide the {affinity_TE.shape[-1]} experts; give equal groups."
        )
