"""FP8 products by Transformer Engine (TE), on Hopper GPUs: the recipe of :mod:`lightning_dsv3.ops.fp8` in its kernels.

A converted module keeps its parameters. TE's own module stands beside it, made when the first input comes and without
parameters: for the time of a call it is lent the weight. So state dicts, optimizers, DDP, FSDP2, copies and pickles
never see TE's module, nor its ``_extra_state``.

    recipe          ``Float8BlockScaling``: E4M3, 1 x 128 tiles of activations and gradients, 128 x 128 of weights. TE's
                    autocast is entered for each call, so that nothing else computes in FP8 and a forward that is
                    recomputed in the backward does
    weights         tiles are made from the parameter, float32 for a master weight
    gradients       TE rounds a weight's gradient to the dtype of activations unless it is given ``main_grad`` to write
                    to. It is given memory in the parameter's dtype, which autograd then gets as the gradient
    rows            zeros are added up to a multiple of 16 (for each expert), as TE's products ask for, and cut off
    experts         TE starts one product per expert from the host, so a layer waits once for the GPU to tell how many
                    tokens each expert has
    micro-batches   while :class:`MicroBatches` says so, weights are rounded to FP8 once per optimizer step, and the
                    FP8 form is kept. A validation in between makes its own. Under FSDP2 none is kept from one to the
                    next, as the weights that they are made from are not either
    torch.compile   a graph breaks at each of these calls

Written for Transformer Engine 2.20.2. Its kernels have not been run yet: the tests have a stand-in with its signatures
and rules, and run its own Python over emulated products where they are given its wheel.

Shapes: T rows, I inputs, O outputs; K chosen experts, N slots with padding, E experts, D and F widths, G = 2F.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dsv3.ops.backends import Case, chosen, refusals
from lightning_dsv3.ops.dispatch import combine, permute, plan_dispatch
from lightning_dsv3.ops.fp8 import gated_swiglu
from lightning_dsv3.ops.libraries import library

# FP8 products want whole 16 bytes along each dimension, and the weight's gradient sums over rows.
_ALIGN = 16
_COMPANIONS = "_te"


def uses_te(backend: str, x: Tensor) -> bool:
    """Whether a module with this backend computes an input with TE.

    Args:
        backend: ``te``, ``emulate``, or ``auto`` for the choice of :mod:`lightning_dsv3.ops.backends`.
        x: The input, in the dtype that is computed in.
    """
    return (chosen("fp8", x) if backend == "auto" else backend) == "te"


@dataclass
class MicroBatches:
    """Tells converted modules which of their forward passes in training have the same weights.

    Attributes:
        step: Changes whenever weights may have changed.
        keep: Keep FP8 weights from one micro-batch to the next.
        sharded: The parameters are FSDP2's, gathered for the time of a forward or backward; None: not known yet.
    """

    step: int = 0
    keep: bool = False
    sharded: bool | None = None


@dataclass
class _Companions:
    """TE's modules beside one of ours, and for which weights each holds an FP8 form."""

    micro_batches: MicroBatches | None = None
    device: torch.device | None = None
    modules: dict[str, Any] = field(default_factory=dict)
    held: dict[str, tuple[int, int, int]] = field(default_factory=dict)

    def __reduce__(self) -> tuple[type[_Companions], tuple[()]]:
        return _Companions, ()  # a copy or a pickle of our module begins with none


def set_micro_batches(module: nn.Module, micro_batches: MicroBatches) -> None:
    """Let a converted module keep FP8 weights as ``micro_batches`` says; without it, it keeps none."""
    _companions(module).micro_batches = micro_batches


def forget_te(module: nn.Module) -> None:
    """Drop all that stands beside a module."""
    vars(module).pop(_COMPANIONS, None)


def _companions(owner: nn.Module) -> _Companions:
    companions: _Companions = vars(owner).setdefault(_COMPANIONS, _Companions())
    return companions


@torch.compiler.disable
def te_linear(owner: nn.Module, x_TI: Tensor, weight_OI: Tensor, pow2_scales: bool) -> Tensor:
    """As :func:`~lightning_dsv3.ops.fp8.fp8_linear`, by ``te.Linear`` beside ``owner``.

    Raises:
        ValueError: TE cannot compute on this device.
    """
    return _first_rows(_product(owner, "Linear", _padded(x_TI), weight_OI, pow2_scales), x_TI.shape[0])


@torch.compiler.disable
def te_norm_linear(
    owner: nn.Module, x_TI: Tensor, norm_weight_I: Tensor, eps: float, weight_OI: Tensor, pow2_scales: bool
) -> Tensor:
    """Return :func:`te_linear` of the rows after RMSNorm, in one with ``te.LayerNormLinear``.

    TE takes the norm's weight in the dtype of ``x_TI``; the norm itself is computed in float32, as elsewhere.
    """
    y = _product(owner, "LayerNormLinear", _padded(x_TI), weight_OI, pow2_scales, norm=(norm_weight_I, eps))
    return _first_rows(y, x_TI.shape[0])


@torch.compiler.disable
def te_experts(
    owner: nn.Module, x_TD: Tensor, gate_TK: Tensor, expert_TK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor,
    pow2_scales: bool,
) -> Tensor:  # fmt: skip
    """As :func:`~lightning_dsv3.ops.fp8.fp8_experts`, by two ``te.GroupedLinear`` beside ``owner``."""
    plan = plan_dispatch(expert_TK, gate_up_EGD.shape[0], align=_ALIGN)
    ends = plan.ends_E.tolist()
    rows = [end - begin for begin, end in pairwise([0, *ends])]
    slots = ends[-1]
    plan = plan._replace(slot_token_N=plan.slot_token_N[:slots], slot_pair_N=plan.slot_pair_N[:slots])
    x_ND = permute(x_TD, plan)
    gate_N = gate_TK.new_zeros(slots, dtype=torch.float32).scatter(0, plan.pair_slot_N, gate_TK.flatten().float())
    if not slots:  # no token at all: some rows of zeros, so that the gradients come from the same products
        rows[0] = _ALIGN
        x_ND, gate_N = F.pad(x_ND, (0, 0, 0, _ALIGN)), F.pad(gate_N, (0, _ALIGN))
    z_NG = _product(owner, "GroupedLinear gate_up", x_ND, gate_up_EGD, pow2_scales, rows)
    h_NF = gated_swiglu(z_NG, gate_N)
    y_ND = _product(owner, "GroupedLinear down", h_NF, down_EDF, pow2_scales, rows)
    return combine(_first_rows(y_ND, slots), plan, x_TD.shape[0])


def _product(
    owner: nn.Module,
    name: str,
    x: Tensor,
    weight: Tensor,
    pow2_scales: bool,
    rows: Sequence[int] | None = None,
    norm: tuple[Tensor, float] | None = None,
) -> Tensor:
    """Lend a weight ``[O, I]``, or experts' ``[E, O, I]``, to TE's module ``name`` beside ``owner``, and call that."""
    companions = _companions(owner)
    if companions.device != x.device:
        companions.device, companions.modules, companions.held = x.device, {}, {}
    te = _te(x)
    module = companions.modules.get(name)
    if module is None:
        sharded = companions.micro_batches is not None and bool(companions.micro_batches.sharded)
        module = companions.modules[name] = _without_parameters(te, name, x, weight, norm, sharded)
    matrices, gradient = _lent(weight)
    names = ["weight"] if weight.dim() == 2 else [f"weight{expert}" for expert in range(len(matrices))]
    lent = dict(zip(names, matrices, strict=True))
    if norm is not None:
        lent["layer_norm_weight"] = norm[0]
    hold = _hold(companions, owner, weight)
    first = None if hold is None else companions.held.get(name) != hold
    splits = [] if rows is None else [torch.tensor(rows)]
    vars(module).update(lent)
    try:
        with te.autocast(enabled=True, recipe=_recipe(te, pow2_scales)):
            y: Tensor = module(x, *splits, is_first_microbatch=first)
    finally:
        for lent_name in lent:
            del vars(module)[lent_name]
    if hold is not None:
        companions.held[name] = hold
    if gradient is not None:
        # The hook also keeps the lent matrices alive, which TE holds weakly, until it writes their gradients.
        y.register_hook(functools.partial(gradient.prepare, matrices, rows))
    return y


def _te(x: Tensor) -> ModuleType:
    te = library("transformer_engine").module
    reason = refusals("fp8", Case(x.device.type, x.dtype, torch.is_grad_enabled()))["te"]
    if te is None or reason is not None:
        raise ValueError(
            f"FP8 by Transformer Engine on {x.device.type}: {reason}; move the model, or use backend='emulate'"
        )
    return te


@functools.cache
def _recipe(te: ModuleType, pow2_scales: bool) -> Any:
    recipes = importlib.import_module("transformer_engine.common.recipe")
    recipe = recipes.Float8BlockScaling(fp8_format=recipes.Format.E4M3, backward_override=None)
    # The argument use_f32_scales decides nothing: these three are fixed when the class is made.
    scales = recipes.QParams(power_2_scale=pow2_scales, amax_epsilon=0.0)
    recipe.fp8_quant_fwd_inp = recipe.fp8_quant_fwd_weight = recipe.fp8_quant_bwd_grad = scales
    return recipe


def _without_parameters(
    te: ModuleType, name: str, x: Tensor, weight: Tensor, norm: tuple[Tensor, float] | None, sharded: bool
) -> Any:
    """Return TE's module without parameters: made on the meta device, which draws no random numbers either."""
    outputs, inputs = weight.shape[-2:]
    common = {"bias": False, "fuse_wgrad_accumulation": True, "params_dtype": weight.dtype, "device": "meta"}
    if weight.dim() == 3:
        module = te.GroupedLinear(weight.shape[0], inputs, outputs, use_grouped_tensor=False, **common)
        for expert in range(weight.shape[0]):  # empty, and saved for the backward all the same
            setattr(module, f"bias{expert}", torch.empty(0, dtype=weight.dtype, device=x.device))
    elif norm is not None:
        module = te.LayerNormLinear(inputs, outputs, eps=norm[1], normalization="RMSNorm", **common)
    else:
        module = te.Linear(inputs, outputs, **common)
    for parameter in [parameter for parameter, _ in module.named_parameters()]:
        delattr(module, parameter)
    if sharded and norm is None:
        # What TE finds out by itself where FSDP2 knows its module; then te.Linear keeps no FP8 weight for the backward.
        # te.LayerNormLinear would not find main_grad any more, and te.GroupedLinear does not ask.
        module._is_fsdp2 = True
    return module


def _hold(companions: _Companions, owner: nn.Module, weight: Tensor) -> tuple[int, int, int] | None:
    """Return what identifies the weight's numbers, or None where no FP8 form of them is to be kept."""
    micro_batches = companions.micro_batches
    if micro_batches is None or not micro_batches.keep or micro_batches.sharded is not False:
        return None
    if not owner.training or not torch.is_grad_enabled():
        return None
    return micro_batches.step, weight.data_ptr(), weight._version


class _Gradient:
    """Memory for the gradient of a weight that is lent to TE, from when TE is about to write it."""

    def __init__(self, weight: Tensor) -> None:
        self._shape, self._dtype, self._device = weight.shape, weight.dtype, weight.device
        self._whole: Tensor | None = None

    def prepare(self, matrices: Sequence[Tensor], rows: Sequence[int] | None, _: Tensor) -> None:
        """Give each matrix its ``main_grad``."""
        self._whole = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        # Views, as autograd copies a gradient that something else refers to.
        parts = self._whole.unbind(0) if rows is not None else [self._whole.view_as(self._whole)]
        for index, (matrix, part) in enumerate(zip(matrices, parts, strict=True)):
            if rows is not None and not rows[index]:
                part.zero_()  # there is no product to write it
            matrix.main_grad = part  # type: ignore[attr-defined]

    def take(self) -> Tensor:
        whole, self._whole = self._whole, None
        assert whole is not None, "TE's backward runs after the hook on its output"
        return whole


class _Lend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, gradient):  # type: ignore[no-untyped-def]
        ctx.gradient = gradient
        ctx.set_materialize_grads(False)
        return weight.view_as(weight) if weight.dim() == 2 else weight.unbind(0)

    @staticmethod
    def backward(ctx, *_):  # type: ignore[no-untyped-def]
        return ctx.gradient.take(), None


def _lent(weight: Tensor) -> tuple[Sequence[Tensor], _Gradient | None]:
    """Return a weight's matrices as TE is to see them, and where their gradients go."""
    if not (torch.is_grad_enabled() and weight.requires_grad):
        weight = weight.detach()
        return [weight] if weight.dim() == 2 else weight.unbind(0), None
    gradient = _Gradient(weight)
    lent = _Lend.apply(weight, gradient)
    matrices = [lent] if weight.dim() == 2 else list(lent)
    for matrix in matrices:
        matrix.overwrite_main_grad = True
    return matrices, gradient


def _padded(x_TI: Tensor) -> Tensor:
    missing = max(_ALIGN, -(-x_TI.shape[0] // _ALIGN) * _ALIGN) - x_TI.shape[0]
    return F.pad(x_TI, (0, 0, 0, missing)) if missing else x_TI


def _first_rows(y: Tensor, rows: int) -> Tensor:
    # The gradient of a slice is a copy, also where nothing was cut off.
    return y[:rows] if y.shape[0] > rows else y
