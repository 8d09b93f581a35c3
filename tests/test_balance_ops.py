"""The bias rule, the balance losses and MaxVio, held against loops in Python integers and float64."""

from __future__ import annotations

from fractions import Fraction

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from lightning_dsv3.ops.balance import (
    BIAS_RULES,
    batch_balance_loss,
    bias_step,
    centred_bias_step,
    max_violation,
    proportional_bias_step,
    sequence_balance_loss,
)

counts_lists = st.lists(st.integers(0, 2**40), min_size=1, max_size=24)


@pytest.fixture
def bfloat16_default():
    """The default dtype that Lightning sets around forwards in `bf16-true`."""
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


class TestBiasStep:
    @given(counts_lists)
    def test_is_the_reports_formula(self, counts):
        moved = bias_step(torch.zeros(len(counts)), torch.tensor(counts), 1.0)
        total, num_experts = sum(counts), len(counts)
        expected = [(total > num_experts * n) - (total < num_experts * n) for n in counts]
        assert moved.tolist() == expected

    @given(counts_lists, st.integers(2, 1000))
    def test_is_invariant_to_the_scale_of_the_counts(self, counts, factor):
        bias = torch.linspace(-1, 1, len(counts))
        counts = torch.tensor(counts)
        assert torch.equal(bias_step(bias, counts, 0.01), bias_step(bias, factor * counts, 0.01))

    @given(counts_lists, st.randoms(use_true_random=False))
    def test_is_equivariant_to_the_order_of_experts(self, counts, random):
        order = list(range(len(counts)))
        random.shuffle(order)
        bias, counts = torch.linspace(-1, 1, len(counts)), torch.tensor(counts)
        assert torch.equal(bias_step(bias, counts, 0.01)[order], bias_step(bias[order], counts[order], 0.01))

    def test_bias_moves_against_overload(self):
        moved = bias_step(torch.full((4,), 5.0), torch.tensor([9, 1, 2, 0]), 0.001)
        assert moved[0] < 5.0
        assert (moved[1:] > 5.0).all()

    def test_an_expert_at_the_mean_keeps_its_bias(self):
        bias = torch.tensor([0.1, 0.2, 0.3, 0.4])
        moved = bias_step(bias, torch.tensor([5, 3, 4, 4]), 0.001)
        assert torch.equal(moved[2:], bias[2:])
        assert torch.equal(bias_step(bias, torch.full((4,), 7), 0.001), bias)
        assert torch.equal(bias_step(bias, torch.zeros(4, dtype=torch.int64), 0.001), bias)

    def test_one_token_in_2_to_the_40_decides(self):
        # float32 (and the float mean of int64) would call these loads equal.
        counts = torch.tensor([2**40 + 1, 2**40, 2**40 - 1])
        assert bias_step(torch.zeros(3), counts, 1.0).tolist() == [-1.0, 0.0, 1.0]

    def test_a_mean_that_is_no_integer_is_exact(self):
        assert bias_step(torch.zeros(3), torch.tensor([3, 4, 4]), 1.0).tolist() == [1.0, -1.0, -1.0]

    def test_small_steps_add_up_on_a_large_bias(self):
        bias = torch.full((2,), 5.0)
        for _ in range(100):
            bias = bias_step(bias, torch.tensor([1, 3]), 0.001)
        torch.testing.assert_close(bias, torch.tensor([5.1, 4.9]), atol=1e-4, rtol=0)

    def test_rate_0_freezes_the_bias(self):
        bias = torch.randn(5)
        assert torch.equal(bias_step(bias, torch.tensor([0, 1, 2, 3, 4]), 0.0), bias)
        assert torch.equal(bias_step(bias, torch.tensor([0, 1, 2, 3, 4]), torch.tensor(0.0)), bias)

    def test_arguments_are_left_alone(self):
        bias, counts = torch.zeros(2), torch.tensor([0, 1])
        bias_step(bias, counts, 0.1)
        assert bias.tolist() == [0, 0]
        assert counts.tolist() == [0, 1]

    def test_layers_in_front_are_independent(self):
        bias, counts = torch.randn(3, 7), torch.randint(0, 50, (3, 7))
        each = torch.stack([bias_step(b, c, 0.01) for b, c in zip(bias, counts, strict=True)])
        assert torch.equal(bias_step(bias, counts, 0.01), each)

    @pytest.mark.usefixtures("bfloat16_default")
    def test_result_is_float32_under_a_bfloat16_default(self):
        moved = bias_step(torch.full((2,), 5.0, dtype=torch.float32), torch.tensor([1, 3]), 0.001)
        exact = torch.tensor([5.0, 5.0], dtype=torch.float32) + torch.tensor([0.001, -0.001], dtype=torch.float32)
        assert moved.dtype == torch.float32
        assert torch.equal(moved, exact)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_a_bias_that_is_not_float32_is_refused(self, dtype):
        with pytest.raises(TypeError, match="float32"):
            bias_step(torch.zeros(2, dtype=dtype), torch.tensor([1, 2]), 0.001)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
    def test_counts_that_are_no_integers_are_refused(self, dtype):
        with pytest.raises(TypeError, match="integer counts"):
            bias_step(torch.zeros(2), torch.ones(2, dtype=dtype), 0.001)

    def test_different_shapes_are_refused(self):
        with pytest.raises(ValueError, match=r"\[1, 2\].*\[2\]"):
            bias_step(torch.zeros(1, 2), torch.tensor([1, 2]), 0.001)


class TestOtherRules:
    @given(counts_lists)
    def test_proportional_is_the_error_relative_to_the_mean(self, counts):
        moved = proportional_bias_step(torch.zeros(len(counts)), torch.tensor(counts), 1.0)
        mean = Fraction(sum(counts), len(counts))
        expected = [float((mean - n) / mean) if mean else 0.0 for n in counts]
        assert moved.tolist() == pytest.approx(expected, rel=1e-6)

    @given(counts_lists, st.integers(2, 1000))
    def test_proportional_does_not_depend_on_the_number_of_tokens(self, counts, factor):
        bias, counts = torch.zeros(len(counts)), torch.tensor(counts)
        torch.testing.assert_close(
            proportional_bias_step(bias, counts, 0.01), proportional_bias_step(bias, factor * counts, 0.01)
        )

    def test_proportional_moves_the_busiest_by_its_violation(self):
        counts = torch.tensor([[10, 2, 2, 2], [0, 0, 12, 12]])
        moved = proportional_bias_step(torch.zeros(2, 4), counts, 1.0)
        assert torch.equal(-moved.amin(-1), max_violation(counts))
        assert moved.amax().item() == 1.0, "an idle expert"

    @given(counts_lists)
    def test_centred_is_the_sign_rule_less_its_mean(self, counts):
        total, num_experts = sum(counts), len(counts)
        signs = [(total > num_experts * n) - (total < num_experts * n) for n in counts]
        moved = centred_bias_step(torch.zeros(num_experts), torch.tensor(counts), 1.0)
        expected = [float(sign - Fraction(sum(signs), num_experts)) for sign in signs]
        assert moved.tolist() == pytest.approx(expected, rel=1e-6, abs=0)

    def test_centred_keeps_the_mean_that_the_sign_rule_moves(self):
        bias, counts = torch.zeros(4), torch.tensor([7, 3, 3, 3])
        assert centred_bias_step(bias, counts, 0.001).sum().abs() < 1e-9
        assert bias_step(bias, counts, 0.001).sum() == pytest.approx(0.002)

    def test_centred_leaves_the_same_differences_between_experts_as_the_sign_rule(self):
        bias, counts = torch.linspace(-1, 1, 7), torch.tensor([0, 9, 3, 3, 1, 4, 2])
        shift = centred_bias_step(bias, counts, 0.01) - bias_step(bias, counts, 0.01)
        torch.testing.assert_close(shift, shift[:1].expand(7), rtol=0, atol=1e-6)

    def test_the_names_are_those_of_the_configuration_and_sign_is_the_reports(self):
        assert tuple(BIAS_RULES) == ("sign", "proportional", "centred")
        assert BIAS_RULES["sign"] is bias_step

    @pytest.mark.parametrize("rule", BIAS_RULES.values(), ids=BIAS_RULES)
    def test_every_rule_lowers_the_busiest_and_keeps_a_balanced_row(self, rule):
        bias = torch.tensor([[5.0, 5.0, 5.0], [0.1, 0.2, 0.3], [0.1, 0.2, 0.3]])
        counts = torch.tensor([[9, 1, 2], [4, 4, 4], [0, 0, 0]])
        moved = rule(bias, counts, 0.01)
        assert moved[0, 0] < 5.0 < moved[0, 1]
        assert torch.equal(moved[1:], bias[1:])
        assert bias[0].tolist() == [5.0] * 3, "the argument is left alone"
        assert torch.equal(rule(bias, counts, torch.tensor(0.0)), bias)

    @pytest.mark.parametrize("rule", BIAS_RULES.values(), ids=BIAS_RULES)
    @pytest.mark.usefixtures("bfloat16_default")
    def test_every_rule_is_float32_under_a_bfloat16_default(self, rule):
        moved = rule(torch.full((2,), 5.0, dtype=torch.float32), torch.tensor([1, 3]), 0.001)
        assert moved.dtype == torch.float32
        assert moved[0] > 5.0 > moved[1]

    @pytest.mark.parametrize("rule", BIAS_RULES.values(), ids=BIAS_RULES)
    def test_every_rule_refuses_what_swallows_steps(self, rule):
        with pytest.raises(TypeError, match="float32"):
            rule(torch.zeros(2, dtype=torch.bfloat16), torch.tensor([1, 2]), 0.001)
        with pytest.raises(TypeError, match="integer counts"):
            rule(torch.zeros(2), torch.ones(2), 0.001)


class TestMaxViolation:
    def test_is_0_when_balanced_and_E_over_K_minus_1_at_worst(self):
        num_experts, k, tokens = 6, 2, 63
        assert max_violation(torch.full((num_experts,), 21)) == 0
        worst = torch.tensor([tokens] * k + [0] * (num_experts - k))
        assert max_violation(worst) == num_experts / k - 1

    def test_matches_the_formula_by_row(self):
        counts = torch.randint(0, 1000, (5, 3, 7))
        load = counts.double()
        expected = (load.amax(-1) - load.mean(-1)) / load.mean(-1)
        torch.testing.assert_close(max_violation(counts), expected.float())

    def test_a_row_without_tokens_is_nan(self):
        assert max_violation(torch.tensor([[0, 0], [1, 1]])).isnan().tolist() == [True, False]

    @pytest.mark.usefixtures("bfloat16_default")
    def test_is_float32_under_a_bfloat16_default(self):
        assert max_violation(torch.tensor([1001, 999])).item() == pytest.approx(0.001, rel=1e-6)


def loss_by_loops(affinity: Tensor, expert: Tensor, num_sequences: int, alpha: float, selection: str) -> float:
    """Eq. 17-20 token by token, in Python floats."""
    num_tokens, num_experts = affinity.shape
    k, length = expert.shape[1], num_tokens // num_sequences
    total = 0.0
    for sequence in range(num_sequences):
        tokens = range(sequence * length, (sequence + 1) * length)
        chosen = []
        for t in tokens:
            scores = affinity[t].tolist()
            if selection == "unbiased":
                chosen.append(sorted(range(num_experts), key=lambda i: -scores[i])[:k])
            else:
                chosen.append(expert[t].tolist())
        for i in range(num_experts):
            f = num_experts / (k * length) * sum(i in choice for choice in chosen)
            p = sum(affinity[t, i].item() / affinity[t].sum().item() for t in tokens) / length
            total += f * p
    return alpha * total / num_sequences


def sample(num_tokens: int, num_experts: int, k: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(num_tokens * 1000 + num_experts * 10 + k)
    affinity = torch.randn(num_tokens, num_experts, dtype=torch.float32).sigmoid()
    bias = torch.randn(num_experts, dtype=torch.float32)
    return affinity, (affinity + bias).topk(k).indices


SHAPES = pytest.mark.parametrize(
    ("num_tokens", "num_experts", "k", "num_sequences"),
    [(63, 6, 2, 3), (12, 5, 5, 4), (1, 7, 3, 1), (32, 16, 1, 1), (30, 3, 2, 30)],
    ids=lambda n: str(n),
)


class TestBalanceLosses:
    @SHAPES
    @pytest.mark.parametrize("selection", ["unbiased", "executed"])
    def test_sequence_loss_equals_loops_over_tokens(self, num_tokens, num_experts, k, num_sequences, selection):
        affinity, expert = sample(num_tokens, num_experts, k)
        loss = sequence_balance_loss(
            affinity_TE=affinity,
            expert_TK=expert,
            num_sequences=num_sequences,
            alpha=0.3,
            selection=selection,
        )
        expected = loss_by_loops(affinity.double(), expert, num_sequences, 0.3, selection)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected, rel=1e-5)

    @SHAPES
    @pytest.mark.parametrize("selection", ["unbiased", "executed"])
    def test_batch_loss_equals_loops_over_tokens(self, num_tokens, num_experts, k, num_sequences, selection):
        affinity, expert = sample(num_tokens, num_experts, k)
        loss = batch_balance_loss(affinity_TE=affinity, expert_TK=expert, alpha=0.3, selection=selection)
        assert loss.item() == pytest.approx(loss_by_loops(affinity.double(), expert, 1, 0.3, selection), rel=1e-5)

    def test_unbiased_and_executed_differ_and_unbiased_is_the_default(self):
        affinity, expert = sample(63, 6, 2)
        loss = {
            selection: batch_balance_loss(affinity_TE=affinity, expert_TK=expert, alpha=1.0, selection=selection)
            for selection in ("unbiased", "executed")
        }
        assert loss["unbiased"] != loss["executed"]
        assert batch_balance_loss(affinity_TE=affinity, expert_TK=expert, alpha=1.0) == loss["unbiased"]

    @pytest.mark.parametrize("alpha", [1.0, 1e-4])
    def test_equals_alpha_when_balanced(self, alpha):
        num_experts, k = 6, 2
        # Each sequence of 6 tokens gives every expert 2 tokens and the same total affinity.
        token = torch.tensor([0.9, 0.8, 0.1, 0.2, 0.3, 0.4])
        affinity = torch.stack([token.roll(shift) for shift in range(num_experts)] * 3)
        expert = affinity.topk(k).indices
        loss = sequence_balance_loss(affinity_TE=affinity, expert_TK=expert, num_sequences=3, alpha=alpha)
        assert loss.item() == pytest.approx(alpha, rel=1e-6)
        assert batch_balance_loss(affinity_TE=affinity, expert_TK=expert, alpha=alpha).item() == pytest.approx(
            alpha, rel=1e-6
        )

    def test_sequence_loss_sees_imbalance_that_the_batch_loss_does_not(self):
        affinity = torch.tensor([[0.9, 0.1]] * 4 + [[0.1, 0.9]] * 4)
        expert = affinity.topk(1).indices
        assert batch_balance_loss(affinity_TE=affinity, expert_TK=expert, alpha=1.0) == pytest.approx(1.0)
        loss = sequence_balance_loss(affinity_TE=affinity, expert_TK=expert, num_sequences=2, alpha=1.0)
        assert loss == pytest.approx(1.8)

    def test_gradient_flows_through_the_mean_affinity_alone(self):
        affinity, expert = sample(63, 6, 2)
        affinity = affinity.double().requires_grad_()
        num_sequences, length = 3, 21
        chosen = torch.nn.functional.one_hot(affinity.detach().topk(2).indices, 6).sum(1).double()
        f = chosen.view(num_sequences, length, 6).sum(1) * 6 / (2 * length)
        p = (affinity / affinity.sum(-1, keepdim=True)).view(num_sequences, length, 6).mean(1)
        (expected,) = torch.autograd.grad((f * p).sum(-1).mean(), affinity)
        loss = sequence_balance_loss(affinity_TE=affinity, expert_TK=expert, num_sequences=num_sequences, alpha=1.0)
        (gradient,) = torch.autograd.grad(loss, affinity)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-8)

    def test_a_descent_step_takes_affinity_from_the_busy_expert(self):
        logits = torch.zeros(8, 4)
        logits[:, 0] = 1.0
        logits.requires_grad_()
        affinity = logits.sigmoid()
        batch_balance_loss(affinity_TE=affinity, expert_TK=affinity.topk(1).indices, alpha=1.0).backward()
        assert logits.grad is not None
        assert (logits.grad[:, 0] > 0).all()
        assert (logits.grad[:, 1:] < 0).all()

    def test_underflown_affinities_give_no_nan(self):
        logits = torch.full((4, 3), -200.0, requires_grad=True)
        affinity = logits.sigmoid()
        loss = batch_balance_loss(affinity_TE=affinity, expert_TK=affinity.topk(1).indices, alpha=1.0)
        loss.backward()
        assert loss.isfinite()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()

    @pytest.mark.usefixtures("bfloat16_default")
    def test_is_float32_under_a_bfloat16_default(self):
        affinity, expert = sample(300, 6, 2)
        loss = batch_balance_loss(affinity_TE=affinity, expert_TK=expert, alpha=1.0)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(loss_by_loops(affinity.double(), expert, 1, 1.0, "unbiased"), rel=1e-5)

    def test_broken_sequences_are_refused(self):
        affinity, expert = sample(63, 6, 2)
        with pytest.raises(ValueError, match="num_sequences=2 does not divide the 63 tokens"):
            sequence_balance_loss(affinity_TE=affinity, expert_TK=expert, num_sequences=2, alpha=1.0)

    def test_an_unknown_selection_is_refused(self):
        affinity, expert = sample(12, 5, 2)
        with pytest.raises(ValueError, match=r"selection='biased'.*'unbiased'.*'executed'"):
            batch_balance_loss(affinity_TE=affinity, expert_TK=expert, alpha=1.0, selection="biased")
