"""Every kernel of attention against the plain form, and the plain form against each document by itself."""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    HALF,
    LAYOUTS,
    SCALE,
    TOLERANCE,
    WIDTHS,
    Flash3,
    assert_close,
    documents_of,
    each_document_alone,
    flex_on_the_cpu,
    numbers,
    operands,
    relative_error,
    rows_of_one_length,
    with_gradients,
)
from hypothesis import given
from torch import Tensor, nn

from lightning_dsv3 import DeepSeekV3, DeepSeekV3Config
from lightning_dsv3.ops import backends
from lightning_dsv3.ops.attention import AttentionKernel, Positions, attention_kernel, causal_attention, latent_heads
from lightning_dsv3.ops.attention_kernels import ATTENTION_KERNELS, needs_one_width
from lightning_dsv3.ops.backends import Case, decide, forced_kernels
from lightning_dsv3.ops.documents import (
    Documents,
)
from lightning_dsv3.ops.libraries import Library
from lightning_dsv3.ops.rope import rope_table
from lightning_dsv3.parallel import checkpoint_blocks, compile_model


@pytest.fixture
def cpu_flex() -> Iterator[None]:
    with flex_on_the_cpu():
        yield


@pytest.fixture(params=[False, True], ids=["out", "out_and_sums"])
def flash3(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flash3]:
    module = Flash3(returns_sums=request.param)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    monkeypatch.setitem(backends._RULES, ("attention", "flash_attn_3"), lambda case: None)
    with forced_kernels():  # a table of choices of its own
        yield module


class TestPlain:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("widths", WIDTHS, ids=str)
    def test_it_is_each_document_by_itself(self, widths: tuple[int, int], layout: str) -> None:
        def alone(q: Tensor, k: Tensor, v: Tensor, scale: float, made: Documents | None) -> Tensor:
            return each_document_alone(q, k, v, scale, LAYOUTS[layout])

        tensors, made = operands(widths, torch.float64), documents_of(layout)
        plain = with_gradients(ATTENTION_KERNELS["plain"], tensors, made)
        assert_close(plain, with_gradients(alone, tensors, made), 1e-12)

    @pytest.mark.parametrize("packed", [False, True])
    def test_it_can_be_differentiated_twice(self, packed: bool) -> None:
        made = Documents(numbers([1, 3, 2])) if packed else None
        tensors = operands((5, 3), torch.float64, batch=1, length=6)
        assert torch.autograd.gradcheck(lambda *x: ATTENTION_KERNELS["plain"](*x, SCALE, made), tensors)
        assert torch.autograd.gradgradcheck(lambda *x: ATTENTION_KERNELS["plain"](*x, SCALE, made), tensors)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_scores_are_float32_under_autocast_too(self, dtype: torch.dtype) -> None:
        tensors = operands((24, 16), dtype)
        plain = ATTENTION_KERNELS["plain"](*tensors, SCALE, None)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ATTENTION_KERNELS["plain"](*tensors, SCALE, None), plain)
        exact = each_document_alone(*(x.double() for x in tensors), SCALE, None)
        assert plain.dtype == dtype
        # In bfloat16 nothing but the result is rounded.
        assert relative_error(plain, exact) < (1e-6 if dtype == torch.float32 else 2**-8)


class TestKernels:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("widths", WIDTHS, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_sdpa(self, dtype: torch.dtype, widths: tuple[int, int], layout: str) -> None:
        self.compare("sdpa", dtype, widths, layout)

    @pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
    def test_flex(self, cpu_flex: None) -> None:
        cases = [(torch.float64, w, layout) for w in WIDTHS for layout in LAYOUTS]
        for dtype, widths, layout in [
            *cases,
            (torch.float32, (24, 16), "packed"),
            (torch.bfloat16, (24, 16), "packed"),
        ]:
            self.compare("flex", dtype, widths, layout)

    @staticmethod
    def compare(name: str, dtype: torch.dtype, widths: tuple[int, int], layout: str, device: str = "cpu") -> None:
        """Outputs and gradients of a kernel are the plain form's on the same numbers, in float64."""
        tensors, made = operands(widths, dtype, device=device), documents_of(layout, device)
        ours = with_gradients(ATTENTION_KERNELS[name], tensors, made)
        plain = with_gradients(ATTENTION_KERNELS["plain"], [x.double() for x in tensors], made)
        assert_close(ours, plain, TOLERANCE[dtype])

    @pytest.mark.gpu
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("widths", [(192, 128), (128, 192), (64, 64), (24, 16)], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("name", ["plain", "sdpa", "flex", "flash_attn_3"])
    def test_on_cuda(self, name: str, dtype: torch.dtype, widths: tuple[int, int], layout: str) -> None:
        case = Case("cuda", dtype, True, (("qk_head_dim", widths[0]), ("v_head_dim", widths[1]), ("packed", True)))
        reason = backends.refusals("attention", case)[name]
        if reason is not None:
            pytest.skip(reason)
        options = {"device": "cuda", "dtype": dtype, "packed": layout == "packed"}
        if needs_one_width(name, qk_head_dim=widths[0], v_head_dim=widths[1], **options):
            widths = (max(widths),) * 2
        self.compare(name, dtype, widths, layout, "cuda")


class TestFlash3:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("widths", [(24, 24), (192, 192)], ids=str)
    def test_with_gradients_in_one_width(self, flash3: Flash3, widths: tuple[int, int], layout: str) -> None:
        tensors, made = operands(widths, torch.bfloat16), documents_of(layout)
        ours = with_gradients(ATTENTION_KERNELS["flash_attn_3"], tensors, made)
        plain = with_gradients(ATTENTION_KERNELS["plain"], [x.double() for x in tensors], made)
        assert_close(ours, plain, TOLERANCE[torch.bfloat16])
        assert flash3.calls == [{"widths": widths, "sequences": 3 if made is None else 9, "deterministic": False}]

    @given(rows=rows_of_one_length)
    def test_any_documents(self, rows: list[list[int]]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "flash_attn_interface", Flash3())
            made = Documents(numbers(*rows))
            tensors = operands((192, 128), torch.bfloat16, len(rows), sum(rows[0]))
            with torch.no_grad():
                ours = ATTENTION_KERNELS["flash_attn_3"](*tensors, SCALE, made)
                assert relative_error(ours, ATTENTION_KERNELS["plain"](*tensors, SCALE, made)) < 1e-2

    def test_widths_are_made_one_where_there_is_a_backward(self, flash3: Flash3) -> None:
        like = torch.empty(1, dtype=torch.bfloat16)
        for qk, v, grad, expected in [
            (192, 128, True, (192, 192)),
            (192, 128, False, (192, 128)),
            (24, 16, False, (24, 24)),
        ]:
            inputs = latent_inputs(qk - 8, 8, v, dtype=torch.bfloat16)
            with torch.set_grad_enabled(grad):
                kernel = attention_kernel(like, qk_head_dim=qk, v_head_dim=v, packed=False)
                assert kernel.name == "flash_attn_3"
                heads = latent_heads(*inputs, v_head_dim=v, one_width=kernel.one_width)
                out = causal_attention(heads, scale=SCALE, v_head_dim=v, kernel=kernel)
            if grad:
                out.float().square().sum().backward()
                assert all(x.grad.isfinite().all() for x in inputs[:3])
            assert out.shape == (2, 3, 17, v)
            assert flash3.calls.pop()["widths"] == expected

    def test_deterministic_algorithms_are_asked_for(self, flash3: Flash3) -> None:
        torch.use_deterministic_algorithms(True)
        try:
            ATTENTION_KERNELS["flash_attn_3"](*operands((16, 16), torch.bfloat16), SCALE, None)
        finally:
            torch.use_deterministic_algorithms(False)
        assert flash3.calls[0]["deterministic"] is True


def latent_inputs(nope: int, rope: int, v: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    tensors = [torch.randn(2, 17, 3, nope + rope), torch.randn(2, 17, 3, nope + v), torch.randn(2, 17, rope)]
    cos, sin = rope_table(torch.arange(17), dim=rope, theta=100.0)
    return [*(x.to(dtype).requires_grad_() for x in tensors), cos, sin]


class TestWidths:
    @pytest.mark.parametrize(("nope", "rope", "v"), [(8, 4, 8), (4, 4, 12), (6, 2, 8), (0, 4, 3)])
    def test_heads_of_their_own_widths_are_the_padded_ones_without_zeros(self, nope: int, rope: int, v: int) -> None:
        inputs = latent_inputs(nope, rope, v)
        results = []
        for one_width in (True, False):
            leaves = [x.detach().requires_grad_() for x in inputs[:3]]
            heads = latent_heads(*leaves, *inputs[3:], v_head_dim=v, one_width=one_width)
            if one_width:
                assert {x.shape[-1] for x in heads} == {max(nope + rope, v)}
                assert all(not x[..., w:].any() for x, w in zip(heads, (nope + rope, nope + rope, v), strict=True))
            cut = [x[..., :w] for x, w in zip(heads, (nope + rope, nope + rope, v), strict=True)]
            assert one_width or all(x.shape == y.shape for x, y in zip(cut, heads, strict=True))
            sum((x * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum() for x in cut).backward()
            results.append([*cut, *(x.grad for x in leaves)])
        for padded, own in zip(*results, strict=True):
            assert torch.equal(padded, own)

    @pytest.mark.parametrize(("name", "expected"), [("sdpa", [24, 24, 24]), ("plain", [24, 24, 16])])
    def test_a_layer_makes_the_widths_that_its_kernel_wants(
        self, name: str, expected: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[int] = []

        def kernel(q: Tensor, k: Tensor, v: Tensor, scale: float, made: Documents | None) -> Tensor:
            seen.extend(x.shape[-1] for x in (q, k, v))
            return v

        monkeypatch.setitem(ATTENTION_KERNELS, name, kernel)
        layer = TestModel.make().blocks[0].attention
        cos, sin = rope_table(torch.arange(5), dim=8, theta=1e4)
        with forced_kernels(attention=name):
            assert layer(torch.randn(1, 5, 32), Positions(cos, sin)).shape == (1, 5, 32)
        assert seen == expected

    @pytest.mark.parametrize(
        ("name", "device", "dtype", "widths", "packed", "expected"),
        [
            ("plain", "cpu", torch.float32, (192, 128), False, False),
            ("flex", "cuda", torch.bfloat16, (192, 128), True, False),
            ("sdpa", "cpu", torch.float32, (192, 128), False, True),
            ("sdpa", "cpu", torch.float64, (8, 16), True, True),
            ("sdpa", "cpu", torch.float32, (16, 16), False, False),
            ("sdpa", "cuda", torch.bfloat16, (192, 128), False, True),
            ("sdpa", "cuda", torch.float16, (128, 192), False, True),
            # Flash takes no wider ones, and neither a mask nor float32: the memory-efficient kernel takes two widths.
            ("sdpa", "cuda", torch.bfloat16, (320, 128), False, False),
            ("sdpa", "cuda", torch.bfloat16, (192, 128), True, False),
            ("sdpa", "cuda", torch.float32, (192, 128), False, False),
        ],
    )
    def test_where_one_width_is_wanted(self, name, device, dtype, widths, packed, expected) -> None:  # type: ignore[no-untyped-def]
        qk, v = widths
        wanted = needs_one_width(name, device=device, dtype=dtype, qk_head_dim=qk, v_head_dim=v, packed=packed)
        assert wanted is expected


SHAPE = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "n_routed_experts": 8, "num_experts_per_tok": 2, "num_nextn_predict_layers": 1,
    "initializer_range": 0.2,
}  # fmt: skip


class TestModel:
    @staticmethod
    def make(**overrides: Any) -> DeepSeekV3:
        torch.manual_seed(0)
        return DeepSeekV3(DeepSeekV3Config.from_preset("tiny", **(SHAPE | overrides)))

    @staticmethod
    def step(model: nn.Module, kernel: str, packed: bool) -> dict[str, Tensor]:
        document = numbers([4, 120, 20], [144])
        ids = torch.randint(0, 61, document.shape, generator=torch.Generator().manual_seed(2))
        with forced_kernels(attention=kernel):
            output = model(ids, labels=ids, document=document if packed else None)
            model.zero_grad()
            (output.loss + 0.3 * output.mtp_losses[0]).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        return gradients | {"logits": output.logits.detach(), "mtp": output.mtp_logits[-1].detach()}

    @classmethod
    def layer_step(cls, kernel: str, autocast: bool = True) -> dict[str, Tensor]:
        """Output and gradients of attention alone: the routing of a whole model turns roundings into other experts."""
        layer = cls.make().blocks[0].attention
        x = torch.randn(2, 144, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
        cos, sin = rope_table(torch.arange(144), dim=8, theta=1e4)
        documents = Documents.prepared(numbers([4, 120, 20], [144]), kernel, torch.bfloat16)
        with forced_kernels(attention=kernel), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = layer(x, Positions(cos, sin, documents))
        out.float().square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
        return gradients | {"out": out.detach(), "x": x.grad}

    @staticmethod
    def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
        for name, value in theirs.items():
            assert relative_error(ours[name], value) < tolerance, name

    @pytest.mark.parametrize("packed", [True, False])
    @pytest.mark.parametrize("overrides", [{}, {"v_head_dim": 40}], ids=["v<qk", "v>qk"])
    def test_plain(self, packed: bool, overrides: dict[str, int]) -> None:
        model = self.make(**overrides)
        self.assert_same(self.step(model, "plain", packed), self.step(model, "sdpa", packed), 1e-4)

    @pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
    def test_flex_with_checkpointing_and_autocast(self, cpu_flex: None) -> None:
        model = self.make()
        sdpa, flex = (self.step(model, name, packed=True) for name in ("sdpa", "flex"))
        self.assert_same(flex, sdpa, 1e-4)
        for policy in ("block", "keep_routing"):
            changed = self.step(checkpoint_blocks(copy.deepcopy(model), policy), "flex", packed=True)
            for name, value in flex.items():
                assert torch.equal(changed[name], value), (policy, name)
        half = self.layer_step("flex")
        assert half["out"].dtype == torch.bfloat16
        self.assert_same(half, self.layer_step("plain", autocast=False), 3e-2)

    @pytest.mark.slow
    @pytest.mark.parametrize(("part", "whole"), [("blocks", True), ("model", False)])
    def test_flex_in_a_compiled_block_without_a_graph_break(self, cpu_flex: None, part: str, whole: bool) -> None:
        model = self.make()
        compiled = compile_model(copy.deepcopy(model), part, backend="aot_eager", fullgraph=whole)
        self.assert_same(self.step(compiled, "flex", True), self.step(model, "sdpa", True), 1e-4)

    def test_flash_3(self, flash3: Flash3) -> None:
        """In bfloat16, which it is for; the blocks of the main model share the bounds, the MTP module has its own."""
        self.assert_same(self.layer_step("flash_attn_3"), self.layer_step("plain", autocast=False), 3e-2)
        flash3.calls.clear()
        with torch.autocast("cpu", torch.bfloat16):
            gradients = self.step(self.make(), "flash_attn_3", packed=True)
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        assert [(call["widths"], call["sequences"]) for call in flash3.calls] == [((24, 24), 4)] * 3

    def test_a_kernel_other_than_the_prepared_one_makes_what_it_reads(self) -> None:
        model = self.make()
        attention, x = model.blocks[0].attention, torch.randn(2, 144, 32)
        document = numbers([4, 120, 20], [144])
        cos, sin = rope_table(torch.arange(144), dim=8, theta=1e4)
        prepared = [Documents.prepared(document, name, torch.float32) for name in ("sdpa", "flex", "flash_attn_3")]
        first, *others = (attention(x, Positions(cos, sin, made)) for made in prepared)
        for other in others:
            assert torch.equal(other, first)


def case(device: str, dtype: torch.dtype, packed: bool, widths: tuple[int, int] = (192, 128)) -> Case:
    return Case(device, dtype, True, (("qk_head_dim", widths[0]), ("v_head_dim", widths[1]), ("packed", packed)))


class TestChoice:
    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_on_the_cpu_it_is_sdpa(self, dtype: torch.dtype, packed: bool) -> None:
        assert decide("attention", case("cpu", dtype, packed)).name == "sdpa"
        kernel = attention_kernel(torch.empty(1, dtype=dtype), qk_head_dim=192, v_head_dim=128, packed=packed)
        assert kernel == AttentionKernel("sdpa", one_width=True)

    @pytest.mark.parametrize(
        ("capability", "flash", "expected"),
        [
            ((9, 0), None, {"half packed": "flex", "half": "sdpa", "float packed": "sdpa", "float": "sdpa"}),
            ((9, 0), "there", {"half packed": "flash_attn_3", "half": "flash_attn_3", "float packed": "sdpa"}),
            ((8, 0), "there", {"half packed": "flex", "half": "sdpa"}),
            ((10, 0), "there", {"half packed": "flex", "half": "sdpa"}),
            ((7, 5), None, {"half packed": "sdpa", "half": "sdpa"}),
        ],
    )
    def test_on_cuda(self, capability, flash, expected, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
        self.pretend(monkeypatch, capability, flash)
        for words, name in expected.items():
            for dtype in HALF if "half" in words else (torch.float32,):
                choice = decide("attention", case("cuda", dtype, "packed" in words))
                assert choice.name == name, (words, choice)

    @pytest.mark.parametrize(
        ("widths", "expected"),
        [((192, 128), "flash_attn_3"), ((256, 256), "flash_attn_3"), ((264, 128), "flex"), ((196, 128), "flex"),
         ((64, 12), "sdpa"), ((8, 8), "flash_attn_3")],
    )  # fmt: skip
    def test_widths_count(self, widths: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pretend(monkeypatch, (9, 0), "there")
        assert decide("attention", case("cuda", torch.bfloat16, True, widths)).name == expected

    def test_any_can_be_forced_where_it_can_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pretend(monkeypatch, (9, 0), "there")
        for name, packed in itertools.product(ATTENTION_KERNELS, (False, True)):
            with forced_kernels(attention=name):
                assert decide("attention", case("cuda", torch.bfloat16, packed)).name == name
        for name in ("flex", "flash_attn_3"):
            with forced_kernels(attention=name), pytest.raises(ValueError, match=f"kernels.attention={name}.*cpu"):
                attention_kernel(torch.empty(1), qk_head_dim=24, v_head_dim=16, packed=True)

    @staticmethod
    def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], flash: str | None) -> None:
        """A machine with this card, with Triton and with or without FlashAttention 3."""
        absent = {"flash_attn_3": "not installed"} if flash is None else {}
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
        monkeypatch.setattr(backends, "library", lambda name: Library(None, absent.get(name)))


def test_padding_changes_neither_scores_nor_values() -> None:
    """The two widths of the CPU's path, bit for bit what torch computes with zeros behind the values."""
    q, k, v = (x.detach() for x in operands((24, 16), torch.float32))
    padded = F.scaled_dot_product_attention(q, k, F.pad(v, (0, 8)), is_causal=True, scale=SCALE)[..., :16]
    assert torch.equal(ATTENTION_KERNELS["sdpa"](q, k, F.pad(v, (0, 8)), SCALE, None)[..., :16], padded)
    assert relative_error(padded, ATTENTION_KERNELS["plain"](q, k, v, SCALE, None)) < 1e-6
