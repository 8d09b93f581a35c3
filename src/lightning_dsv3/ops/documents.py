"""Documents that share a row: which positions attend to which, in the form that each attention kernel reads.

    plain, sdpa     a mask that is added to the scores: B * S * S numbers (4096 positions in bfloat16: 34 MB per row)
    flex            a block mask: for each 128 queries the blocks of 128 keys that they see any of, B * (S / 128)^2
                    numbers; blocks that lie in other documents or in the future are never computed
    flash_attn_3    where each document begins in the rows laid end to end, and the length of the longest

Each is made once per batch and shared by all blocks of the model.

A row's documents follow one another, each with its own number. So a position attends to all from the start of its
document up to itself, and over a row these starts never fall: the first and the last query of 128 tell which blocks of
keys the 128 see in part and which as a whole, without looking at S * S pairs.

Shapes: B batch, S sequence, N blocks of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# What flex_attention's kernels are tuned for; their own tiles must divide it.
BLOCK = 128
# The memory-efficient kernel copies a mask whose rows are not so many elements apart, in every block of the model.
_MASK_ROW = 16


class Bounds(NamedTuple):
    """Documents of all rows, laid end to end.

    Attributes:
        starts: Where each begins, and behind the last where it ends, int32 ``[documents + 1]``.
        longest: At least the length of the longest: rounded up to a power of two, so that a compiled graph meets few
            values of it.
    """

    starts: Tensor
    longest: int


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents of packed rows, with what the attention kernel of this pass reads of them.

    Attributes:
        number_BS: Number of each position's document, int64 ``[B, S]``.
        mask: Of :func:`document_mask`, made if the kernel adds one to the scores.
        block_mask: Of :func:`document_block_mask`, made for ``flex``.
        bounds: Of :func:`document_bounds`, made for ``flash_attn_3``.
    """

    number_BS: Tensor
    mask: Tensor | None = None
    block_mask: BlockMask | None = None
    bounds: Bounds | None = None

    @classmethod
    def prepared(cls, number_BS: Tensor, kernel: str, dtype: torch.dtype) -> Documents:
        """Make what a kernel reads.

        Args:
            number_BS: Number of each position's document, int64 ``[B, S]``.
            kernel: Implementation of ``attention`` in :data:`lightning_dsv3.config.kernels.KERNELS`.
            dtype: What attention computes in.
        """
        if kernel == "flex":
            return cls(number_BS, block_mask=document_block_mask(number_BS))
        if kernel == "flash_attn_3":
            return cls(number_BS, bounds=document_bounds(number_BS))
        return cls(number_BS, mask=document_mask(number_BS, dtype))

    def first(self, length: int) -> Documents:
        """Return what holds for the first ``length`` positions alone."""
        number_BS = self.number_BS[:, :length]
        return Documents(
            number_BS,
            mask=None if self.mask is None else self.mask[..., :length, :length],
            block_mask=None if self.block_mask is None else document_block_mask(number_BS),
            bounds=None if self.bounds is None else document_bounds(number_BS),
        )

    def added_mask(self, dtype: torch.dtype) -> Tensor:
        """Return the mask that is added to the scores."""
        return document_mask(self.number_BS, dtype) if self.mask is None else self.mask.to(dtype)

    def blocks(self) -> BlockMask:
        """Return the block mask."""
        return document_block_mask(self.number_BS) if self.block_mask is None else self.block_mask

    def in_a_line(self) -> Bounds:
        """Return where documents begin."""
        return document_bounds(self.number_BS) if self.bounds is None else self.bounds


def document_mask(document_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask by which a position attends to itself and to earlier positions of its own document.

    Args:
        document_BS: Number of each position's document, int64 ``[B, S]``.
        dtype: What attention computes in.

    Returns:
        0 or minus infinity, ``[B, 1, S, S]``: query, then key. No row is without a 0, as a position attends to itself.

    >>> document_mask(torch.tensor([[0, 0, 1]]), torch.float32)[0, 0]
    tensor([[0., -inf, -inf],
            [0., 0., -inf],
            [-inf, -inf, 0.]])
    """
    # Not boolean: torch would make this very tensor from it anew in every block, and keep each one for the backward.
    attended_BSS = (document_BS.unsqueeze(2) == document_BS.unsqueeze(1)).tril()
    batch, length = document_BS.shape
    row = length if document_BS.device.type == "cpu" else _ceil(length, _MASK_ROW) * _MASK_ROW
    mask_BSS = torch.zeros(batch, length, row, dtype=dtype, device=document_BS.device)[..., :length]
    return mask_BSS.masked_fill_(~attended_BSS, float("-inf")).unsqueeze(1)


def document_starts(document_BS: Tensor) -> Tensor:
    """Return the first position of each position's document, int32 ``[B, S]``.

    >>> document_starts(torch.tensor([[0, 0, 1, 2, 2, 2]]))
    tensor([[0, 0, 2, 3, 3, 3]], dtype=torch.int32)
    """
    position_S = torch.arange(document_BS.shape[1], dtype=torch.int32, device=document_BS.device)
    begins_BS = F.pad(document_BS[:, 1:] != document_BS[:, :-1], (1, 0))
    return torch.where(begins_BS, position_S, 0).cummax(dim=1).values.int()


def document_block_mask(document_BS: Tensor) -> BlockMask:
    """Return what :func:`document_mask` says, as a block mask of ``flex_attention``, without S * S of anything.

    Args:
        document_BS: Number of each position's document, int64 ``[B, S]``; each row's in a stretch of its own.
    """
    from torch.nn.attention.flex_attention import BlockMask

    length = document_BS.shape[1]
    start_BS = document_starts(document_BS)
    key_N = torch.arange(_ceil(length, BLOCK), device=document_BS.device)
    query_N1 = key_N.unsqueeze(1)
    earliest_BN1 = start_BS[:, ::BLOCK].unsqueeze(-1)
    last_query_N = ((key_N + 1) * BLOCK - 1).clamp_max(length - 1)
    latest_BN1 = start_BS[:, last_query_N].unsqueeze(-1)
    some_BNN = (key_N <= query_N1) & (key_N >= earliest_BN1 // BLOCK)
    # A last block of fewer queries stays masked, as in torch's own block masks.
    whole_BNN = (key_N < query_N1) & (key_N * BLOCK >= latest_BN1) & ((query_N1 + 1) * BLOCK <= length)

    def attended(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= start_BS[batch, query])

    return BlockMask.from_kv_blocks(
        *_listed(some_BNN & ~whole_BNN),
        *_listed(whole_BNN),
        BLOCK_SIZE=BLOCK,
        mask_mod=attended,
        seq_lengths=(length, length),
    )


def document_bounds(document_BS: Tensor) -> Bounds:
    """Return where documents begin if rows are laid end to end; waits for the device.

    Args:
        document_BS: Number of each position's document, int64 ``[B, S]``; each row's in a stretch of its own.

    >>> document_bounds(torch.tensor([[0, 0, 1], [0, 0, 0]]))
    Bounds(starts=tensor([0, 2, 3, 6], dtype=torch.int32), longest=3)
    """
    length = document_BS.shape[1]
    start_BS = document_starts(document_BS)
    # Position 0 is its own start in every row, so a row's end is a document's end too.
    begins_BS = start_BS == torch.arange(length, device=document_BS.device)
    starts = F.pad(begins_BS.flatten().nonzero().squeeze(1), (0, 1), value=document_BS.numel()).int()
    longest = int(starts.diff().max())
    return Bounds(starts, min(length, 1 << (longest - 1).bit_length()))


def _listed(some_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many blocks of each row are true, ``[B, 1, N]``, and indices, theirs first, ``[B, 1, N, N]``."""
    listed_BNN = some_BNN.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return some_BNN.sum(-1, dtype=torch.int32).unsqueeze(1), listed_BNN.int().unsqueeze(1)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
