"""FP8 in the fused experts of Hugging Face models: against the recipe in float64, and against their own forward."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import te_stand_in
import torch
import transformers
from foreign_models import configurations, modelling_files
from test_fp8_emulated import POW2, expert_inputs, expert_reference
from torch import Tensor, nn

from lightning_dsv3.layers.fused_experts import FP8FusedExperts, fused_class_of, fused_experts_refusal
from lightning_dsv3.ops import fp8 as fp8_ops
from lightning_dsv3.parallel.fp8 import convert_from_fp8, convert_to_fp8, is_fp8

calls = te_stand_in.calls
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_experts_per_tok": 2,
}  # fmt: skip
DEEPSEEK = {
    "moe_intermediate_size": 16, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "DeepseekV3": DEEPSEEK,
    "Qwen3Moe": {"moe_intermediate_size": 16, "num_experts": 6, "head_dim": 16},
    "Mixtral": {"num_local_experts": 4},
}


def hugging_face(name: str, **arguments: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(SMALL | MODELS.get(name, {}) | arguments))
    return getattr(transformers, f"{name}ForCausalLM")(config)


def experts_of(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if name.endswith(".experts")}


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
class TestModels:
    @POW2
    def test_experts_compute_the_recipe(self, name, pow2):
        model = hugging_face(name)
        conversion = convert_to_fp8(model, backend="emulate", pow2_scales=pow2)
        found = experts_of(model)
        assert set(found) == {n for n in conversion.converted if n.endswith(".experts")}
        experts = next(iter(found.values()))
        number, double, dim = experts.gate_up_proj.shape
        x, gate, choices, gate_up, down = expert_inputs(63, number, 2, dim, double // 2)
        with torch.no_grad():
            experts.gate_up_proj.copy_(gate_up)
            experts.down_proj.copy_(down)
        x.requires_grad_()
        gate.requires_grad_()
        y = experts(x, choices, gate)
        grad = torch.randn_like(y)
        y.backward(grad)
        plain = [tensor.detach() for tensor in (x, gate, choices, gate_up, down)]
        expected = expert_reference(*plain, grad, pow2)
        results = {
            "y": y.detach(), "x": x.grad, "gate": gate.grad, "gate_up": experts.gate_up_proj.grad,
            "down": experts.down_proj.grad,
        }  # fmt: skip
        for key, ours in results.items():
            error = np.linalg.norm(ours.double().numpy() - expected[key]) / np.linalg.norm(expected[key])
            assert error < 2e-4, key

    def test_a_model_trains_near_its_plain_self_and_goes_back(self, name):
        model, ids = hugging_face(name), torch.randint(0, 64, (2, 20))
        names, classes = list(model.state_dict()), [type(m) for m in model.modules()]
        plain = gradients(model, ids)
        conversion = convert_to_fp8(model, backend="emulate")
        assert all(is_fp8(module) for module in experts_of(model).values())
        assert not [n for n in conversion.kept if not re.search(r"lm_head|gate$", n)]
        rounded = gradients(model, ids)
        assert list(model.state_dict()) == names
        assert 0 < (rounded["loss"] - plain["loss"]).abs() < 0.02 * plain["loss"]
        for key in plain:
            if key.endswith("_proj") or key.endswith("_proj.weight"):
                cosine = torch.cosine_similarity(plain[key].flatten(), rounded[key].flatten(), dim=0)
                assert cosine > 0.9, key
        convert_from_fp8(model)
        assert [type(m) for m in model.modules()] == classes
        assert torch.equal(model(ids, labels=ids).loss, plain["loss"])

    def test_transformer_engine_computes_the_same(self, name, calls):
        model, ids = hugging_face(name), torch.randint(0, 64, (2, 20))
        found = []
        for backend in ("te", "emulate"):
            convert_to_fp8(model, backend=backend)
            found.append(gradients(model, ids))
        assert "GroupedLinear" in {call.kind for call in calls}
        assert found[0].keys() == found[1].keys()
        for key, ours in found[0].items():
            assert (ours - found[1][key]).norm() <= 1e-3 * found[1][key].norm(), key
        assert not [key for key in model.state_dict() if "extra_state" in key]


def test_copies_and_pickles_compute_the_same():
    experts = next(iter(experts_of(hugging_face("Qwen3Moe")).values()))
    convert_to_fp8(experts, backend="emulate")
    x, gate, choices, *_ = expert_inputs(9, 6, 2, 32, 16)
    expected = experts(x, choices, gate)
    for other in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        assert isinstance(other, FP8FusedExperts)
        assert torch.equal(other(x, choices, gate), expected)
        assert type(convert_from_fp8(other)) is type(convert_from_fp8(copy.deepcopy(experts)))


def test_a_trainer_s_autocast_reaches_the_experts():
    experts = next(iter(experts_of(hugging_face("Mixtral")).values()))
    convert_to_fp8(experts)
    x, gate, choices, *_ = expert_inputs(9, 4, 2, 32, 48)
    with torch.autocast("cpu", torch.bfloat16):
        assert experts(x, choices, gate).dtype == torch.float32
        assert experts(x.bfloat16(), choices, gate).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("GptOss", {"num_local_experts": 4, "head_dim": 16}, "its experts interleave gate and up projections"),
        (
            "Qwen3Moe",
            {"hidden_act": "gelu"},
            "its experts' activation is not SwiGLU",
        ),
        ("Qwen3Moe", {"moe_intermediate_size": 24}, "width 24 is no multiple of 16"),
    ],
)  # fmt: skip
def test_other_layouts_stay_and_are_named(name, arguments, reason):
    model = hugging_face(name, **arguments)
    conversion = convert_to_fp8(model)
    assert {conversion.kept[key] for key in experts_of(model)} == {reason}
    assert not any(map(is_fp8, experts_of(model).values()))
    assert conversion.converted


def test_experts_that_state_nothing_stay():
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(4, 32, 16))
            self.down_proj = nn.Parameter(torch.randn(4, 16, 16))

    expected = "a Stacked is neither torch.nn.Linear, our Experts nor experts of transformers 5"
    assert fused_experts_refusal(Stacked()) == expected


def expert_modules() -> Iterator[tuple[str, nn.Module]]:
    """Every class of experts in the installed transformers that its family's configuration can build, once."""
    for path in modelling_files():
        names = re.findall(r"^class (\w*Experts)\(nn\.Module\)", path.read_text(encoding="utf-8"), re.M)
        if not names:
            continue
        family = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        for name in names:
            for config in configurations(path.parent.name):
                try:
                    module = getattr(family, name)(config)
                except Exception:  # another configuration of the family is meant
                    continue
                yield f"{path.parent.name}.{name}", module
                break


def test_whatever_is_converted_is_what_its_own_forward_computes(monkeypatch):
    # Without rounding, so that control flow, layout and activation are all that is compared.
    monkeypatch.setattr(fp8_ops, "quantize_dequantize_blocks", lambda x, block, pow2: x.float())
    converted, kept = [], {}
    for name, module in expert_modules():
        reason = fused_experts_refusal(module)
        if reason is not None:
            kept[name] = reason
            continue
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
        number, _, dim = module.gate_up_proj.shape
        x, gate, choices, *_ = expert_inputs(40, number, 2, dim, 8)
        module.config._experts_implementation = "eager"
        module.eval()
        expected = module(x, choices, gate)
        assert list(inspect.signature(module.forward).parameters)[:3] == [
            "hidden_states",
            "top_k_index",
            "top_k_weights",
        ]
        module.__class__ = fused_class_of(type(module))
        torch.testing.assert_close(module(x, choices, gate), expected, rtol=1e-4, atol=1e-5, msg=name)
        converted.append(name)
    assert len(converted) > 20
    assert "gpt_oss.GptOssExperts" in kept
