"""What the kernels share: conversions that hold in the interpreter too, launch settings, what is compiled ahead.

Interpreter and compiler. ``TRITON_INTERPRET=1`` is read while a kernel's module is imported, so a process is the one
or the other, and :data:`INTERP` tells kernels which. The interpreter holds bfloat16 as uint16 and FP8 as uint8: it
computes with these integers, and its conversions truncate or forget a carry. So a kernel

- calls :func:`to_float32` right after a load and computes in float32;
- calls :func:`round_to` right before a store, which rounds to the nearest, ties to even, as torch and the hardware do.

A bitcast is right everywhere. Integers that overflow are an error in the interpreter.

Settings are chosen in Python from a table of :class:`Config`. Nothing is tuned when a module is imported or a kernel
first runs: that would need a GPU, and results would depend on the time of day.

Proof without a GPU. Each kernel module has a list ``COMPILED`` of :class:`CompileCase`: every kernel in every setting
that the module launches. ``tests/test_triton_compile.py`` walks these modules, compiles the cases for sm_90 and looks
at registers and shared memory. Interpreter tests stand in a class ``TestInterpreted`` that only the process started by
``triton_cases.run_interpreted(__file__)`` sees. Outputs are allocated by ``torch.empty``, which tests fill with NaN.
"""

import contextlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_dsv3.ops.libraries import is_interpreted

INTERP = tl.constexpr(is_interpreted())
"""Whether kernels run in the interpreter: a constant of every kernel."""

ALIGNED = 16
"""A pointer or integer that is a multiple of this allows wide loads; the launcher finds out at each call."""

INPUTS = (("bf16", False), ("bf16", True), ("fp16", False), ("fp32", False), ("fp32", True))
"""What is compiled ahead: a dtype, and whether widths are odd, which takes more registers."""


class Config(NamedTuple):
    """How a kernel is launched.

    Attributes:
        constexprs: Sizes of a program's block, and other constants.
        num_warps: Groups of 32 threads in a program.
        num_stages: Iterations of a loop whose loads are in flight at once.
    """

    constexprs: Mapping[str, int]
    num_warps: int
    num_stages: int = 1

    @property
    def keywords(self) -> dict[str, int]:
        """What a launch takes: ``kernel[grid](..., **config.keywords)``."""
        return {**self.constexprs, "num_warps": self.num_warps, "num_stages": self.num_stages}


class CompileCase(NamedTuple):
    """A kernel and a setting that it can be launched with.

    Attributes:
        name: Unique in its module.
        kernel: Function under ``triton.jit``.
        signature: Type of every argument that is no constant, in Triton's words: ``*bf16``, ``*fp8e4nv``, ``i32``.
        config: The setting.
        constants: What a launch passes as constants beside the setting; integers that are 1 are constants too.
        unaligned: Arguments that are no multiples of :data:`ALIGNED`.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    config: Config
    constants: Mapping[str, int | None] = MappingProxyType({})
    unaligned: frozenset[str] = frozenset()


def kernel_modules() -> list[str]:
    """Return the names of the modules beside this one: those with kernels, and with a list ``COMPILED``."""
    return [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]) if module.name != "common"]


def compile_ahead(case: CompileCase, capability: int = 90) -> Any:
    """Compile a case as a launch would, for a GPU that need not be there.

    Args:
        case: What to compile.
        capability: 90 is Hopper.

    Returns:
        Triton's compiled kernel: ``.metadata.shared``, ``.asm["ptx"]``, ``.asm["cubin"]``.

    Raises:
        ValueError: A case that does not fit its kernel's arguments.
    """
    constants = {**case.config.constexprs, **case.constants}
    names = list(case.kernel.arg_names)
    if sorted([*case.signature, *constants]) != sorted(names) or not case.unaligned <= case.signature.keys():
        raise ValueError(f"{case.name}: its signature and its constants must be the arguments {names}, each once")
    attributes = {
        (names.index(name),): [["tt.divisibility", ALIGNED]]
        for name, kind in case.signature.items()
        if kind.startswith(("*", "i")) and name not in case.unaligned
    }
    source = ASTSource(
        case.kernel,
        {name: case.signature.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        attributes,
    )
    options = {"num_warps": case.config.num_warps, "num_stages": case.config.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the device of ``x`` the current one: kernels are launched there, whatever device their operands are on."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@triton.jit
def to_float32(x):  # type: ignore[no-untyped-def]
    """Convert what was loaded; exact, except from float64."""
    if INTERP:
        if x.dtype == tl.bfloat16:
            y = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        elif x.dtype == tl.float8e4nv:
            code = x.to(tl.uint8, bitcast=True).to(tl.int32)
            # With the exponent of float32 it is 2^120 times too small.
            magnitude = ((code & 0x7F) << 20).to(tl.float32, bitcast=True) * 2.0**120
            magnitude = tl.where((code & 0x7F) == 0x7F, float("nan"), magnitude)
            y = tl.where(code >= 0x80, -magnitude, magnitude)
        else:
            y = x.to(tl.float32)
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def round_to_bf16(v):  # type: ignore[no-untyped-def]
    """Round float32 to the nearest bfloat16, ties to even."""
    if INTERP:
        bits = v.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        number = tl.where(magnitude > 0x7F800000, 0, magnitude)
        code = (number + 0x7FFF + ((number >> 16) & 1)) >> 16
        code = tl.where(magnitude > 0x7F800000, 0x7FC0, code) | ((bits >> 16) & 0x8000)
        y = code.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = v.to(tl.bfloat16)
    return y


@triton.jit
def round_to_e4m3(v):  # type: ignore[no-untyped-def]
    """Round float32 to the nearest E4M3 number, ties to even; beyond 448 to 448, NaN stays NaN."""
    kept = tl.clamp(v, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    if INTERP:
        bits = kept.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        number = tl.where(magnitude > 0x7F800000, 0, magnitude)
        # From 2^-6 on: 3 of 23 bits of mantissa stay, and the exponent's bias is 7 instead of 127.
        code = ((number + 0x7FFFF + ((number >> 20) & 1)) >> 20) - (120 << 3)
        # Below, codes count steps of 2^-9, which is the last bit of 24576.
        steps = (number.to(tl.float32, bitcast=True) + 24576.0).to(tl.int32, bitcast=True) - 0x46C00000
        code = tl.where(number < 0x3C800000, steps, code)
        code = tl.where(magnitude > 0x7F800000, 0x7F, code) | ((bits >> 24) & 0x80)
        y = code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        y = kept.to(tl.float8e4nv)
    return y


@triton.jit
def round_to(v, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Round float32 to a dtype; what a pointer holds is ``pointer.dtype.element_ty``."""
    if dtype == tl.float8e4nv:
        y = round_to_e4m3(v)
    elif dtype == tl.bfloat16:
        y = round_to_bf16(v)
    else:
        y = v.to(dtype)
    return y
