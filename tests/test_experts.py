"""The routed experts' operation against a float64 loop over tokens, and its two forms against each other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_dsv3.ops import experts
from lightning_dsv3.ops.dispatch import plan_dispatch
from lightning_dsv3.ops.experts import routed_experts, routed_experts_grouped

FORMS = [routed_experts, routed_experts_grouped]


def by_loop(x: Tensor, gate_TK: Tensor, expert_TK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The definition, token by token (report, eq. 12)."""
    rows = []
    for t in range(x.shape[0]):
        row = torch.zeros_like(x[t])
        for k in range(expert_TK.shape[1]):
            gate, up = (gate_up[expert_TK[t, k]] @ x[t]).chunk(2)
            row = row + gate_TK[t, k] * (down[expert_TK[t, k]] @ (F.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


def make_case(tokens: int, k: int, num_experts: int, dim: int, width: int, choices: list[int] | None = None):
    chosen = torch.tensor(choices if choices is not None else range(num_experts))
    expert_TK = torch.stack([chosen[torch.randperm(len(chosen))[:k]] for _ in range(tokens)])
    tensors = [
        torch.randn(tokens, dim, dtype=torch.float64),
        torch.rand(tokens, k, dtype=torch.float64),
        torch.randn(num_experts, 2 * width, dim, dtype=torch.float64) * 0.3,
        torch.randn(num_experts, dim, width, dtype=torch.float64) * 0.3,
    ]
    return expert_TK, tensors


def run(form, expert_TK: Tensor, tensors: list[Tensor], dtype: torch.dtype, direction: Tensor) -> list[Tensor]:
    """Output and every gradient, in float64."""
    x, gate, gate_up, down = leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    if form is by_loop:
        y = by_loop(x, gate, expert_TK, gate_up, down)
    else:
        y = form(x, gate, plan_dispatch(expert_TK, gate_up.shape[0]), gate_up, down)
    (y * direction.to(dtype)).sum().backward()
    return [t.detach().double() for t in (y, *(leaf.grad for leaf in leaves))]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("tokens", "k", "choices"),
    [(13, 2, None), (13, 1, [3]), (13, 2, [0, 4]), (1, 2, None), (63, 5, None)],
    ids=["random", "all_on_one", "three_experts_empty", "one_token", "every_expert_chosen"],
)
@pytest.mark.parametrize("block", [2048, 4])
def test_output_and_every_gradient_equal_the_loop(form, tokens, k, choices, block, monkeypatch) -> None:
    monkeypatch.setattr(experts, "_BLOCK_ROWS", block)
    expert_TK, tensors = make_case(tokens, k, 5, 12, 7, choices)
    direction = torch.randn(tokens, 12, dtype=torch.float64)
    expected = run(by_loop, expert_TK, tensors, torch.float64, direction)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        for mine, theirs in zip(run(form, expert_TK, tensors, dtype, direction), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 9), st.integers(1, 50), st.integers(0, 2**31))
def test_blocks_do_not_change_what_is_computed(tokens: int, k: int, num_experts: int, block: int, seed: int) -> None:
    torch.manual_seed(seed)
    k = min(k, num_experts)
    expert_TK, tensors = make_case(tokens, k, num_experts, 8, 4)
    direction = torch.randn(tokens, 8, dtype=torch.float64)
    before = experts._BLOCK_ROWS
    try:
        experts._BLOCK_ROWS = block
        mine = run(routed_experts, expert_TK, tensors, torch.float64, direction)
    finally:
        experts._BLOCK_ROWS = before
    for a, b in zip(mine, run(routed_experts_grouped, expert_TK, tensors, torch.float64, direction), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_bfloat16_sums_a_tokens_experts_in_float32() -> None:
    expert_TK, tensors = make_case(32, 8, 8, 64, 32)
    direction = torch.randn(32, 64, dtype=torch.float64)
    expected = run(by_loop, expert_TK, tensors, torch.float64, direction)[0]
    mine = run(routed_experts, expert_TK, tensors, torch.bfloat16, direction)[0]
    # bfloat16 has 8 bits: a few roundings on the way, but not one for each of the 8 experts' sums.
    assert float((mine - expected).norm() / expected.norm()) < 0.01


def test_rows_that_are_not_written_are_not_read(monkeypatch) -> None:
    """Memory that holds NaN must not reach a result, also where experts are empty and blocks ragged."""
    monkeypatch.setattr(experts, "_BLOCK_ROWS", 4)
    real = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, *a, **k: real(t, *a, **k).fill_(float("nan")))
    expert_TK, tensors = make_case(13, 2, 7, 8, 4, [1, 5, 6])
    for tensor in run(routed_experts, expert_TK, tensors, torch.float32, torch.randn(13, 8, dtype=torch.float64)):
        assert torch.isfinite(tensor).all()


def test_the_operator_is_registered_right() -> None:
    expert_TK, tensors = make_case(6, 2, 3, 8, 4)
    plan = plan_dispatch(expert_TK, 3)
    x, gate, gate_up, down = (t.float().requires_grad_() for t in tensors)
    gate_N = gate.flatten()[plan.slot_pair_N].detach().requires_grad_()
    torch.library.opcheck(experts._experts_in_blocks, (x, gate_N, plan.slot_token_N, plan.ends_E, gate_up, down))


def test_gathered_rows_are_not_kept_for_the_backward() -> None:
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def bytes_kept(form) -> int:
        kept.clear()
        expert_TK, tensors = make_case(64, 8, 16, 64, 8)
        x, gate, gate_up, down = (t.float().requires_grad_() for t in tensors)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            form(x, gate, plan_dispatch(expert_TK, 16), gate_up, down)
        return sum(kept.values())

    gathered = 64 * 8 * 64 * 4
    assert bytes_kept(routed_experts) < bytes_kept(routed_experts_grouped) - gathered // 2
