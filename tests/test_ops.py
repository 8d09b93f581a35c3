"""Routing, dispatch, attention, rotary position and cross entropy against plain definitions."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_dsv3.ops.attention import causal_attention, latent_heads
from lightning_dsv3.ops.backends import forced_kernels
from lightning_dsv3.ops.cross_entropy import IGNORE_INDEX, count_targets, linear_cross_entropy, shifted_targets
from lightning_dsv3.ops.dispatch import (
    combine,
    grouped_matmul,
    grouped_matmul_loop,
    grouped_outer,
    permute,
    plan_dispatch,
)
from lightning_dsv3.ops.linear import linear
from lightning_dsv3.ops.norm import rms_norm
from lightning_dsv3.ops.rope import apply_rope, rope_table, softmax_scale, unapply_rope
from lightning_dsv3.ops.routing import affinity, choose_experts, gate_values


def choose_by_hand(scores: list[float], bias: list[float], k: int, groups: int, kept: int, in_score: int) -> set[int]:
    """The report's rule for one token, in plain Python."""
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(scores) // groups
    group_scores = [sum(sorted(biased[g * size : (g + 1) * size], reverse=True)[:in_score]) for g in range(groups)]
    best = sorted(range(groups), key=lambda g: -group_scores[g])[:kept]
    allowed = [e for e in range(len(scores)) if e // size in best]
    return set(sorted(allowed, key=lambda e: -biased[e])[:k])


@st.composite
def routing_case(draw: st.DrawFn) -> tuple[Tensor, Tensor, dict[str, int]]:
    groups = draw(st.integers(1, 5))
    size = draw(st.integers(1, 6))
    kept = draw(st.integers(1, groups))
    k = draw(st.integers(1, kept * size))
    tokens = draw(st.sampled_from([1, 2, 63]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.0, 0.1, 5.0]))
    affinity_TE = torch.rand(tokens, groups * size)
    bias_E = torch.randn(groups * size) * scale
    return affinity_TE, bias_E, {
        "num_experts_per_tok": k, "n_group": groups, "topk_group": kept,
        "experts_in_group_score": draw(st.integers(1, 4)),
    }  # fmt: skip


@given(routing_case())
def test_choice_is_the_reports_rule(case: tuple[Tensor, Tensor, dict[str, int]]) -> None:
    affinity_TE, bias_E, arguments = case
    chosen = choose_experts(affinity_TE, bias_E, **arguments)
    assert chosen.shape == (len(affinity_TE), arguments["num_experts_per_tok"])
    for scores, mine in zip(affinity_TE, chosen, strict=True):
        by_hand = choose_by_hand(
            scores.tolist(),
            bias_E.tolist(),
            arguments["num_experts_per_tok"],
            arguments["n_group"],
            arguments["topk_group"],
            arguments["experts_in_group_score"],
        )
        assert len(set(mine.tolist())) == mine.numel()  # no expert twice
        assert set(mine.tolist()) == by_hand


def test_excluded_groups_stay_excluded_when_every_biased_score_is_negative() -> None:
    """A fill value of 0 in place of -inf would let an excluded expert win here."""
    chosen = choose_experts(torch.rand(50, 8), torch.full((8,), -5.0), num_experts_per_tok=2, n_group=4, topk_group=1)
    assert (chosen // 2 == chosen[:, :1] // 2).all()


@given(routing_case(), st.booleans(), st.sampled_from(["sigmoid", "softmax"]))
def test_gate_values_come_from_affinities_without_bias(
    case: tuple[Tensor, Tensor, dict[str, int]], normalise: bool, scoring: str
) -> None:
    logits_TE, bias_E, arguments = case
    s_TE = affinity(logits_TE, scoring)
    chosen = choose_experts(s_TE, bias_E * 1e6, **arguments)  # (s + b) - b would be 0 here
    gate_TK = gate_values(s_TE, chosen, norm_topk_prob=normalise, routed_scaling_factor=2.5)
    expected = s_TE.gather(1, chosen)
    if normalise:
        torch.testing.assert_close(gate_TK.sum(-1), torch.full((len(s_TE),), 2.5))
        expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(gate_TK, expected * 2.5)


@given(st.integers(1, 9), st.integers(1, 4), st.sampled_from([1, 2, 63]), st.integers(0, 2**31))
def test_every_chosen_pair_is_dispatched_and_comes_back(experts: int, k: int, tokens: int, seed: int) -> None:
    torch.manual_seed(seed)
    k = min(k, experts)
    expert_TK = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)])
    plan = plan_dispatch(expert_TK, experts)
    x_TD = torch.randn(tokens, 3)
    x_ND = permute(x_TD, plan)
    assert plan.ends_E[-1] == tokens * k  # nothing is dropped
    starts = [0, *plan.ends_E.tolist()]
    for e in range(experts):
        holders = (expert_TK == e).any(-1).nonzero().flatten()
        assert torch.equal(x_ND[starts[e] : starts[e + 1]], x_TD[holders])  # in the tokens' order
    torch.testing.assert_close(combine(x_ND, plan, tokens), x_TD * k)


@given(
    st.integers(1, 9), st.integers(1, 4), st.sampled_from([0, 1, 2, 63]), st.sampled_from([2, 3, 16]),
    st.integers(0, 2**31),
)  # fmt: skip
def test_slots_of_an_expert_are_padded_to_a_multiple(experts: int, k: int, tokens: int, align: int, seed: int) -> None:
    torch.manual_seed(seed)
    k = min(k, experts)
    # Some experts get no token.
    expert_TK = (torch.rand(tokens, experts) - 2.0 * (torch.rand(experts) < 0.3)).topk(k, dim=-1).indices
    plan, tight = plan_dispatch(expert_TK, experts, align), plan_dispatch(expert_TK, experts)
    slots = plan.slot_token_N.numel()
    assert slots % align == 0
    assert slots == (tokens * k + min(experts, tokens * k) * (align - 1)) // align * align
    x_TD = torch.randn(tokens, 3)
    x_ND, tight_ND = permute(x_TD, plan), permute(x_TD, tight)
    starts, tight_starts = [0, *plan.ends_E.tolist()], [0, *tight.ends_E.tolist()]
    assert starts[-1] <= slots
    is_pair_N = torch.zeros(slots, dtype=torch.bool)
    for e in range(experts):
        count = tight_starts[e + 1] - tight_starts[e]
        assert starts[e + 1] - starts[e] == -(-count // align) * align
        rows = slice(starts[e], starts[e] + count)
        is_pair_N[rows] = True
        for name in ("slot_token_N", "slot_pair_N"):
            assert torch.equal(getattr(plan, name)[rows], getattr(tight, name)[tight_starts[e] : tight_starts[e + 1]])
        assert torch.equal(x_ND[rows], tight_ND[tight_starts[e] : tight_starts[e + 1]])
    for values in (plan.slot_token_N, plan.slot_pair_N):
        assert (values[~is_pair_N] == -1).all()
    assert not x_ND[~is_pair_N].any()
    assert torch.equal(plan.slot_pair_N[plan.pair_slot_N], torch.arange(tokens * k))
    y_ND = x_ND.clone()
    y_ND[~is_pair_N] = math.nan
    torch.testing.assert_close(combine(y_ND, plan, tokens), x_TD * k)


def test_padding_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="align=0: give what each expert's slots are a multiple of"):
        plan_dispatch(torch.zeros(1, 1, dtype=torch.int64), 1, align=0)


@pytest.mark.parametrize("align", [1, 4])
@pytest.mark.parametrize("gated", [True, False])
def test_gradients_of_permutation_and_combination_are_exact_and_can_be_differentiated(gated: bool, align: int) -> None:
    plan = plan_dispatch(torch.tensor([[0, 3], [3, 1], [0, 1], [3, 0], [1, 3]]), 5, align)
    x_TD = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    y_ND = torch.randn(plan.slot_token_N.numel(), 3, dtype=torch.float64, requires_grad=True)
    gate_TK = torch.rand(5, 2, dtype=torch.float64, requires_grad=gated)
    inputs = (y_ND, gate_TK) if gated else (y_ND,)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x: permute(x, plan), (x_TD,))
        assert check(lambda y, gate=None: combine(y, plan, 5, gate), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gated_slots_are_summed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    tokens, k = 40, 6
    expert_TK = torch.stack([torch.randperm(8)[:k] for _ in range(tokens)])
    plan = plan_dispatch(expert_TK, 8, align=16)
    y_ND = torch.randn(plan.slot_token_N.numel(), 5).to(dtype)
    gate_TK = torch.rand(tokens, k)
    y_TD = combine(y_ND, plan, tokens, gate_TK)
    exact = (y_ND.double()[plan.pair_slot_N].view(tokens, k, -1) * gate_TK.double().unsqueeze(-1)).sum(1)
    assert y_TD.dtype == dtype
    # Half a unit of the last place, and what the float32 sum adds.
    torch.testing.assert_close(y_TD.double(), exact, rtol=torch.finfo(dtype).eps / 2, atol=2e-6)


def test_the_table_of_kernels_chooses_the_grouped_product(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, ends = torch.randn(6, 8), torch.randn(2, 4, 8), torch.tensor([2, 6], dtype=torch.int32)
    expected = grouped_matmul(x, w, ends)
    with forced_kernels(grouped_matmul="grouped_mm"):
        assert grouped_matmul(torch.empty(0, 7), torch.randn(2, 4, 7), torch.zeros_like(ends)).shape == (0, 4)
        with pytest.raises(ValueError, match="a width of 7 numbers is no multiple of 16 bytes"):
            grouped_matmul(torch.randn(6, 7), torch.randn(2, 4, 7), ends)
        with pytest.raises(ValueError, match="operands of two dtypes"):
            grouped_matmul(x, w.bfloat16(), ends)
        with pytest.raises(ValueError, match="not for float64"):
            grouped_outer(x.double(), x.double(), ends)
    monkeypatch.setattr(F, "grouped_mm", None)  # so that a call of it fails
    with forced_kernels(grouped_matmul="loop"):
        torch.testing.assert_close(grouped_matmul(x, w, ends), expected)
        grouped_outer(x, x, ends)
    with pytest.raises(TypeError):
        grouped_matmul(x, w, ends)


def experts_by_loop(x: Tensor, weight: Tensor, expert_TK: Tensor, gate_TK: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], weight.shape[1], dtype=x.dtype)
    for t in range(x.shape[0]):
        for j in range(expert_TK.shape[1]):
            out[t] = out[t] + gate_TK[t, j] * (weight[expert_TK[t, j]] @ x[t])
    return out


@pytest.mark.parametrize("routing", ["random", "all_on_one", "one_token", "some_experts_empty"])
@pytest.mark.parametrize(("width", "dtype"), [(8, torch.float32), (7, torch.float32), (8, torch.float64)])
def test_grouped_matmul_computes_every_pair_with_all_gradients(routing: str, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    experts, tokens, dim = 5, 1 if routing == "one_token" else 13, 12
    choices = {"all_on_one": [3], "some_experts_empty": [0, 4]}.get(routing, range(experts))
    expert_TK = torch.tensor([[choices[(t * 7) % len(choices)]] for t in range(tokens)])
    gate_TK = torch.rand(tokens, 1, dtype=dtype)
    reference = [torch.randn(tokens, dim, dtype=torch.float64), torch.randn(experts, width, dim, dtype=torch.float64)]
    ours = [t.to(dtype).requires_grad_() for t in reference]
    reference = [t.requires_grad_() for t in reference]
    plan = plan_dispatch(expert_TK, experts)
    gate_N = gate_TK.flatten()[plan.slot_pair_N]
    y = combine(grouped_matmul(permute(ours[0], plan), ours[1], plan.ends_E) * gate_N[:, None], plan, tokens)
    expected = experts_by_loop(reference[0], reference[1], expert_TK, gate_TK.double())
    direction = torch.randn(tokens, width, dtype=torch.float64)
    (y * direction.to(dtype)).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(ours, reference, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-5, atol=1e-6)


def test_grouped_matmul_takes_an_expanded_gradient() -> None:
    x, w = torch.randn(6, 8, requires_grad=True), torch.randn(2, 4, 8, requires_grad=True)
    grouped_matmul(x, w, torch.tensor([2, 6], dtype=torch.int32)).sum().backward()
    expected = torch.cat([torch.ones(2, 4) @ w.detach()[0], torch.ones(4, 4) @ w.detach()[1]])
    torch.testing.assert_close(x.grad, expected)


def test_grouped_matmul_equals_its_loop_in_bfloat16() -> None:
    x, w = torch.randn(20, 16, dtype=torch.bfloat16), torch.randn(3, 8, 16, dtype=torch.bfloat16)
    ends = torch.tensor([4, 4, 20], dtype=torch.int32)
    torch.testing.assert_close(grouped_matmul(x, w, ends), grouped_matmul_loop(x, w, ends))


@pytest.mark.parametrize("op", [grouped_matmul, grouped_outer])
def test_grouped_operators_are_registered_right(op: torch._library.custom_ops.CustomOpDef) -> None:
    a, b = torch.randn(6, 8, requires_grad=True), torch.randn(2, 4, 8, requires_grad=True)
    second = b if op is grouped_matmul else torch.randn(6, 4, requires_grad=True)
    torch.library.opcheck(op, (a, second, torch.tensor([2, 6], dtype=torch.int32)))


@pytest.mark.parametrize(("nope", "rope", "v"), [(8, 4, 8), (4, 4, 12), (6, 2, 8), (0, 4, 3)])
def test_attention_of_latent_heads_equals_the_plain_form(nope: int, rope: int, v: int) -> None:
    """Report, eq. 3-10, with every gradient; widths that torch's kernel takes and widths that it does not."""
    batch, length, heads = 2, 17, 3
    inputs = [
        torch.randn(batch, length, heads, nope + rope, dtype=torch.float64),
        torch.randn(batch, length, heads, nope + v, dtype=torch.float64),
        torch.randn(batch, length, rope, dtype=torch.float64),
    ]
    cos, sin = rope_table(torch.arange(length), dim=rope, theta=100.0)
    fast = [t.float().requires_grad_() for t in inputs]
    out = causal_attention(latent_heads(*fast, cos, sin, v_head_dim=v), scale=0.3, v_head_dim=v)
    q, kv, k_rope = plain = [t.requires_grad_() for t in inputs]
    turned = torch.polar(torch.ones_like(cos).double(), torch.atan2(sin, cos).double())
    q_rope = torch.view_as_real(_pairs(q[..., nope:]) * turned[:, None]).flatten(-2)
    k_rope = torch.view_as_real(_pairs(k_rope) * turned).flatten(-2)
    scores = torch.einsum("bshn,bthn->bhst", q[..., :nope], kv[..., :nope])
    scores = (scores + torch.einsum("bshr,btr->bhst", q_rope, k_rope)) * 0.3
    scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
    expected = torch.einsum("bhst,bthv->bhsv", scores.softmax(-1), kv[..., nope:])
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(fast, plain, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


def _pairs(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_equals_torchs_with_gradients(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x, weight, grad = torch.randn(3, 5, 24).to(dtype), torch.rand(24).to(weight_dtype), torch.randn(3, 5, 24).to(dtype)
    mine = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = [x.double().requires_grad_(), weight.double().requires_grad_()]
    y = rms_norm(*mine, 1e-5)
    expected = F.rms_norm(theirs[0], (24,), theirs[1], 1e-5)
    y.backward(grad)
    expected.backward(grad.double())
    assert (y.dtype, mine[1].grad.dtype) == (dtype, weight_dtype)
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(mine[0].grad.double(), theirs[0].grad, rtol=tolerance, atol=2 * tolerance)
    tolerance = max(tolerance, 1e-2 if weight_dtype == torch.bfloat16 else 0)
    torch.testing.assert_close(mine[1].grad.double(), theirs[1].grad, rtol=tolerance, atol=4 * tolerance)


def test_turning_back_undoes_the_turn() -> None:
    x = torch.randn(2, 9, 3, 6)
    cos, sin = rope_table(torch.arange(9), dim=6, theta=100.0)
    torch.testing.assert_close(unapply_rope(apply_rope(x, cos, sin), cos, sin), x)


def test_rope_turns_neighbouring_pairs_as_complex_numbers() -> None:
    x = torch.randn(2, 9, 3, 6)
    cos, sin = rope_table(torch.arange(9), dim=6, theta=100.0)
    turned = apply_rope(x, cos, sin)
    frequency = 100.0 ** (-torch.arange(0, 6, 2, dtype=torch.float64) / 6)
    angle = torch.arange(9, dtype=torch.float64)[:, None] * frequency
    spun = (
        torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angle), angle)[:, None]
    )
    torch.testing.assert_close(turned.double(), torch.cat([spun.real, spun.imag], -1), rtol=1e-5, atol=1e-6)


def test_rope_scores_depend_on_distance_alone() -> None:
    q, k = torch.randn(1, 1, 8), torch.randn(1, 1, 8)

    def score(i: int, j: int) -> float:
        tables = [rope_table(torch.tensor([p]), dim=8, theta=10000.0) for p in (i, j)]
        return float((apply_rope(q, *tables[0]) * apply_rope(k, *tables[1])).sum())

    assert score(5, 2) == pytest.approx(score(105, 102), abs=1e-4)


def test_yarn_has_the_published_constants() -> None:
    yarn = {"factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}
    assert softmax_scale(192, yarn) == pytest.approx(0.135234, abs=1e-6)
    assert softmax_scale(192, yarn | {"mscale_all_dim": 0.707}) == pytest.approx(192**-0.5 * 1.58963, rel=1e-5)
    position = torch.tensor([1.0])
    plain = torch.atan2(*rope_table(position, dim=64, theta=10000.0)[::-1])[0]
    scaled = torch.atan2(*rope_table(position, dim=64, theta=10000.0, scaling=yarn)[::-1])[0]
    ratio = (scaled / plain).tolist()
    assert ratio[:11] == pytest.approx([1.0] * 11, rel=1e-5)  # pairs up to `low` = 10 keep their frequency
    assert ratio[23:] == pytest.approx([1 / 40] * 9, rel=1e-3)  # pairs from `high` = 23 are interpolated
    assert all(a >= b - 1e-6 for a, b in pairwise(ratio[10:]))


@pytest.mark.parametrize("rows", [1, 63, 700])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_linear_cross_entropy_equals_torchs_with_gradients(
    rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_dsv3.ops.cross_entropy._CHUNK_ELEMENTS", 50 * 37)  # several chunks, the last ragged
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, 16, dtype=torch.float64), torch.randn(37, 16, dtype=torch.float64)
    targets = torch.randint(0, 37, (rows,))
    targets[::5] = IGNORE_INDEX
    targets[-1] = 3
    mine = [t.to(dtype, copy=True).requires_grad_() for t in (hidden, weight)]
    theirs = [t.detach().clone().requires_grad_() for t in (hidden, weight)]
    loss, token_losses = linear_cross_entropy(*mine, targets)
    expected = F.cross_entropy(theirs[0] @ theirs[1].T, targets)
    (loss * 3).backward()
    (expected * 3).backward()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    each = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    torch.testing.assert_close(token_losses.double(), each, rtol=tolerance, atol=tolerance)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(
            a.grad.double(), b.grad, rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=tolerance
        )


def test_linear_cross_entropy_of_no_target_is_zero_with_zero_gradient() -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(5, 4), torch.full((3,), IGNORE_INDEX)).loss
    loss.backward()
    assert loss == 0
    assert torch.equal(hidden.grad, torch.zeros(3, 4))


def test_linear_cross_entropy_of_a_target_with_probability_zero_is_finite() -> None:
    """exp(-200) is 0 in float32; the loss is still 200, as is torch's own."""
    hidden, weight = torch.tensor([[100.0], [-100.0]], requires_grad=True), torch.tensor([[1.0], [-1.0]])
    loss, token_losses = linear_cross_entropy(hidden, weight, torch.tensor([1, 1]))
    assert token_losses.tolist() == [200.0, 0.0]
    loss.backward()
    torch.testing.assert_close(hidden.grad, torch.tensor([[1.0], [0.0]]))


def test_linear_cross_entropy_divides_by_the_given_denominator() -> None:
    hidden, weight, targets = torch.randn(6, 4), torch.randn(5, 4), torch.randint(0, 5, (6,))
    loss = linear_cross_entropy(hidden, weight, targets, torch.tensor(24.0)).loss
    assert float(loss) == pytest.approx(float(F.cross_entropy(hidden @ weight.T, targets)) * 6 / 24, rel=1e-5)


def test_linear_cross_entropy_follows_autocast() -> None:
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, torch.randint(0, 5, (6,))).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


@given(st.integers(1, 3), st.integers(2, 9), st.integers(1, 4))
def test_shifted_targets_point_at_the_label_so_many_places_ahead(batch: int, length: int, shift: int) -> None:
    labels = torch.arange(batch * length).view(batch, length)
    targets = shifted_targets(labels, min(shift, length))
    for i in range(length):
        expected = labels[:, i + shift] if i + shift < length else torch.full((batch,), IGNORE_INDEX)
        assert torch.equal(targets[:, i], expected)
    assert count_targets(torch.tensor([IGNORE_INDEX])) == 1
    assert math.isclose(float(count_targets(targets)), max(1, batch * max(0, length - shift)))


class TestFewRows:
    def test_one_vector_is_one_row(self):
        weight, x = torch.randn(8, 4), torch.randn(4)
        with torch.no_grad():
            torch.testing.assert_close(linear(x, weight), weight @ x)

    @pytest.mark.parametrize("rows", [1, 2, 3, 7, 32, 33])
    @pytest.mark.parametrize("shape", [(5, 3), (64, 48)])
    def test_they_are_multiplied_as_many_are(self, rows, shape):
        generator = torch.Generator().manual_seed(rows)
        weight, x = (torch.randn(*size, generator=generator) for size in (shape, (1, rows, shape[1])))
        with torch.no_grad():
            y = linear(x, weight)
        assert y.is_contiguous()
        torch.testing.assert_close(y.double(), x.double() @ weight.double().mT, atol=1e-5, rtol=1e-5)

    def test_gradients_and_autocast_are_those_of_torch(self):
        weight, x = torch.randn(8, 4, requires_grad=True), torch.randn(2, 4)
        linear(x, weight).sum().backward()
        torch.testing.assert_close(weight.grad, x.sum(dim=0).expand(8, 4))
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert linear(x, weight).dtype == torch.bfloat16
