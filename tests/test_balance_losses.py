"""Global-batch, device, communication, importance and z-loss, held against float64 loops over tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from lightning_dsv3.ops.balance_losses import (
    communication_balance_loss,
    count_choices,
    device_balance_loss,
    global_batch_balance_loss,
    importance_loss,
    router_z_loss,
    sequence_balance_loss,
    squared_variation,
)
from lightning_dsv3.ops.routing import gate_values

# tokens, experts, chosen, sequences, groups
SHAPES = pytest.mark.parametrize(
    "shape", [(63, 6, 2, 3, 3), (12, 5, 5, 4, 1), (1, 7, 3, 1, 7), (32, 16, 1, 1, 4), (30, 4, 2, 30, 2)], ids=str
)
SELECTIONS = pytest.mark.parametrize("selection", ["unbiased", "executed"])


def sample(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, affinities and a biased choice."""
    num_tokens, num_experts, k = shape[:3]
    torch.manual_seed(num_tokens * 1000 + num_experts * 10 + k)
    logits = torch.randn(num_tokens, num_experts, dtype=torch.float32)
    return logits, logits.sigmoid(), (logits.sigmoid() + torch.randn(num_experts)).topk(k).indices


def choices_of(affinity: Tensor, expert: Tensor, selection: str) -> list[list[int]]:
    if selection == "executed":
        return expert.tolist()
    return [sorted(range(len(s)), key=lambda i, s=s: -s[i])[: expert.shape[1]] for s in affinity.tolist()]


def mean_affinity(affinity: Tensor, tokens: range) -> list[Tensor]:
    """P of each expert, by a loop."""
    total = [torch.zeros((), dtype=torch.float64) for _ in range(affinity.shape[1])]
    for t in tokens:
        for i in range(affinity.shape[1]):
            total[i] = total[i] + affinity[t, i] / affinity[t].sum() / len(tokens)
    return total


def group_loop(kind: str, affinity: Tensor, expert: Tensor, shape: tuple[int, ...], limit: int, selection: str) -> Any:
    """V2's device and communication losses with factor 1, token by token."""
    num_tokens, num_experts, k, num_sequences, num_groups = shape
    length, size = num_tokens // num_sequences, num_experts // num_groups
    chosen = choices_of(affinity.detach(), expert, selection)
    loss = torch.zeros((), dtype=torch.float64)
    for n in range(num_sequences):
        tokens = range(n * length, (n + 1) * length)
        P = mean_affinity(affinity, tokens)
        for d in range(num_groups):
            members = range(d * size, (d + 1) * size)
            if kind == "device":
                f = sum(num_experts / (k * length) * (i in chosen[t]) for t in tokens for i in members) / size
            else:
                f = num_groups / (limit * length) * sum(any(i in members for i in chosen[t]) for t in tokens)
            loss = loss + f * sum(P[i] for i in members) / num_sequences
    return loss


def assert_same_value_and_gradient(
    loss: Callable[[Tensor], Tensor], loop: Callable[[Tensor], Tensor], x: Tensor, factor: float
) -> None:
    x, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    value, expected = loss(x), loop(exact) * factor
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(value, x)
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-7)


@SHAPES
@SELECTIONS
def test_device_loss_equals_loops_over_tokens(shape, selection):
    _, affinity, expert = sample(shape)
    assert_same_value_and_gradient(
        lambda s: device_balance_loss(
            affinity_TE=s, expert_TK=expert, num_sequences=shape[3], num_groups=shape[4], alpha=0.3, selection=selection
        ),
        lambda s: group_loop("device", s, expert, shape, 0, selection),
        affinity,
        0.3,
    )


@SHAPES
@SELECTIONS
def test_communication_loss_equals_loops_over_tokens(shape, selection):
    _, affinity, expert = sample(shape)
    limit = min(2, shape[4])
    assert_same_value_and_gradient(
        lambda s: communication_balance_loss(
            affinity_TE=s,
            expert_TK=expert,
            num_sequences=shape[3],
            num_groups=shape[4],
            groups_per_token=limit,
            alpha=0.3,
            selection=selection,
        ),
        lambda s: group_loop("communication", s, expert, shape, limit, selection),
        affinity,
        0.3,
    )


@SHAPES
@SELECTIONS
def test_global_batch_loss_equals_loops_over_tokens(shape, selection):
    _, affinity, expert = sample(shape)
    others = torch.arange(shape[1]) * 5

    def loop(s: Tensor) -> Tensor:
        load = [n + sum(i in c for c in choices_of(affinity, expert, selection)) for i, n in enumerate(others.tolist())]
        P = mean_affinity(s, range(shape[0]))
        return sum(shape[1] * load[i] / sum(load) * P[i] for i in range(shape[1]))

    counts = others + count_choices(affinity_TE=affinity, expert_TK=expert, selection=selection)
    assert_same_value_and_gradient(
        lambda s: global_batch_balance_loss(affinity_TE=s, counts_E=counts, alpha=0.3), loop, affinity, 0.3
    )


@SHAPES
def test_importance_loss_equals_loops_over_tokens(shape):
    _, affinity, expert = sample(shape)

    def gates(s: Tensor) -> Tensor:
        return gate_values(s, expert, norm_topk_prob=False, routed_scaling_factor=1.0)

    def loop(s: Tensor) -> Tensor:
        importance = [torch.zeros((), dtype=torch.float64) for _ in range(shape[1])]
        for t in range(shape[0]):
            for k in range(shape[2]):
                importance[expert[t, k]] = importance[expert[t, k]] + gates(s)[t, k]
        mean = sum(importance) / shape[1]
        return sum((x - mean) ** 2 for x in importance) / shape[1] / mean**2

    assert_same_value_and_gradient(
        lambda s: importance_loss(gate_TK=gates(s), expert_TK=expert, num_experts=shape[1], alpha=0.3),
        loop,
        affinity,
        0.3,
    )


@SHAPES
def test_z_loss_equals_loops_over_tokens(shape):
    logits, _, _ = sample(shape)

    def loop(z: Tensor) -> Tensor:
        return sum(sum(z[t, i].exp() for i in range(shape[1])).log() ** 2 for t in range(shape[0])) / shape[0]

    assert_same_value_and_gradient(lambda z: router_z_loss(logits_TE=z, alpha=0.3), loop, logits, 0.3)


def test_z_loss_survives_large_logits_and_is_least_at_minus_log_of_the_experts():
    assert router_z_loss(logits_TE=torch.full((2, 3), 1000.0), alpha=1.0).item() == pytest.approx(1001.1**2, rel=1e-4)
    assert router_z_loss(logits_TE=torch.full((2, 3), -math.log(3)), alpha=1.0).item() == pytest.approx(0, abs=1e-12)


def balanced() -> tuple[Tensor, Tensor]:
    """6 tokens on 6 experts in 3 groups: every expert twice, every token in 2 groups."""
    token = torch.tensor([0.9, 0.1, 0.8, 0.2, 0.3, 0.4])
    affinity = torch.stack([token.roll(shift) for shift in range(6)])
    return affinity, affinity.topk(2).indices


@pytest.mark.parametrize("alpha", [1.0, 0.05])
def test_a_balanced_load_costs_alpha_or_nothing(alpha):
    affinity, expert = balanced()
    grouped = {"affinity_TE": affinity, "expert_TK": expert, "num_sequences": 1, "num_groups": 3, "alpha": alpha}
    assert device_balance_loss(**grouped).item() == pytest.approx(alpha)
    assert communication_balance_loss(**grouped, groups_per_token=2).item() == pytest.approx(alpha)
    counts = count_choices(affinity_TE=affinity, expert_TK=expert)
    assert global_batch_balance_loss(affinity_TE=affinity, counts_E=counts, alpha=alpha).item() == pytest.approx(alpha)
    importance = importance_loss(gate_TK=affinity.gather(1, expert), expert_TK=expert, num_experts=6, alpha=alpha)
    assert importance.item() == pytest.approx(0, abs=1e-9)


def test_device_loss_sees_no_imbalance_inside_a_device_and_the_expert_loss_does():
    affinity = torch.tensor([[0.9, 0.1, 0.1, 0.1], [0.1, 0.1, 0.9, 0.1]])
    arguments = {"affinity_TE": affinity, "expert_TK": affinity.topk(1).indices, "num_sequences": 1, "alpha": 1.0}
    assert device_balance_loss(**arguments, num_groups=2).item() == pytest.approx(1.0)
    assert sequence_balance_loss(**arguments).item() > 1.5


def test_communication_counts_a_device_once_however_many_of_its_experts_are_used():
    affinity = torch.rand(8, 4)
    arguments = {"affinity_TE": affinity, "num_sequences": 1, "num_groups": 2, "groups_per_token": 1, "alpha": 1.0}
    twice = communication_balance_loss(**arguments, expert_TK=torch.tensor([[0, 1]] * 8))
    once = communication_balance_loss(**arguments, expert_TK=torch.tensor([[0]] * 8))
    assert twice == once


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 1000))
def test_parts_of_uneven_sizes_make_the_whole_when_weighted_by_tokens(sizes, seed):
    torch.manual_seed(seed)
    length, num_experts = 3, 5
    num_tokens = [length * rows for rows in sizes]
    logits = torch.randn(sum(num_tokens), num_experts)
    expert = logits.topk(2).indices
    counts = count_choices(affinity_TE=logits.sigmoid(), expert_TK=expert)

    def losses(z: Tensor, chosen: Tensor) -> Tensor:
        s, rows = z.sigmoid(), len(z) // length
        grouped = {"affinity_TE": s, "expert_TK": chosen, "num_sequences": rows, "alpha": 1.0}
        return torch.stack(
            [
                sequence_balance_loss(**grouped),
                device_balance_loss(**grouped, num_groups=5),
                communication_balance_loss(**grouped, num_groups=5, groups_per_token=2),
                global_batch_balance_loss(affinity_TE=s, counts_E=counts, alpha=1.0),
                router_z_loss(logits_TE=z, alpha=1.0),
            ]
        )

    whole = losses(logits, expert)
    parts = [
        losses(z, chosen) * len(z) for z, chosen in zip(logits.split(num_tokens), expert.split(num_tokens), strict=True)
    ]
    torch.testing.assert_close(torch.stack(parts).sum(0) / sum(num_tokens), whole, rtol=1e-5, atol=1e-6)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=20))
def test_squared_variation_is_the_variance_over_the_squared_mean(values):
    mean = sum(values) / len(values)
    expected = sum((v - mean) ** 2 for v in values) / len(values) / mean**2 if mean else 0.0
    assert squared_variation(torch.tensor(values)).item() == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_normalised_gates_of_one_expert_per_token_have_no_importance_gradient():
    affinity = torch.rand(6, 3, requires_grad=True)
    expert = affinity.topk(1).indices
    gate = gate_values(affinity, expert, norm_topk_prob=True, routed_scaling_factor=1.0)
    importance_loss(gate_TK=gate, expert_TK=expert, num_experts=3, alpha=1.0).backward()
    assert affinity.grad is not None
    assert affinity.grad.abs().max() < 1e-6


def test_an_idle_expert_and_underflown_affinities_give_finite_gradients():
    logits = torch.full((4, 3), -200.0, requires_grad=True)
    affinity, expert = logits.sigmoid(), torch.zeros(4, 1, dtype=torch.int64)
    gate = gate_values(affinity, expert, norm_topk_prob=True, routed_scaling_factor=1.0)
    total = importance_loss(gate_TK=gate, expert_TK=expert, num_experts=3, alpha=1.0)
    total = total + router_z_loss(logits_TE=logits, alpha=1.0)
    total = total + global_batch_balance_loss(affinity_TE=affinity, counts_E=torch.tensor([4, 0, 0]), alpha=1.0)
    total.backward()
    assert total.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_groups_that_do_not_fit_are_refused():
    _, affinity, expert = sample((12, 5, 2))
    with pytest.raises(ValueError, match="num_groups=2 does not divide the 5 experts"):
        device_balance_loss(affinity_TE=affinity, expert_TK=expert, num_sequences=1, num_groups=2, alpha=1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_losses_are_float32_under_a_bfloat16_default(dtype):
    torch.set_default_dtype(torch.bfloat16)
    try:
        affinity, expert = (x.to(dtype) if x.is_floating_point() else x for x in sample((12, 6, 2))[1:])
        grouped = {"affinity_TE": affinity, "expert_TK": expert, "num_sequences": 2, "num_groups": 3, "alpha": 1.0}
        losses = [
            device_balance_loss(**grouped),
            communication_balance_loss(**grouped, groups_per_token=2),
            global_batch_balance_loss(affinity_TE=affinity, counts_E=torch.arange(6), alpha=1.0),
            importance_loss(gate_TK=affinity.gather(1, expert), expert_TK=expert, num_experts=6, alpha=1.0),
            router_z_loss(logits_TE=affinity, alpha=1.0),
        ]
        assert {loss.dtype for loss in losses} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)
