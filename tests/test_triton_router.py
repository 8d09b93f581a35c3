"""The router's kernels against float64, written out token by token, and against the plain form."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from tiny_model import tiny_model
from torch import Tensor
from triton_cases import poison_empty, run_interpreted

from lightning_dsv3.balance import RouterObserver, find_routers
from lightning_dsv3.config import DeepSeekV3Config
from lightning_dsv3.layers.router import Router
from lightning_dsv3.ops.backends import Case, forced_kernels, is_interpreted, refusals
from lightning_dsv3.ops.routing import Routed, affinity, choose_experts, gate_values, route, route_plain
from lightning_dsv3.parallel import checkpoint_blocks

pytest.importorskip("triton")


class Shape(NamedTuple):
    tokens: int
    experts: int
    k: int
    groups: int = 1
    kept: int = 1
    in_score: int = 2
    scoring: str = "sigmoid"
    normalise: bool = True
    bias: bool = True

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            "num_experts_per_tok": self.k,
            "n_group": self.groups,
            "topk_group": self.kept,
            "experts_in_group_score": self.in_score,
            "scoring_func": self.scoring,
            "norm_topk_prob": self.normalise,
            "routed_scaling_factor": 2.5,
        }

    def draw(self) -> tuple[Tensor, Tensor | None]:
        logits = torch.randn(self.tokens, self.experts)
        return logits, torch.randn(self.experts) / 2 if self.bias else None


SHAPES = {
    "v3": Shape(13, 256, 8, 8, 4),
    "v2": Shape(17, 160, 6, 8, 3, 1, "softmax", normalise=False, bias=False),
    "v2_lite": Shape(19, 64, 6, scoring="softmax", normalise=False, bias=False),
    "softmax_normalised": Shape(33, 72, 6, scoring="softmax"),
    "sigmoid_not_normalised": Shape(5, 24, 3, 4, 2, normalise=False),
    "3_groups_of_5": Shape(19, 15, 4, 3, 2),
    "5_groups_of_3_score_of_3": Shape(31, 15, 4, 5, 3, 3),
    "groups_of_one_expert": Shape(9, 6, 3, 6, 4),
    "all_groups_kept": Shape(9, 12, 3, 4, 4),
    "every_expert_chosen": Shape(7, 5, 5),
    "every_expert_of_the_kept_groups": Shape(7, 12, 6, 4, 2),
    "one_expert": Shape(3, 1, 1),
    "one_token": Shape(1, 8, 2),
    "512_experts_16_chosen": Shape(3, 512, 16, 8, 4),
    "1000_experts_in_25_groups": Shape(2, 1000, 8, 25, 5, scoring="softmax"),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def affinity64(logits: Tensor, shape: Shape) -> Tensor:
    exact = logits.double()
    if shape.scoring == "sigmoid":
        return 1 / (1 + (-exact).exp())
    return exact.exp() / exact.exp().sum(-1, keepdim=True)


def gate64(affinity: Tensor, expert: Tensor, shape: Shape) -> Tensor:
    gate = torch.stack([s[e] for s, e in zip(affinity, expert, strict=True)])
    return 2.5 * (gate / gate.sum(-1, keepdim=True) if shape.normalise else gate)


def choose(choice: list[float], shape: Shape) -> tuple[set[int], float]:
    """The experts of one token, and how far away another choice was."""
    margins = [math.inf]
    size = shape.experts // shape.groups
    groups = [range(g * size, (g + 1) * size) for g in range(shape.groups)]
    if shape.kept < shape.groups:
        scores = [sum(sorted((choice[e] for e in group), reverse=True)[: shape.in_score]) for group in groups]
        by_score = sorted(range(shape.groups), key=lambda g: -scores[g])
        margins.append(scores[by_score[shape.kept - 1]] - scores[by_score[shape.kept]])
        groups = [groups[g] for g in by_score[: shape.kept]]
    order = sorted((e for group in groups for e in group), key=lambda e: -choice[e])
    if shape.k < len(order):
        margins.append(choice[order[shape.k - 1]] - choice[order[shape.k]])
    return set(order[: shape.k]), min(margins)


def sets(expert: Tensor) -> list[set[int]]:
    assert expert.dtype == torch.int64
    found = [set(row) for row in expert.tolist()]
    assert all(len(row) == expert.shape[1] for row in found), "an expert was chosen twice"
    return found


def assert_counts(routed: Routed, num_experts: int) -> None:
    assert routed.counts_E is not None
    assert routed.counts_E.dtype == torch.int64
    assert routed.counts_E.tolist() == torch.bincount(routed.expert_TK.flatten(), minlength=num_experts).tolist()


class TestInterpreted:
    __test__ = is_interpreted()

    @pytest.fixture(autouse=True)
    def poison(self, monkeypatch: pytest.MonkeyPatch) -> None:
        poison_empty(monkeypatch)

    @every_shape
    def test_choice_gate_values_affinities_and_counts(self, shape: Shape) -> None:
        logits, bias = shape.draw()
        routed = route(logits, bias, **shape.arguments)
        exact = affinity64(logits, shape)
        choice = exact if bias is None else exact + bias.double()
        chosen, margins = zip(*(choose(row, shape) for row in choice.tolist()), strict=True)
        assert min(margins) > 1e-6, "nearer than float32 tells apart: no choice to compare with"
        assert sets(routed.expert_TK) == list(chosen)
        # float32 has 1.2e-7; an exponential, a sum and two divisions are a few of them.
        close = {"rtol": 2e-6, "atol": 1e-9}
        torch.testing.assert_close(routed.affinity_TE.double(), exact, **close)
        torch.testing.assert_close(routed.gate_TK.double(), gate64(exact, routed.expert_TK, shape), **close)
        assert_counts(routed, shape.experts)
        plain = route_plain(logits, bias, **shape.arguments)
        assert sets(plain.expert_TK) == list(chosen)

    @pytest.mark.parametrize(
        ("name", "used"),
        [(name, "gate and affinity") for name in SHAPES]
        + [(name, used) for name in ("v2", "3_groups_of_5", "softmax_normalised") for used in ("gate", "affinity")],
    )
    def test_gradient_of_the_logits(self, name: str, used: str) -> None:
        shape = SHAPES[name]
        logits, bias = shape.draw()
        logits.requires_grad_()
        exact = logits.detach().double().requires_grad_()
        to_gate, to_affinity = torch.randn(shape.tokens, shape.k), torch.randn(shape.tokens, shape.experts)
        routed = route(logits, bias, **shape.arguments)
        s = affinity64(exact, shape)
        loss, loss64 = torch.zeros(()), torch.zeros((), dtype=torch.float64)
        if "gate" in used:
            loss = loss + (routed.gate_TK * to_gate).sum()
            loss64 = loss64 + (gate64(s, routed.expert_TK, shape) * to_gate).sum()
        if "affinity" in used:
            loss = loss + (routed.affinity_TE * to_affinity).sum()
            loss64 = loss64 + (s * to_affinity).sum()
        loss.backward()
        loss64.backward()
        # Differences of numbers near 1, with a few roundings of 6e-8 each.
        torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)

    def test_one_without_a_gradient_has_none(self) -> None:
        shape = SHAPES["3_groups_of_5"]
        logits, bias = shape.draw()
        bias.requires_grad_()
        routed = route(logits.requires_grad_(), bias, **shape.arguments)
        assert routed.gate_TK.requires_grad
        assert routed.affinity_TE.requires_grad
        assert not routed.expert_TK.requires_grad
        assert not routed.counts_E.requires_grad
        routed.gate_TK.sum().backward()
        assert bias.grad is None

    def test_tensors_with_strides(self) -> None:
        shape = Shape(6, 10, 3)
        logits, bias = torch.randn(10, 6), torch.rand(20)
        routed = route(logits.T.requires_grad_(), bias[::2], **shape.arguments)
        plain = route_plain(logits.T, bias[::2], **shape.arguments)
        assert sets(routed.expert_TK) == sets(plain.expert_TK)
        seen = logits.T.clone().requires_grad_()
        other = seen.clone()
        (gradient,) = torch.autograd.grad(route(other, bias[::2], **shape.arguments).affinity_TE.sum(), seen)
        torch.testing.assert_close(gradient, seen.sigmoid() * (1 - seen.sigmoid()))

    def test_of_equals_the_first_is_taken(self) -> None:
        shape = Shape(3, 15, 4, 5, 2)
        logits = torch.zeros(3, 15)
        logits[1, [7, 13]] = 1.0
        logits[2, 3:6] = torch.tensor([40.0, 50.0, 60.0])  # their sigmoids are 1
        expected = [[0, 1, 2, 3], [7, 13, 6, 8], [3, 4, 5, 0]]
        for bias in (None, torch.zeros(15)):
            routed = route(logits, bias, **shape.arguments)
            assert routed.expert_TK.tolist() == expected
            assert_counts(routed, 15)

    @pytest.mark.filterwarnings("ignore:.*(invalid value|All-NaN|overflow).*:RuntimeWarning")
    @pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
    @pytest.mark.parametrize("broken", [math.nan, -math.nan, math.inf, -math.inf])
    def test_a_broken_logit_stays_visible_and_harms_no_other_token(self, broken: float, scoring: str) -> None:
        shape = Shape(9, 15, 4, 5, 2, scoring=scoring)
        logits, bias = shape.draw()
        whole = route(logits, bias, **shape.arguments)
        logits[4, 11] = broken
        routed, plain = (form(logits, bias, **shape.arguments) for form in (route, route_plain))
        torch.testing.assert_close(routed.affinity_TE, plain.affinity_TE, equal_nan=True)
        others = [t for t in range(9) if t != 4]
        for now, before in zip(routed[:3], whole[:3], strict=True):
            assert torch.equal(now[others], before[others])
        assert 0 <= int(routed.expert_TK.min()) <= int(routed.expert_TK.max()) < 15
        assert len(sets(routed.expert_TK)) == 9
        assert_counts(routed, 15)
        all_nan = scoring == "softmax" and broken != -math.inf
        assert routed.affinity_TE[4].isnan().tolist() == [
            all_nan or (math.isnan(broken) and e == 11) for e in range(15)
        ]
        if math.isnan(broken) and scoring == "sigmoid":
            assert routed.expert_TK[4, 0] == 11
        assert routed.gate_TK[4].isnan().all() == plain.gate_TK[4].isnan().all() == (all_nan or math.isnan(broken))
        if not all_nan:
            assert set(routed.expert_TK[4].tolist()) == set(plain.expert_TK[4].tolist())

    @pytest.mark.filterwarnings("ignore:.*(invalid value|All-NaN|overflow).*:RuntimeWarning")
    def test_rows_of_broken_logits(self) -> None:
        shape = Shape(3, 12, 5, 4, 2)
        logits = torch.full((3, 12), math.nan)
        logits[1:] = torch.tensor([[math.inf], [-math.inf]])
        logits.requires_grad_()
        routed = route(logits, None, **shape.arguments)
        assert routed.expert_TK.tolist() == [[0, 1, 2, 3, 4]] * 3
        assert routed.gate_TK[0].isnan().all()
        assert routed.gate_TK[1].tolist() == [0.5] * 5
        assert routed.gate_TK[2].tolist() == [0.0] * 5  # no 0 / 0
        routed.gate_TK.sum().backward()
        assert logits.grad[0, :5].isnan().all()
        assert torch.equal(logits.grad[1:], torch.zeros(2, 12))

    def test_infinite_and_broken_biases(self) -> None:
        shape = Shape(20, 12, 4)
        logits, bias = shape.draw()
        bias[3], bias[5], bias[7:] = math.inf, math.nan, -math.inf
        routed = route(logits, bias, **shape.arguments)
        assert routed.expert_TK[:, :2].tolist() == [[5, 3]] * 20  # NaN is the greatest
        assert int(routed.expert_TK.max()) < 7
        assert routed.gate_TK.isfinite().all()
        for k in (9, 12):  # too few are left
            routed = route(logits, bias, **Shape(20, 12, k).arguments)
            assert all(set(range(7)) < row for row in sets(routed.expert_TK))
        routed = route(logits, torch.full((12,), -math.inf), **Shape(20, 12, 5, 4, 1).arguments)
        assert routed.expert_TK.tolist() == [[0, 1, 2, 3, 4]] * 20

    def test_a_huge_bias_leaves_the_gate_values(self) -> None:
        shape = SHAPES["3_groups_of_5"]
        logits, bias = shape.draw()
        routed = route(logits, bias * 1e6, **shape.arguments)  # (s + b) - b would be 0
        torch.testing.assert_close(
            routed.gate_TK.double(), gate64(affinity64(logits, shape), routed.expert_TK, shape), rtol=2e-6, atol=0
        )

    @pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
    def test_no_tokens(self, scoring: str) -> None:
        shape = Shape(0, 12, 3, 4, 2, scoring=scoring)
        logits = torch.zeros(0, 12, requires_grad=True)
        routed = route(logits, torch.zeros(12), **shape.arguments)
        assert routed.gate_TK.shape == routed.expert_TK.shape == (0, 3)
        assert routed.affinity_TE.shape == (0, 12)
        assert routed.counts_E.tolist() == [0] * 12
        (routed.gate_TK.sum() + routed.affinity_TE.sum()).backward()
        assert logits.grad.shape == (0, 12)

    @pytest.mark.parametrize("wrong", [{"num_experts_per_tok": 13}, {"num_experts_per_tok": 0}, {"n_group": 5}])
    def test_impossible_settings(self, wrong: dict[str, int]) -> None:
        with pytest.raises(ValueError, match=r"num_experts_per_tok=\d+ of 12 experts in n_group"):
            route(torch.zeros(2, 12), None, **{**Shape(2, 12, 3, 4, 2).arguments, **wrong})

    def test_as_operators(self) -> None:
        from lightning_dsv3.ops.triton import router

        shape = SHAPES["3_groups_of_5"]
        logits, bias = shape.draw()
        rule = [15, 4, 3, 2, 2, 0, 1]
        torch.library.opcheck(router._route, (logits.requires_grad_(), bias, rule, 2.5))
        routed = route(logits.detach(), bias, **shape.arguments)
        arguments = (torch.randn(19, 4), None, routed.expert_TK, routed.affinity_TE, rule, 2.5)
        torch.library.opcheck(router._route_backward, arguments)

    def test_compiled_in_one_graph(self) -> None:
        shape = SHAPES["3_groups_of_5"]
        logits, bias = shape.draw()

        def loss(z: Tensor) -> Tensor:
            routed = route(z, bias, **shape.arguments)
            return routed.gate_TK.square().sum() + routed.affinity_TE.square().mean() + routed.counts_E[0]

        results = []
        for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
            z = logits.clone().requires_grad_()
            value = function(z)
            value.backward()
            results.append((value.detach(), z.grad))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])

    def test_shapes_on_a_device_that_computes_nothing(self) -> None:
        from lightning_dsv3.ops.triton.router import route as kernel

        shape = SHAPES["v3"]
        logits = torch.zeros(13, 256, device="meta", requires_grad=True)
        routed = kernel(logits, torch.zeros(256, device="meta"), **shape.arguments)
        assert [tuple(t.shape) for t in routed] == [(13, 8), (13, 8), (13, 256), (256,)]
        assert [t.dtype for t in routed] == [torch.float32, torch.int64, torch.float32, torch.int64]
        routed.gate_TK.sum().backward()
        assert logits.grad.shape == (13, 256)

    def test_without_gradients(self) -> None:
        shape = SHAPES["3_groups_of_5"]
        logits, bias = shape.draw()
        routed = route(logits, bias, **shape.arguments)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                again = route(logits.requires_grad_(), bias, **shape.arguments)
            assert not again.gate_TK.requires_grad
            assert all(torch.equal(a, b) for a, b in zip(routed, again, strict=True))

    def test_a_second_derivative_is_refused(self) -> None:
        logits = torch.randn(3, 8, requires_grad=True)
        gate = route(logits, None, **Shape(3, 8, 2).arguments).gate_TK
        (gradient,) = torch.autograd.grad(gate.square().sum(), logits, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula"):
            gradient.sum().backward()

    @pytest.mark.parametrize("mask", [False, True])
    def test_the_layer_and_what_its_observer_counts(self, mask: bool) -> None:
        config = DeepSeekV3Config.from_preset(
            "tiny", n_routed_experts=12, num_experts_per_tok=3, n_group=4, topk_group=2
        )
        router = Router(config)
        torch.nn.init.normal_(router.weight)
        router.bias.uniform_(0, 0.1)
        x = torch.randn(3 * 7, config.hidden_size)
        found = {}
        for name in ("triton", "torch"):
            observer = RouterObserver(find_routers(router))
            observer.attach()
            observer.start("cpu")
            observer.open(mask=torch.arange(21).view(3, 7) % 4 > 0 if mask else None)
            with forced_kernels(router=name):
                output = router(x)
            observer.detach()
            assert (output.counts_E is None) == (name == "torch")
            router.zero_grad()
            (output.gate_TK.square().sum() + output.logits_TE.square().mean()).backward()
            found[name] = (output, observer.take()[0], router.weight.grad)
        (kernel, counts, gradient), (plain, plain_counts, plain_gradient) = found["triton"], found["torch"]
        assert sets(kernel.expert_TK) == sets(plain.expert_TK)
        torch.testing.assert_close(kernel.gate_TK.sort().values, plain.gate_TK.sort().values)
        torch.testing.assert_close(gradient, plain_gradient)
        assert counts.tolist() == plain_counts.tolist()
        assert int(counts.sum()) == 3 * (15 if mask else 21)

    def test_kept_routing_is_not_launched_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from lightning_dsv3.ops.triton import router as kernels

        launches = []

        class Counted:
            def __init__(self, kernel: Any) -> None:
                self.kernel = kernel

            def __getitem__(self, grid: tuple[int]) -> Any:
                launches.append(grid)
                return self.kernel[grid]

        monkeypatch.setattr(kernels, "_route_kernel", Counted(kernels._route_kernel))
        ids, gradients = torch.randint(0, 64, (2, 9)), {}
        for policy, expected in (("block", 4), ("keep_routing", 2)):
            model = checkpoint_blocks(tiny_model().train(), policy)
            launches.clear()
            loss = model(ids, labels=ids).loss
            assert len(launches) == 2 + len(model.mtp)
            loss.backward()
            assert len(launches) == expected + len(model.mtp)
            gradients[policy] = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        for one, other in zip(*gradients.values(), strict=True):
            assert torch.equal(one, other)


def test_in_the_interpreter() -> None:
    run_interpreted(__file__)


@every_shape
def test_the_plain_form_is_its_three_steps(shape: Shape) -> None:
    logits, bias = shape.draw()
    arguments = dict(shape.arguments)
    scoring, normalise, scale = (
        arguments.pop(name) for name in ("scoring_func", "norm_topk_prob", "routed_scaling_factor")
    )
    s = affinity(logits, scoring)
    expert = choose_experts(s, bias, **arguments)
    gate = gate_values(s, expert, norm_topk_prob=normalise, routed_scaling_factor=scale)
    for form in (route, route_plain):
        with forced_kernels(router="torch"):
            routed = form(logits, bias, **shape.arguments)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(routed[:3], (gate, expert, s), strict=True))
        assert routed.counts_E is None


@pytest.mark.parametrize(
    ("case", "refused"),
    [
        (Case("cuda", torch.float32, True, (("experts", 1024),)), None),
        (Case("cuda", torch.float32, True, (("experts", 1025),)), "1025"),
        (Case("cuda", torch.float64, True, (("experts", 8),)), "float64"),
        (Case("cpu", torch.float32, True, (("experts", 8),)), "cpu"),
        (Case("meta", torch.float32, True, (("experts", 8),)), "meta"),
    ],
)
@pytest.mark.skipif(is_interpreted(), reason="an interpreted kernel takes CPU tensors")
def test_what_the_kernel_refuses(case: Case, refused: str | None) -> None:
    reason = refusals("router", case)["triton"]
    assert reason is None if refused is None else refused in str(reason)
    assert refusals("router", case)["torch"] is None


@pytest.mark.gpu
@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_on_cuda_as_the_plain_form(scoring: str) -> None:
    shape = Shape(4096, 256, 8, 8, 4, scoring=scoring)
    logits, bias = (t.cuda() for t in shape.draw())
    to_gate, to_affinity = torch.randn(4096, 256, device="cuda"), torch.randn(4096, 256, device="cuda")
    results = []
    for name in ("triton", "triton", "torch"):
        z = logits.clone().requires_grad_()
        with forced_kernels(router=name):
            routed = route(z, bias, **shape.arguments)
        gate_TE = torch.zeros_like(z).scatter(1, routed.expert_TK, routed.gate_TK)
        ((gate_TE * to_gate).sum() + (routed.affinity_TE * to_affinity).sum()).backward()
        results.append((routed, gate_TE.detach(), z.grad))
    (first, gate_TE, gradient), (again, _, again_gradient), (plain, plain_gate_TE, plain_gradient) = results
    assert all(torch.equal(a, b) for a, b in zip((*first, gradient), (*again, again_gradient), strict=True))
    assert_counts(first, 256)
    # A choice between affinities that are one rounding apart may differ.
    same = ((gate_TE > 0) == (plain_gate_TE > 0)).all(dim=-1)
    assert same.float().mean() > 0.999
    close = {"rtol": 2e-6, "atol": 1e-7}
    torch.testing.assert_close(first.affinity_TE, plain.affinity_TE, **close)
    torch.testing.assert_close(gate_TE[same], plain_gate_TE[same], **close)
    torch.testing.assert_close(gradient[same], plain_gradient[same], rtol=1e-5, atol=1e-6)
