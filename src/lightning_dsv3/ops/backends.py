"""Which implementation computes an operation: chosen here and nowhere else, said once, forced where that is asked for.

An operation has one plain form in torch, which is the truth, and others that are quicker somewhere. Each of these has a
rule here that names what it cannot take. The first in the order of :data:`lightning_dsv3.config.kernels.KERNELS` that
refuses nothing is used. ``kernels.<operation>=<name>`` of a run's configuration forces one; if that one refuses, this
is an error and no other takes its place.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dsv3.config.kernels import AUTO, KERNELS, KernelConfig
from lightning_dsv3.ops.libraries import library

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
    sizes: tuple[tuple[str, Size], ...]

    def size(self, name: str) -> Size:
        """Return a width or flag by its name."""
        return dict(self.sizes)[name]


Rule = Callable[[Case], str | None]
"""Returns why an implementation cannot take a case; None where it can."""


def is_interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_RULES: dict[tuple[str, str], Rule] = {
    ("router", "triton"): _triton,
    ("permute", "triton"): _triton,
    ("quantize", "triton"): _triton,
}
_forced: dict[str, str] = {}
_choices: dict[tuple[str, Case], str] = {}


def chosen(op: str, like: Tensor, **sizes: Size) -> str:
    """Return the implementation that takes an operation; costs a look into a dictionary.

    Args:
        op: One of :data:`lightning_dsv3.config.kernels.KERNELS`.
        like: A tensor with the operands' device and dtype.
        sizes: What else the operation's rules look at: widths and flags, never a number of tokens.

    Raises:
        ValueError: The implementation that is forced refuses.
    """
    return _chosen(op, like.device.type, like.dtype, torch.is_grad_enabled(), **sizes)


# A compiled graph holds the choice as a constant and never sees the table.
@torch.compiler.assume_constant_result
def _chosen(op: str, device: str, dtype: torch.dtype, grad: bool, **sizes: Size) -> str:
    case = Case(device, dtype, grad, tuple(sizes.items()))
    choice = _choices.get((op, case))
    if choice is None:
        choice = _choices[op, case] = _choose(op, case)
    return choice


def refusals(op: str, case: Case) -> dict[str, str | None]:
    """Return each implementation of an operation and why it cannot take a case; None where it can."""
    return {name: _RULES.get((op, name), _no_rule)(case) for name in KERNELS[op]}


def _choose(op: str, case: Case) -> str:
    forced = _forced.get(op, AUTO)
    if forced != AUTO:
        reason = _RULES.get((op, forced), _no_rule)(case)
        if reason is not None:
            raise ValueError(f"kernels.{op}={forced}: {reason}; use kernels.{op}={AUTO} or another of {KERNELS[op]}")
        _say(op, case, forced, "forced")
        return forced
    refused = {}
    for name in KERNELS[op]:
        reason = _RULES.get((op, name), _no_rule)(case)
        if reason is None:
            _say(op, case, name, "; ".join(f"{other}: {why}" for other, why in refused.items()) or "preferred")
            return name
        refused[name] = reason
    raise ValueError(f"{op}: nothing takes it: {refused}")


_said: set[tuple[str, str, str]] = set()


def _say(op: str, case: Case, name: str, why: str) -> None:
    if (op, case.device, name) not in _said:
        _said.add((op, case.device, name))
        logger.info("%s on %s in %s: %s (%s)", op, case.device, _name(case.dtype), name, why)


def force_kernels(config: KernelConfig) -> None:
    """Use these implementations from here on, in this process; ``auto`` leaves the choice to the rules."""
    _forced.clear()
    _forced.update({op: name for op, name in asdict(config).items() if name != AUTO})
    _choices.clear()


@contextlib.contextmanager
def forced_kernels(**names: str) -> Iterator[None]:
    """Force some implementations for a while.

    >>> with forced_kernels(router="torch"):
    ...     chosen("router", torch.empty(1))
    'torch'
    """
    before = dict(_forced)
    force_kernels(KernelConfig(**{**before, **names}))
    try:
        yield
    finally:
        force_kernels(KernelConfig(**before))
