"""The kernels of permutation and combination, forward and backward, against sums in float64."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from triton_cases import poison_empty, run_interpreted

from lightning_dsv3.ops import dispatch
from lightning_dsv3.ops.backends import forced_kernels
from lightning_dsv3.ops.dispatch import combine, permute, plan_dispatch
from lightning_dsv3.ops.libraries import is_interpreted

pytest.importorskip("triton")

from lightning_dsv3.ops.triton import permute as kernels

# One rounding to the dtype, after a sum in float32.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def routing(tokens: int, experts: int, k: int) -> Tensor:
    """K different experts for each token; some experts get none."""
    favoured = torch.rand(experts) - 2.0 * (torch.arange(experts) % 3 == 1)
    return (favoured + torch.rand(tokens, experts)).topk(k, dim=-1).indices


def check(
    tokens: int, width: int, experts: int, k: int, align: int, dtype: torch.dtype, gated: bool, device: str
) -> None:
    expert_TK = routing(tokens, experts, k)
    plan = plan_dispatch(expert_TK.to(device), experts, align)
    slots = plan.slot_token_N.shape[0]
    x_TD, grad_TD = (torch.randn(tokens, width).to(dtype) for _ in range(2))
    y_ND, grad_ND = (torch.randn(slots, width).to(dtype) for _ in range(2))
    gate_TK = torch.rand(tokens, k) if gated else None
    padding_N = plan.slot_token_N.cpu() < 0
    y_ND[padding_N] = torch.nan  # nobody may look at it
    grad_ND[padding_N] = torch.nan
    inputs = [t if t is None else t.to(device).requires_grad_() for t in (x_TD, y_ND, gate_TK)]
    with forced_kernels(permute="triton"):
        x_ND = permute(inputs[0], plan)
        x_ND.backward(grad_ND.to(device))
        z_TD = combine(inputs[1], plan, tokens, inputs[2])
        z_TD.backward(grad_TD.to(device))

    shapes = [(slots, width), (tokens, width), (tokens, width), (slots, width), (tokens, k)]
    exact = [torch.zeros(*shape, dtype=torch.float64) for shape in shapes]
    exact_x_ND, exact_z_TD, grad_x_TD, grad_y_ND, grad_gate_TK = exact
    starts = [0, *plan.ends_E.tolist()]
    free = list(starts[:-1])
    for t in range(tokens):
        for j in range(k):
            # Slots of an expert are given to tokens in their order.
            slot = free[expert_TK[t, j]]
            free[expert_TK[t, j]] += 1
            weight = gate_TK[t, j].item() if gated else 1.0
            exact_x_ND[slot] = x_TD[t].double()
            exact_z_TD[t] += weight * y_ND[slot].double()
            grad_x_TD[t] += grad_ND[slot].double()
            grad_y_ND[slot] = weight * grad_TD[t].double()
            grad_gate_TK[t, j] = grad_TD[t].double() @ y_ND[slot].double()
    tolerance = ROUNDING[dtype]
    assert torch.equal(x_ND.double().cpu(), exact_x_ND)
    for ours, expected in [(z_TD, exact_z_TD), (inputs[0].grad, grad_x_TD), (inputs[1].grad, grad_y_ND)]:
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double().cpu(), expected, rtol=tolerance, atol=1e-5)
    if gated:
        # D products of float32, whichever the operands' dtype.
        torch.testing.assert_close(inputs[2].grad.double().cpu(), grad_gate_TK, rtol=1e-5, atol=1e-5)


class TestInterpreted:
    __test__ = is_interpreted()

    @pytest.fixture(autouse=True)
    def poison(self, monkeypatch):
        poison_empty(monkeypatch)

    @settings(max_examples=18)
    @given(
        tokens=st.sampled_from([1, 2, 31, 63]),
        width=st.sampled_from([1, 5, 128, 130, 600]),
        experts=st.integers(1, 9),
        k=st.integers(1, 4),
        align=st.sampled_from([1, 4, 16]),
        dtype=st.sampled_from(list(ROUNDING)),
        gated=st.booleans(),
    )
    def test_values_and_gradients(self, tokens, width, experts, k, align, dtype, gated):
        check(tokens, width, experts, min(k, experts), align, dtype, gated, "cpu")

    def test_more_than_one_block_of_columns(self):
        check(5, 1030, 3, 2, 4, torch.bfloat16, True, "cpu")

    @pytest.mark.parametrize("align", [1, 16])
    def test_gradients_of_gradients_are_those_of_the_plain_form(self, align):
        plan = plan_dispatch(routing(7, 5, 2), 5, align)
        y_ND = torch.randn(plan.slot_token_N.shape[0], 6)
        gate_TK, direction_TD = torch.rand(7, 2), torch.randn(7, 6)
        results = []
        for name in ("triton", "torch"):
            with forced_kernels(permute=name):
                y, gate, direction = (t.clone().requires_grad_() for t in (y_ND, gate_TK, direction_TD))
                inputs = (y, gate, direction)
                z = (combine(y, plan, 7, gate).square() * direction).sum()
                first = torch.autograd.grad(z, inputs, create_graph=True)
                second = torch.autograd.grad(sum(t.square().sum() for t in first), inputs)
                results.append([*first, *second])
        for ours, plain in zip(*results, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)

    def test_operators_are_registered_right_and_compile(self):
        plan = plan_dispatch(routing(7, 5, 2), 5, 4)
        x_TD, y_ND, gate_TK = torch.randn(7, 5), torch.randn(plan.slot_token_N.shape[0], 5), torch.rand(7, 2)
        for op, operands in [
            (kernels.permute, (x_TD, gate_TK, plan.slot_token_N, plan.pair_slot_N)),
            (kernels.combine, (y_ND, None, plan.pair_slot_N, 7)),
            (kernels.dots, (x_TD, y_ND, plan.pair_slot_N)),
        ]:
            torch.library.opcheck(op, operands)

        def there_and_back(x_TD, gate_TK):
            return combine(permute(x_TD, plan).sin(), plan, 7, gate_TK)

        inputs = [t.requires_grad_() for t in (x_TD, gate_TK)]
        results = []
        for function in (there_and_back, torch.compile(there_and_back, fullgraph=True, backend="aot_eager")):
            with forced_kernels(permute="triton"):
                y_TD = function(*inputs)
                results.append([y_TD, *torch.autograd.grad(y_TD.square().sum(), inputs)])
        for eager, compiled in zip(*results, strict=True):
            torch.testing.assert_close(compiled, eager)

    def test_a_gradient_of_any_strides(self):
        plan = plan_dispatch(routing(6, 4, 2), 4)
        x = torch.randn(6, 8, requires_grad=True)
        with forced_kernels(permute="triton"):
            permute(x, plan).sum().backward()  # the gradient is one number, expanded
        assert torch.equal(x.grad, torch.full((6, 8), 2.0))

    def test_no_tokens(self):
        plan = plan_dispatch(torch.empty(0, 2, dtype=torch.int64), 3, align=16)
        x = torch.zeros(0, 8, requires_grad=True)
        gate = torch.zeros(0, 2, requires_grad=True)
        with forced_kernels(permute="triton"):
            y = combine(permute(x, plan), plan, 0, gate)
        y.sum().backward()
        assert y.shape == x.grad.shape == (0, 8)
        assert gate.grad.shape == (0, 2)


def test_in_the_interpreter():
    run_interpreted(__file__)


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
def test_on_cuda(dtype, gated):
    for tokens, width, experts, k, align in [(1, 1, 1, 1, 1), (63, 130, 9, 3, 16), (300, 7168, 64, 8, 16)]:
        check(tokens, width, experts, k, align, dtype, gated, "cuda")


@pytest.mark.gpu
def test_on_cuda_every_run_gives_the_same_bits():
    plan = plan_dispatch(routing(999, 64, 8).cuda(), 64, align=16)
    y_ND, gate_TK = torch.randn(plan.slot_token_N.shape[0], 512, device="cuda"), torch.rand(999, 8, device="cuda")
    runs = [
        dispatch._Dots.apply(combine(y_ND, plan, 999, gate_TK), y_ND, plan.slot_token_N, plan.pair_slot_N)
        for _ in range(3)
    ]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])
