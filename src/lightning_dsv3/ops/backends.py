"""Which implementation computes an operation: chosen here and nowhere else, said once, forced where that is asked for.

An operation has one plain form in torch, which is the truth, and others that are quicker somewhere. Each of these has a
rule here that names what it cannot take. The first in the order of :data:`lightning_dsv3.config.kernels.KERNELS` that
refuses nothing is used. ``kernels.<operation>=<name>`` of a run's configuration forces one, as :func:`force_kernels`
does in any program; if that one refuses, this is an error and no other takes its place.

A choice is made at the first call of its kind and kept: later calls look into a dictionary. It goes by what does not
change from call to call: the type of the device, the dtype, whether gradients are recorded, and the widths and flags
that the operation names. ``torch.compile`` makes it while it traces and keeps it in the graph, without a guard, so
force before the first compiled call.

Each new choice is one line at level INFO of this module's logger, on rank zero. :func:`used_kernels` tells what has
been chosen so far, ``dsv3 doctor`` what would be on this machine, with the reasons.
"""

from __future__ import annotations

import contextlib
import logging
import operator
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_dsv3.config.errors import ConfigError
from lightning_dsv3.config.kernels import AUTO, KERNELS, KernelConfig
from lightning_dsv3.ops.libraries import is_interpreted, library

logger = logging.getLogger(__name__)

Size = int | bool


class Case(NamedTuple):
    """What an implementation is asked to take.

    Attributes:
        device: Type of the device, as in ``cuda``.
        dtype: Of the operands.
        grad: Whether gradients are recorded.
        sizes: Widths and flags that an operation names; never a number of tokens, which changes from call to call.
    """

    device: str
    dtype: torch.dtype
    grad: bool
    sizes: tuple[tuple[str, Size], ...] = ()

    def size(self, name: str) -> Size:
        """Return a width or flag by its name."""
        return dict(self.sizes)[name]


class Choice(NamedTuple):
    """Which implementation takes a case, and why.

    Attributes:
        name: The implementation.
        forced: It was asked for by name.
        passed_over: The preferred ones that do not take it, and why.
    """

    name: str
    forced: bool
    passed_over: Mapping[str, str]

    @property
    def why(self) -> str:
        """The reasons in one line."""
        if self.forced:
            return "forced"
        return "; ".join(f"{name}: {reason}" for name, reason in self.passed_over.items()) or "preferred"


Rule = Callable[[Case], str | None]
"""Returns why an implementation cannot take a case; None where it can."""


def _no_rule(case: Case) -> str | None:
    return None


def _triton(case: Case) -> str | None:
    if case.device != "cuda" and not (is_interpreted() and case.device == "cpu"):
        return f"Triton's kernels are for CUDA, not for {case.device}"
    return library("triton").reason


def _on_cuda(name: str, dtypes: tuple[torch.dtype, ...]) -> Rule:
    def rule(case: Case) -> str | None:
        if case.device != "cuda":
            return f"for CUDA, not for {case.device}"
        if case.dtype not in dtypes:
            return f"not for {_name(case.dtype)}"
        return library(name).reason

    return rule


def _liger(case: Case) -> str | None:
    if case.device != "cuda" and not (is_interpreted() and case.device == "cpu"):
        return f"for CUDA, not for {case.device}"
    if case.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"not for {_name(case.dtype)}"
    return library("liger_kernel").reason


def _router_triton(case: Case) -> str | None:
    if case.dtype != torch.float32:
        return f"not for {_name(case.dtype)}"
    reason = _triton(case)
    if reason is None and case.size("experts") > 1024:
        return f"{case.size('experts')} experts do not fit one program, which has room for 1024"
    return reason


def _permute_triton(case: Case) -> str | None:
    if case.dtype == torch.float64:
        return "sums in float32, not in float64"
    return _triton(case)


def _quantize_triton(case: Case) -> str | None:
    block = (case.size("rows"), case.size("columns"))
    if block not in ((1, 128), (128, 128), (128, 1)):
        return f"not for tiles of {block[0]} x {block[1]}"
    if case.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"not for {_name(case.dtype)}"
    reason = _triton(case)
    if reason is None and case.device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        return "E4M3 needs compute capability 8.9"
    return reason


def _grouped_mm(case: Case) -> str | None:
    if case.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"not for {_name(case.dtype)}"
    if case.size("mixed"):
        return "operands of two dtypes"
    step = 16 // case.dtype.itemsize
    odd = [size for name, size in case.sizes if name != "mixed" and size % step]
    return f"a width of {odd[0]} numbers is no multiple of 16 bytes" if odd else None


def _flash_attn_3(case: Case) -> str | None:
    reason = _on_cuda("flash_attn_3", (torch.bfloat16, torch.float16))(case)
    if reason is None and torch.cuda.get_device_capability()[0] != 9:
        return "for Hopper, compute capability 9"
    widths = (case.size("qk_head_dim"), case.size("v_head_dim"))
    if reason is None and (max(widths) > 256 or any(width % 8 for width in widths)):
        return f"for widths up to 256 in steps of 8, not for {widths[0]} and {widths[1]}"
    return reason


def _flex(case: Case) -> str | None:
    reason = _on_cuda("triton", (torch.bfloat16, torch.float16))(case)
    if reason is None and torch.cuda.get_device_capability() < (8, 0):
        return "needs compute capability 8.0"
    widths = (case.size("qk_head_dim"), case.size("v_head_dim"))
    if reason is None and min(widths) < 16:
        return f"for widths from 16 on, not for {widths[0]} and {widths[1]}"
    return reason


def _no_documents(case: Case) -> str | None:
    return None if case.size("packed") else "rows are single texts, which have no documents to skip"


def _unmeasured(case: Case) -> str | None:
    return "no GPU has measured it yet"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_RULES: dict[tuple[str, str], Rule] = {
    ("attention", "flash_attn_3"): _flash_attn_3,
    ("attention", "flex"): _flex,
    ("router", "triton"): _router_triton,
    ("permute", "triton"): _permute_triton,
    ("grouped_matmul", "grouped_mm"): _grouped_mm,
    ("quantize", "triton"): _quantize_triton,
    ("norm", "liger"): _liger,
    ("swiglu", "liger"): _liger,
    ("cross_entropy", "liger"): _liger,
    ("fp8", "te"): _on_cuda("transformer_engine", (torch.float32, torch.bfloat16, torch.float16)),
}
# What can be had, but is taken only where it is forced: why it is no gain, or not known to be one.
_ON_REQUEST: dict[tuple[str, str], Rule] = {
    ("attention", "flex"): _no_documents,
    ("norm", "liger"): _unmeasured,
    ("swiglu", "liger"): _unmeasured,
    ("cross_entropy", "liger"): _unmeasured,
}


class _Table:
    """What is forced, and what has been chosen under it; replaced as a whole, so that no thread sees half of it."""

    def __init__(self, forced: Mapping[str, str]) -> None:
        self.forced = {op: name for op, name in forced.items() if name != AUTO}
        self.choices: dict[tuple[Any, ...], str] = {}  # by operation, device, dtype, gradients and sizes


_table = _Table({})
_said: set[tuple[str, str, str, str]] = set()


def chosen(op: str, like: Tensor, **sizes: Size) -> str:
    """Return the implementation that takes an operation; once it is known, under a microsecond of Python.

    Args:
        op: One of :data:`lightning_dsv3.config.kernels.KERNELS`.
        like: A tensor with the operands' device and dtype.
        sizes: What else the operation's rules look at: widths and flags, never a number of tokens.

    Raises:
        ConfigError: The implementation that is forced refuses.
    """
    if torch.compiler.is_dynamo_compiling():
        # A width that is symbolic in a graph becomes a number, with a guard: the graph is for this width.
        sizes = {name: operator.index(size) for name, size in sizes.items()}
    return _chosen(op, like.device, like.dtype, torch.is_grad_enabled(), *sizes.items())


# A compiled graph holds the choice as a constant and never sees the table.
@torch.compiler.assume_constant_result
def _chosen(*key: Any) -> str:
    table = _table
    name = table.choices.get(key)
    if name is None:
        op, device, dtype, grad, *sizes = key
        case = Case(device.type, dtype, grad, tuple(sizes))
        choice = _decide(table, op, case)
        _say(op, case, choice)
        name = table.choices[key] = choice.name
    return name


def decide(op: str, case: Case) -> Choice:
    """Return which implementation takes a case, and why.

    Raises:
        ConfigError: The implementation that is forced refuses.
    """
    return _decide(_table, op, case)


def refusals(op: str, case: Case) -> dict[str, str | None]:
    """Return each implementation of an operation and why it cannot take a case; None where it can."""
    return {name: _RULES.get((op, name), _no_rule)(case) for name in KERNELS[op]}


def _decide(table: _Table, op: str, case: Case) -> Choice:
    forced = table.forced.get(op)
    if forced is not None:
        reason = _RULES.get((op, forced), _no_rule)(case)
        if reason is None:
            return Choice(forced, True, {})
        able = [name for name, other in refusals(op, case).items() if other is None]
        raise ConfigError(
            f"kernels.{op}={forced}: {reason}; use kernels.{op}={AUTO}"
            + (f", or {' or '.join(able)}, which can be had here" if able else "")
        )
    passed_over: dict[str, str] = {}
    for name in KERNELS[op]:
        reason = _RULES.get((op, name), _no_rule)(case)
        if reason is None and (why := _ON_REQUEST.get((op, name), _no_rule)(case)) is not None:
            reason = f"only by kernels.{op}={name}: {why}"
        if reason is None:
            return Choice(name, False, passed_over)
        passed_over[name] = reason
    raise ConfigError(f"{op}: nothing takes {case}: {passed_over}")


def _say(op: str, case: Case, choice: Choice) -> None:
    key = (op, case.device, choice.name, choice.why)
    if key not in _said and _is_rank_zero():
        _said.add(key)
        logger.info("%s on %s in %s: %s (%s)", op, case.device, _name(case.dtype), choice.name, choice.why)


def _is_rank_zero() -> bool:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def used_kernels() -> dict[str, list[str]]:
    """Return the implementations that were chosen since :func:`force_kernels`, by operation, in alphabetical order."""
    used: dict[str, set[str]] = {}
    for (op, *_), name in list(_table.choices.items()):
        used.setdefault(op, set()).add(name)
    return {op: sorted(used[op]) for op in KERNELS if op in used}


def force_kernels(config: KernelConfig | None = None, /, **names: str) -> None:
    """Use these implementations from here on, in the whole process.

    Args:
        config: The implementation of each operation; ``auto`` leaves the choice to the rules. None is ``auto`` for all.
        names: Single ones, over those of ``config``.

    Raises:
        ConfigError: An unknown operation or implementation.

    >>> force_kernels(router="torch")
    >>> chosen("router", torch.empty(1))
    'torch'
    >>> force_kernels()
    """
    global _table
    _table = _Table(asdict(KernelConfig.from_dict({**asdict(config or KernelConfig()), **names})))


@contextlib.contextmanager
def forced_kernels(**names: str) -> Iterator[None]:
    """Force some implementations for a while, in the whole process.

    >>> with forced_kernels(router="torch"):
    ...     chosen("router", torch.empty(1))
    'torch'
    """
    global _table
    before = _table
    force_kernels(**{**before.forced, **names})
    try:
        yield
    finally:
        _table = before
