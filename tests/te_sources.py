"""Runs the Python of a Transformer Engine wheel on a CPU beneath our layers: ``python tests/te_sources.py WHEEL``.

Only what is compiled is replaced: rounding to tiles and products, by the emulated ones, and the norm's two kernels. So
the real modules are made, lent weights, called and differentiated, with the real autograd functions, caches of FP8
weights and checks between; results and every gradient are held against the emulated backend. Written for 2.20.2.

It changes torch for the whole process (there seems to be a GPU), so tests start it as a program of its own.
"""

from __future__ import annotations

import contextlib
import copy
import enum
import importlib
import importlib.abc
import importlib.machinery
import os
import re
import sys
import tempfile
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F
from test_fp8_emulated import FITTING, expert_inputs
from tiny_model import tiny_model
from torch import Tensor, nn

from lightning_dsv3.layers import te
from lightning_dsv3.layers.fp8 import FP8Experts, FP8Linear
from lightning_dsv3.layers.linear import Linear
from lightning_dsv3.layers.norm import RMSNorm
from lightning_dsv3.layers.te import MicroBatches
from lightning_dsv3.ops import backends, libraries
from lightning_dsv3.ops.quantize import quantize_blocks
from lightning_dsv3.parallel import checkpoint_blocks
from lightning_dsv3.parallel.fp8 import convert_to_fp8, share_micro_batches

ROOT = "transformer_engine"
# Imported by the sources and never used on the way here.
UNUSED = ("onnxscript", "onnx", "einops", "importlib_metadata", "nvdlfw_inspect", "flash_attn", "flash_attn_interface")
weights_rounded = 0


class Extension(types.ModuleType):
    """``transformer_engine_torch``: whatever is asked for is there, and of no use unless it is set below."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, MagicMock(name=name))
        return getattr(self, name)


class Unused(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty packages in place of some that are not installed."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        wanted = name.split(".")[0] in UNUSED
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if wanted else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        return MagicMock(name=spec.name, __name__=spec.name, __path__=[], __spec__=spec, __file__="")

    def exec_module(self, module: Any) -> None:
        pass


def load(folder: Path) -> types.ModuleType:
    """Import the modules that we use and replace what they call; returns what stands for the library."""
    extension = sys.modules[f"{ROOT}_torch"] = Extension(f"{ROOT}_torch")
    constants = (folder / ROOT / "pytorch" / "constants.py").read_text(encoding="utf-8")
    extension.DType = enum.IntEnum("DType", re.findall(r"^    (k\w+) = int\(tex\.DType", constants, re.M), start=0)
    places = ["INPUT", "WEIGHT", "OUTPUT"]
    extension.FP8FwdTensors = enum.IntEnum("Fwd", [f"GEMM{i}_{p}" for i in (1, 2, 3) for p in places], start=0)
    extension.FP8BwdTensors = enum.IntEnum(
        "Bwd", [f"GRAD_{p}{i}" for i in (1, 2, 3) for p in ("OUTPUT", "INPUT")], start=0
    )
    sys.meta_path.insert(0, Unused())
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # no shared libraries
    for name in (ROOT, f"{ROOT}.pytorch"):  # without what their __init__ files load
        package = sys.modules[name] = types.ModuleType(name)
        package.__path__ = [str(folder / name.replace(".", "/"))]
    attention = sys.modules[f"{ROOT}.pytorch.cpp_extensions.fused_attn"] = types.ModuleType("fused_attn")
    attention.__all__ = []
    sys.path.append(str(folder))
    importlib.import_module(f"{ROOT}.common")
    linear = importlib.import_module(f"{ROOT}.pytorch.module.linear")
    norm_linear = importlib.import_module(f"{ROOT}.pytorch.module.layernorm_linear")
    grouped = importlib.import_module(f"{ROOT}.pytorch.module.grouped_linear")
    quantization = importlib.import_module(f"{ROOT}.pytorch.quantization")
    blockwise = importlib.import_module(f"{ROOT}.pytorch.tensor.float8_blockwise_tensor")

    torch.cuda.is_available = lambda: True
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.Tensor.is_cuda = property(lambda tensor: True)
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor
    quantization.check_fp8_support = quantization.check_fp8_block_scaling_support = lambda: (True, "")
    quantization.check_recipe_support = lambda recipe: None
    linear.general_gemm = norm_linear.general_gemm = product
    grouped.general_grouped_gemm = products
    norm_linear.apply_normalization = normalize
    extension.rmsnorm_bwd = normalize_backward
    extension.fp8_transpose = lambda data, dtype, out=None: data.T.contiguous()
    extension.quantize = quantize = quantizer_of(blockwise)
    extension.split_quantize = lambda tensor, splits, quantizers, disable_bulk_allocation=False: [
        quantize(part, quantizer) for part, quantizer in zip(tensor.split(splits), quantizers, strict=True)
    ]
    library = types.ModuleType(f"{ROOT}.pytorch")
    library.Linear, library.LayerNormLinear = linear.Linear, norm_linear.LayerNormLinear
    library.GroupedLinear, library.autocast = grouped.GroupedLinear, quantization.autocast
    return library


def quantizer_of(blockwise: types.ModuleType) -> Callable[..., Any]:
    def quantize(tensor: Tensor, quantizer: Any, out: Any = None, noop: Any = None) -> Any:
        """Fill the fields of TE's own containers; scales in their layout, padded to multiples of four."""
        global weights_rounded
        square = quantizer.block_scaling_dim == 2
        weights_rounded += square
        rows, pow2 = tensor.detach().reshape(-1, tensor.shape[-1]), quantizer.force_pow_2_scales
        fields: dict[str, Tensor | None] = dict.fromkeys(["rowwise_data", "rowwise_scale_inv"])
        fields |= dict.fromkeys(["columnwise_data", "columnwise_scale_inv"])
        if quantizer.rowwise_usage:
            data, scales = quantize_blocks(rows, (128, 128) if square else (1, 128), pow2)
            fields["rowwise_data"] = data.view(torch.uint8)
            fields["rowwise_scale_inv"] = padded(scales if square else scales.T)
        if quantizer.columnwise_usage:
            data, scales = quantize_blocks(rows, (128, 128) if square else (128, 1), pow2)
            fields["columnwise_data"] = data.T.contiguous().view(torch.uint8)
            fields["columnwise_scale_inv"] = padded(scales.T if square else scales)
        if out is not None:
            for name, field in fields.items():
                if field is not None and getattr(out, f"_{name}") is not None:
                    getattr(out, f"_{name}").data.copy_(field)
                elif field is not None:
                    setattr(out, f"_{name}", field)
            return out
        common = {"fp8_dtype": quantizer.dtype, "quantizer": quantizer, "is_2D_scaled": square, **fields}
        if quantizer.internal:
            return blockwise.Float8BlockwiseQTensorStorage(fake_dtype=tensor.dtype, **common)
        return blockwise.Float8BlockwiseQTensor(
            shape=tensor.shape, dtype=tensor.dtype, device=tensor.device, requires_grad=False, **common
        )

    return quantize


def padded(scales: Tensor) -> Tensor:
    return F.pad(scales, (0, -scales.shape[1] % 4)).contiguous()


def restored(stored: Any, way: str) -> Tensor:
    """Return what a container holds for products along its rows, or along its columns."""
    data, scales = getattr(stored, f"_{way}_data"), getattr(stored, f"_{way}_scale_inv")
    data, square = data.view(torch.float8_e4m3fn).float(), stored._is_2D_scaled
    if way == "columnwise":
        data = data.T
    rows, columns = data.shape
    if way == "rowwise" and not square:
        scales = scales[:, :rows].T
    elif way == "columnwise":
        scales = scales.T if square else scales[:, :columns]
    tall, wide = (128, 128) if square else (1, 128) if way == "rowwise" else (128, 1)
    return data * scales.repeat_interleave(tall, 0).repeat_interleave(wide, 1)[:rows, :columns]


def multiplied(a: Any, b: Any, layout: str) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        if layout == "TN":
            return restored(b, "rowwise") @ restored(a, "rowwise").T
        if layout == "NN":
            return restored(b, "rowwise") @ restored(a, "columnwise")
        return restored(b, "columnwise").T @ restored(a, "columnwise")


def product(a: Any, b: Any, *, out_dtype: torch.dtype, layout: str = "TN", **options: Any) -> tuple[Any, ...]:
    assert options["use_split_accumulator"]
    assert options.get("bias") is None
    out, result = options.get("out"), multiplied(a, b, layout)
    if out is None:
        return result.to(out_dtype), None, None, None
    assert out.dtype == out_dtype
    out.copy_(out + result if options.get("accumulate") else result)
    return out, None, None, None


def products(a: list[Any], b: list[Any], out: list[Tensor], *_: Any, layout: str = "TN", **options: Any) -> Any:
    assert options["use_split_accumulator"]
    assert not options["use_bias"] if "use_bias" in options else True
    parts = list(out[0].split(options["m_splits"])) if options.get("single_output") else out
    for one, other, part in zip(a, b, parts, strict=True):
        used = other._columnwise_data if layout == "NT" else other._rowwise_data
        if used.numel():  # an expert without rows is left as it was
            result = multiplied(one, other, layout)
            part.copy_(part + result if options.get("accumulate") else result)
    return out, [None] * len(a), None


def normalized(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * weight


def normalize(x: Tensor, out: None, weight: Tensor, bias: None, eps: float, quantizer: Any, *_: Any) -> Any:
    y = normalized(x.float(), weight.float(), eps).to(x.dtype)
    return quantizer(y), None, torch.full((x.shape[0],), eps)  # eps in place of what the real kernel keeps


def normalize_backward(grad: Tensor, x: Tensor, eps: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    leaves = x.float().requires_grad_(), weight.float().requires_grad_()
    with torch.enable_grad():
        y = normalized(*leaves, eps=float(eps[0]))
    grad_x, grad_weight = torch.autograd.grad(y, leaves, grad.float())
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


@contextlib.contextmanager
def autocast(enabled: bool = True) -> Iterator[None]:
    """Both for the CPU, where we look, and for CUDA, where the sources do."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", enabled)
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            yield
    finally:
        torch.set_autocast_enabled("cuda", False)


def gradients(module: nn.Module, *arguments: Tensor, enabled: bool = True) -> dict[str, Tensor | None]:
    leaves = [a.detach().clone().requires_grad_(a.is_floating_point()) for a in arguments]
    with autocast(enabled):
        y = module(*leaves)
    torch.manual_seed(1)
    y.backward(torch.randn(y.shape).to(y.dtype))
    found = {"y": y.detach()} | {name: p.grad for name, p in module.named_parameters()}
    return found | {f"argument {i}": leaf.grad for i, leaf in enumerate(leaves) if leaf.is_floating_point()}


def model_gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    with autocast():
        output = model(ids, labels=ids)
    loss = output.loss + sum(output.mtp_losses)
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_near(ours: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == expected[name].dtype, name
        error = (tensor - expected[name]).float().norm() / expected[name].float().norm().clamp(min=1e-30)
        assert error <= tolerance, (name, error)


def with_backend(module: nn.Module, backend: str) -> nn.Module:
    other = copy.deepcopy(module)
    other.backend = backend
    return other


def check_layers() -> None:
    for pow2 in (True, False):
        for rows, inputs, outputs in [(1, 16, 16), (63, 144, 80), (300, 256, 144), (0, 32, 16)]:
            layer, x = FP8Linear(inputs, outputs), torch.randn(rows, inputs)
            layer.pow2_scales = pow2
            for enabled in (True, False):
                pair = [gradients(with_backend(layer, b), x, enabled=enabled) for b in ("te", "emulate")]
                assert_near(*pair, tolerance=1e-6)  # float32 sums in another order
        for shape in [(1, 3, 2, 16, 16), (63, 5, 2, 48, 32), (333, 3, 1, 144, 80), (0, 3, 2, 16, 16)]:
            x, gate, choices, gate_up, down = expert_inputs(max(1, shape[0]), *shape[1:])
            experts = FP8Experts(shape[1], shape[3], shape[4])
            experts.load_state_dict({"gate_up": gate_up, "down": down})
            experts.pow2_scales = pow2
            tokens = (x[: shape[0]], gate[: shape[0]], choices[: shape[0]])
            assert_near(*[gradients(with_backend(experts, b), *tokens) for b in ("te", "emulate")], tolerance=0.01)
    layers = nn.Sequential(Linear(32, 48), RMSNorm(48), Linear(48, 16))
    with torch.no_grad():
        layers[1].weight.copy_((torch.rand(48) + 0.5).bfloat16())
    pair = [copy.deepcopy(layers), copy.deepcopy(layers)]
    for module, backend in zip(pair, ("te", "emulate"), strict=True):
        convert_to_fp8(module, backend=backend)
    x = torch.randn(3, 5, 32)
    assert_near(gradients(pair[0], x), gradients(pair[1], x), tolerance=0.01)
    assert list(vars(pair[0][2])["_te"].modules) == ["LayerNormLinear"]


def check_model() -> None:
    ids = torch.randint(0, 64, (2, 30))
    emulated = tiny_model(**FITTING).train()
    convert_to_fp8(emulated, backend="emulate")
    expected, first, every = model_gradients(emulated, ids), None, 0
    for policy in ("none", "block", "keep_routing"):
        for keep in (False, True):
            model = checkpoint_blocks(tiny_model(**FITTING), policy).train()
            convert_to_fp8(model, backend="te")
            micro_batches = MicroBatches(keep=keep, sharded=False)
            share_micro_batches(model, micro_batches)
            before, counts = weights_rounded, []
            for micro_batch in range(3):
                micro_batches.step = micro_batch // 2
                found = model_gradients(model, ids)
                counts.append(weights_rounded - before)
                before = weights_rounded
                first = first or found
                assert_near(found, first, tolerance=0)
            every = every or counts[0]
            times = 1 if policy == "none" else 2  # recomputed with weights that are rounded again
            assert counts == ([every, 0, every] if keep else [times * every] * 3), (policy, keep, counts)
            assert not [name for name in model.state_dict() if "extra_state" in name]
    assert_near(first or {}, expected, tolerance=0.06)
    model = tiny_model(**FITTING).train()
    convert_to_fp8(model, backend="te")
    share_micro_batches(model, MicroBatches(keep=True, sharded=True))
    assert_near(model_gradients(model, ids), first or {}, tolerance=0)


def main(wheel: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        library = libraries.Library(load(Path(folder)), None)
        te.library = lambda name: library
        backends._RULES["fp8", "te"] = lambda case: None
        torch.manual_seed(0)
        check_layers()
        check_model()
    print("layers and models compute the same")


if __name__ == "__main__":
    main(sys.argv[1])
