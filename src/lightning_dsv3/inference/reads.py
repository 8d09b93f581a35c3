"""What new tokens of a cache's rows attend to: which pieces of memory, and which rows read a piece in one product.

A piece is a chunk of a prefix that rows share, or of the rows' own tokens. Rows of unequal length are padded to the
longest of those that they are read with. Where a segment may be read apart from others, rows of like length are read
together, and others by a product of their own if that saves more than the product costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from lightning_dsv3.ops.latent_attention import Segment

# Rows are read together if padding is not more than this share of their pairs of queries and slots, or is little.
_MOST_PADDING = 0.25
# Pairs that take about as long as one more product.
_LITTLE = 30_000


@dataclass(frozen=True)
class Chunk:
    """Slots ``start`` to ``stop`` of each row's own tokens, all layers: ``[L, B, stop - start, W]``."""

    start: int
    latent: Tensor

    @property
    def stop(self) -> int:
        """The slot behind the last."""
        return self.start + self.latent.shape[2]


@dataclass(frozen=True)
class Level:
    """A prefix: the chunks of a cache, for each row the row there that holds it, and how many of its slots are seen."""

    chunks: list[Chunk]
    rows: list[int]
    visible: list[int]

    def of(self, rows: Sequence[int]) -> Level:
        """Return the same for some of the rows."""
        return Level(self.chunks, [self.rows[row] for row in rows], [self.visible[row] for row in rows])

    @property
    def groups(self) -> list[_Group]:
        """Rows that can be read in one product."""
        runs = []
        first = 0
        for row, same in groupby(self.rows):
            branches = len(list(same))
            runs.append(_Group(first, range(row, row + 1), branches))
            first += branches
        joined = runs[:1]
        for run in runs[1:]:
            before = joined[-1]
            if run.branches == before.branches and run.prefixes.start == before.prefixes.stop:
                joined[-1] = _Group(before.first, range(before.prefixes.start, run.prefixes.stop), run.branches)
            else:
                joined.append(run)
        return joined


@dataclass(frozen=True)
class _Group:
    """Rows from ``first`` on: ``branches`` of them for each of the prefix's rows."""

    first: int
    prefixes: range
    branches: int

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + len(self.prefixes) * self.branches)

    def by_length(self, num_queries: Sequence[int], width: int) -> list[_Group]:
        """Return groups of like numbers of queries, if reading ``width`` slots in as many products is less work."""
        parts = []
        for number, prefix in enumerate(self.prefixes):
            first = self.first + number * self.branches
            for start, stop in _runs([n * width for n in num_queries[first : first + self.branches]]):
                parts.append(_Group(first + start, range(prefix, prefix + 1), stop - start))
        saved = self._padded(num_queries) - sum(part._padded(num_queries) for part in parts)
        return parts if saved * width > _LITTLE * (len(parts) - 1) else [self]

    def _padded(self, num_queries: Sequence[int]) -> int:
        return len(self.prefixes) * self.branches * max(num_queries[self.rows])


@dataclass(frozen=True)
class Read:
    """A segment but for its layer."""

    chunk: Chunk
    rows: range | slice
    width: int
    first_row: int
    branches: int
    column: int
    mask: Tensor | None
    is_causal: bool
    num_queries: int

    def segment(self, layer: int) -> Segment:
        """Return what a layer's queries attend to."""
        latent = self.chunk.latent[layer, self.rows.start : self.rows.stop, : self.width]
        return Segment(latent, self.first_row, self.branches, self.column, self.mask, self.is_causal, self.num_queries)


def plan_reads(
    levels: Sequence[Level],
    chunks: Sequence[Chunk],
    lengths: Sequence[int],
    num_tokens: Sequence[int],
    *,
    num_new: int,
    like: Tensor,
    by_length: bool,
) -> list[Read]:
    """Say what new tokens attend to.

    Args:
        levels: Prefixes, the oldest first.
        chunks: The rows' own, the new tokens' slots included.
        lengths: Tokens that each row has of its own.
        num_tokens: New tokens of each.
        num_new: S, the columns of the new tokens.
        like: A tensor with the masks' dtype and device.
        by_length: Segments are read apart: rows need not all be padded to S.
    """
    queries = list(num_tokens) if by_length else [num_new] * len(num_tokens)
    reads: list[Read] = []
    column = 0
    for level in levels:
        for chunk in level.chunks:
            seen = [min(visible, chunk.stop) - chunk.start for visible in level.visible]
            if max(seen) > 0:
                reads += _reads_of_prefix(chunk, level.groups, seen, queries, column, like, by_length)
                column += max(seen)
    pairs = [new * (own + new) for own, new in zip(lengths, queries, strict=True)]
    runs = list(_runs(pairs)) if by_length else [(0, len(queries))]
    for chunk in chunks:
        for start, stop in runs:
            reads += _own_reads(chunk, slice(start, stop), lengths, max(queries[start:stop]), column, like)
    return reads


def _reads_of_prefix(
    chunk: Chunk,
    groups: Sequence[_Group],
    seen: Sequence[int],
    queries: Sequence[int],
    column: int,
    like: Tensor,
    by_length: bool,
) -> Iterator[Read]:
    for group in groups:
        width = max(seen[group.rows])
        for part in group.by_length(queries, width) if by_length else [group]:
            visible, longest = seen[part.rows], max(queries[part.rows])
            width = max(visible)
            if width > 0 and longest:
                mask = _mask(torch.tensor(visible).unsqueeze(1), width, like)
                yield Read(chunk, part.prefixes, width, part.first, part.branches, column, mask, False, longest)


def _own_reads(
    chunk: Chunk, rows: slice, lengths: Sequence[int], longest: int, column: int, like: Tensor
) -> Iterator[Read]:
    own = lengths[rows]
    if len(set(own)) == 1:
        own = own[:1]  # one mask serves them all
    width = min(max(own) + longest, chunk.stop) - chunk.start
    if width > 0 and longest:
        seen_BS = torch.tensor(own).unsqueeze(1) + torch.arange(1, longest + 1)
        mask = _mask(seen_BS - chunk.start, width, like)
        is_causal = not any(own) and width == longest
        yield Read(chunk, rows, width, rows.start, 1, column + chunk.start, mask, is_causal, longest)


def _runs(work: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield where runs of rows with like work begin and end.

    >>> list(_runs([100_000, 99_000, 10_000, 9_000, 10]))
    [(0, 2), (2, 5)]
    """
    start = most = total = 0
    for row, own in enumerate(work):
        padding = (row + 1 - start) * max(most, own) - total - own
        if row > start and padding > max(_LITTLE, _MOST_PADDING * (total + own)):
            yield start, row
            start, most, total = row, 0, 0
        most, total = max(most, own), total + own
    yield start, len(work)


def _mask(visible: Tensor, width: int, like: Tensor) -> Tensor | None:
    """Return 0 for the first ``visible`` of ``width`` slots, minus infinity behind, ``[..., width]``; None for all."""
    if int(visible.min()) >= width:
        return None
    visible = visible.to(like.device)
    mask = torch.zeros(*visible.shape, width, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(torch.arange(width, device=like.device) >= visible.unsqueeze(-1), float("-inf"))
