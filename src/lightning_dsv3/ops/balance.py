"""Load balance of experts: the bias rule, the balance losses, and how far a load is from balance.

The report keeps the experts busy in two ways (section 2.1.2), and both are pure functions here.

*Without a loss*: a bias per expert is added to the affinities when experts are chosen, and nowhere else.
After each training step it moves by a fixed amount against the load of that step's whole batch
(:func:`bias_step`). No gradient reaches it, so it cannot disturb what the model learns. Signs are all that is
used: counts from any number of ranks and micro-batches are added up first, and their common scale does not
matter.

*With a loss*: ``L = alpha * sum_i f_i P_i``, where f_i is the share of tokens that chose expert i and P_i the
mean normalised affinity, both scaled so that a balanced load gives ``L = alpha``. Taken over each sequence
(:func:`sequence_balance_loss`, eq. 17-20) it guards against extreme imbalance within a sequence; over the
batch (:func:`batch_balance_loss`, section 4.5.3) it leaves sequences free to specialise. f_i has no gradient.

Counts are int64 and compared as integers. Everything else is float32, whatever the default dtype is.

Shapes: T tokens, E experts, K chosen experts, N sequences; ``...`` any leading dimensions, such as layers.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Selection = Literal["unbiased", "executed"]


def bias_step(bias_E: Tensor, counts_E: Tensor, update_rate: float | Tensor) -> Tensor:
    """Move the routing bias one step against the load (report, section 2.1.2; arXiv 2408.15664, algorithm 1).

    ::

        Load_i = tokens of the whole training batch routed to expert i
        mean   = sum_j Load_j / N_r
        b_i   <- b_i + gamma * sign(mean - Load_i)

    ``sign(0) = 0``: an expert with exactly the mean load keeps its bias. The comparison is exact, as it is
    made in integers: ``sign(sum_j Load_j - N_r * Load_i)``.

    Args:
        bias_E: Routing bias b, float32 ``[..., E]``.
        counts_E: Load of each expert, integers ``[..., E]``. The sum over ranks and micro-batches of one
            optimizer step.
        update_rate: Bias update speed gamma (0.001 in the report, 0 for the last 500B tokens).

    Returns:
        The new bias, float32 ``[..., E]``; the arguments are left as they are.

    Raises:
        TypeError: The bias is not float32, or the counts are not integers.
        ValueError: The shapes differ.

    Example:
        >>> bias_step(torch.zeros(4), torch.tensor([5, 3, 4, 4]), 0.001)
        tensor([-0.0010,  0.0010,  0.0000,  0.0000])
    """
    if bias_E.dtype != torch.float32:
        raise TypeError(
            f"bias_step: bias has dtype {bias_E.dtype}, which swallows steps (5.0 + 0.001 == 5.0 in "
            "bfloat16). Keep the bias in float32."
        )
    if counts_E.is_floating_point() or counts_E.is_complex() or counts_E.dtype == torch.bool:
        raise TypeError(f"bias_step: counts have dtype {counts_E.dtype}; give integer counts, best int64.")
    if bias_E.shape != counts_E.shape:
        raise ValueError(
            f"bias_step: bias has shape {list(bias_E.shape)} and counts {list(counts_E.shape)}; they must be equal."
        )
    counts_E = counts_E.to(torch.int64)
    total = counts_E.sum(dim=-1, keepdim=True)
    error_sign_E = torch.sign(total - counts_E.shape[-1] * counts_E)
    return bias_E + update_rate * error_sign_E.to(torch.float32)


def max_violation(counts_E: Tensor) -> Tensor:
    """Return MaxVio, how far the busiest expert is above the mean load (arXiv 2408.15664, eq. 4).

    ``(max_i Load_i - mean) / mean``: 0 when balanced, ``E/K - 1`` when every token chooses the same K
    experts.

    Args:
        counts_E: Load of each expert, integers ``[..., E]``.

    Returns:
        float32 ``[...]``, one value per row; nan for a row without tokens.

    Example:
        >>> max_violation(torch.tensor([[4, 4, 4, 4], [10, 2, 2, 2]]))
        tensor([0.0000, 1.5000])
    """
    counts_E = counts_E.to(torch.int64)
    total = counts_E.sum(dim=-1)
    excess = counts_E.shape[-1] * counts_E.amax(dim=-1) - total
    return excess.to(torch.float32) / total.to(torch.float32)


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
    num_tokens, num_experts = affinity_TE.shape
    if num_sequences < 1 or num_tokens % num_sequences:
        raise ValueError(
            f"sequence_balance_loss: num_sequences={num_sequences} does not divide the {num_tokens} tokens; "
            "give whole sequences of one length."
        )
    affinity_TE = affinity_TE.to(torch.float32)
    chosen_TK = _chosen(affinity_TE, expert_TK, selection)
    choices_N = chosen_TK.numel() // num_sequences

    # One histogram for all sequences: expert i of sequence n has bin n * E + i.
    sequence_T1 = torch.arange(num_tokens, device=chosen_TK.device).unsqueeze(-1) // (num_tokens // num_sequences)
    bins = (sequence_T1 * num_experts + chosen_TK).flatten()
    counts_NE = torch.zeros(num_sequences * num_experts, dtype=torch.float32, device=bins.device)
    counts_NE = counts_NE.scatter_add(0, bins, torch.ones_like(bins, dtype=torch.float32)).view(num_sequences, -1)
    f_NE = counts_NE * (num_experts / choices_N)

    # Every sigmoid of a token underflows to 0 below logits of about -104; the floor keeps 0/0 out of the
    # loss.
    total_T1 = affinity_TE.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    P_NE = (affinity_TE / total_T1).unflatten(0, (num_sequences, -1)).mean(dim=1)
    return alpha * (f_NE * P_NE).sum(dim=-1).mean()


def batch_balance_loss(
    *, affinity_TE: Tensor, expert_TK: Tensor, alpha: float, selection: Selection = "unbiased"
) -> Tensor:
    """Return the batch-wise balance loss (report, section 4.5.3): f_i and P_i over all tokens of the batch.

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


def _chosen(affinity_TE: Tensor, expert_TK: Tensor, selection: str) -> Tensor:
    if selection == "executed":
        return expert_TK
    if selection == "unbiased":
        return affinity_TE.detach().topk(expert_TK.shape[-1], dim=-1, sorted=False).indices
    raise ValueError(f"selection={selection!r} is unknown; use 'unbiased' (eq. 18) or 'executed'.")
