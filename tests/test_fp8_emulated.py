"""Emulated FP8 products, held against the recipe written out in float64, and the conversion of built models."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from fp8_reference import restored_by_loop
from tiny_model import tiny_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lightning_dsv3.config import ConfigError
from lightning_dsv3.inference import generate
from lightning_dsv3.layers.experts import Experts
from lightning_dsv3.layers.fp8 import FP8_CLASS_OF, FP8Experts, FP8Linear, FP8TorchLinear
from lightning_dsv3.layers.linear import Linear
from lightning_dsv3.ops import fp8 as fp8_ops
from lightning_dsv3.ops.dispatch import plan_dispatch
from lightning_dsv3.ops.experts import routed_experts
from lightning_dsv3.ops.fp8 import fp8_experts, fp8_linear
from lightning_dsv3.parallel import checkpoint_blocks
from lightning_dsv3.parallel.fp8 import convert_from_fp8, convert_to_fp8, is_fp8

# tiny_model's widths that are no multiples of 16, made so.
FITTING = {"q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
ROW, SQUARE, COLUMN = (1, 128), (128, 128), (128, 1)
POW2 = pytest.mark.parametrize("pow2", [True, False], ids=["pow2", "amax/448"])


def q(x: np.ndarray | Tensor, block: tuple[int, int], pow2: bool = True) -> np.ndarray:
    """The recipe's operand: float32 rounded to tiles, in float64."""
    return restored_by_loop(torch.as_tensor(np.asarray(x)).float(), block, pow2)


def assert_near(ours: Tensor, expected: np.ndarray, tolerance: float = 2e-6) -> None:
    """Sums in float32 against float64, relative to the largest value."""
    error = np.abs(ours.detach().double().numpy() - expected).max(initial=0)
    assert error <= tolerance * np.abs(expected).max(initial=1e-30), error


class TestLinear:
    @POW2
    @pytest.mark.parametrize("shape", [(1, 16, 16), (63, 130, 70), (300, 257, 129)], ids=str)
    def test_the_three_products_are_those_of_the_recipe(self, shape, pow2):
        rows, inputs, outputs = shape
        x = (torch.randn(rows, inputs) * torch.logspace(-3, 3, inputs)).requires_grad_()
        weight = (torch.randn(outputs, inputs) * torch.logspace(-2, 2, outputs)[:, None]).requires_grad_()
        grad = torch.randn(rows, outputs) * torch.logspace(-6, 0, rows)[:, None]
        y = fp8_linear(x, weight, pow2)
        y.backward(grad)
        x64, weight64 = x.detach(), weight.detach()
        assert_near(y, q(x64, ROW, pow2) @ q(weight64, SQUARE, pow2).T)
        assert_near(x.grad, q(grad, ROW, pow2) @ q(weight64, SQUARE, pow2))
        assert_near(weight.grad, q(grad, COLUMN, pow2).T @ q(x64, COLUMN, pow2))

    def test_bands_of_rows_change_nothing_but_the_order_of_sums(self, monkeypatch):
        x, weight = torch.randn(300, 64, requires_grad=True), torch.randn(48, 64, requires_grad=True)
        grad = torch.randn(300, 48)
        whole = torch.autograd.grad(fp8_linear(x, weight), (x, weight), grad)
        monkeypatch.setattr(fp8_ops, "_BAND_ROWS", 128)
        banded = torch.autograd.grad(fp8_linear(x, weight), (x, weight), grad)
        torch.testing.assert_close(banded, whole, rtol=1e-5, atol=1e-5)
        assert torch.equal(fp8_linear(x[:128], weight), fp8_linear(x, weight)[:128])

    def test_only_the_gradients_that_are_needed_are_computed(self):
        x, weight = torch.randn(4, 16), torch.randn(16, 16, requires_grad=True)
        fp8_linear(x, weight).sum().backward()
        assert x.grad is None
        frozen = weight.detach()
        x.requires_grad_()
        fp8_linear(x, frozen).sum().backward()
        assert x.grad is not None

    def test_sums_are_rounded_once_and_master_weights_are_not_rounded_to_bf16(self):
        layer = FP8Linear(256, 64)
        with torch.no_grad():
            layer.weight.mul_(1 + 2**-12)  # below bfloat16's precision, and a tie-breaker for some numbers of E4M3
        x = torch.randn(2, 5, 256)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert (y.dtype, y.shape) == (torch.bfloat16, (2, 5, 64))
        exact = q(x.bfloat16().float().flatten(0, 1), ROW) @ q(layer.weight.detach(), SQUARE).T
        np.testing.assert_array_equal(y.flatten(0, 1).float().detach(), torch.tensor(exact).float().bfloat16().float())
        y.sum().backward()
        assert layer.weight.grad.dtype == torch.float32
        # More than bfloat16's 8 bits: the weight's gradient has not passed through it.
        assert not torch.equal(layer.weight.grad, layer.weight.grad.bfloat16().float())

    def test_autocast_reaches_into_no_product(self):
        # Scales that are no powers of two do not fit bfloat16, nor do sums; here all three are made under autocast.
        x, weight = torch.randn(40, 256, requires_grad=True), torch.randn(64, 256, requires_grad=True)
        grad = torch.randn(40, 64)
        with torch.autocast("cpu", torch.bfloat16):
            y = fp8_linear(x, weight, False)
            y.backward(grad)
        assert_near(y, q(x.detach(), ROW, False) @ q(weight.detach(), SQUARE, False).T)
        assert_near(x.grad, q(grad, ROW, False) @ q(weight.detach(), SQUARE, False))
        assert_near(weight.grad, q(grad, COLUMN, False).T @ q(x.detach(), COLUMN, False))

    def test_a_bias_and_any_leading_dimensions(self):
        layer = nn.Linear(32, 16)
        plain = layer(torch.zeros(3, 2, 32))
        layer.__class__ = FP8TorchLinear
        assert torch.equal(layer(torch.zeros(3, 2, 32)), plain)
        assert layer(torch.randn(32)).shape == (16,)
        assert layer(torch.randn(0, 32)).shape == (0, 16)

    def test_a_broken_activation_stays_visible(self):
        x = torch.randn(3, 32)
        x[1, 3] = torch.inf
        y = fp8_linear(x, torch.randn(16, 32))
        assert y[1].isnan().all()
        assert not y[[0, 2]].isnan().any()


def expert_reference(
    x: Tensor, gate: Tensor, expert: Tensor, gate_up: Tensor, down: Tensor, grad: Tensor, pow2: bool
) -> dict[str, np.ndarray]:
    """Output and gradients, expert by expert in float64; between products numbers are rounded to float32."""
    width = down.shape[2]
    sums = {"y": x, "x": x, "gate": gate, "gate_up": gate_up, "down": down}
    out = {name: np.zeros(tensor.shape) for name, tensor in sums.items()}
    for e in range(gate_up.shape[0]):
        token, choice = np.nonzero((expert == e).numpy())
        if not len(token):
            continue
        first, second = q(gate_up[e], SQUARE, pow2), q(down[e], SQUARE, pow2)
        x_e, grad_e, g = x[token].double().numpy(), grad[token].double().numpy(), gate.double().numpy()[token, choice]
        z = (q(x_e, ROW, pow2) @ first.T).astype(np.float32).astype(float)
        a, u = z[:, :width], z[:, width:]
        sigmoid = 1 / (1 + np.exp(-a))
        h = a * sigmoid * u
        np.add.at(out["y"], token, q(h * g[:, None], ROW, pow2) @ second.T)
        grad_h = q(grad_e, ROW, pow2) @ second
        out["gate"][token, choice] = (grad_h * h).sum(axis=1)
        out["down"][e] = q(grad_e, COLUMN, pow2).T @ q(h * g[:, None], COLUMN, pow2)
        grad_h = grad_h * g[:, None]
        grad_a = grad_h * u * sigmoid * (1 + a * (1 - sigmoid))
        grad_z = np.concatenate([grad_a, grad_h * a * sigmoid], axis=1)
        out["gate_up"][e] = q(grad_z, COLUMN, pow2).T @ q(x_e, COLUMN, pow2)
        np.add.at(out["x"], token, q(grad_z, ROW, pow2) @ first)
    return out


def expert_inputs(tokens: int, experts: int, chosen: int, dim: int, width: int) -> list[Tensor]:
    x, gate = torch.randn(tokens, dim), torch.rand(tokens, chosen) + 0.1
    choices = torch.stack([torch.randperm(experts - 1)[:chosen] for _ in range(tokens)])  # none of the last expert
    gate_up, down = torch.randn(experts, 2 * width, dim) / 8, torch.randn(experts, dim, width) / 8
    return [x, gate, choices, gate_up, down]


class TestExperts:
    @POW2
    @pytest.mark.parametrize(
        "shape", [(1, 3, 2, 16, 16), (63, 5, 2, 40, 24), (333, 3, 1, 130, 70)], ids=["one", "ragged", "two tiles"]
    )
    def test_output_and_gradients_are_those_of_the_recipe(self, shape, pow2, monkeypatch):
        monkeypatch.setattr(fp8_ops, "_BAND_ROWS", 128)
        x, gate, choices, gate_up, down = expert_inputs(*shape)
        leaves = {"x": x, "gate": gate, "gate_up": gate_up, "down": down}
        for leaf in leaves.values():
            leaf.requires_grad_()
        y = fp8_experts(x, gate, plan_dispatch(choices, shape[1]), gate_up, down, pow2)
        grad = torch.randn_like(y)
        y.backward(grad)
        plain = [tensor.detach() for tensor in (x, gate, choices, gate_up, down)]
        expected = expert_reference(*plain, grad, pow2)
        results = {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}
        for name, ours in results.items():
            # Sums in float32 can fall on the other side of a tie than those in float64: one step of E4M3 in one
            # number of a hidden layer. A wrong tile or scale is off by a percent.
            error = np.linalg.norm(ours.double().numpy() - expected[name]) / np.linalg.norm(expected[name])
            assert error < 2e-4, name
        assert gate_up.grad[-1].abs().max() == 0

    def test_without_rounding_they_are_the_plain_experts(self, monkeypatch):
        # The control flow alone: gather, gate, combine and their gradients.
        monkeypatch.setattr(fp8_ops, "quantize_dequantize_blocks", lambda x, block, pow2: x.float())
        inputs = expert_inputs(63, 6, 3, 40, 24)
        results = []
        for function in (fp8_experts, routed_experts):
            x, gate, choices, gate_up, down = copy.deepcopy(inputs)
            leaves = [leaf.requires_grad_() for leaf in (x, gate, gate_up, down)]
            y = function(x, gate, plan_dispatch(choices, 6), gate_up, down)
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaves)))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)

    def test_under_autocast_the_sum_is_bf16_and_gradients_are_float32(self):
        layer = Experts(4, 32, 16)
        nn.init.normal_(layer.gate_up)
        nn.init.normal_(layer.down)
        layer.__class__ = FP8Experts
        x, gate, choices, _, _ = expert_inputs(20, 4, 2, 32, 16)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x, gate, choices)
        assert y.dtype == torch.bfloat16
        y.sum().backward()
        assert layer.down.grad.dtype == layer.gate_up.grad.dtype == torch.float32
        exact = fp8_experts(x.bfloat16().float(), gate, plan_dispatch(choices, 4), layer.gate_up, layer.down)
        assert (y.float() - exact).norm() < 0.02 * exact.norm()  # a few roundings to bfloat16 apart

    def test_no_token_at_all(self):
        x, gate, choices, gate_up, down = expert_inputs(1, 3, 2, 16, 16)
        y = fp8_experts(x[:0], gate[:0], plan_dispatch(choices[:0], 3), gate_up, down)
        assert y.shape == (0, 16)


def kept_bytes(module: nn.Module, *arguments: Tensor) -> int:
    """Bytes that a forward under BF16 autocast keeps for its backward, each storage once."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        output = module(*arguments)
    own = {p.untyped_storage().data_ptr() for p in [*module.parameters(), output, *arguments]}
    return sum(size for pointer, size in sizes.items() if pointer not in own)


def peak_bytes(module: nn.Module, *arguments: Tensor) -> int:
    """Most bytes that are allocated at a time in a forward and backward under BF16 autocast."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        with torch.autocast("cpu", torch.bfloat16):
            output = module(*arguments)
        output.sum().backward()
    now = most = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def layer_and_arguments(kind: str) -> tuple[nn.Module, list[Tensor]]:
    if kind == "linear":
        return Linear(256, 512), [torch.randn(2048, 256, requires_grad=True)]
    layer, (x, gate, choices, _, _) = Experts(8, 128, 64), expert_inputs(2048, 8, 2, 128, 64)
    nn.init.normal_(layer.gate_up)
    nn.init.normal_(layer.down)
    return layer, [x.requires_grad_(), gate.requires_grad_(), choices]


@pytest.mark.parametrize("kind", ["linear", "experts"])
@pytest.mark.parametrize(("measure", "times"), [(kept_bytes, 1), (peak_bytes, 2)], ids=["kept", "peak"])
def test_memory_is_that_of_bf16_and_at_its_peak_at_most_twice_that(kind, measure, times):
    layer, arguments = layer_and_arguments(kind)
    plain = measure(layer, *arguments)
    layer.zero_grad()
    for argument in arguments:
        argument.grad = None
    layer.__class__ = FP8_CLASS_OF[type(layer)]
    assert 0 < measure(layer, *arguments) <= times * plain


@pytest.mark.parametrize("dynamic", [False, True])
def test_operators_keep_their_promises_to_torch_compile(dynamic):
    x, gate, choices, gate_up, down = expert_inputs(9, 4, 2, 16, 16)
    plan = plan_dispatch(choices, 4)
    for leaf in (x, gate_up, down):
        leaf.requires_grad_()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    if dynamic:
        checks = ("test_aot_dispatch_dynamic",)
    torch.library.opcheck(fp8_linear, (x, gate_up.detach()[0], True), test_utils=checks)
    operands = (x, gate[:, 0].repeat(2), plan.slot_token_N, plan.ends_E, gate_up, down, True)
    torch.library.opcheck(fp8_ops._experts, operands, test_utils=checks)


def test_a_model_of_fp8_layers_stays_near_the_plain_one():
    model = tiny_model(num_experts_per_tok=8, n_group=1, topk_group=1)  # all experts: no choice can differ
    ids = torch.randint(0, 64, (2, 30))
    plain = model(ids).logits
    for module in model.modules():
        if type(module) in FP8_CLASS_OF and module is not model.head:
            module.__class__ = FP8_CLASS_OF[type(module)]
    rounded = model(ids).logits
    assert 1e-3 < (rounded - plain).norm() / plain.norm() < 0.2


class TestConversion:
    EVERY_BLOCK = ("attention.q.down", "attention.q.up", "attention.kv_down", "attention.kv_up", "attention.output")

    def test_what_the_report_computes_in_fp8_is_converted_and_nothing_else(self):
        model = tiny_model(**FITTING)
        conversion = convert_to_fp8(model)
        expected = set()
        for block in ("blocks.0", "blocks.1", "blocks.2", "mtp.0.block"):
            expected |= {f"{block}.{name}" for name in self.EVERY_BLOCK}
            networks = [""] if block == "blocks.0" else [".shared"]
            expected |= {f"{block}.feed_forward{n}.{name}" for n in networks for name in ("gate_up", "down")}
            expected |= {f"{block}.feed_forward.experts"} if block != "blocks.0" else set()
        assert set(conversion.converted) == expected
        assert {name for name, module in model.named_modules() if is_fp8(module)} == expected
        assert dict(conversion.kept) == {"head": "output head", "mtp.0.projection": "projection of an MTP module"}

    def test_a_query_without_compression(self):
        assert "blocks.0.attention.q" in convert_to_fp8(tiny_model(**{**FITTING, "q_lora_rank": None})).converted

    def test_names_shapes_and_values_stay_so_that_a_checkpoint_goes_both_ways(self):
        plain, model = tiny_model(), tiny_model(seed=1)
        convert_to_fp8(model)
        state = plain.state_dict()
        assert [(n, t.shape, t.dtype) for n, t in model.state_dict().items()] == [
            (n, t.shape, t.dtype) for n, t in state.items()
        ]
        model.load_state_dict(state)
        ids = torch.randint(0, 64, (2, 9))
        assert not torch.equal(model(ids).logits, plain(ids).logits)
        other = tiny_model(seed=2)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(ids).logits, plain(ids).logits)
        assert torch.equal(convert_from_fp8(model)(ids).logits, plain(ids).logits)
        assert not any(map(is_fp8, model.modules()))
        assert not any("pow2_scales" in vars(module) for module in model.modules())

    def test_widths_that_do_not_fit_stay_and_are_named(self):
        conversion = convert_to_fp8(tiny_model(qk_rope_head_dim=4, moe_intermediate_size=24))
        assert conversion.kept["blocks.0.attention.kv_down"] == "width 20 is no multiple of 16"
        assert conversion.kept["blocks.1.feed_forward.experts"] == "width 24 is no multiple of 16"
        assert "blocks.*.attention.kv_down (3): width 20 is no multiple of 16" in conversion.summary()
        assert "blocks.*.attention.output" not in conversion.summary().partition("as they are")[0]

    def test_patterns_choose(self):
        model = tiny_model(**FITTING)
        conversion = convert_to_fp8(model, include=["blocks.*"], exclude=["*.attention.*"])
        assert {name.split(".")[2] for name in conversion.converted} == {"feed_forward"}
        assert conversion.kept["blocks.1.attention.kv_up"] == "excluded"
        assert conversion.kept["mtp.0.block.attention.kv_up"] == "excluded"
        assert conversion.kept["mtp.0.block.feed_forward.experts"] == "not included"

    def test_converting_twice_is_converting_once(self):
        model = tiny_model(**FITTING)
        first = convert_to_fp8(model)
        assert convert_to_fp8(model) == first
        assert convert_to_fp8(model, pow2_scales=False).pow2_scales is False
        assert model.blocks[0].attention.output.pow2_scales is False

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"backend": "emulated"}, "did you mean 'emulate'"),
            (
                {"include": ["layers.*"]},
                r"include='layers.\*' of FP8: matches no linear map or experts.*blocks.0.atten",
            ),
            ({"include": ["blocks.*", "head"]}, r"include='head' of FP8: head stays as it is \(output head\)"),
            ({"include": ["mtp.*.projection"]}, "mtp.0.projection stays as it is"),
            ({"exclude": ["blocks.7.*"]}, r"exclude='blocks.7.\*'"),
            ({"exclude": "blocks.*"}, r"exclude='blocks.\*' of FP8: give a list"),
            ({"exclude": ["blocks.*", "mtp.*"]}, "nothing in DeepSeekV3 can be converted.*excluded"),
        ],
    )
    def test_what_cannot_be_done_is_one_error_and_changes_nothing(self, arguments, message):
        model = tiny_model(**FITTING)
        with pytest.raises(ConfigError, match=message):
            convert_to_fp8(model, **arguments)
        assert not any(map(is_fp8, model.modules()))

    def test_tied_weights_are_those_of_the_head(self):
        conversion = convert_to_fp8(tiny_model(tie_word_embeddings=True, **FITTING))
        assert conversion.kept["head"] == "output head"

    def test_a_hugging_face_model(self):
        transformers = pytest.importorskip("transformers")
        config = transformers.Qwen2MoeConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
            shared_expert_intermediate_size=20, num_attention_heads=2, num_key_value_heads=2, num_experts=4,
            num_experts_per_tok=2,
        )  # fmt: skip
        torch.manual_seed(0)
        model = transformers.Qwen2MoeForCausalLM(config)
        ids = torch.randint(0, 64, (2, 9))
        plain = model(ids, labels=ids).loss
        names = list(model.state_dict())
        conversion = convert_to_fp8(model)
        layer = "model.layers.1"
        expected = {f"{layer}.self_attn.{name}_proj" for name in "qkvo"} | {f"{layer}.mlp.experts"}
        assert {name for name in conversion.converted if name.startswith(layer)} == expected
        assert conversion.kept[f"{layer}.mlp.shared_expert_gate"] == "router"
        assert conversion.kept[f"{layer}.mlp.shared_expert.up_proj"] == "width 20 is no multiple of 16"
        assert conversion.kept["lm_head"] == "output head"
        loss = model(ids, labels=ids).loss
        assert 0 < (loss - plain).abs() < 0.05 * plain
        loss.backward()  # queries, keys and values have biases
        projection = model.model.layers[1].self_attn.q_proj
        assert projection.bias.grad.abs().max() > 0
        assert projection.weight.grad.abs().max() > 0
        assert list(model.state_dict()) == names

    def test_generation_reads_the_plain_weight_where_it_decodes(self):
        model = tiny_model(**FITTING)
        convert_to_fp8(model)
        prompt = torch.randint(0, 64, (2, 6))
        ids = generate(model, prompt, max_new_tokens=8)
        assert ids.shape == (2, 14)
        assert (ids[:, :6] == prompt).all()
        # Decoding absorbs kv_up, in its own precision: with plain weights of kv_up, the whole is the same.
        convert_from_fp8(model)
        convert_to_fp8(model, exclude=["*.kv_up"])
        first = model(ids[:, :-1]).logits[:, 5:].argmax(dim=-1)
        assert (first == ids[:, 6:]).float().mean() > 0.8

    @pytest.mark.parametrize("policy", ["block", "keep_routing"])
    def test_recomputed_activations_give_the_same_gradients(self, policy):
        ids = torch.randint(0, 64, (2, 30))
        gradients = []
        for chosen in ("none", policy):
            model = checkpoint_blocks(tiny_model(**FITTING), chosen)
            convert_to_fp8(model)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(ids, labels=ids).loss
            loss.backward()
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            assert torch.equal(gradient, gradients[1][name]), name

    def test_a_block_traces_without_a_break(self):
        model = tiny_model(**FITTING)
        convert_to_fp8(model)
        ids = torch.randint(0, 64, (2, 9))
        plain = model(ids).logits
        model.blocks[1].compile(backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(model(ids).logits, plain)
