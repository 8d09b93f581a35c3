"""The kernels of FP8 tiles, held bit by bit against the plain form, whose own truth is a loop in float64."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from fp8_reference import loop
from hypothesis import given, settings
from torch import Tensor
from triton_cases import poison_empty, run_interpreted

from lightning_dsv3.ops.backends import forced_kernels
from lightning_dsv3.ops.libraries import is_interpreted
from lightning_dsv3.ops.quantize import (
    ACTIVATION_BLOCK,
    TRANSPOSED_BLOCK,
    WEIGHT_BLOCK,
    QuantizedBlocks,
    quantize_blocks,
    quantize_dequantize_blocks,
    quantize_with_transpose,
)

triton, tl = pytest.importorskip("triton"), pytest.importorskip("triton.language")

from lightning_dsv3.ops.triton import quantize as kernels  # noqa: E402
from lightning_dsv3.ops.triton.common import round_to, to_float32  # noqa: E402

BLOCKS = [ACTIVATION_BLOCK, WEIGHT_BLOCK, TRANSPOSED_BLOCK]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPECIAL = [0.0, 2.0**-149, 3e-45, 1e-39, 2.0**-126, 5e-38, 1e-20, 447.99, 448.0, 448.01, 1.75, 1.7500001, 3e38, 3.4e38]
SPECIAL += [448.0 * 2.0**e for e in (-149, -148, -141, -133, -127, -126, -125, 118)]


def matrix(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Numbers of very different sizes, zeros among them, and a tile of zeros."""
    x = torch.randn(rows, columns) * torch.logspace(-4, 3, rows)[:, None]
    x = torch.where(torch.rand(rows, columns) < 0.1, 0.0, x)
    x[: rows // 3, 128:] = 0
    return x.to(dtype)


def broken_matrix(bad: float) -> Tensor:
    """Tiles of extreme numbers, and one number that is none."""
    x = torch.randn(len(SPECIAL), 200) * torch.tensor(SPECIAL)[:, None] / 8
    x[:, 3] = torch.tensor(SPECIAL)
    x[5, 7] = bad
    return x


def assert_same(ours: QuantizedBlocks, plain: QuantizedBlocks) -> None:
    assert (ours.data.dtype, ours.data.shape) == (plain.data.dtype, plain.data.shape)
    assert ours.data.is_contiguous()
    np.testing.assert_array_equal(ours.scales.cpu().numpy(), plain.scales.cpu().numpy())
    np.testing.assert_array_equal(ours.data.float().cpu().numpy(), plain.data.float().cpu().numpy())


def check_quantize(x: Tensor, block: tuple[int, int], pow2: bool) -> None:
    with forced_kernels(quantize="triton"):
        ours = quantize_blocks(x, block, pow2)
    with forced_kernels(quantize="torch"):
        plain = quantize_blocks(x.cpu(), block, pow2)
    assert_same(ours, plain)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        with forced_kernels(quantize="triton"):
            held = quantize_dequantize_blocks(x, block, pow2, dtype)
        with forced_kernels(quantize="torch"):
            plainly = quantize_dequantize_blocks(x.cpu(), block, pow2, dtype)
        assert held.dtype == dtype
        np.testing.assert_array_equal(held.double().cpu().numpy(), plainly.double().numpy())


def check_both(x: Tensor, pow2: bool) -> None:
    with forced_kernels(quantize="triton"):
        ours = quantize_with_transpose(x, pow2)
    with forced_kernels(quantize="torch"):
        rows, columns = (
            quantize_blocks(x.cpu(), ACTIVATION_BLOCK, pow2),
            quantize_blocks(x.cpu(), TRANSPOSED_BLOCK, pow2),
        )
    assert_same(ours[0], rows)
    assert_same(ours[1], QuantizedBlocks(columns.data.t().contiguous(), columns.scales.t()))


@triton.jit
def copy_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = to_float32(tl.load(x_ptr + at, mask=at < N))
    tl.store(y_ptr + at, round_to(x, y_ptr.dtype.element_ty), mask=at < N)


class TestInterpreted:
    __test__ = is_interpreted()

    @pytest.fixture(autouse=True)
    def poison(self, monkeypatch):
        poison_empty(monkeypatch)

    def test_loaded_and_stored_numbers_are_rounded_as_torch_rounds(self):
        """Every bfloat16, and around every E4M3 and bfloat16 number and the middle between two of them."""
        e4m3 = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)
        bf16 = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
        codes = e4m3.float()[:127]
        between = (bf16.view(torch.int16).int() << 16 | 0x8000).view(torch.float32)
        edges = torch.cat([codes, (codes[1:] + codes[:-1]) / 2, bf16.float(), between])
        edges = torch.cat([torch.nextafter(edges, torch.tensor(to)) for to in (-math.inf, math.inf)] + [edges])
        every = [(e4m3, torch.float32), (bf16, torch.float32), (edges, torch.bfloat16)]
        every += [(edges, torch.float8_e4m3fn), (-edges, torch.float8_e4m3fn)]
        for x, dtype in every:
            out = torch.empty(x.shape, dtype=dtype)
            copy_kernel[(triton.cdiv(x.numel(), 2**15),)](x, out, x.numel(), BLOCK=2**15)
            expected = (x.clamp(-448, 448) if dtype == torch.float8_e4m3fn else x).to(dtype).float()
            np.testing.assert_array_equal(out.float().numpy(), expected.numpy())
            number = expected.abs() > 0  # not zeros, whose sign the interpreter of Triton 3.7 loses
            assert torch.equal(out.float().signbit()[number], expected.signbit()[number])

    @pytest.mark.parametrize("pow2", [True, False], ids=["pow2", "amax/448"])
    @pytest.mark.parametrize("block", BLOCKS, ids=str)
    @pytest.mark.parametrize("shape", [(1, 1), (33, 129), (130, 300)], ids=str)
    def test_tiles_are_those_of_a_loop_in_float64(self, shape, block, pow2):
        x = matrix(*shape, torch.float32)
        with forced_kernels(quantize="triton"):
            data, scales = quantize_blocks(x, block, pow2)
        expected, expected_scales = loop(x, block, pow2)
        np.testing.assert_array_equal(scales.double().numpy(), expected_scales)
        np.testing.assert_array_equal(data.double().numpy(), expected)

    @settings(max_examples=12)
    @given(
        rows=st.integers(1, 260),
        columns=st.integers(1, 260),
        dtype=st.sampled_from(DTYPES),
        block=st.sampled_from(BLOCKS),
        pow2=st.booleans(),
        strided=st.booleans(),
    )
    def test_every_shape_dtype_and_stride(self, rows, columns, dtype, block, pow2, strided):
        x = matrix(rows, columns, dtype)
        if strided:
            x = torch.randn(columns, 2 * rows + 1).to(dtype).t()[:-1:2]
        check_quantize(x, block, pow2)

    @settings(max_examples=6)
    @given(rows=st.integers(1, 260), columns=st.integers(1, 260), dtype=st.sampled_from(DTYPES), pow2=st.booleans())
    def test_rows_and_columns_at_once(self, rows, columns, dtype, pow2):
        check_both(matrix(rows, columns, dtype), pow2)
        check_both(matrix(columns, rows, dtype).t(), pow2)

    @pytest.mark.parametrize("pow2", [True, False], ids=["pow2", "amax/448"])
    @pytest.mark.parametrize("bad", [1.0, math.nan, -math.nan, math.inf, -math.inf], ids=str)
    def test_extreme_and_broken_numbers(self, bad, pow2):
        x = broken_matrix(bad)
        check_quantize(x, ACTIVATION_BLOCK, pow2)
        check_quantize(x.t(), TRANSPOSED_BLOCK, pow2)
        check_quantize(x, WEIGHT_BLOCK, pow2)
        check_both(x, pow2)

    def test_operators_are_registered_right(self):
        x = torch.randn(5, 130)
        torch.library.opcheck(kernels.quantize_blocks, (x, ACTIVATION_BLOCK, True))
        torch.library.opcheck(kernels.quantize_dequantize_blocks, (x, ACTIVATION_BLOCK, True, torch.bfloat16))
        torch.library.opcheck(kernels.quantize_with_transpose, (x, True))

    def test_nothing_is_quantised_to_nothing(self):
        for shape in [(0, 5), (5, 0)]:
            check_quantize(torch.ones(shape), ACTIVATION_BLOCK, True)
            check_both(torch.ones(shape), True)


def test_in_the_interpreter():
    run_interpreted(__file__)


@pytest.mark.gpu
@pytest.mark.parametrize("pow2", [True, False], ids=["pow2", "amax/448"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_cuda(dtype, pow2):
    for shape in [(1, 1), (33, 129), (300, 7168), (4096, 576)]:
        x = matrix(*shape, dtype)
        for given_ in (x.cuda(), x.cuda().t().contiguous().t()):
            for block in BLOCKS:
                check_quantize(given_, block, pow2)
            check_both(given_, pow2)
    for bad in (1.0, math.nan, math.inf):
        for block in BLOCKS:
            check_quantize(broken_matrix(bad).cuda(), block, pow2)
        check_both(broken_matrix(bad).cuda(), pow2)
