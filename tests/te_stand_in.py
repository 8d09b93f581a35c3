"""A stand-in for Transformer Engine 2.20.2 on a CPU: its signatures and its rules, with emulated FP8 products inside.

What it refuses is what the real modules refuse, or would silently do otherwise than our code means it:

* arguments that the real ones do not have (``SIGNATURES``, held against the sources by a test that is given a wheel);
* a call outside ``autocast``, or under another recipe than 1 x 128 and 128 x 128 tiles of E4M3;
* rows that are no multiple of 8 (16 for each expert) and widths that are no multiple of 16;
* a weight on the meta device, of another shape, or in another dtype than the input where autocast is off;
* a gradient without memory to write it to, where ``fuse_wgrad_accumulation`` promises some;
* ``is_first_microbatch=False`` where no FP8 weight is held, or one of other numbers than the weight has now.

The one liberty: it takes tensors of a CPU, where the real one wants CUDA.
"""

from __future__ import annotations

import enum
import inspect
import sys
import types
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lightning_dsv3.ops import backends, libraries
from lightning_dsv3.ops.quantize import quantize_dequantize_blocks as rounded

ROW, SQUARE, COLUMN = (1, 128), (128, 128), (128, 1)

# File in the wheel, then the names of each callable's arguments; "=" where there is a default.
SIGNATURES = {
    "transformer_engine/pytorch/module/linear.py": {
        "Linear.__init__": (
            "in_features, out_features, sequence_parallel=, fuse_wgrad_accumulation=, tp_group=, tp_size=, "
            "get_rng_state_tracker=, rng_tracker_name=, init_method=, bias=, return_bias=, params_dtype=, "
            "parallel_mode=, parameters_split=, device=, ub_overlap_ag=, ub_overlap_rs=, ub_overlap_rs_dgrad=, "
            "ub_bulk_dgrad=, ub_bulk_wgrad=, ub_name=, delay_wgrad_compute=, symmetric_ar_type=, "
            "save_original_input=, name="
        ),
        "Linear.forward": "inp, is_first_microbatch=, fp8_output=, fp8_grad=",
    },
    "transformer_engine/pytorch/module/layernorm_linear.py": {
        "LayerNormLinear.__init__": (
            "in_features, out_features, eps=, sequence_parallel=, fuse_wgrad_accumulation=, tp_group=, tp_size=, "
            "get_rng_state_tracker=, init_method=, bias=, normalization=, return_bias=, params_dtype=, "
            "parallel_mode=, return_layernorm_output=, return_layernorm_output_gathered=, parameters_split=, "
            "zero_centered_gamma=, device=, ub_overlap_ag=, ub_overlap_rs=, ub_overlap_rs_dgrad=, ub_bulk_wgrad=, "
            "ub_bulk_dgrad=, ub_name=, delay_wgrad_compute=, symmetric_ar_type=, name="
        ),
        "LayerNormLinear.forward": "inp, is_first_microbatch=, fp8_output=, fp8_grad=",
    },
    "transformer_engine/pytorch/module/grouped_linear.py": {
        "GroupedLinear.__init__": (
            "num_gemms, in_features, out_features, sequence_parallel=, fuse_wgrad_accumulation=, tp_group=, tp_size=, "
            "get_rng_state_tracker=, rng_tracker_name=, init_method=, bias=, return_bias=, params_dtype=, "
            "parallel_mode=, device=, ub_overlap_rs=, ub_overlap_ag=, ub_name=, delay_wgrad_compute=, "
            "save_original_input=, single_grouped_weight=, single_grouped_bias=, name=, use_grouped_tensor="
        ),
        "GroupedLinear.forward": "inp, m_splits, is_first_microbatch=, out=, dgrad_out=",
    },
    "transformer_engine/pytorch/quantization.py": {
        "autocast.__init__": "enabled=, calibrating=, recipe=, amax_reduction_group=, _graph=",
        "is_fp8_block_scaling_available": "return_reason=",
    },
}
# Annotated names are arguments; the three that are not are fixed when the class is made.
RECIPE_FIELDS = (
    "use_f32_scales, fp8_format, x_block_scaling_dim, w_block_scaling_dim, grad_block_scaling_dim, fp8_gemm_fprop, "
    "fp8_gemm_dgrad, fp8_gemm_wgrad, fp8_dpa, fp8_mha, backward_override"
)
RECIPE_CONSTANTS = "fp8_quant_fwd_inp, fp8_quant_fwd_weight, fp8_quant_bwd_grad"
QPARAMS_FIELDS = "power_2_scale, amax_epsilon, random_hadamard_transform, stochastic_rounding, fp4_2d_quantization"


def signature(qualified_name: str) -> inspect.Signature:
    (names,) = [file[qualified_name] for file in SIGNATURES.values() if qualified_name in file]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [
            inspect.Parameter(n.rstrip("="), kind, default=None if n.endswith("=") else inspect.Parameter.empty)
            for n in names.split(", ")
        ]
    )


def arguments(qualified_name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """What the real callable would be given; a TypeError for what it would not take."""
    return dict(signature(qualified_name).bind(*args, **kwargs).arguments)


class Format(enum.Enum):
    E4M3 = "E4M3"
    E5M2 = "E5M2"
    HYBRID = "HYBRID"


@dataclass(frozen=True)
class QParams:
    power_2_scale: bool = False
    amax_epsilon: float = 0.0
    random_hadamard_transform: bool = False
    stochastic_rounding: bool = False
    fp4_2d_quantization: bool = False


@dataclass
class Float8BlockScaling:
    use_f32_scales: bool = False
    fp8_format: Format = Format.E4M3
    fp8_quant_fwd_inp = QParams(power_2_scale=True)
    fp8_quant_fwd_weight = QParams(power_2_scale=True)
    fp8_quant_bwd_grad = QParams(power_2_scale=True)
    x_block_scaling_dim: int = 1
    w_block_scaling_dim: int = 2
    grad_block_scaling_dim: int = 1
    fp8_gemm_fprop: Any = None
    fp8_gemm_dgrad: Any = None
    fp8_gemm_wgrad: Any = None
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: str | None = "the environment's"


class Call(NamedTuple):
    """A forward of one of the modules."""

    kind: str
    rows: int
    first: bool | None
    grad: bool


_calls: list[Call] = []
_recipe: list[Float8BlockScaling | None] = [None]


class autocast:  # noqa: N801
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = arguments("autocast.__init__", *args, **kwargs)
        self._recipe = given.get("recipe") if given.get("enabled", True) else None

    def __enter__(self) -> None:
        _recipe.append(self._recipe)

    def __exit__(self, *_: object) -> None:
        _recipe.pop()


def is_fp8_block_scaling_available(*args: Any, **kwargs: Any) -> Any:
    given = arguments("is_fp8_block_scaling_available", *args, **kwargs)
    return (True, "") if given.get("return_reason") else True


def active_recipe() -> Float8BlockScaling:
    recipe = _recipe[-1]
    assert isinstance(recipe, Float8BlockScaling), "not under autocast with block scaling: products would be BF16's"
    assert recipe.fp8_format is Format.E4M3
    dims = (recipe.x_block_scaling_dim, recipe.w_block_scaling_dim, recipe.grad_block_scaling_dim)
    assert dims == (1, 2, 1)
    assert recipe.backward_override is None
    assert recipe.fp8_quant_fwd_inp == recipe.fp8_quant_fwd_weight == recipe.fp8_quant_bwd_grad
    assert recipe.fp8_quant_fwd_inp.amax_epsilon == 0
    return recipe


def check_sizes(tensor: Tensor, multiple: int = 8) -> None:
    if tensor.shape[:-1].numel() % multiple or tensor.shape[-1] % 16:
        raise ValueError(f"FP8 execution requires rows divisible by {multiple} and 16 columns, got {tensor.shape}")


class Module(nn.Module):
    """What the three modules share."""

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__()
        # Nothing of this may be used by accident.
        parallel = {"sequence_parallel", "tp_group", "parallel_mode", "delay_wgrad_compute", "save_original_input"}
        assert not parallel & set(given)
        self.fused = bool(given.get("fuse_wgrad_accumulation"))
        self.shape = (given["out_features"], given["in_features"])
        self.use_bias = given.get("bias", True)
        assert not self.use_bias, "the bias stays a parameter of ours"
        self._given = given
        self._fp8_workspaces: dict[str, Tensor] = {}

    def _parameter(self, name: str, *shape: int) -> None:
        self.register_parameter(
            name, nn.Parameter(torch.empty(shape, dtype=self._given["params_dtype"], device=self._given["device"]))
        )

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    @property
    def is_fsdp2(self) -> bool:
        return getattr(self, "_is_fsdp2", False)

    def activation_dtype(self, inp: Tensor) -> torch.dtype:
        if torch.is_autocast_enabled(inp.device.type):
            return torch.get_autocast_dtype(inp.device.type)
        for name, parameter in self.named_parameters():
            if parameter.dtype != inp.dtype:
                raise TypeError(f"Found input dtype: {inp.dtype} and {name!r} dtype: {parameter.dtype}")
        return inp.dtype

    def weight_of(self, name: str, inp: Tensor) -> Tensor:
        weight: Tensor = getattr(self, name)
        assert weight.device == inp.device
        assert weight.shape == self.shape
        assert inp.shape[-1] == weight.shape[-1], "GEMM not possible"
        check_sizes(weight)
        return weight

    def fp8_weight(self, name: str, weight: Tensor, first: bool | None, pow2: bool) -> Tensor:
        fresh = rounded(weight, SQUARE, pow2)
        if first is None or self.is_fsdp2:
            return fresh
        held = self._fp8_workspaces.get(name)
        if first:
            if held is None:
                self._fp8_workspaces[name] = held = fresh
            held.data.copy_(fresh)  # as the real kernel, past autograd's notice
        assert held is not None, "no FP8 weight is held"
        assert torch.equal(held, fresh), "the FP8 weight is of other numbers"
        return held


class _Product(torch.autograd.Function):
    """One product; ``weight`` is what autograd sees, ``fp8`` what is multiplied."""

    @staticmethod
    def forward(ctx, x, weight, fp8, dtype, module, first, pow2):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight if module.is_fsdp2 else fp8)
        ctx.fp8_is_saved, ctx.pow2, ctx.dtype, ctx.fused, ctx.first = (
            not module.is_fsdp2,
            pow2,
            dtype,
            module.fused,
            first,
        )
        ctx.weight = weakref.ref(weight)
        ctx.overwrites = getattr(weight, "overwrite_main_grad", False)
        return times(rounded(x, ROW, pow2), fp8.mT).to(dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, fp8 = ctx.saved_tensors
        if not ctx.fp8_is_saved:
            fp8 = rounded(fp8, SQUARE, ctx.pow2)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = times(rounded(grad, ROW, ctx.pow2), fp8).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            outer = times(rounded(grad, COLUMN, ctx.pow2).mT, rounded(x, COLUMN, ctx.pow2))
            grad_weight = outer.to(ctx.dtype)
            if ctx.fused:
                weight = ctx.weight()
                assert weight is not None, "weight was removed while fuse_wgrad_accumulation=True"
                accumulates = (ctx.first is None or not ctx.first) and not ctx.overwrites
                if x.shape[0]:
                    weight.main_grad.copy_(weight.main_grad + outer if accumulates else outer)
                grad_weight = None
        return grad_x, grad_weight, None, None, None, None, None


def times(a: Tensor, b: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return a @ b


class Linear(Module):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(arguments("Linear.__init__", *args, **kwargs))
        self._parameter("weight", *self.shape)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._forward(**arguments("Linear.forward", *args, **kwargs))

    def _forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        pow2, dtype = active_recipe().fp8_quant_fwd_inp.power_2_scale, self.activation_dtype(inp)
        weight = self.weight_of("weight", inp)
        check_sizes(inp)
        fp8 = self.fp8_weight("weight", weight.detach(), is_first_microbatch, pow2)
        _calls.append(Call(type(self).__name__, inp.shape[0], is_first_microbatch, torch.is_grad_enabled()))
        return _Product.apply(inp, weight, fp8, dtype, self, is_first_microbatch, pow2)


class LayerNormLinear(Linear):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = arguments("LayerNormLinear.__init__", *args, **kwargs)
        assert given["normalization"] == "RMSNorm"
        Module.__init__(self, given)
        self._parameter("layer_norm_weight", self.shape[1])
        self._parameter("weight", *self.shape)

    def _forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        assert not (self.is_fsdp2 and self.fused), "its backward finds no main_grad"
        dtype = self.activation_dtype(inp)
        x, gamma = inp.to(dtype).float(), self.layer_norm_weight.to(dtype).float()
        x = x * (x.square().mean(dim=-1, keepdim=True) + self._given["eps"]).rsqrt() * gamma
        return super()._forward(x.to(dtype), is_first_microbatch)


class GroupedLinear(Module):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = arguments("GroupedLinear.__init__", *args, **kwargs)
        super().__init__(given)
        self.num_gemms = given["num_gemms"]
        for index in range(self.num_gemms):
            self._parameter(f"weight{index}", *self.shape)
            setattr(self, f"bias{index}", torch.empty(0, device=given["device"]))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        given = arguments("GroupedLinear.forward", *args, **kwargs)
        inp, first, splits = given["inp"], given.get("is_first_microbatch"), given["m_splits"]
        assert isinstance(splits, Tensor)
        assert (splits.dtype, splits.device.type, splits.shape) == (torch.int64, "cpu", (self.num_gemms,))
        assert splits.sum() == inp.shape[0], "rows that belong to nobody"
        assert inp.shape[0], "no row at all"
        pow2, dtype = active_recipe().fp8_quant_fwd_inp.power_2_scale, self.activation_dtype(inp)
        parts = []
        for index, rows in enumerate(inp.split(splits.tolist())):
            check_sizes(rows, 16)
            name = f"weight{index}"
            weight = self.weight_of(name, inp)
            assert getattr(self, f"bias{index}").device == inp.device
            fp8 = self.fp8_weight(name, weight.detach(), first, pow2)
            parts.append(_Product.apply(rows, weight, fp8, dtype, self, first, pow2))
        _calls.append(Call("GroupedLinear", inp.shape[0], first, torch.is_grad_enabled()))
        return torch.cat(parts)


@contextmanager
def installed() -> Iterator[list[Call]]:
    """Let it be found as Transformer Engine, and taken on a CPU; yields the calls of its modules, as they come."""
    pytorch, recipe = (
        types.ModuleType("transformer_engine.pytorch"),
        types.ModuleType("transformer_engine.common.recipe"),
    )
    for thing in (Linear, LayerNormLinear, GroupedLinear, autocast, is_fp8_block_scaling_available):
        setattr(pytorch, thing.__name__, thing)
    for thing in (Format, QParams, Float8BlockScaling):
        setattr(recipe, thing.__name__, thing)
    modules = {
        "transformer_engine": types.ModuleType("transformer_engine"),
        "transformer_engine.pytorch": pytorch,
        "transformer_engine.common": types.ModuleType("transformer_engine.common"),
        "transformer_engine.common.recipe": recipe,
    }
    name = "transformer_engine"
    libraries.library.cache_clear()
    _calls.clear()
    try:
        with pytest.MonkeyPatch.context() as patch:
            for module_name, module in modules.items():
                patch.setitem(sys.modules, module_name, module)
            patch.setitem(libraries.LIBRARIES, name, libraries.LIBRARIES[name]._replace(machine=lambda: None))
            patch.setitem(backends._RULES, ("fp8", "te"), lambda case: libraries.library(name).reason)
            patch.setattr(backends, "_table", backends._Table({}))
            patch.setattr(backends, "_said", set())
            yield _calls
    finally:
        libraries.library.cache_clear()


@pytest.fixture
def calls() -> Iterator[list[Call]]:
    """The calls of its modules, while it is installed."""
    with installed() as made:
        yield made
