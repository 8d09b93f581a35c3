"""What the observer finds, and what it counts."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_moe import D, Gate, GateAdapter, MoE, make_router
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from lightning_dsv3.balance import (
    NATIVE_ADAPTERS,
    RouterObserver,
    find_routers,
    in_recompute,
    no_router_message,
)


def observe(root: nn.Module, **arguments) -> RouterObserver:
    observer = RouterObserver(find_routers(root), **arguments)
    observer.attach()
    observer.start("cpu")
    return observer


def counts_of(expert_TK: Tensor, num_experts: int) -> list[int]:
    return torch.bincount(expert_TK.flatten(), minlength=num_experts).tolist()


class TestFindRouters:
    def test_names_layers_and_mtp_modules(self):
        routers = find_routers(MoE(num_experts=(6, 6, 5)))
        assert [router.name for router in routers] == ["layer_0", "layer_1", "mtp_1"]
        assert [router.num_experts for router in routers] == [6, 6, 5]
        assert routers[0].path == "blocks.0.feed_forward.router"

    def test_names_are_the_same_under_every_wrapper(self):
        plain = MoE(num_experts=(6, 6, 5))
        names = [(router.name, router.path) for router in find_routers(plain)]
        plain.blocks[0] = checkpoint_wrapper(plain.blocks[0])
        wrapped = nn.Module()
        wrapped.module = torch.compile(plain, backend="eager")
        assert [(router.name, router.path) for router in find_routers(wrapped)] == names

    def test_names_stay_unique_with_two_models(self):
        root = nn.ModuleDict({"student": MoE(), "teacher": MoE()})
        assert [router.name for router in find_routers(root)] == [
            f"{model}.{path}.feed_forward.router"
            for model in ("student", "teacher")
            for path in ("blocks.0", "mtp.0.block")
        ]

    def test_paths_stay_unique_when_a_layer_is_called_module(self):
        root = nn.ModuleDict({"module": make_router(), "module_": nn.ModuleDict({"module": make_router()})})
        root["module"] = nn.ModuleDict({"module_": make_router()})
        assert len({router.name for router in find_routers(root)}) == 2

    def test_a_shared_router_is_found_once(self):
        router = make_router()
        assert len(find_routers(nn.ModuleList([router, router]))) == 1

    def test_a_private_router_needs_an_adapter(self):
        root = nn.ModuleDict({"layers": nn.ModuleList([Gate()])})
        assert find_routers(root) == []
        [router] = find_routers(root, [GateAdapter()])
        assert router.name == "layers.0"
        assert router.bias is root["layers"][0].correction

    def test_the_message_says_what_was_searched_and_what_comes_close(self):
        message = no_router_message(nn.ModuleDict({"gate": Gate(), "head": nn.Linear(2, 2)}), NATIVE_ADAPTERS)
        assert "ModuleDict: searched its 4 modules with DeepSeekV3RouterAdapter" in message
        assert "gate (Gate)" in message
        assert "routers=[...]" in message

    def test_the_bias_is_looked_up_anew(self):
        module = make_router()
        [router] = find_routers(module)
        module.bias = torch.ones(6)
        assert router.bias is module.bias


class TestCounting:
    @pytest.mark.parametrize("tokens", [0, 1, 63])
    def test_counts_what_was_chosen(self, tokens):
        model = MoE()
        observer = observe(model)
        observer.open()
        outputs = [router(torch.randn(tokens, D)) for router in model.routers()]
        assert [counts.tolist() for counts in observer.take()] == [
            counts_of(output.expert_TK, router.num_experts)
            for output, router in zip(outputs, model.routers(), strict=True)
        ]

    def test_one_observer_counts_more_tokens_then_fewer_in_layers_of_other_widths(self):
        model = MoE(num_experts=(6, 5))
        observer = observe(model)
        observer.open()
        chosen: list[list[Tensor]] = [[], []]
        for tokens in (3, 64, 7, 0, 65):
            for router, of_router in zip(model.routers(), chosen, strict=True):
                of_router.append(router(torch.randn(tokens + router.num_experts, D)).expert_TK)
        assert [counts.tolist() for counts in observer.take()] == [
            counts_of(torch.cat(of_router), num_experts) for of_router, num_experts in zip(chosen, (6, 5), strict=True)
        ]

    def test_choices_that_are_no_contiguous_tensor_are_counted(self):
        class Transposed(GateAdapter):
            def chosen_experts(self, module: nn.Module, output: tuple[Tensor, Tensor]) -> Tensor:
                return output[1].to(torch.int64).T.contiguous().T

        gate = Gate()
        observer = RouterObserver(find_routers(gate, [Transposed()]))
        observer.attach()
        observer.start("cpu")
        observer.open()
        _, indices = gate(torch.randn(13, D))
        assert observer.take()[0].tolist() == counts_of(indices, 4)

    def test_forwards_add_up_and_take_starts_again(self):
        router = make_router()
        observer = observe(router)
        observer.open()
        chosen = torch.cat([router(torch.randn(5, D)).expert_TK for _ in range(3)])
        assert observer.take()[0].tolist() == counts_of(chosen, 6)
        assert observer.take()[0].tolist() == [0] * 6

    def test_all_experts_chosen_when_k_is_e(self):
        router = make_router(num_experts=3, k=3)
        observer = observe(router)
        observer.open()
        router(torch.randn(11, D))
        assert observer.take()[0].tolist() == [11, 11, 11]

    def test_reads_an_adapters_output_of_any_shape_and_integer_type(self):
        gate = Gate()
        observer = RouterObserver(find_routers(gate, [GateAdapter()]))
        observer.attach()
        observer.start("cpu")
        observer.open()
        _, indices = gate(torch.randn(2, 3, D))
        assert indices.dtype == torch.int32
        assert observer.take()[0].tolist() == counts_of(indices, 4)
        assert observer.num_experts_per_tok == [2]

    def test_counts_only_while_open(self):
        router = make_router()
        observer = observe(router)
        router(torch.randn(5, D))
        observer.open()
        observer.close()
        router(torch.randn(5, D))
        assert observer.take()[0].sum() == 0

    def test_eval_mode_counts_for_validation_only(self):
        router = make_router().eval()
        training, validation = observe(router), observe(router, training=False)
        training.open()
        validation.open()
        router(torch.randn(5, D))
        assert training.take()[0].sum() == 0
        assert validation.take()[0].sum() == 10

    def test_detach_takes_the_hooks_off(self):
        router = make_router()
        observer = observe(router)
        observer.open()
        observer.detach()
        router(torch.randn(5, D))
        assert observer.take()[0].sum() == 0
        assert not router._forward_hooks

    def test_attaching_twice_counts_once(self):
        router = make_router()
        observer = observe(router)
        observer.attach()
        observer.open()
        router(torch.randn(5, D))
        assert observer.take()[0].sum() == 10

    def test_the_counts_are_no_part_of_the_model(self):
        model = MoE()
        keys = list(model.state_dict())
        observe(model)
        assert list(model.state_dict()) == keys

    def test_a_copy_of_the_model_is_not_counted(self):
        model = MoE()
        observer = observe(model)
        observer.open()
        copy.deepcopy(model).routers()[0](torch.randn(5, D))
        assert observer.take()[0].sum() == 0

    def test_counts_are_int64_under_a_bfloat16_default(self):
        torch.set_default_dtype(torch.bfloat16)
        try:
            router = make_router()
            observer = observe(router)
            observer.open()
            router(torch.randn(1000, D))
        finally:
            torch.set_default_dtype(torch.float32)
        [counts] = observer.take()
        assert counts.dtype == torch.int64
        assert counts.sum() == 2000

    def test_counts_made_under_inference_mode_can_be_used_outside(self):
        router = make_router()
        observer = RouterObserver(find_routers(router), training=False)
        observer.attach()
        with torch.inference_mode():
            observer.start("cpu")
            observer.open()
            router(torch.randn(5, D))
        router(torch.randn(5, D))
        assert observer.take()[0].sum() == 20

    def test_restore_goes_back_to_a_snapshot(self):
        router = make_router()
        observer = observe(router)
        observer.open()
        router(torch.randn(5, D))
        snapshot = observer.snapshot()
        router(torch.randn(5, D))
        observer.restore(snapshot)
        assert observer.take()[0].sum() == 10
        router(torch.randn(5, D))
        observer.restore(None)
        assert observer.take()[0].sum() == 0

    def test_says_which_routers_were_not_seen_and_why(self):
        model = MoE(num_experts=(6, 6, 5))
        observer = observe(model)
        observer.open()
        first, second, _ = model.routers()
        first(torch.randn(3, D))
        second.eval()(torch.randn(3, D))
        assert observer.unobserved() == [
            "layer_1 (blocks.1.feed_forward.router): it is in eval() mode; call .train()",
            "mtp_1 (mtp.0.block.feed_forward.router): its forward was not seen",
        ]


class Layer(nn.Module):
    """A router whose work a recompute repeats, in the middle of other work, or as the last thing (`late`)."""

    def __init__(self, late: bool = False) -> None:
        super().__init__()
        self.before = nn.Linear(D, D)
        self.after = nn.Linear(D, D)
        self.router = make_router()
        self.late = late
        self.calls = 0
        self.router.register_forward_hook(self._on_call)

    def _on_call(self, *_: object) -> None:
        self.calls += 1

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x).tanh()
        if not self.late:
            gate = self.router(x).gate_TK.sum(-1, keepdim=True)
            return self.after(x * gate).tanh()
        y = self.after(x).tanh()
        with torch.no_grad():
            self.router(y)  # measured only: nothing behind y is needed in the backward
        return y


class TestRecompute:
    @pytest.mark.parametrize(
        ("use_reentrant", "late", "router_calls"),
        [(None, False, 1), (True, False, 2), (False, False, 2), (False, True, 1)],
        ids=["plain", "reentrant", "non_reentrant", "non_reentrant_early_stop"],
    )
    def test_recompute_does_not_count_twice(self, use_reentrant, late, router_calls):
        layer = Layer(late)
        observer = observe(layer)
        observer.open()
        x = torch.randn(9, D, requires_grad=True)
        y = layer(x) if use_reentrant is None else checkpoint(layer, x, use_reentrant=use_reentrant)
        y.sum().backward()
        assert layer.calls == router_calls, "the case does not do what its name says"
        assert observer.take()[0].sum() == 18

    def test_checkpoint_wrapper_counts_once(self):
        layer = Layer()
        observer = observe(checkpoint_wrapper(layer))
        observer.open()
        checkpoint_wrapper(layer)(torch.randn(9, D, requires_grad=True)).sum().backward()
        assert observer.take()[0].sum() == 18

    def test_nested_checkpoints_count_once(self):
        layer = Layer()
        observer = observe(layer)
        observer.open()

        def inner(x: Tensor) -> Tensor:
            return checkpoint(layer, x, use_reentrant=False)

        checkpoint(inner, torch.randn(9, D, requires_grad=True), use_reentrant=True).sum().backward()
        assert layer.calls == 3
        assert observer.take()[0].sum() == 18

    def test_a_forward_under_no_grad_still_counts(self):
        # Reentrant checkpointing runs the real forward like this.
        router = make_router()
        observer = observe(router)
        observer.open()
        with torch.no_grad():
            router(torch.randn(9, D))
        assert observer.take()[0].sum() == 18

    def test_in_recompute_knows_a_backward(self):
        seen = []
        x = torch.ones(1, requires_grad=True)
        y = x * 2
        y.register_hook(lambda _: seen.append(in_recompute()))
        assert not in_recompute()
        y.backward()
        assert seen == [True]
        assert not in_recompute()


class TestCompile:
    @pytest.mark.parametrize("use_reentrant", [None, False], ids=["plain", "non_reentrant"])
    def test_hooks_attached_before_the_first_call_count(self, use_reentrant):
        layer = Layer()
        compiled = torch.compile(layer, backend="eager")
        observer = observe(compiled)
        for step in range(3):
            observer.open()
            x = torch.randn(9, D, requires_grad=True)
            y = compiled(x) if use_reentrant is None else checkpoint(compiled, x, use_reentrant=use_reentrant)
            y.sum().backward()
            observer.close()
            compiled(torch.randn(4, D))
            assert observer.take()[0].sum() == 18, step
        assert observer.unobserved() == []

    @pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
    def test_forwards_that_are_not_finite_are_noted_beside_exact_counts(self, is_compiled):
        router = make_router()
        observer = observe(router)
        # Traced by the compiler with its decompositions, as a backend would get it.
        forward = torch.compile(router, backend="aot_eager") if is_compiled else router
        observer.open()
        broken = torch.randn(9, D)
        broken[4] = float("nan")
        chosen = [forward(x).expert_TK for x in (torch.randn(9, D), broken, torch.randn(9, D), broken)]
        [counts] = observer.take()
        assert counts.tolist() == counts_of(torch.cat(chosen), 6)
        assert observer.broken_forwards.tolist() == [2]
        forward(torch.randn(9, D))
        observer.take()
        assert observer.broken_forwards.tolist() == [0]

    def test_a_compiled_hook_asks_the_host_nothing_but_whether_it_is_a_recompute(self):
        router = make_router()
        observer = observe(router)
        observer.open()
        torch._dynamo.reset()
        # One answer that no graph can hold; reading a value would be another break.
        assert torch._dynamo.explain(router)(torch.randn(9, D)).graph_break_count <= 1

    def test_a_tracers_tensors_are_not_read(self):
        router = make_router()
        observer = observe(router)
        observer.open()
        with FakeTensorMode(allow_non_fake_inputs=True):
            router(torch.randn(9, D))
        observer.start("cpu")
        chosen = router(torch.randn(20, D)).expert_TK
        assert observer.take()[0].tolist() == counts_of(chosen, 6), "nothing of the tracer's is left behind"


class TestGateValues:
    @pytest.mark.parametrize(("value", "broken"), [("nan", 1), ("inf", 1), ("-inf", 1), ("0.5", 0)])
    def test_one_gate_value_that_is_not_finite_is_noted(self, value, broken):
        class Odd(Gate):
            def forward(self, x: Tensor) -> tuple[Tensor, ...]:
                gates, indices = super().forward(x)
                gates[2, 1] = float(value)
                # Wider tensors, where excluded experts may have -inf, and single numbers are not looked at.
                return x.new_full((len(x), 64), float("-inf")), indices, gates, gates.new_tensor(float("nan"))

        gate = Odd()
        observer = RouterObserver(find_routers(gate, [GateAdapter()]))
        observer.attach()
        observer.start("cpu")
        observer.open()
        with torch.no_grad():
            gate(torch.randn(3, D))
        observer.take()
        assert observer.broken_forwards.tolist() == [broken]


class TestGroups:
    def test_tokens_count_for_the_group_of_their_row(self):
        router = make_router()
        observer = observe(router, num_groups=3)
        observer.open(torch.tensor([2, 0, 2, 0]))
        chosen = router(torch.randn(4 * 7, D)).expert_TK.view(4, 7, 2)
        [counts] = observer.take()
        assert counts[0].tolist() == counts_of(chosen[[1, 3]], 6)
        assert counts[1].tolist() == [0] * 6
        assert counts[2].tolist() == counts_of(chosen[[0, 2]], 6)

    def test_rows_of_group_minus_1_do_not_count(self):
        router = make_router()
        observer = observe(router, num_groups=2)
        observer.open(torch.tensor([-1, 1, -1]))
        chosen = router(torch.randn(3 * 5, D)).expert_TK.view(3, 5, 2)
        [counts] = observer.take()
        assert counts.shape == (2, 6)
        assert counts[0].sum() == 0
        assert counts[1].tolist() == counts_of(chosen[1], 6)

    def test_layers_may_route_other_numbers_of_tokens_and_experts(self):
        model = MoE(num_experts=(6, 5))
        observer = observe(model, num_groups=2)
        observer.open(torch.tensor([0, 1]))
        block, mtp = model.routers()
        first = block(torch.randn(2 * 4, D)).expert_TK.view(2, 4, 2)
        second = mtp(torch.randn(2 * 3, D)).expert_TK.view(2, 3, 2)
        counts = observer.take()
        assert counts[0].tolist() == [counts_of(first[row], 6) for row in (0, 1)]
        assert counts[1].tolist() == [counts_of(second[row], 5) for row in (0, 1)]

    def test_tokens_that_are_no_whole_rows_are_refused(self):
        router = make_router()
        observer = observe(router, num_groups=1)
        observer.open(torch.tensor([0, 0]))
        with pytest.raises(ValueError, match=r"routed 7 tokens of a batch with 2 rows"):
            router(torch.randn(7, D))
