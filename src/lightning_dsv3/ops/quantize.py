"""FP8 numbers in tiles, each with a scale of its own (report, section 3.3.2 and Figure 7).

An E4M3 number has 4 bits of exponent and 3 of mantissa: at most 448, steps of 1/8 to 1/16 of the value down to 2^-6,
and below that steps of 2^-9. One outlier would push all the rest of a tensor into those; so each tile is scaled until
its largest magnitude (amax) is near 448:

    scale = amax / 448, rounded up to a power of two where ``pow2_scales``; 1 for a tile of zeros
    data  = x / scale, rounded to the nearest E4M3 number, ties to the even mantissa
    value = data * scale

Tiles ``(rows, columns)`` of the recipe: (1, 128) for activations and gradients, (128, 128) for weights, (128, 1) for
both operands of a weight's gradient. Tiles start at the first row and column. The last ones may be cut off: they are as
if zeros stood in the rest.

What a tile of finite numbers keeps: an error of at most ``max(|x| / 16, scale / 1024)`` in each value. Nothing
saturates, as no ``x / scale`` is above 448. Powers of two lose up to one bit of the range and no precision, make the
division exact, and every value fits bfloat16. Scales reach down to 2^-149, the smallest float32, so a tile of tiny
numbers is as precise as any.

A tile with a NaN or an infinity becomes NaN throughout, its scale too: E4M3 has no infinity and one scale cannot serve
both. So a broken number stays visible, as in BF16, and nothing waits for the GPU to look for one. Also as in BF16, what
rounds to a number above float32's largest (from 3.3e38 on) is infinite when it is dequantised.

Memory: the functions go through a matrix in bands of rows, so that float32 copies are no larger than a band. Triton's
kernels, which give the same bits, make none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dsv3.ops.backends import chosen

E4M3_MAX = 448.0
ACTIVATION_BLOCK = (1, 128)
"""Tile of activations and gradients where they are summed over columns: forward and input gradient."""
WEIGHT_BLOCK = (128, 128)
"""Tile of weights."""
TRANSPOSED_BLOCK = (128, 1)
"""Tile of activations and gradients where they are summed over rows: the weight's gradient."""

# Numbers in a band. On a CPU a band should stay in the cache; on a GPU few launches matter more.
_BAND_CPU, _BAND_GPU = 1 << 17, 1 << 26


class QuantizedBlocks(NamedTuple):
    """A matrix in FP8.

    Attributes:
        data: float8_e4m3fn ``[R, C]``.
        scales: What each tile is multiplied with, float32 ``[ceil(R / b0), ceil(C / b1)]``.
    """

    data: Tensor
    scales: Tensor


@torch.no_grad()
def quantize_blocks(x: Tensor, block: tuple[int, int] = ACTIVATION_BLOCK, pow2_scales: bool = True) -> QuantizedBlocks:
    """Round a matrix to FP8, tile by tile.

    Args:
        x: ``[R, C]``, any floating dtype; float64 is rounded to float32 first.
        block: Rows and columns of a tile.
        pow2_scales: Round scales up to powers of two.

    Returns:
        ``data`` and ``scales``; see :class:`QuantizedBlocks`. No gradient passes.

    Raises:
        ValueError: ``x`` is no matrix of floating-point numbers, or a block that is not two positive numbers.

    >>> data, scales = quantize_blocks(torch.tensor([[900.0, -1.0, 0.3]]))
    >>> scales.item(), data.tolist()
    (4.0, [[224.0, -0.25, 0.078125]])
    """
    _check(x, block)
    if chosen("quantize", x, rows=block[0], columns=block[1]) == "triton":
        from lightning_dsv3.ops.triton import quantize as kernels

        return QuantizedBlocks(*kernels.quantize_blocks(x, block, pow2_scales))
    data = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(scales_shape(x.shape, block), dtype=torch.float32, device=x.device)
    for rows, tile_rows in _bands(x.shape, block, x.device):
        band = x[rows]
        tiles, scale = _scaled_tiles(band, block, pow2_scales)
        scales[tile_rows] = scale.view(scales[tile_rows].shape)
        data[rows] = _untiled(tiles.clamp_(-E4M3_MAX, E4M3_MAX), band.shape).to(data.dtype)
    return QuantizedBlocks(data, scales)


@torch.no_grad()
def quantize_with_transpose(x: Tensor, pow2_scales: bool = True) -> tuple[QuantizedBlocks, QuantizedBlocks]:
    """Round a matrix to FP8 twice: in tiles along its rows, and in tiles along its columns, these turned.

    A product sums over neighbouring numbers of both operands. So a linear map's forward and input gradient take rows,
    and its weight's gradient, which sums over tokens, takes columns, with the tokens of each column side by side. Both
    are rounded from ``x`` itself, none twice.

    Args:
        x: ``[R, C]``, any floating dtype.
        pow2_scales: Round scales up to powers of two.

    Returns:
        ``x`` in 1 x 128 tiles: data ``[R, C]``, scales ``[R, ceil(C / 128)]``. Then its transpose in such tiles:
        data ``[C, R]``, scales ``[C, ceil(R / 128)]``. No gradient passes.

    >>> rows, columns = quantize_with_transpose(torch.tensor([[900.0, 1.0], [2.0, 448.0]]))
    >>> rows.scales.tolist(), columns.scales.tolist()
    ([[4.0], [1.0]], [[4.0], [1.0]])
    >>> columns.data.tolist()
    [[224.0, 0.5], [1.0, 448.0]]
    """
    _check(x, ACTIVATION_BLOCK)
    if chosen("quantize", x, rows=ACTIVATION_BLOCK[0], columns=ACTIVATION_BLOCK[1]) == "triton":
        from lightning_dsv3.ops.triton import quantize as kernels

        data, scales, turned, turned_scales = kernels.quantize_with_transpose(x, pow2_scales)
        return QuantizedBlocks(data, scales), QuantizedBlocks(turned, turned_scales)
    return quantize_blocks(x, ACTIVATION_BLOCK, pow2_scales), quantize_blocks(x.t(), ACTIVATION_BLOCK, pow2_scales)


@torch.no_grad()
def dequantize_blocks(
    data: Tensor, scales: Tensor, block: tuple[int, int] = ACTIVATION_BLOCK, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return ``data * scale`` of each tile, multiplied in float32.

    Args:
        data: ``[R, C]``, usually float8_e4m3fn.
        scales: ``[ceil(R / b0), ceil(C / b1)]``.
        block: Rows and columns of a tile.
        dtype: Of the result. bfloat16 holds every value exactly where scales are powers of two.

    Raises:
        ValueError: Scales that do not fit the matrix and the block.
    """
    _check(data, block)
    expected = scales_shape(data.shape, block)
    if scales.shape != expected:
        raise ValueError(
            f"scales {list(scales.shape)}: {list(data.shape)} in blocks {block} has {list(expected)}; "
            "give the scales of this matrix and the block that they were made with"
        )
    x = torch.empty(data.shape, dtype=dtype, device=data.device)
    for rows, tile_rows in _bands(data.shape, block, data.device):
        tiles = _tiled(data[rows].float(), block).mul(scales[tile_rows].float()[:, None, :, None])
        x[rows] = _untiled(tiles, data[rows].shape).to(dtype)
    return x


@torch.no_grad()
def quantize_dequantize_blocks(
    x: Tensor,
    block: tuple[int, int] = ACTIVATION_BLOCK,
    pow2_scales: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Round a matrix to what FP8 tiles can hold: both functions above in one, without a matrix of FP8 in between.

    Args:
        x: ``[R, C]``, any floating dtype.
        block: Rows and columns of a tile.
        pow2_scales: Round scales up to powers of two.
        dtype: Of the result.

    Returns:
        ``[R, C]``. No gradient passes.
    """
    _check(x, block)
    if chosen("quantize", x, rows=block[0], columns=block[1]) == "triton":
        from lightning_dsv3.ops.triton import quantize as kernels

        return kernels.quantize_dequantize_blocks(x, block, pow2_scales, dtype)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    for rows, _ in _bands(x.shape, block, x.device):
        band = x[rows]
        tiles, scale = _scaled_tiles(band, block, pow2_scales)
        # A NaN is lost on this way, and comes back with its tile's scale.
        tiles = _finite_values(tiles.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)).mul_(scale)
        out[rows] = _untiled(tiles, band.shape).to(dtype)
    return out


class QuantizationError(NamedTuple):
    """What a matrix loses in FP8.

    Attributes:
        clipped: Share of the numbers that are above 448 after scaling and would saturate; 0 by construction.
        underflowed: Share of the numbers that are not zero and become zero.
        relative_error: Length of the error over the length of the matrix; 0 for a matrix of zeros.
    """

    clipped: Tensor
    underflowed: Tensor
    relative_error: Tensor


@torch.no_grad()
def quantization_error(
    x: Tensor, block: tuple[int, int] = ACTIVATION_BLOCK, pow2_scales: bool = True
) -> QuantizationError:
    """Measure what :func:`quantize_blocks` loses; float32 scalars on the device of ``x`` ``[R, C]``.

    >>> float(quantization_error(torch.tensor([[448.0, 4e-4]])).underflowed)  # steps are 2^-9 there
    0.5
    """
    _check(x, block)
    clipped, underflowed, error, length = torch.zeros(4, dtype=torch.float64, device=x.device).unbind()
    for rows, _ in _bands(x.shape, block, x.device):
        tiles, scale = _scaled_tiles(x[rows], block, pow2_scales)
        kept = tiles.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()
        clipped += (tiles.abs() > E4M3_MAX).sum()
        underflowed += ((kept == 0) & (tiles != 0)).sum()
        error += ((kept - tiles) * scale).double().square().sum()
        length += x[rows].double().square().sum()
    numbers = max(x.numel(), 1)
    relative = torch.where(length == 0, 0.0, (error / length).sqrt())
    return QuantizationError((clipped / numbers).float(), (underflowed / numbers).float(), relative.float())


def scales_shape(shape: torch.Size | tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Return the number of tiles down and across.

    >>> scales_shape((576, 7168), (128, 128))
    (5, 56)
    """
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def _scaled_tiles(x: Tensor, block: tuple[int, int], pow2_scales: bool) -> tuple[Tensor, Tensor]:
    """Return ``x / scale`` as new float32 tiles ``[r, b0, c, b1]``, and scales ``[r, 1, c, 1]``."""
    tiles = _tiled(x.float(), block)
    scale = _scale(tiles.abs().amax(dim=(1, 3), keepdim=True), pow2_scales)
    return tiles / scale, scale


def _scale(amax: Tensor, pow2: bool) -> Tensor:
    mantissa, exponent = torch.frexp(amax)  # amax = mantissa * 2^exponent with 1/2 <= mantissa < 1
    # 448 = 7/8 * 2^9, so this is the smallest power of two that is no less than amax / 448, without rounding.
    scale = _power_of_two(exponent - 9 + (mantissa > 0.875))
    if not pow2:
        # Where the quotient is no normal float32, rounding it could put amax / scale far above 448.
        scale = torch.where(amax >= E4M3_MAX * 2.0**-126, amax / E4M3_MAX, scale)
    scale = torch.where(amax == 0, 1.0, scale)
    return torch.where(amax.isfinite(), scale, torch.nan)


def _power_of_two(exponent: Tensor) -> Tensor:
    """Return 2^exponent, from 2^-149, made of bits: an approximate exp2 would spoil what is exact otherwise."""
    exponent = exponent.clamp(-149, 127)
    normal = exponent.clamp(min=-126)
    parts = [((part + 127) << 23).to(torch.int32).view(torch.float32) for part in (normal, exponent - normal)]
    return parts[0] * parts[1]


def _finite_values(data: Tensor) -> Tensor:
    """Return E4M3 numbers as float32; NaN becomes 480. Some four times as fast as torch's conversion on a CPU.

    The bits of E4M3, moved by 7, are those of a float16 whose exponent is 8 too low; bit 14 has a copy of the sign.
    """
    bits = data.view(torch.int8).to(torch.int16)
    return bits.bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16).float().mul_(256)


def _bands(shape: torch.Size, block: tuple[int, int], device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Cut a matrix into bands of whole tiles; yield the slice of its rows and that of its rows of tiles."""
    numbers = _BAND_CPU if device.type == "cpu" else _BAND_GPU
    tiles = max(1, numbers // max(1, block[0] * shape[1]))
    for first in range(0, scales_shape(shape, block)[0], tiles):
        end = min((first + tiles) * block[0], shape[0])
        yield slice(first * block[0], end), slice(first, -(-end // block[0]))


def _tiled(x: Tensor, block: tuple[int, int]) -> Tensor:
    """View ``[R, C]`` as ``[r, b0, c, b1]``, with zeros where the last tiles are cut off."""
    missing = [-size % length for size, length in zip(x.shape, block, strict=True)]
    if any(missing):
        x = F.pad(x, (0, missing[1], 0, missing[0]))
    return x.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))


def _untiled(tiles: Tensor, shape: torch.Size) -> Tensor:
    return tiles.flatten(2, 3).flatten(0, 1)[: shape[0], : shape[1]]


def _check(x: Tensor, block: tuple[int, int]) -> None:
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {list(x.shape)}: give a matrix [R, C] of floating-point numbers")
    if len(block) != 2 or min(block) < 1:
        raise ValueError(f"block={block}: give the rows and columns of a tile, as in (1, 128)")
