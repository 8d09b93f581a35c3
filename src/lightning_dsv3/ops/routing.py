"""Which experts a token uses, and with what gate values (report, section 2.1.2, eq. 12-16).

    s = sigmoid(u e_i)                   affinity of token and expert
    c = s + b                            biased affinity: decides the choice and nothing else
    groups: keep the M groups with the highest score, every other expert gets -inf
    S = the K_r experts with the highest c
    g = s[S] / sum(s[S]) * scale         gate values from s, never from (s + b) - b, which loses s when b is large

All of it is float32 in every precision mode: a bfloat16 affinity has steps of 1/256 near 0.5, a bfloat16 bias near 5
steps of 1/32, and both would choose other experts.

:func:`route` is what the layer calls. Where it can be, it is one kernel (:mod:`lightning_dsv3.ops.triton.router`);
:func:`route_plain` is the truth, in the steps above.

Shapes: T tokens, E experts, K chosen experts, G groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dsv3.ops.backends import chosen


class Routed(NamedTuple):
    """What was decided for T tokens.

    Attributes:
        gate_TK: Gate values g of the chosen experts, float32 ``[T, K]``; carries the gradient.
        expert_TK: Chosen experts, int64 ``[T, K]``, in no particular order. No token is dropped.
        affinity_TE: Affinities s without bias, float32 ``[T, E]``; carries a gradient too.
        counts_E: Tokens of each expert, int64 ``[E]``; None where they were not counted on the way.
    """

    gate_TK: Tensor
    expert_TK: Tensor
    affinity_TE: Tensor
    counts_E: Tensor | None = None


def route(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    *,
    num_experts_per_tok: int,
    n_group: int,
    topk_group: int,
    experts_in_group_score: int,
    scoring_func: str,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> Routed:
    """Choose each token's experts and their gate values.

    Args:
        logits_TE: Router logits, float32 ``[T, E]``.
        bias_E: Routing bias b, float32 ``[E]``, or None. No gradient reaches it.
        num_experts_per_tok: K experts to choose.
        n_group: Groups G of E/G neighbouring experts.
        topk_group: Groups M that a token may use.
        experts_in_group_score: See :func:`choose_experts`.
        scoring_func: ``sigmoid`` or ``softmax``.
        norm_topk_prob: Divide gate values by their sum.
        routed_scaling_factor: Factor after normalisation.
    """
    form = route_plain
    if chosen("router", logits_TE, experts=logits_TE.shape[-1]) == "triton":
        from lightning_dsv3.ops.triton.router import route as form
    return form(
        logits_TE,
        bias_E,
        num_experts_per_tok=num_experts_per_tok,
        n_group=n_group,
        topk_group=topk_group,
        experts_in_group_score=experts_in_group_score,
        scoring_func=scoring_func,
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=routed_scaling_factor,
    )


def route_plain(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    *,
    num_experts_per_tok: int,
    n_group: int,
    topk_group: int,
    experts_in_group_score: int,
    scoring_func: str,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> Routed:
    """As :func:`route`, step by step, on any device and in any dtype."""
    s_TE = affinity(logits_TE, scoring_func)
    with torch.no_grad():
        expert_TK = choose_experts(
            s_TE,
            bias_E,
            num_experts_per_tok=num_experts_per_tok,
            n_group=n_group,
            topk_group=topk_group,
            experts_in_group_score=experts_in_group_score,
        )
    gate_TK = gate_values(s_TE, expert_TK, norm_topk_prob=norm_topk_prob, routed_scaling_factor=routed_scaling_factor)
    return Routed(gate_TK, expert_TK, s_TE)


def affinity(logits_TE: Tensor, scoring_func: str) -> Tensor:
    """Return the affinities s of tokens and experts (eq. 15; softmax in DeepSeek-V2).

    Args:
        logits_TE: Router logits, float32 ``[T, E]``.
        scoring_func: ``sigmoid`` or ``softmax`` (over experts).

    Returns:
        float32 ``[T, E]``.
    """
    return logits_TE.sigmoid() if scoring_func == "sigmoid" else logits_TE.softmax(dim=-1)


def choose_experts(
    affinity_TE: Tensor,
    bias_E: Tensor | None,
    *,
    num_experts_per_tok: int,
    n_group: int = 1,
    topk_group: int = 1,
    experts_in_group_score: int = 2,
) -> Tensor:
    """Choose each token's experts (eq. 16 and node-limited routing).

    Args:
        affinity_TE: Affinities s, float32 ``[T, E]``.
        bias_E: Routing bias b, float32 ``[E]``, or None.
        num_experts_per_tok: K experts to choose.
        n_group: Groups G of E/G neighbouring experts.
        topk_group: Groups M that a token may use.
        experts_in_group_score: A group's score is the sum of its so many highest biased affinities: 2 in DeepSeek's
            code, K/M as the report prints, 1 in DeepSeek-V2 (the maximum).

    Returns:
        Chosen experts, int64 ``[T, K]``, in no particular order. No token is dropped.
    """
    choice_TE = affinity_TE if bias_E is None else affinity_TE + bias_E
    if topk_group < n_group:
        choice_TGe = choice_TE.unflatten(-1, (n_group, -1))
        size = min(experts_in_group_score, choice_TGe.shape[-1])
        score_TG = choice_TGe.topk(size, dim=-1).values.sum(dim=-1)
        kept_TM = score_TG.topk(topk_group, dim=-1, sorted=False).indices
        excluded_TG = torch.ones_like(score_TG, dtype=torch.bool).scatter(-1, kept_TM, False)
        choice_TE = choice_TGe.masked_fill(excluded_TG.unsqueeze(-1), float("-inf")).flatten(-2)
    return choice_TE.topk(num_experts_per_tok, dim=-1, sorted=False).indices


def gate_values(
    affinity_TE: Tensor, expert_TK: Tensor, *, norm_topk_prob: bool, routed_scaling_factor: float
) -> Tensor:
    """Return the gate values g of the chosen experts (eq. 13), from the affinities without the bias.

    Args:
        affinity_TE: Affinities s, float32 ``[T, E]``.
        expert_TK: Chosen experts, int64 ``[T, K]``.
        norm_topk_prob: Divide by the sum over the chosen experts.
        routed_scaling_factor: Factor after normalisation (2.5 in DeepSeek-V3).

    Returns:
        float32 ``[T, K]``.
    """
    gate_TK = affinity_TE.gather(-1, expert_TK)
    if norm_topk_prob:
        # Keeps 0/0 away where every chosen sigmoid underflows; far below any representable sum otherwise.
        gate_TK = gate_TK / (gate_TK.sum(dim=-1, keepdim=True) + 1e-20)
    return gate_TK * routed_scaling_factor
