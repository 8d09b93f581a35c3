"""Permutation of tokens on a GPU: the kernels of :mod:`lightning_dsv3.ops.dispatch`.

Three maps, each linear in either of its operands, so that they are each other's gradients:

    permute  x_ND[n]    = gate[pair of n] * x_TD[token of n]          a token's row is read once and written K times
    combine  y_TD[t]    = sum_k gate[t, k] * y_ND[slot of (t, k)]     K rows are read, summed in float32, rounded once
    dots     g_TK[t, k] = <a_TD[t], b_ND[slot of (t, k)]>             summed in float32

A program takes some tokens; nobody else writes what it writes, so results are the same in every run. Slots that pad an
expert's rows belong to no token: :func:`permute` fills them with zeros, the others do not read them.

The functions are registered operators, so that ``torch.compile`` takes each as a whole.

Shapes: T tokens, K chosen experts per token, N slots, D width.
"""

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_dsv3.ops.triton.common import INPUTS, CompileCase, Config, on_device, round_to, to_float32

# 16 bytes of bfloat16 for each thread and row.
_ROWS = Config({"ROWS": 4, "COLS": 1024}, num_warps=4)
_NARROW_ROWS = Config({"ROWS": 32, "COLS": 128}, num_warps=4)
_DOTS = Config({"ROWS": 4, "COLS": 512}, num_warps=4)
_PADDING = Config({"ROWS": 16, "COLS": 256}, num_warps=4)


@torch.library.custom_op("lightning_dsv3::permute", mutates_args=())
def permute(x_TD: Tensor, gate_TK: Tensor | None, slot_token_N: Tensor, pair_slot_N: Tensor) -> Tensor:
    """Copy each token's row into its K slots, each times its gate value where there are any: ``[N, D]``.

    Args:
        x_TD: ``[T, D]``, float32, bfloat16 or float16.
        gate_TK: ``[T, K]``, floating; or None for 1.
        slot_token_N: Token in each slot, int64 ``[N]``; -1 in padding, which becomes zero.
        pair_slot_N: Slot of each pair, int64 ``[T * K]``.
    """
    x_TD = x_TD.contiguous()
    (tokens, width), slots = x_TD.shape, slot_token_N.shape[0]
    out_ND = torch.empty(slots, width, dtype=x_TD.dtype, device=x_TD.device)
    if not out_ND.numel():
        return out_ND
    with on_device(x_TD):
        if tokens:
            config, choices = _rows_config(width), pair_slot_N.shape[0] // tokens
            gate = x_TD if gate_TK is None else gate_TK.contiguous()
            _permute_kernel[_grid(tokens, width, config)](
                x_TD, gate, pair_slot_N, out_ND, tokens, width, GATED=gate_TK is not None, K=choices, **config.keywords
            )
        if slots > pair_slot_N.shape[0]:
            _padding_kernel[_grid(slots, width, _PADDING)](out_ND, slot_token_N, slots, width, **_PADDING.keywords)
    return out_ND


@permute.register_fake
def _(x_TD: Tensor, gate_TK: Tensor | None, slot_token_N: Tensor, pair_slot_N: Tensor) -> Tensor:
    return x_TD.new_empty(slot_token_N.shape[0], x_TD.shape[1])


@torch.library.custom_op("lightning_dsv3::combine", mutates_args=())
def combine(y_ND: Tensor, gate_TK: Tensor | None, pair_slot_N: Tensor, num_tokens: int) -> Tensor:
    """Sum each token's K slots, each times its gate value where there are any: ``[T, D]``.

    Args:
        y_ND: ``[N, D]``, float32, bfloat16 or float16.
        gate_TK: ``[T, K]``, floating; or None for 1.
        pair_slot_N: Slot of each pair, int64 ``[T * K]``.
        num_tokens: T.
    """
    y_ND = y_ND.contiguous()
    width = y_ND.shape[1]
    out_TD = torch.empty(num_tokens, width, dtype=y_ND.dtype, device=y_ND.device)
    if not out_TD.numel():
        return out_TD
    config, choices = _rows_config(width), pair_slot_N.shape[0] // num_tokens
    gate = y_ND if gate_TK is None else gate_TK.contiguous()
    with on_device(y_ND):
        _combine_kernel[_grid(num_tokens, width, config)](
            y_ND, gate, pair_slot_N, out_TD, num_tokens, width, GATED=gate_TK is not None, K=choices, **config.keywords
        )
    return out_TD


@combine.register_fake
def _(y_ND: Tensor, gate_TK: Tensor | None, pair_slot_N: Tensor, num_tokens: int) -> Tensor:
    return y_ND.new_empty(num_tokens, y_ND.shape[1])


@torch.library.custom_op("lightning_dsv3::pair_dots", mutates_args=())
def dots(a_TD: Tensor, b_ND: Tensor, pair_slot_N: Tensor) -> Tensor:
    """Multiply each token's row with each of its slots' rows: float32 ``[T, K]``.

    Args:
        a_TD: ``[T, D]``, float32, bfloat16 or float16.
        b_ND: ``[N, D]``, likewise.
        pair_slot_N: Slot of each pair, int64 ``[T * K]``.
    """
    a_TD, b_ND = a_TD.contiguous(), b_ND.contiguous()
    tokens, width = a_TD.shape
    choices = pair_slot_N.shape[0] // max(tokens, 1)
    out_TK = torch.empty(tokens, choices, dtype=torch.float32, device=a_TD.device)
    if out_TK.numel():
        # The programs of a token's K slots stand side by side, so that its row can be in the cache.
        grid = (triton.cdiv(tokens, _DOTS.constexprs["ROWS"]) * choices,)
        with on_device(a_TD):
            _dots_kernel[grid](a_TD, b_ND, pair_slot_N, out_TK, tokens, D=width, K=choices, **_DOTS.keywords)
    return out_TK


@dots.register_fake
def _(a_TD: Tensor, b_ND: Tensor, pair_slot_N: Tensor) -> Tensor:
    return a_TD.new_empty(a_TD.shape[0], pair_slot_N.shape[0] // max(a_TD.shape[0], 1), dtype=torch.float32)


def _rows_config(width: int) -> Config:
    return _ROWS if width > _NARROW_ROWS.constexprs["COLS"] else _NARROW_ROWS


def _grid(rows: int, width: int, config: Config) -> tuple[int, int]:
    return triton.cdiv(rows, config.constexprs["ROWS"]), triton.cdiv(width, config.constexprs["COLS"])


@triton.jit
def _permute_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    gate_ptr,
    pair_slot_ptr,
    out_ptr,
    tokens,
    width,
    GATED: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    inside = (token < tokens)[:, None] & (column < width)
    x = tl.load(x_ptr + token[:, None] * width + column, mask=inside, other=0.0)
    for k in tl.static_range(K):
        slot = tl.load(pair_slot_ptr + token * K + k, mask=token < tokens, other=0)
        if GATED:
            gate = to_float32(tl.load(gate_ptr + token * K + k, mask=token < tokens, other=0.0))
            y = round_to(to_float32(x) * gate[:, None], out_ptr.dtype.element_ty)
        else:
            y = x
        tl.store(out_ptr + slot[:, None] * width + column, y, mask=inside)


@triton.jit
def _padding_kernel(out_ptr, slot_token_ptr, slots, width, ROWS: tl.constexpr, COLS: tl.constexpr):  # type: ignore[no-untyped-def]
    slot = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    padding = tl.load(slot_token_ptr + slot, mask=slot < slots, other=0) < 0
    zeros = tl.zeros([ROWS, COLS], out_ptr.dtype.element_ty)
    tl.store(out_ptr + slot[:, None] * width + column, zeros, mask=padding[:, None] & (column < width))


@triton.jit
def _combine_kernel(  # type: ignore[no-untyped-def]
    y_ptr,
    gate_ptr,
    pair_slot_ptr,
    out_ptr,
    tokens,
    width,
    GATED: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    inside = (token < tokens)[:, None] & (column < width)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for k in range(K):
        slot = tl.load(pair_slot_ptr + token * K + k, mask=token < tokens, other=0)
        y = to_float32(tl.load(y_ptr + slot[:, None] * width + column, mask=inside, other=0.0))
        if GATED:
            gate = to_float32(tl.load(gate_ptr + token * K + k, mask=token < tokens, other=0.0))
            y = y * gate[:, None]
        total += y
    tl.store(out_ptr + token[:, None] * width + column, round_to(total, out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _dots_kernel(  # type: ignore[no-untyped-def]
    a_ptr,
    b_ptr,
    pair_slot_ptr,
    out_ptr,
    tokens,
    D: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    token = (tl.program_id(0) // K).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    pair = token * K + tl.program_id(0) % K
    slot = tl.load(pair_slot_ptr + pair, mask=token < tokens, other=0)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, D, COLS):
        column = start + tl.arange(0, COLS)[None, :]
        inside = (token < tokens)[:, None] & (column < D)
        a = to_float32(tl.load(a_ptr + token[:, None] * D + column, mask=inside, other=0.0))
        b = to_float32(tl.load(b_ptr + slot[:, None] * D + column, mask=inside, other=0.0))
        total += a * b
    tl.store(out_ptr + pair, tl.sum(total, axis=1), mask=token < tokens)


def _cases() -> Iterator[CompileCase]:
    for dtype, odd in INPUTS:
        rows, sizes = f"*{dtype}", {"tokens": "i32", "width": "i32"}
        of = f"{dtype}{', odd width' if odd else ''}"
        unaligned = frozenset({"tokens", "width"} if odd else {"tokens"})
        for gated, (shape, config) in itertools.product((True, False), (("wide", _ROWS), ("narrow", _NARROW_ROWS))):
            gate = "*fp32" if gated else rows
            constants = {"GATED": gated, "K": 8}
            for kernel, source in ((_permute_kernel, "x_ptr"), (_combine_kernel, "y_ptr")):
                yield CompileCase(
                    f"{kernel.__name__.split('_')[1]} of {shape} {of}{', gated' if gated else ''}",
                    kernel,
                    {source: rows, "gate_ptr": gate, "pair_slot_ptr": "*i64", "out_ptr": rows, **sizes},
                    config,
                    constants,
                    unaligned,
                )
        yield CompileCase(
            f"padding of {of}",
            _padding_kernel,
            {"out_ptr": rows, "slot_token_ptr": "*i64", "slots": "i32", "width": "i32"},
            _PADDING,
            unaligned=unaligned - {"tokens"},
        )
        yield CompileCase(
            f"dots of {of}",
            _dots_kernel,
            {"a_ptr": rows, "b_ptr": rows, "pair_slot_ptr": "*i64", "out_ptr": "*fp32", "tokens": "i32"},
            _DOTS,
            {"D": 7169 if odd else 7168, "K": 8},
            frozenset({"tokens"}),
        )


COMPILED = list(_cases())
