"""FP8 tiles on a GPU: the kernels of :mod:`lightning_dsv3.ops.quantize`, whose scales and numbers they give bit by bit.

A program takes the numbers of one tile, or of some tiles that are one row or one column: it reads them once, and
writes data and scales. Amax, and the power of two above ``amax / 448``, are found on the bits of float32: these are
ordered as the numbers are, NaN above infinity above all numbers, and the result depends on no order of summation and no
approximate function.

Division by a power of two is multiplication, exact even where the reciprocal is above float32's largest number: then in
two steps. Other scales are divided by, with the rounding of IEEE.

The functions are registered operators, so that ``torch.compile`` takes each as a whole.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_dsv3.ops.triton.common import INPUTS, CompileCase, Config, on_device, round_to, round_to_e4m3, to_float32

# Numbers of a program; a tile of 128 x 128 is one program.
_CONFIGS = {
    (1, 128): Config({"TILE_ROWS": 1, "TILE_COLS": 128, "ROWS": 32, "COLS": 128}, num_warps=4),
    (128, 128): Config({"TILE_ROWS": 128, "TILE_COLS": 128, "ROWS": 128, "COLS": 128}, num_warps=8),
    (128, 1): Config({"TILE_ROWS": 128, "TILE_COLS": 1, "ROWS": 128, "COLS": 64}, num_warps=16),
}
_BOTH = Config({"BLOCK": 128, "PART": 32}, num_warps=8)


@torch.library.custom_op("lightning_dsv3::quantize_blocks", mutates_args=())
def quantize_blocks(x: Tensor, block: Sequence[int], pow2_scales: bool) -> tuple[Tensor, Tensor]:
    """Return data and scales of :func:`lightning_dsv3.ops.quantize.quantize_blocks`.

    Args:
        x: ``[R, C]``, float32, bfloat16 or float16, any strides.
        block: (1, 128), (128, 128) or (128, 1).
        pow2_scales: Round scales up to powers of two.
    """
    rows, columns = x.shape
    data = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x.device)
    tiles = triton.cdiv(rows, block[0]), triton.cdiv(columns, block[1])
    scales = torch.empty(tiles, dtype=torch.float32, device=x.device)
    _quantize(x, data, scales, block, pow2_scales)
    return data, scales


@quantize_blocks.register_fake
def _(x: Tensor, block: Sequence[int], pow2_scales: bool) -> tuple[Tensor, Tensor]:
    tiles = triton.cdiv(x.shape[0], block[0]), triton.cdiv(x.shape[1], block[1])
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(tiles, dtype=torch.float32)


@torch.library.custom_op("lightning_dsv3::quantize_dequantize_blocks", mutates_args=())
def quantize_dequantize_blocks(x: Tensor, block: Sequence[int], pow2_scales: bool, dtype: torch.dtype) -> Tensor:
    """Return what :func:`lightning_dsv3.ops.quantize.quantize_dequantize_blocks` does, in one kernel.

    Args:
        x: ``[R, C]``, float32, bfloat16 or float16, any strides.
        block: (1, 128), (128, 128) or (128, 1).
        pow2_scales: Round scales up to powers of two.
        dtype: Of the result.
    """
    out = torch.empty(x.shape, dtype=torch.float32 if dtype == torch.float64 else dtype, device=x.device)
    _quantize(x, out, None, block, pow2_scales)
    return out.to(dtype)


@quantize_dequantize_blocks.register_fake
def _(x: Tensor, block: Sequence[int], pow2_scales: bool, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.custom_op("lightning_dsv3::quantize_with_transpose", mutates_args=())
def quantize_with_transpose(x: Tensor, pow2_scales: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return data and scales of ``x`` in 1 x 128 tiles, and those of its transpose, in one kernel.

    Args:
        x: ``[R, C]``, float32, bfloat16 or float16, any strides.
        pow2_scales: Round scales up to powers of two.

    Returns:
        ``[R, C]`` and ``[R, ceil(C / 128)]``, ``[C, R]`` and ``[C, ceil(R / 128)]``.
    """
    rows, columns = x.shape
    size = _BOTH.constexprs["BLOCK"]
    down, across = triton.cdiv(rows, size), triton.cdiv(columns, size)
    data = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, across, dtype=torch.float32, device=x.device)
    turned = torch.empty(columns, rows, dtype=torch.float8_e4m3fn, device=x.device)
    turned_scales = torch.empty(columns, down, dtype=torch.float32, device=x.device)
    if x.numel():
        with on_device(x):
            _quantize_both_kernel[(down, across)](
                x,
                data,
                scales,
                turned,
                turned_scales,
                rows,
                columns,
                x.stride(0),
                x.stride(1),
                across,
                down,
                POW2=pow2_scales,
                **_BOTH.keywords,
            )
    return data, scales, turned, turned_scales


@quantize_with_transpose.register_fake
def _(x: Tensor, pow2_scales: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (rows, columns), size = x.shape, _BOTH.constexprs["BLOCK"]
    return (
        x.new_empty(rows, columns, dtype=torch.float8_e4m3fn),
        x.new_empty(rows, triton.cdiv(columns, size), dtype=torch.float32),
        x.new_empty(columns, rows, dtype=torch.float8_e4m3fn),
        x.new_empty(columns, triton.cdiv(rows, size), dtype=torch.float32),
    )


def _quantize(x: Tensor, out: Tensor, scales: Tensor | None, block: Sequence[int], pow2_scales: bool) -> None:
    """Write data and scales; where there is nowhere to put scales, what data times scale is."""
    if not x.numel():
        return
    (rows, columns), config = x.shape, _CONFIGS[block[0], block[1]]
    grid = triton.cdiv(rows, config.constexprs["ROWS"]), triton.cdiv(columns, config.constexprs["COLS"])
    with on_device(x):
        _quantize_kernel[grid](
            x,
            out,
            scales,
            rows,
            columns,
            x.stride(0),
            x.stride(1),
            triton.cdiv(columns, block[1]),
            POW2=pow2_scales,
            RESTORE=scales is None,
            **config.keywords,
        )


@triton.jit
def _quantize_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    out_ptr,
    scales_ptr,
    rows,
    columns,
    stride_row,
    stride_column,
    scales_across,
    POW2: tl.constexpr,
    RESTORE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    block_row = tl.program_id(0).to(tl.int64)
    block_column = tl.program_id(1).to(tl.int64)
    row = block_row * ROWS + tl.arange(0, ROWS)[:, None]
    column = block_column * COLS + tl.arange(0, COLS)[None, :]
    inside = (row < rows) & (column < columns)
    x = to_float32(tl.load(x_ptr + row * stride_row + column * stride_column, mask=inside, other=0.0))
    amax = _magnitude(x)
    if TILE_COLS > 1:
        amax = tl.max(amax, axis=1, keep_dims=True)
    if TILE_ROWS > 1:
        amax = tl.max(amax, axis=0, keep_dims=True)
    scaled, scale = _scaled(x, amax, POW2)
    data = round_to_e4m3(scaled)
    at = out_ptr + row * columns + column
    if RESTORE:
        tl.store(at, round_to(to_float32(data) * scale, out_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(at, data, mask=inside)
        # A block has one tile, or as many as rows, or as many as columns.
        tile_row = row if TILE_ROWS == 1 else block_row + tl.zeros([1, 1], tl.int64)
        tile_column = column if TILE_COLS == 1 else block_column + tl.zeros([1, 1], tl.int64)
        in_scales = (tile_row * TILE_ROWS < rows) & (tile_column * TILE_COLS < columns)
        tl.store(scales_ptr + tile_row * scales_across + tile_column, scale, mask=in_scales)


@triton.jit
def _quantize_both_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    data_ptr,
    scales_ptr,
    turned_ptr,
    turned_scales_ptr,
    rows,
    columns,
    stride_row,
    stride_column,
    across,
    down,
    POW2: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
):
    block_row = tl.program_id(0).to(tl.int64)
    block_column = tl.program_id(1).to(tl.int64)
    # A whole block, with the addresses of odd shapes, is more than the registers hold: it is done in parts. The second
    # reading is of what was read just before, 32 or 64 KB.
    for start in range(0, BLOCK, PART):
        row = block_row * BLOCK + start + tl.arange(0, PART)[:, None]
        column = block_column * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = (row < rows) & (column < columns)
        x = to_float32(tl.load(x_ptr + row * stride_row + column * stride_column, mask=inside, other=0.0))
        scaled, scale = _scaled(x, tl.max(_magnitude(x), axis=1, keep_dims=True), POW2)
        tl.store(data_ptr + row * columns + column, round_to_e4m3(scaled), mask=inside)
        tl.store(scales_ptr + row * across + block_column, scale, mask=row < rows)
    for start in range(0, BLOCK, PART):
        row = block_row * BLOCK + tl.arange(0, BLOCK)[:, None]
        column = block_column * BLOCK + start + tl.arange(0, PART)[None, :]
        inside = (row < rows) & (column < columns)
        x = to_float32(tl.load(x_ptr + row * stride_row + column * stride_column, mask=inside, other=0.0))
        scaled, scale = _scaled(x, tl.max(_magnitude(x), axis=0, keep_dims=True), POW2)
        tl.store(turned_scales_ptr + column * down + block_row, scale, mask=column < columns)
        # Turned before it is stored, so that neighbouring threads write neighbouring bytes.
        row = block_column * BLOCK + start + tl.arange(0, PART)[:, None]
        column = block_row * BLOCK + tl.arange(0, BLOCK)[None, :]
        turned = tl.trans(round_to_e4m3(scaled))
        tl.store(turned_ptr + row * rows + column, turned, mask=(row < columns) & (column < rows))


@triton.jit
def _magnitude(x):  # type: ignore[no-untyped-def]
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scaled(x, amax, POW2: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return ``x / scale`` and the scale, of float32 and of the bits of the tiles' largest magnitudes."""
    # A number below 2^-126 is an integer times 2^-149: as float32 that has the mantissa and an exponent.
    small = amax < 0x00800000
    bits = tl.where(small, amax.to(tl.float32).to(tl.int32, bitcast=True), amax)
    # 448 = 7/4 * 2^8: the smallest power of two no less than amax / 448.
    exponent = (bits >> 23) - 127 - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    exponent = tl.maximum(tl.where(small, exponent - 149, exponent), -149)
    exponent = tl.where(amax == 0, 0, exponent)
    broken = amax >= 0x7F800000
    scale = tl.where(broken, float("nan"), _power_of_two(exponent))
    if POW2:
        first = tl.minimum(-exponent, 126)
        inverse = tl.where(broken, float("nan"), _power_of_two(first))
        scaled = x * inverse * _power_of_two(-exponent - first)
    else:
        # Where the quotient is no normal float32, rounding it could put amax / scale far above 448.
        large = (amax >= 0x04E00000) & (amax < 0x7F800000)  # from 448 * 2^-126
        quotient = tl.div_rn(amax.to(tl.float32, bitcast=True), tl.full(amax.shape, 448.0, tl.float32))
        scale = tl.where(large, quotient, scale)
        scaled = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
    return scaled, scale


@triton.jit
def _power_of_two(exponent):  # type: ignore[no-untyped-def]
    """Return 2^exponent of integers from -149 to 127."""
    normal = (tl.maximum(exponent, -126) + 127) << 23
    subnormal = tl.full(exponent.shape, 1, tl.int32) << tl.minimum(tl.maximum(exponent + 149, 0), 22)
    return tl.where(exponent < -126, subnormal, normal).to(tl.float32, bitcast=True)


def _cases() -> Iterator[CompileCase]:
    shape = {"rows": "i32", "columns": "i32", "stride_row": "i32"}
    for (dtype, odd), pow2 in itertools.product(INPUTS, (True, False)):
        constants = {"POW2": pow2, "stride_column": 1}
        of = f"{dtype}, {'powers of two' if pow2 else 'amax / 448'}{', odd shape' if odd else ''}"
        unaligned = frozenset({"rows", "columns", "stride_row"} if odd else {"rows"})
        for block, config in _CONFIGS.items():
            common = {"x_ptr": f"*{dtype}", **shape, "scales_across": "i32"}
            yield CompileCase(
                f"tiles {block} of {of}",
                _quantize_kernel,
                {**common, "out_ptr": "*fp8e4nv", "scales_ptr": "*fp32"},
                config,
                {**constants, "RESTORE": False},
                unaligned | {"scales_across"},
            )
            if not odd:
                yield CompileCase(
                    f"what tiles {block} hold of {of}",
                    _quantize_kernel,
                    {**common, "out_ptr": f"*{dtype}"},
                    config,
                    {**constants, "RESTORE": True, "scales_ptr": None},
                    unaligned | {"scales_across"},
                )
        data = {"data_ptr": "*fp8e4nv", "scales_ptr": "*fp32", "turned_ptr": "*fp8e4nv", "turned_scales_ptr": "*fp32"}
        yield CompileCase(
            f"rows and columns of {of}",
            _quantize_both_kernel,
            {"x_ptr": f"*{dtype}", **data, **shape, "across": "i32", "down": "i32"},
            _BOTH,
            constants,
            unaligned | {"across", "down"},
        )


COMPILED = list(_cases())
