"""Documents of a row in the forms that the attention kernels read: against torch's own block masks, and by counting."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from attention_cases import numbers, rows_of_one_length
from hypothesis import given
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_dsv3.ops import attention_kernels, documents
from lightning_dsv3.ops.attention import Positions
from lightning_dsv3.ops.documents import (
    Documents,
    document_block_mask,
    document_bounds,
    document_mask,
    document_starts,
)


class TestDocuments:
    @given(rows=rows_of_one_length)
    def test_block_masks_are_torchs_own(self, rows: list[list[int]]) -> None:
        """Field by field what torch makes of S * S pairs; small blocks, so that small rows have many."""
        number = numbers(*rows)
        length = number.shape[1]

        def attended(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (q >= k) & (number[b, q] == number[b, k])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(documents, "BLOCK", 4)
            ours = document_block_mask(number)
        theirs = torch_flex.create_block_mask(attended, len(rows), 1, length, length, device="cpu", BLOCK_SIZE=4)
        assert ours.seq_lengths == theirs.seq_lengths == (length, length)
        assert ours.BLOCK_SIZE == theirs.BLOCK_SIZE
        for side in ("kv", "full_kv", "q", "full_q"):
            counts = getattr(theirs, f"{side}_num_blocks")
            assert torch.equal(getattr(ours, f"{side}_num_blocks"), counts)
            used = torch.arange(counts.shape[-1]) < counts.unsqueeze(-1)
            mine, other = (getattr(mask, f"{side}_indices") for mask in (ours, theirs))
            assert mine.dtype == other.dtype
            assert mine.shape == other.shape
            assert torch.equal(mine[used], other[used])
        pairs = torch_flex.create_mask(ours.mask_mod, len(rows), 1, length, length, device="cpu")
        assert torch.equal(pairs, document_mask(number, torch.float32) == 0)

    @given(rows=rows_of_one_length)
    def test_starts_and_bounds(self, rows: list[list[int]]) -> None:
        number = numbers(*rows)
        starts = [[sum(row[:n]) for n, length in enumerate(row) for _ in range(length)] for row in rows]
        assert document_starts(number).tolist() == starts
        bounds = document_bounds(number)
        assert bounds.starts.tolist() == [0, *itertools.accumulate(itertools.chain(*rows))]
        longest = max(itertools.chain(*rows))
        assert longest <= bounds.longest <= min(number.shape[1], 2 * longest)
        assert bounds.longest == number.shape[1] or bounds.longest.bit_count() == 1 or bounds.longest == longest

    def test_numbers_need_not_begin_at_zero_nor_rise(self) -> None:
        number = torch.tensor([[7, 7, 3, 9, 9]])
        assert document_starts(number).tolist() == [[0, 0, 2, 3, 3]]
        assert document_bounds(number).starts.tolist() == [0, 2, 3, 5]

    def test_a_block_mask_takes_no_square_of_the_length(self) -> None:
        largest = 0

        class Largest(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                nonlocal largest
                out = func(*args, **(kwargs or {}))
                largest = max(
                    [largest, *(x.untyped_storage().nbytes() for x in tree_leaves(out) if isinstance(x, Tensor))]
                )
                return out

        number = numbers([1000, 2000, 1096], [4096])
        with Largest():
            made = Documents.prepared(number, "flex", torch.bfloat16)
        assert made.mask is None
        # A row's numbers in int64 are the largest, the 32 * 32 blocks are fewer.
        assert largest <= 8 * number.numel()

    def test_masks_of_other_devices_have_rows_that_no_kernel_must_copy(self) -> None:
        mask = document_mask(torch.zeros(2, 37, dtype=torch.int64, device="meta"), torch.bfloat16)
        assert mask.shape == (2, 1, 37, 37)
        assert mask.stride(-1) == 1
        assert all(stride % 16 == 0 for stride in mask.stride()[:-1])

    @pytest.mark.parametrize("kernel", ["plain", "sdpa", "flex", "flash_attn_3"])
    def test_what_a_kernel_reads_is_made_beforehand_and_cut_with_the_row(self, kernel: str) -> None:
        number = numbers([100, 50, 150], [299, 1])
        made = Documents.prepared(number, kernel, torch.float32)
        cos = torch.randn(300, 2)
        cut = Positions(cos, -cos, made).first(170).documents
        fresh = Documents.prepared(number[:, :170], kernel, torch.float32)
        bare = Documents(number[:, :170])
        assert torch.equal(cut.number_BS, number[:, :170])
        read = {
            "flex": lambda d: d.blocks().kv_indices,
            "flash_attn_3": lambda d: d.in_a_line().starts,
        }.get(kernel, lambda d: d.added_mask(torch.float32))
        for some in (cut, bare):
            assert torch.equal(read(some), read(fresh))
        kept = {"flex": "block_mask", "flash_attn_3": "bounds"}.get(kernel, "mask")
        for some in (made, cut):
            assert {n for n in ("mask", "block_mask", "bounds") if getattr(some, n) is not None} == {kept}
        assert read(made) is read(made)

    def test_with_a_mask_cudnn_is_left_out(self) -> None:
        before = torch.backends.cuda.cudnn_sdp_enabled()
        with attention_kernels._kernels_with_a_mask("cuda"):
            assert not torch.backends.cuda.cudnn_sdp_enabled()
            assert torch.backends.cuda.mem_efficient_sdp_enabled()
        assert torch.backends.cuda.cudnn_sdp_enabled() == before
        assert isinstance(attention_kernels._kernels_with_a_mask("cpu"), contextlib.nullcontext)
