"""The bias rules of balance without a loss, and how far a load is from balance.

The report keeps the experts busy in two ways (section 2.1.2), and both are pure functions.

*Without a loss*, in this file: a bias per expert is added to the affinities when experts are chosen, and nowhere else.
After each training step it moves against the load of that step's whole batch. No gradient reaches it, so it cannot
disturb what the model learns. The report moves it by a fixed amount (:func:`bias_step`). Two other rules of the field
are here under their own names (:data:`BIAS_RULES`), never as the default:

==============  ===============================================  ===================================================
name            rule                                             for
==============  ===============================================  ===================================================
sign            ``b += u * sign(e)``                             sigmoid affinities, u = 0.001: the report's
proportional    ``b += u * e / mean``                            softmax affinities, u = 0.01 (arXiv 2408.15664)
centred         ``d = u * sign(e); b += d - mean(d)``            a bias whose mean does not drift (torchtitan)
==============  ===============================================  ===================================================

e is the mean load minus the expert's. None of them changes when all counts are multiplied by one number: counts from
any number of ranks and micro-batches are added up first.

*With a loss*: :mod:`lightning_dsv3.ops.balance_losses`, whose names are importable from here as well.

Counts are int64 and compared as integers. Everything else is float32, whatever the default dtype is.

Shapes: E experts; ``...`` any leading dimensions, such as layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_dsv3.ops.balance_losses import Selection, batch_balance_loss, sequence_balance_loss

__all__ = [
    "BIAS_RULES",
    "BiasRule",
    "Selection",
    "batch_balance_loss",
    "bias_step",
    "centred_bias_step",
    "max_violation",
    "proportional_bias_step",
    "sequence_balance_loss",
]

BiasRule = Callable[[Tensor, Tensor, float | Tensor], Tensor]
"""``rule(bias_E, counts_E, update_rate)`` returns the new bias; see :func:`bias_step`."""


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
    return bias_E + update_rate * _load_error(bias_E, counts_E)[0].sign().to(torch.float32)


def proportional_bias_step(bias_E: Tensor, counts_E: Tensor, update_rate: float | Tensor) -> Tensor:
    """Move the routing bias in proportion to the load error (a variant in arXiv 2408.15664).

    ::

        b_i <- b_i + u * (mean - Load_i) / mean

    The paper prints ``b_i + u * e_i`` with e_i in tokens, and reports it with u = 0.01. Taken as it is printed, a step
    would be as large as 0.01 times thousands of tokens, far beyond affinities between 0 and 1, and would change with
    the batch size. Relative to the mean load, the error of an idle expert is 1 and that of the busiest is minus its
    MaxVio, so u = 0.01 moves a bias by 0.01 at first and by 0.0003 at the MaxVio of 0.03 that the paper reaches, on
    both sides of the sign rule's 0.001. (Relative to all tokens it would be E times smaller, slower than the sign rule
    at u = 0.0001, which the paper finds too slow.) This normalisation is our reading; the paper gives none.

    For softmax affinities, which are small and sum to one, the paper uses this rule, as a fixed step is coarse among
    them: at the end a MaxVio of 0.027, against 0.937 with the auxiliary loss. With a sigmoid gate it balances better
    than the sign rule (0.028 against 0.044) and learns no better (perplexity 9.53 against 9.50).

    Args:
        bias_E: Routing bias b, float32 ``[..., E]``.
        counts_E: Load of each expert, integers ``[..., E]``; a row without tokens moves nothing.
        update_rate: Rate u; 0.01 in the paper.

    Returns:
        The new bias, float32 ``[..., E]``; the sum of the biases does not change, up to rounding.

    Raises:
        TypeError: The bias is not float32, or the counts are not integers.
        ValueError: The shapes differ.

    Example:
        >>> proportional_bias_step(torch.zeros(4), torch.tensor([8, 0, 4, 4]), 0.01)
        tensor([-0.0100,  0.0100,  0.0000,  0.0000])
    """
    error_E, total = _load_error(bias_E, counts_E)
    # (mean - Load) / mean = (total - N_r * Load) / total, whose numerator is exact.
    return bias_E + update_rate * (error_E.to(torch.float32) / total.clamp_min(1).to(torch.float32))


def centred_bias_step(bias_E: Tensor, counts_E: Tensor, update_rate: float | Tensor) -> Tensor:
    """Move the routing bias by the sign rule, less the mean of the moves (torchtitan, Moonlight; not the report's).

    ::

        d_i  = gamma * sign(mean - Load_i)
        b_i <- b_i + d_i - sum_j d_j / N_r

    A number added to every bias changes no choice within a layer, so the experts are chosen as by the sign rule, up to
    rounding. But the biases keep their mean, where those of the sign rule drift (the released model's are all above
    2): small biases lose nothing to rounding where a framework keeps them in lower precision. With group-limited
    choice the choices are the same as well, as every group's score moves by the same amount.

    Args:
        bias_E: Routing bias b, float32 ``[..., E]``.
        counts_E: Load of each expert, integers ``[..., E]``.
        update_rate: Rate gamma; 0.001 in Moonlight.

    Returns:
        The new bias, float32 ``[..., E]``. An expert at the mean load moves where the signs of the others do not
        cancel.

    Raises:
        TypeError: The bias is not float32, or the counts are not integers.
        ValueError: The shapes differ.

    Example:
        >>> centred_bias_step(torch.zeros(4), torch.tensor([7, 3, 3, 3]), 0.001)
        tensor([-0.0015,  0.0005,  0.0005,  0.0005])
    """
    sign_E = _load_error(bias_E, counts_E)[0].sign()
    # The mean of the signs is taken of integers, so that equal moves cancel exactly.
    centred_E = sign_E.shape[-1] * sign_E - sign_E.sum(dim=-1, keepdim=True)
    return bias_E + update_rate * (centred_E.to(torch.float32) / sign_E.shape[-1])


BIAS_RULES: dict[str, BiasRule] = {
    "sign": bias_step,
    "proportional": proportional_bias_step,
    "centred": centred_bias_step,
}
"""The rules by name; ``sign`` is the report's."""


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


def _load_error(bias_E: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``N_r * (mean - Load_i)`` and ``sum_j Load_j``, in exact integers, of arguments that fit."""
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
    return total - counts_E.shape[-1] * counts_E, total
