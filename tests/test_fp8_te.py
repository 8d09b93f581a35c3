"""FP8 by Transformer Engine, as far as a stand-in with its signatures and rules can prove it on a CPU.

``LIGHTNING_DSV3_TE_WHEEL=transformer_engine-2.20.2-py3-none-any.whl`` holds the stand-in against the real sources, and
runs those beneath our layers with emulated products in place of their compiled ones.
"""

from __future__ import annotations

import ast
import copy
import gc
import os
import subprocess
import sys
import weakref
import zipfile
from typing import Any

import pytest
import te_stand_in
import torch
from conftest import ROOT
from te_stand_in import Call
from test_fp8_emulated import FITTING, expert_inputs
from tiny_model import tiny_model
from tiny_run import assert_same
from torch import Tensor, nn

from lightning_dsv3.layers import te
from lightning_dsv3.layers.fp8 import FP8Experts, FP8Linear, FP8Sequential, FP8TorchLinear
from lightning_dsv3.layers.linear import Linear
from lightning_dsv3.layers.norm import RMSNorm
from lightning_dsv3.parallel.fp8 import convert_from_fp8, convert_to_fp8

calls = te_stand_in.calls
POW2 = pytest.mark.parametrize("pow2", [True, False], ids=["pow2", "amax/448"])


def both(module: nn.Module, backend: str) -> nn.Module:
    """A copy with a backend."""
    other = copy.deepcopy(module)
    other.backend = backend
    return other


def gradients(module: nn.Module, *arguments: Tensor) -> dict[str, Tensor]:
    """Output and every gradient under BF16 autocast."""
    arguments = tuple(a.detach().clone().requires_grad_(a.is_floating_point()) for a in arguments)
    with torch.autocast("cpu", torch.bfloat16):
        output = module(*arguments)
    torch.manual_seed(1)
    output.backward(torch.randn(output.shape).to(output.dtype))
    found = {"output": output.detach()} | {name: p.grad for name, p in module.named_parameters()}
    return found | {f"argument {i}": a.grad for i, a in enumerate(arguments) if a.is_floating_point()}


class TestStandIn:
    def test_its_signatures_are_those_of_the_wheel(self):
        if "LIGHTNING_DSV3_TE_WHEEL" not in os.environ:
            pytest.skip("LIGHTNING_DSV3_TE_WHEEL names no wheel")
        with zipfile.ZipFile(os.environ["LIGHTNING_DSV3_TE_WHEEL"]) as wheel:
            for file, callables in te_stand_in.SIGNATURES.items():
                tree = ast.parse(wheel.read(file))
                for name, expected in callables.items():
                    assert argument_names(tree, name) == expected, name
            tree = ast.parse(wheel.read("transformer_engine/common/recipe/__init__.py"))
        recipe = body_of(tree, "Float8BlockScaling")
        fields = [node.target.id for node in recipe if isinstance(node, ast.AnnAssign)]
        constants = [node.targets[0].id for node in recipe if isinstance(node, ast.Assign)]
        assert ", ".join(fields) == te_stand_in.RECIPE_FIELDS
        assert ", ".join(constants) == te_stand_in.RECIPE_CONSTANTS
        qparams = [node.target.id for node in body_of(tree, "QParams") if isinstance(node, ast.AnnAssign)]
        assert ", ".join(qparams) == te_stand_in.QPARAMS_FIELDS

    def test_the_real_python_computes_what_the_emulation_does(self):
        if "LIGHTNING_DSV3_TE_WHEEL" not in os.environ:
            pytest.skip("LIGHTNING_DSV3_TE_WHEEL names no wheel")
        program = [sys.executable, str(ROOT / "tests" / "te_sources.py"), os.environ["LIGHTNING_DSV3_TE_WHEEL"]]
        done = subprocess.run(program, capture_output=True, text=True)
        assert done.stdout.strip() == "layers and models compute the same", done.stderr[-3000:]

    def test_its_recipe_has_the_fields_it_says(self):
        assert list(te_stand_in.Float8BlockScaling.__dataclass_fields__) == te_stand_in.RECIPE_FIELDS.split(", ")
        assert list(te_stand_in.QParams.__dataclass_fields__) == te_stand_in.QPARAMS_FIELDS.split(", ")

    @pytest.mark.parametrize(
        ("arguments", "x", "call", "message"),
        [
            ({"heads": 2}, torch.randn(16, 32), {}, "unexpected keyword argument 'heads'"),
            ({"bias": True}, torch.randn(16, 32), {}, "bias"),
            ({}, torch.randn(9, 32), {}, "divisible by 8"),
            ({}, torch.randn(16, 32).bfloat16(), {}, "Found input dtype"),
            ({}, torch.randn(16, 32), {"is_first_microbatch": False}, "no FP8 weight is held"),
            ({}, torch.randn(16, 32), {"fp8": True}, "unexpected keyword argument 'fp8'"),
        ],
        ids=["argument", "bias", "rows", "dtype", "cache", "call"],
    )
    def test_it_refuses(self, arguments, x, call, message):
        common = {"bias": False, "params_dtype": torch.float32, "device": "cpu"}
        with (
            te_stand_in.autocast(recipe=te_stand_in.Float8BlockScaling(backward_override=None)),
            pytest.raises((TypeError, ValueError, AssertionError), match=message),
        ):
            te_stand_in.Linear(32, 16, **(common | arguments))(x, **call)

    def test_it_refuses_to_compute_in_bf16(self):
        linear = te_stand_in.Linear(32, 16, bias=False, params_dtype=torch.float32, device="cpu")
        with pytest.raises(AssertionError, match="not under autocast"):
            linear(torch.randn(16, 32))

    def test_it_refuses_an_fp8_weight_of_other_numbers(self):
        linear = te_stand_in.Linear(32, 16, bias=False, params_dtype=torch.float32, device="cpu")
        nn.init.normal_(linear.weight)
        with te_stand_in.autocast(recipe=te_stand_in.Float8BlockScaling(backward_override=None)):
            linear(torch.randn(16, 32), is_first_microbatch=True)
            linear(torch.randn(16, 32), is_first_microbatch=False)
            nn.init.normal_(linear.weight)
            with pytest.raises(AssertionError, match="other numbers"):
                linear(torch.randn(16, 32), is_first_microbatch=False)


def body_of(tree: ast.Module, name: str) -> list[ast.stmt]:
    (found,) = [node for node in tree.body if getattr(node, "name", None) == name]
    return found.body


def argument_names(tree: ast.Module, qualified_name: str) -> str:
    body, *rest = tree.body, *qualified_name.split(".")
    for name in rest:
        (node,) = [node for node in body if getattr(node, "name", None) == name]
        body = node.body
    names = [argument.arg for argument in node.args.args]
    names = names[: len(names) - len(node.args.defaults)] + [
        f"{n}=" for n in names[len(names) - len(node.args.defaults) :]
    ]
    assert [node.args.vararg, node.args.kwarg, node.args.kwonlyargs] == [None, None, []]
    return ", ".join(name for name in names if name != "self")


class TestLinear:
    @POW2
    @pytest.mark.parametrize("shape", [(1, 16, 16), (63, 144, 80), (0, 32, 16), (3, 2, 48, 32)], ids=str)
    def test_it_computes_what_the_emulation_does(self, calls, shape, pow2):
        *leading, inputs, outputs = shape
        layer = FP8Linear(inputs, outputs)
        layer.pow2_scales = pow2
        x = torch.randn(*leading, inputs)
        ours, expected = gradients(both(layer, "te"), x), gradients(both(layer, "emulate"), x)
        assert_same(ours, expected)
        assert ours["weight"].dtype == torch.float32
        rows = torch.Size(leading).numel()
        assert calls == [Call("Linear", max(16, -(-rows // 16) * 16), None, True)]

    def test_a_master_weight_s_gradient_never_passes_through_bf16(self, calls):
        layer = both(FP8Linear(64, 32), "te")
        found = gradients(layer, torch.randn(80, 64))["weight"]
        assert not torch.equal(found, found.bfloat16().float())

    def test_gradients_add_up(self, calls):
        layers = [both(FP8Linear(32, 16), backend) for backend in ("te", "emulate")]
        layers[1].load_state_dict(layers[0].state_dict())
        x = torch.randn(20, 32)
        for layer in layers:
            ((layer(x) * layer(x + 1)).sum() + layer(x - 1).sum()).backward()  # three calls in one graph
            layer(x).square().sum().backward()
        torch.testing.assert_close(layers[0].weight.grad, layers[1].weight.grad, rtol=1e-6, atol=1e-5)

    def test_a_bias_stays_ours(self, calls):
        layer = FP8TorchLinear(32, 16)
        x = torch.randn(5, 32)
        assert_same(gradients(both(layer, "te"), x), gradients(both(layer, "emulate"), x))
        assert both(layer, "te")(torch.zeros(32)).equal(layer.bias)

    def test_only_the_gradients_that_are_needed_are_computed(self, calls):
        layer = both(FP8Linear(32, 16), "te")
        layer(torch.randn(4, 32)).sum().backward()
        assert layer.weight.grad is not None
        layer.weight.requires_grad_(False)
        x = torch.randn(4, 32, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad is not None
        with torch.no_grad():
            assert not layer(x).requires_grad

    def test_on_another_device_it_begins_anew(self, calls):
        layer = both(FP8Linear(32, 16), "te")
        layer(torch.randn(4, 32))
        companions = vars(layer)["_te"]
        module = companions.modules["Linear"]
        layer(torch.randn(4, 32))
        assert companions.modules["Linear"] is module
        companions.device = torch.device("cuda:1")  # as if the layer had been there
        layer(torch.randn(4, 32))
        assert companions.modules["Linear"] is not module
        assert companions.device == torch.device("cpu")

    def test_without_autocast_and_in_bf16_throughout(self, calls):
        float32, bf16 = torch.float32, torch.bfloat16
        for weight_dtype, dtype in ((float32, float32), (bf16, bf16), (float32, bf16)):
            layers = [both(FP8Linear(32, 16).to(weight_dtype), backend) for backend in ("te", "emulate")]
            layers[1].load_state_dict(layers[0].state_dict())
            x = torch.randn(9, 32, dtype=dtype)
            for layer in layers:
                layer(x).float().square().sum().backward()
            assert torch.equal(layers[0](x), layers[1](x))
            assert torch.equal(layers[0].weight.grad, layers[1].weight.grad)

    @pytest.mark.parametrize("with_backward", [True, False], ids=["backward", "unused"])
    def test_nothing_outlives_the_graph(self, calls, monkeypatch, with_backward):
        # A reference cycle would keep each weight's gradient until Python looks for cycles.
        lent: list[weakref.ref[Tensor]] = []
        real = te._lent

        def watched(weight: Tensor) -> Any:
            matrices, gradient = real(weight)
            lent.extend(weakref.ref(matrix) for matrix in matrices)
            return matrices, gradient

        monkeypatch.setattr(te, "_lent", watched)
        layer = both(FP8Linear(32, 16), "te")
        gc.disable()
        try:
            y = layer(torch.randn(4, 32))
            assert [ref() is not None for ref in lent] == [True]
            if with_backward:
                y.sum().backward()
            del y
            assert [ref() for ref in lent] == [None]
        finally:
            gc.enable()


class TestExperts:
    @POW2
    @pytest.mark.parametrize("shape", [(1, 3, 2, 16, 16), (63, 5, 2, 48, 32), (333, 3, 1, 144, 80)], ids=str)
    def test_they_compute_what_the_emulation_does(self, calls, shape, pow2):
        x, gate, choices, gate_up, down = expert_inputs(*shape)
        layer = FP8Experts(shape[1], shape[3], shape[4])
        layer.load_state_dict({"gate_up": gate_up, "down": down})
        layer.pow2_scales = pow2
        ours = gradients(both(layer, "te"), x, gate, choices)
        expected = gradients(both(layer, "emulate"), x, gate, choices)
        # A token's rows are summed in another order.
        for name in ("output", "argument 0"):
            torch.testing.assert_close(ours.pop(name), expected.pop(name), rtol=2**-7, atol=2**-7)
        assert_same(ours, expected)
        assert ours["gate_up"][-1].abs().max() == 0  # nobody's expert
        counts = choices.flatten().bincount(minlength=shape[1])
        assert calls == [Call("GroupedLinear", int((-(-counts // 16) * 16).sum()), None, True)] * 2

    def test_no_token_at_all(self, calls):
        x, gate, choices, _, _ = expert_inputs(1, 3, 2, 16, 16)
        layer = both(FP8Experts(3, 16, 16), "te")
        nn.init.normal_(layer.gate_up)
        nn.init.normal_(layer.down)
        y = layer(x[:0], gate[:0], choices[:0])
        assert y.shape == (0, 16)
        y.sum().backward()
        assert layer.down.grad.abs().max() == layer.gate_up.grad.abs().max() == 0

    def test_frozen_experts(self, calls):
        x, gate, choices, gate_up, down = expert_inputs(9, 4, 2, 16, 16)
        layer = FP8Experts(4, 16, 16)
        layer.load_state_dict({"gate_up": gate_up, "down": down})
        layer.down.requires_grad_(False)
        x.requires_grad_()
        found = []
        for backend in ("te", "emulate"):
            module = both(layer, backend)
            module(x, gate, choices).square().sum().backward()
            found.append((module.gate_up.grad, module.down.grad))
        assert found[0][1] is None
        torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)


def norm_and_linear() -> nn.Sequential:
    layers = nn.Sequential(Linear(32, 48), RMSNorm(48), Linear(48, 16))
    nn.init.uniform_(layers[1].weight, 0.5, 2)
    return layers


class TestNorm:
    def test_a_norm_and_the_linear_map_behind_it_are_one(self, calls):
        plain, x = norm_and_linear(), torch.randn(3, 5, 32)
        with torch.no_grad():
            plain[1].weight.copy_(plain[1].weight.bfloat16())  # TE takes the norm's weight in BF16
        fused, separate = copy.deepcopy(plain), copy.deepcopy(plain)
        convert_to_fp8(fused, backend="te")
        convert_to_fp8(separate, backend="emulate")
        assert (type(fused), type(separate)) == (FP8Sequential, FP8Sequential)
        ours, expected = gradients(fused, x), gradients(separate, x)
        assert [call.kind for call in calls] == ["Linear", "LayerNormLinear"]
        for name in expected:
            assert ours[name].dtype == expected[name].dtype
            error = (ours[name] - expected[name]).float().norm() / expected[name].float().norm()
            assert error < 0.01, name  # the norm's weight gets its gradient in BF16
        assert torch.equal(ours["output"], expected["output"])
        assert torch.equal(ours["2.weight"], expected["2.weight"])
        assert list(fused.state_dict()) == list(plain.state_dict())

    def test_hooks_see_what_they_would(self, calls):
        layers, seen, x = norm_and_linear(), [], torch.randn(4, 32)
        convert_to_fp8(layers, backend="te")
        handle = layers[2].register_forward_hook(lambda _, arguments, __: seen.append(arguments[0]))
        layers(x)
        assert [call.kind for call in calls] == ["Linear", "Linear"]
        assert torch.equal(seen[0], layers[1](layers[0](x)))
        handle.remove()
        layers(x)
        assert calls[-1].kind == "LayerNormLinear"

    def test_a_query_projection_is_one_and_goes_back(self, calls):
        model = tiny_model(**FITTING)
        convert_to_fp8(model, backend="te")
        assert type(model.blocks[1].attention.q) is FP8Sequential
        model(torch.randint(0, 64, (2, 9)))
        kinds = [call.kind for call in calls]
        assert kinds.count("LayerNormLinear") == 3
        convert_from_fp8(model)
        assert type(model.blocks[1].attention.q) is nn.Sequential

    def test_a_linear_map_that_stays_is_not_fused(self, calls):
        model = tiny_model(**FITTING)
        convert_to_fp8(model, exclude=["*.q.up"], backend="te")
        assert type(model.blocks[1].attention.q) is nn.Sequential
