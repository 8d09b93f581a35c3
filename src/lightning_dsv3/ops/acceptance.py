"""How often the drafts of MTP modules are accepted: what speculative decoding with them would gain (report, 5.4.3).

In a step of the decoder the MTP modules draft tokens, one behind the other. One pass of the main model over the drafts
verifies them all: those before the first that it rejects are kept, and one token of its own is added. If a_k is the
acceptance of draft k, once the drafts before it have been accepted,

    E[n] = 1 + sum_k prod_{j <= k} a_j        tokens per pass of the main model.

Acceptance can be estimated on given text without decoding. At position i the module of depth k predicts token
i + k + 1 from the true tokens up to i + k, and the main model predicts the same token at position i + k. With p and q
what the two give to each token, the draft is accepted

    in greedy decoding             if argmax p = argmax q,             else not
    in sampling at temperature 1   with probability sum_v min(p_v, q_v)         (arXiv 2211.17192, section 3.2)

Both are numbers from 0 to 1 at each position and depth; chained, draft k is tried with the product of those of the
depths before it. Text is given and not the model's own, and drafts after the first read the true token where the
decoder has only the draft before: an estimate, good where the text is like what the model would write.

Shapes: B batch, S sequence, D model, V vocabulary, N rows, K depths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dsv3.ops.cross_entropy import (
    IGNORE_INDEX,
    accumulation_dtype,
    head_operands,
    logit_chunks,
    mtp_targets,
)


class Agreement(NamedTuple):
    """How far two heads say the same of the next token.

    Attributes:
        greedy: Whether both have the same likeliest token, the first one where several are, bool ``[N]``.
        overlap: ``sum_v min(p_v, q_v)`` of their distributions, float32 ``[N]``, 0 to 1.
    """

    greedy: Tensor
    overlap: Tensor


class DraftAcceptance(NamedTuple):
    """Acceptance of every draft that could be made in a batch of text.

    Attributes:
        greedy: 1 where the draft of depth k at position i is accepted in greedy decoding, else 0, bool ``[K, B, S]``.
        sampled: Probability that it is in sampling at temperature 1, float32 ``[K, B, S]``.
        counted: Where there is such a draft and a label for it, bool ``[K, B, S]``. The others are False and 0.
    """

    greedy: Tensor
    sampled: Tensor
    counted: Tensor


class DraftCounts(NamedTuple):
    """Drafts by their position behind the last verified token.

    Attributes:
        num_drafted: Drafts tried at each position: those whose predecessors were all accepted, float64 ``[K]``.
        num_accepted: Those of them that were accepted, float64 ``[K]``.
    """

    num_drafted: Tensor
    num_accepted: Tensor


@torch.no_grad()
def draft_agreement(main_ND: Tensor, draft_ND: Tensor, weight_VD: Tensor) -> Agreement:
    """Compare what one head makes of two states in each row.

    Costs two products with the head, ``4 * N * D * V`` operations; one chunk of logits of each is in memory at a time.

    Args:
        main_ND: States of the main model ``[N, D]``.
        draft_ND: States of an MTP module that predict the same tokens, ``[N, D]``.
        weight_VD: Head ``[V, D]``.

    Returns:
        See :class:`Agreement`. No gradient.
    """
    main_ND, draft_ND, weight_VD = head_operands(main_ND, draft_ND, weight_VD)
    greedy = torch.empty(len(main_ND), dtype=torch.bool, device=main_ND.device)
    overlap = torch.empty(len(main_ND), dtype=accumulation_dtype(main_ND), device=main_ND.device)
    with torch.autocast(main_ND.device.type, enabled=False):
        chunks = zip(logit_chunks(main_ND, weight_VD), logit_chunks(draft_ND, weight_VD), strict=True)
        for (part, main_Vn), (_, draft_Vn) in chunks:
            # Twice as fast as argmax in this layout.
            greedy[part] = main_Vn.max(dim=0).indices == draft_Vn.max(dim=0).indices
            p_Vn, q_Vn = torch.softmax(main_Vn, 0, out=main_Vn), torch.softmax(draft_Vn, 0, out=draft_Vn)
            overlap[part] = torch.minimum(p_Vn, q_Vn, out=p_Vn).sum(dim=0)
    return Agreement(greedy, overlap.clamp_(max=1.0))  # rounding must not make a probability of 1.0000001


def teacher_forced_acceptance(
    hidden_BSD: Tensor,
    mtp_hidden: Sequence[Tensor],
    weight_VD: Tensor,
    labels_BS: Tensor,
    document_BS: Tensor | None = None,
) -> DraftAcceptance:
    """Say of every draft on given text whether it would be accepted.

    Costs two products with the head for each depth; see :func:`draft_agreement`.

    Args:
        hidden_BSD: The main model's states behind its final norm, ``[B, S, D]``.
        mtp_hidden: Those of each MTP depth k, ``[B, S - k, D]``; at least one.
        weight_VD: Head ``[V, D]``.
        labels_BS: int64 ``[B, S]``; a draft of a token whose label is -100 is not counted.
        document_BS: Number of each position's document, int64 ``[B, S]``, or None. Depth k is not counted at the last
            k positions of a document, as in its loss.

    Returns:
        See :class:`DraftAcceptance`.
    """
    greedy: list[Tensor] = []
    sampled: list[Tensor] = []
    counted: list[Tensor] = []
    for depth, draft_BSD in enumerate(mtp_hidden, start=1):
        main_BSD = hidden_BSD[:, depth:]
        agreement = draft_agreement(main_BSD.flatten(0, 1), draft_BSD.flatten(0, 1), weight_VD)
        targets_BS = mtp_targets(labels_BS, depth, document_BS)
        for of_all, of_depth in zip((greedy, sampled), agreement, strict=True):
            of_all.append(F.pad(of_depth.view_as(targets_BS), (0, depth)))
        counted.append(F.pad(targets_BS != IGNORE_INDEX, (0, depth)))
    counted_KBS = torch.stack(counted)
    return DraftAcceptance(
        torch.stack(greedy) & counted_KBS, torch.stack(sampled).masked_fill(~counted_KBS, 0.0), counted_KBS
    )


def chain_counts(acceptance: Tensor, counted: Tensor) -> DraftCounts:
    """Add up drafts that are tried only if those of the depths before were accepted.

    Args:
        acceptance: Whether, or with which probability, each draft is accepted if tried: bool or float ``[K, ...]``.
        counted: Which drafts exist, bool of the same shape. One is left out together with all behind it.

    Returns:
        Counts, or their expected values. See :class:`DraftCounts`.

    Example:
        >>> accepted = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1]], dtype=torch.bool)
        >>> there = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]], dtype=torch.bool)
        >>> drafted, kept = chain_counts(accepted, there)
        >>> drafted.tolist(), kept.tolist()
        ([4.0, 2.0], [3.0, 1.0])
    """
    counted_KN = counted.flatten(1).to(torch.float64).cumprod(dim=0)
    accepted_KN = acceptance.flatten(1).to(torch.float64).cumprod(dim=0)
    tried_KN = torch.cat([torch.ones_like(accepted_KN[:1]), accepted_KN[:-1]])
    return DraftCounts((tried_KN * counted_KN).sum(dim=1), (accepted_KN * counted_KN).sum(dim=1))


def length_counts(accepted_R: Tensor, drafted: Tensor | int, num_drafts: int) -> DraftCounts:
    """Add up verified steps of a decoder, of each of which is known how many drafts it kept.

    Args:
        accepted_R: Drafts accepted in each row, integers ``[R]``; without the main model's own token.
        drafted: Drafts made in each row, integers ``[R]``, or one number for all; at most ``num_drafts``.
        num_drafts: Draft positions K.

    Returns:
        See :class:`DraftCounts`.

    Raises:
        ValueError: A row has more drafts than positions, or more accepted than drafted.

    Example:
        >>> drafted, kept = length_counts(torch.tensor([0, 1, 2, 2]), torch.tensor([2, 2, 2, 1]), num_drafts=2)
        Traceback (most recent call last):
        ...
        ValueError: accepted=[0, 1, 2, 2] of drafted=[2, 2, 2, 1] with num_drafts=2: ...
        >>> drafted, kept = length_counts(torch.tensor([0, 1, 2, 2]), 2, num_drafts=2)
        >>> drafted.tolist(), kept.tolist()
        ([4.0, 3.0], [3.0, 2.0])
    """
    drafted_R = torch.as_tensor(drafted, device=accepted_R.device).expand_as(accepted_R)
    if bool(((accepted_R > drafted_R) | (accepted_R < 0) | (drafted_R > num_drafts)).any()):
        raise ValueError(
            f"accepted={accepted_R.tolist()} of drafted={drafted_R.tolist()} with num_drafts={num_drafts}: give the "
            "number of accepted drafts of each row, without the token that the main model adds, from 0 to drafted, and "
            "no more drafts than num_drafts."
        )
    position_K1 = torch.arange(1, num_drafts + 1, device=accepted_R.device).unsqueeze(1)
    return chain_counts(accepted_R >= position_K1, drafted_R >= position_K1)


def tokens_per_pass(acceptance: Tensor | Sequence[float]) -> Tensor:
    """Return the expected tokens per verifying pass of the main model, ``1 + sum_k prod_{j <= k} a_j``.

    Args:
        acceptance: a_k of each draft, once those before it have been accepted, ``[K]`` or a scalar. What comes behind a
            0 is never tried, and may be nan.

    Returns:
        float64 scalar, 1 to K + 1.

    Example:
        The report's module accepts 85 to 90 % of the second tokens (section 5.4.3).

        >>> tokens_per_pass([0.85]).item(), round(tokens_per_pass([0.85, 0.7]).item(), 3)
        (1.85, 2.445)
    """
    a_K = torch.as_tensor(acceptance, dtype=torch.float64)
    never = (a_K == 0).cumsum(dim=0) > 0
    return 1 + a_K.masked_fill(never, 0.0).cumprod(dim=0).sum()


def break_even_acceptance(cost_ratio_verify: float, cost_draft: float) -> float:
    """Return the acceptance above which one draft per step is faster than plain decoding.

    A step gives 1 + a tokens for a verifying pass and a draft, plain decoding one token for one pass: the draft pays
    when ``(1 + a) / (cost_ratio_verify + cost_draft) > 1``.

    Args:
        cost_ratio_verify: Time of a pass of the main model over two tokens of each row, in passes over one. About 1
            where reading the weights takes the time; nearer to 2 in large batches, and with few experts per token,
            where a second token means other experts to read.
        cost_draft: Time of drafting one token, in the same unit.

    Returns:
        ``cost_ratio_verify + cost_draft - 1``. Above 1: no acceptance pays.

    Raises:
        ValueError: A cost is not a positive number; drafting may cost 0.

    Example:
        >>> round(break_even_acceptance(cost_ratio_verify=1.3, cost_draft=0.1), 3)
        0.4
    """
    if not 0 < cost_ratio_verify < float("inf"):
        raise ValueError(f"cost_ratio_verify={cost_ratio_verify}: give verifying time / time of a plain pass, above 0.")
    if not 0 <= cost_draft < float("inf"):
        raise ValueError(f"cost_draft={cost_draft}: give drafting time / time of a plain pass, 0 or above.")
    return cost_ratio_verify + cost_draft - 1


__all__ = [
    "Agreement",
    "DraftAcceptance",
    "DraftCounts",
    "break_even_acceptance",
    "chain_counts",
    "draft_agreement",
    "length_counts",
    "teacher_forced_acceptance",
    "tokens_per_pass",
]
