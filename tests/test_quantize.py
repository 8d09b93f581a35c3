"""FP8 tiles, held against E4M3 written out by hand in float64 and a loop over tiles."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from fp8_reference import CODES, loop, restored_by_loop
from hypothesis import given
from hypothesis.extra import numpy as st_numpy

from lightning_dsv3.ops import quantize
from lightning_dsv3.ops.quantize import (
    ACTIVATION_BLOCK,
    TRANSPOSED_BLOCK,
    WEIGHT_BLOCK,
    dequantize_blocks,
    quantization_error,
    quantize_blocks,
    quantize_dequantize_blocks,
    quantize_with_transpose,
    scales_shape,
)

BLOCKS = [ACTIVATION_BLOCK, WEIGHT_BLOCK, TRANSPOSED_BLOCK]
RAGGED = [(1, 1), (1, 128), (3, 127), (129, 129), (128, 256), (130, 300), (257, 5)]


def random_matrix(rows: int, columns: int) -> torch.Tensor:
    """Rows of very different sizes, zeros among them."""
    x = torch.randn(rows, columns) * torch.logspace(-12, 6, rows)[:, None]
    return torch.where(torch.rand(rows, columns) < 0.1, 0.0, x)


def test_the_format_is_torch_s_own():
    assert torch.finfo(torch.float8_e4m3fn).max == quantize.E4M3_MAX == CODES[-1]
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    np.testing.assert_array_equal(codes.double().numpy(), CODES)


def test_the_quick_conversion_is_torch_s_for_every_code_but_nan():
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(torch.float8_e4m3fn)
    finite = ~codes.float().isnan()
    assert finite.sum() == 254
    assert torch.equal(quantize._finite_values(codes)[finite], codes.float()[finite])


@pytest.mark.parametrize("pow2", [True, False], ids=["pow2", "amax/448"])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("shape", RAGGED, ids=str)
def test_data_and_scales_are_those_of_a_loop_in_float64(shape, block, pow2):
    x = random_matrix(*shape)
    data, scales = quantize_blocks(x, block, pow2)
    assert (data.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert data.is_contiguous()
    expected, expected_scales = loop(x, block, pow2)
    np.testing.assert_array_equal(scales.double().numpy(), expected_scales)
    np.testing.assert_array_equal(data.double().numpy(), expected)
    restored = dequantize_blocks(data, scales, block)
    np.testing.assert_array_equal(restored.numpy(), restored_by_loop(x, block, pow2).astype(np.float32))
    assert torch.equal(quantize_dequantize_blocks(x, block, pow2), restored)


@pytest.mark.parametrize("pow2", [True, False], ids=["pow2", "amax/448"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 127), (130, 300)], ids=str)
def test_rows_and_columns_of_one_matrix_are_tiles_of_a_loop_in_float64(shape, pow2):
    x = random_matrix(*shape)
    for ours, given_ in zip(quantize_with_transpose(x, pow2), (x, x.t()), strict=True):
        data, scales = loop(given_, ACTIVATION_BLOCK, pow2)
        assert (ours.data.dtype, ours.scales.dtype) == (torch.float8_e4m3fn, torch.float32)
        assert ours.data.is_contiguous()
        np.testing.assert_array_equal(ours.data.double().numpy(), data)
        np.testing.assert_array_equal(ours.scales.double().numpy(), scales)
    with pytest.raises(ValueError, match="give a matrix"):
        quantize_with_transpose(torch.ones(3))


numbers = st.floats(allow_nan=False, allow_infinity=False, width=32)
matrices = st_numpy.arrays(
    np.float32, st.tuples(st.integers(1, 6), st.integers(1, 7)), elements=numbers, fill=st.nothing()
)


@given(x=matrices, block=st.sampled_from([(1, 2), (3, 1), (2, 3), (8, 8)]), pow2=st.booleans())
def test_error_of_every_tile_is_bounded(x, block, pow2):
    data, scales = quantize_blocks(torch.from_numpy(x), block, pow2)
    assert not data.float().isnan().any()
    restored = data.double().numpy() * np.kron(scales.double().numpy(), np.ones(block))[: x.shape[0], : x.shape[1]]
    spread = np.kron(scales.double().numpy(), np.ones(block))[: x.shape[0], : x.shape[1]]
    # A quarter of a thousandth more for the division in float32, which is exact with powers of two.
    slack = 1.0 if pow2 else 1.001
    assert (
        np.abs(restored - x.astype(np.float64)) <= slack * np.maximum(np.abs(x.astype(float)) / 16, spread / 1024)
    ).all()
    assert (np.abs(x.astype(float)) <= slack * 448 * spread).all(), "saturates"
    for (i, j), scale in np.ndenumerate(scales.double().numpy()):
        tile = x[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]].astype(float)
        amax = np.abs(tile).max()
        assert scale > 0
        if amax == 0:
            assert scale == 1
        elif pow2:
            assert math.frexp(scale)[0] == 0.5
            assert amax / 448 <= scale
            assert scale < 2 * amax / 448 or scale == 2.0**-149
        elif amax > 1e-35:
            assert scale == pytest.approx(amax / 448, rel=2**-23)


@pytest.mark.parametrize("exponent", [-149, -140, -126, -100, 0, 60, 118])
def test_scale_at_a_power_of_two_is_not_one_too_high(exponent):
    edge = torch.tensor([[448.0 * 2.0 ** max(exponent, -149)]], dtype=torch.float64).float()
    assert quantize_blocks(edge).scales.item() == 2.0**exponent
    assert quantize_blocks(edge).data.item() == 448
    above = torch.nextafter(edge, torch.tensor(math.inf))
    assert quantize_blocks(above).scales.item() == 2.0 ** (exponent + 1)


@pytest.mark.parametrize("pow2", [True, False], ids=["pow2", "amax/448"])
def test_the_largest_and_the_smallest_float32_are_kept(pow2):
    ends = torch.tensor([[3e38], [2.0**-149], [3e-45], [1e-39], [5e-38]])
    data, scales = quantize_blocks(ends, pow2_scales=pow2)
    restored = dequantize_blocks(data, scales, dtype=torch.float64)
    assert torch.isfinite(restored).all()
    assert ((restored - ends.double()).abs() <= ends.double().abs() / 16).all()
    # As in bfloat16, what would round to a number above float32's is infinite.
    assert quantize_dequantize_blocks(torch.tensor([[-3.4e38]])).item() == -math.inf


def test_ties_go_to_the_even_mantissa_and_small_numbers_to_steps_of_two_to_the_minus_nine():
    step = 2.0**-9
    given_ = [448, 17, 19, 432, 0.5 * step, 0.51 * step, 1.5 * step, 2.5 * step, 7.5 * step, 15 * 2**-10, -17]
    kept = [448, 16, 20, 448, 0, step, 2 * step, 2 * step, 8 * step, 2**-6, -16]
    data, scales = quantize_blocks(torch.tensor([given_]))
    assert scales.item() == 1
    assert data.tolist() == [kept]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_tile_of_zeros_has_scale_one(block):
    x = torch.zeros(130, 130)
    x[0, 0] = 7.0
    data, scales = quantize_blocks(x, block)
    assert scales[-1, -1] == 1
    assert (scales == 1).sum() == scales.numel() - 1
    assert torch.equal(dequantize_blocks(data, scales, block), x)
    assert quantize_dequantize_blocks(torch.zeros(3, 5), block).abs().max() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("pow2", [True, False], ids=["pow2", "amax/448"])
def test_a_broken_number_makes_its_tile_nan_and_no_other(bad, pow2):
    x = torch.randn(4, 256)
    clean = quantize_dequantize_blocks(x, pow2_scales=pow2)
    x[2, 130] = bad
    data, scales = quantize_blocks(x, pow2_scales=pow2)
    for restored in (dequantize_blocks(data, scales), quantize_dequantize_blocks(x, pow2_scales=pow2)):
        assert restored[2, 128:].isnan().all()
        assert not restored.isnan()[:2].any()
        assert torch.equal(restored[2, :128], clean[2, :128])
        assert torch.equal(restored[3], clean[3])
    assert data[2, 128:].float().isnan().all()
    assert scales.isnan().sum() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_floating_dtype(dtype):
    x = torch.randn(5, 200).to(dtype)
    ours, plain = quantize_blocks(x), quantize_blocks(x.float())
    assert torch.equal(ours.data.float(), plain.data.float())
    assert torch.equal(ours.scales, plain.scales)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_bfloat16_holds_every_value_of_power_of_two_tiles(block):
    x = random_matrix(140, 150)
    exact = quantize_dequantize_blocks(x, block)
    assert torch.equal(quantize_dequantize_blocks(x, block, dtype=torch.bfloat16).float(), exact)
    assert torch.equal(dequantize_blocks(*quantize_blocks(x, block), block, dtype=torch.bfloat16).float(), exact)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_quantised_again_nothing_changes(block):
    once = quantize_dequantize_blocks(random_matrix(140, 150), block)
    assert torch.equal(quantize_dequantize_blocks(once, block), once)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_bands_strides_and_transposition_change_nothing(block, monkeypatch):
    x = random_matrix(300, 140)
    whole = quantize_blocks(x, block)
    monkeypatch.setattr(quantize, "_BAND_CPU", 1)
    for ours in (quantize_blocks(x, block), quantize_blocks(x.t().contiguous().t(), block)):
        assert torch.equal(ours.data.float(), whole.data.float())
        assert torch.equal(ours.scales, whole.scales)
    turned = quantize_blocks(x.t(), (block[1], block[0]))
    assert torch.equal(turned.data.float().t(), whole.data.float())
    assert torch.equal(turned.scales.t(), whole.scales)


@pytest.mark.parametrize("shape", [(0, 128), (5, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_nothing_is_quantised_to_nothing(shape, block):
    data, scales = quantize_blocks(torch.empty(shape), block)
    assert (data.shape, scales.shape) == (shape, scales_shape(shape, block))
    assert dequantize_blocks(data, scales, block).shape == shape


def test_a_gradient_does_not_pass_and_the_input_is_left_alone():
    x = torch.randn(3, 130, requires_grad=True)
    before = x.detach().clone()
    assert not any(result.requires_grad for result in (*quantize_blocks(x), quantize_dequantize_blocks(x)))
    assert torch.equal(x, before)


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"x is torch.int64 \[2, 3\]: give a matrix"):
        quantize_blocks(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x is torch.float32 \[3\]"):
        quantize_dequantize_blocks(torch.ones(3))
    with pytest.raises(ValueError, match=r"block=\(0, 128\): give the rows"):
        quantize_blocks(torch.ones(2, 3), (0, 128))
    data, scales = quantize_blocks(torch.ones(130, 300), WEIGHT_BLOCK)
    with pytest.raises(ValueError, match=r"scales \[2, 3\]: \[130, 300\] in blocks \(1, 128\) has \[130, 3\]"):
        dequantize_blocks(data, scales)


def test_what_is_lost_is_measured():
    x = random_matrix(50, 300)
    lost = quantization_error(x, WEIGHT_BLOCK)
    kept = quantize_dequantize_blocks(x, WEIGHT_BLOCK)
    assert lost.relative_error.item() == pytest.approx(
        ((kept - x).double().norm() / x.double().norm()).item(), rel=1e-6
    )
    assert lost.underflowed.item() == pytest.approx(((kept == 0) & (x != 0)).double().mean().item())
    assert 0 < lost.underflowed < 1
    assert lost.clipped == 0
    assert quantization_error(x).underflowed < lost.underflowed
    assert list(map(float, quantization_error(torch.zeros(2, 3)))) == [0, 0, 0]
    assert quantization_error(torch.tensor([[math.nan, 1.0]])).relative_error.isnan()
