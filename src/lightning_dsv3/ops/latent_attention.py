"""Attention to cached latents, in both forms that MLA has (report, section 2.1.1).

A cache keeps per token the latent c_KV and the rotary key k_R, W = C + R values for all heads. From them come

    expanded   k_C = W_UK c_KV and v_C = W_UV c_KV of every head, then attention as in training;
    absorbed   q~ = W_UK^T q_C instead, so that a head's score is q~ . c_KV + q_R . k_R, and o = W_UV sum_j p_j c_KV_j:
               all heads read the same C + R values, and nothing of the cache is expanded.

The absorbed form costs a head 2C + R multiplications per query and slot where the expanded one costs N + R + V, and
saves the C (N + V) that it takes to expand a slot: it is the form for few queries, decoding above all.

What is cached lies in segments: pieces that were allocated one after the other, and prefixes that many rows share. A
segment is read where it lies. There are two ways to one softmax over all of them:

    many queries    each segment by torch's fused kernel, which keeps no scores but tells their log-sum-exp L_i; then
                    o = sum_i exp(L_i - L) o_i with L = log sum_i exp L_i. A prefix is one product for all rows that
                    share it, and of new tokens the half above the diagonal is left out;
    few queries     scores of all segments are put side by side.

Shapes: B rows, S queries of a row, H heads, C latent width, R rotary width, N key width without position, V value
width, W = C + R, G rows of a segment, T slots of a segment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dsv3.ops.attention import Positions

# Scores that are in memory at a time; beyond it, queries are taken in slices.
_MOST_SCORES = 1 << 25
# What a multiplication of the expanded form takes over one of the absorbed form, as keys and values are written and
# read once more: measured on a CPU for three widths of heads and three contexts, where it lies between 1.1 and 1.5.
_EXPANDED_COST = 1.25
# New tokens of a row from which the fused kernel is quicker than scores in memory.
_FUSED_QUERIES = 8
# Keys and values that the fused kernel is given at a time; beyond it, rows of a segment are taken in slices.
_MOST_EXPANDED = 1 << 26


class Segment(NamedTuple):
    """Cached latents, and the rows that attend to them.

    Attributes:
        latent_GTW: Latents and rotary keys, ``[G, T, W]``.
        first_row: The first of the rows that attend to them.
        branches: How many rows share each of the G: row ``first_row + g * branches + j`` attends to g.
        column: Where the segment's T slots stand among all that a row attends to.
        mask: What is added to the scores, 0 or minus infinity, ``[G * branches or 1, S or 1, T]``; None for nothing.
        is_causal: The mask is that of S new tokens, each of which attends to itself and the new ones before it.
        num_queries: New tokens of its rows at most, where that is known to be less than S: the others are padding.
    """

    latent_GTW: Tensor
    first_row: int
    branches: int
    column: int
    mask: Tensor | None
    is_causal: bool = False
    num_queries: int | None = None

    @property
    def rows(self) -> slice:
        """The rows that attend to the segment."""
        return slice(self.first_row, self.first_row + self.latent_GTW.shape[0] * self.branches)

    @property
    def columns(self) -> slice:
        """The columns of its scores."""
        return slice(self.column, self.column + self.latent_GTW.shape[1])


class LayerCache(Protocol):
    """What attention asks of a layer's cache.

    Rows of different lengths come packed, all tokens behind one another as one row ``[1, T, *]``; attention alone
    needs them side by side.
    """

    @property
    def num_queries(self) -> int:
        """S, the most new tokens that a row has."""

    def append(self, latent_BSW: Tensor) -> Sequence[Segment] | None:
        """Keep the latents of new tokens.

        Args:
            latent_BSW: Latents and rotary keys of each row's new tokens, ``[B, S, W]`` or packed.

        Returns:
            What the new tokens attend to, themselves included; None where there is nothing but themselves.
        """

    def unpack(self, x: Tensor) -> Tensor:
        """Put packed rows side by side: ``[1, T, *]`` to ``[B, S, *]``, padded at the end by chance values."""

    def pack(self, x_BS: Tensor) -> Tensor:
        """Undo :meth:`unpack`."""


class ModelCache(Protocol):
    """What a model asks of the cache that one forward pass extends."""

    @property
    def positions(self) -> Positions:
        """Where the new tokens stand."""

    def layer(self, index: int) -> LayerCache:
        """Return the cache of a block."""


def absorbed_is_cheaper(
    segments: Sequence[Segment], num_queries: int, *, latent_dim: int, rope_dim: int, nope_dim: int, v_head_dim: int
) -> bool:
    """Whether the absorbed form is likely to be the quicker one: multiplications, weighted by what they cost.

    ``benchmarks/generate.py --part crossover`` measures where the one becomes quicker than the other.

    Args:
        segments: What is attended to.
        num_queries: S.
        latent_dim: C.
        rope_dim: R.
        nope_dim: N.
        v_head_dim: V.

    >>> V3 = dict(latent_dim=512, rope_dim=64, nope_dim=128, v_head_dim=128)
    >>> one_text = [Segment(torch.empty(1, 4096, 576), 0, 1, 0, None)]
    >>> [absorbed_is_cheaper(one_text, queries, **V3) for queries in (1, 238, 239)]
    [True, True, False]
    """
    slots = sum(s.latent_GTW.shape[0] * s.latent_GTW.shape[1] for s in segments)
    pairs = sum(
        s.latent_GTW.shape[0] * s.latent_GTW.shape[1] * s.branches * (s.num_queries or num_queries) for s in segments
    )
    absorbed = pairs * (2 * latent_dim + rope_dim)
    expanded = pairs * (nope_dim + rope_dim + v_head_dim) + slots * latent_dim * (nope_dim + v_head_dim)
    return absorbed <= _EXPANDED_COST * expanded


def absorbed_attention(q_BSHW: Tensor, segments: Sequence[Segment], *, latent_dim: int) -> Tensor:
    """Attend with queries that W_UK^T has been applied to.

    Args:
        q_BSHW: ``[W_UK^T q_C ; q_R]`` times the softmax scale, ``[B, S, H, W]``.
        segments: What is attended to.
        latent_dim: C.

    Returns:
        ``sum_j p_j c_KV_j`` of each head, ``[B, S, H, C]``.
    """
    num_queries, num_heads = q_BSHW.shape[1:3]
    if takes_segments_apart(q_BSHW, num_queries):
        # Values are the keys' first C columns: the kernel gets the latents as both, where they lie.
        return _attend_fused(
            q_BSHW, segments, lambda latent_GTW: (latent_GTW.unsqueeze(2).expand(-1, -1, num_heads, -1),) * 2
        )[..., :latent_dim]
    # One key and value for all heads: heads are then nothing but more queries.
    out = _attend(
        q_BSHW.flatten(1, 2).unsqueeze(1),
        segments,
        lambda latent_GTW: (latent_GTW.unsqueeze(1), latent_GTW[..., :latent_dim].unsqueeze(1)),
        num_queries,
    )
    return out.squeeze(1).unflatten(1, (num_queries, num_heads))


def expanded_attention(
    q_BSHQ: Tensor, segments: Sequence[Segment], expand: Callable[[Tensor], Tensor], *, latent_dim: int, v_head_dim: int
) -> Tensor:
    """Attend with keys and values that are made from the latents again.

    Args:
        q_BSHQ: ``[q_C ; q_R]`` times the softmax scale, ``[B, S, H, N + R]``.
        segments: What is attended to.
        expand: From latents ``[G, T, C]`` to each head's key and value, ``[G, T, H, N + V]``.
        latent_dim: C.
        v_head_dim: V.

    Returns:
        ``[B, S, H, V]``.
    """

    def keys_and_values(latent_GTW: Tensor) -> tuple[Tensor, Tensor]:
        kv_GTHU = expand(latent_GTW[..., :latent_dim])
        k_GTHN, v_GTHV = kv_GTHU.split([kv_GTHU.shape[-1] - v_head_dim, v_head_dim], dim=-1)
        k_rope = latent_GTW[..., latent_dim:].unsqueeze(2).expand(-1, -1, kv_GTHU.shape[2], -1)
        return torch.cat([k_GTHN, k_rope.to(k_GTHN.dtype)], dim=-1), v_GTHV

    def by_head(latent_GTW: Tensor) -> tuple[Tensor, Tensor]:
        k_GTHQ, v_GTHV = keys_and_values(latent_GTW)
        return k_GTHQ.transpose(1, 2), v_GTHV.transpose(1, 2)

    def of_one_width(latent_GTW: Tensor) -> tuple[Tensor, Tensor]:
        k_GTHQ, v_GTHV = keys_and_values(latent_GTW)
        return _padded(k_GTHQ, width), _padded(v_GTHV, width)

    if takes_segments_apart(q_BSHQ, q_BSHQ.shape[1]):
        # Zeros behind the narrower of keys and values change nothing; the kernel wants one width.
        width = max(q_BSHQ.shape[-1], v_head_dim)
        return _attend_fused(_padded(q_BSHQ, width), segments, of_one_width)[..., :v_head_dim]
    return _attend(q_BSHQ.transpose(1, 2), segments, by_head, q_BSHQ.shape[1]).transpose(1, 2)


def _padded(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def takes_segments_apart(like: Tensor, num_queries: int) -> bool:
    """Whether each segment is read by torch's fused kernel: on a CPU, for many new tokens, without gradients.

    The log-sum-exp, which the public function does not return, comes from the operator behind it. It has no gradient.
    """
    return like.device.type == "cpu" and num_queries >= _FUSED_QUERIES and not torch.is_grad_enabled()


def _attend_fused(
    q_BSHW: Tensor, segments: Sequence[Segment], keys_and_values: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> Tensor:
    """Attend to one segment after the other, and weigh what each gives; return ``[B, S, H, W]``.

    ``keys_and_values`` makes ``[G, T, H, W]`` of a segment's latents.
    """
    out = total = None
    known = [False] * q_BSHW.shape[0]
    # The new tokens themselves come last, and every row has some.
    for segment in reversed(segments):
        for part in _of_bounded_size(segment, q_BSHW.shape[2] * q_BSHW.shape[3]):
            here = (part.rows, slice(part.num_queries))
            o_BSHW, sum_BSH1 = _fused(q_BSHW[here], part, *keys_and_values(part.latent_GTW))
            if out is None or total is None:
                out = o_BSHW.new_zeros(q_BSHW.shape)
                total = sum_BSH1.new_full((*q_BSHW.shape[:3], 1), float("-inf"))
            if not any(known[part.rows]):
                out[here], total[here] = o_BSHW, sum_BSH1
            else:
                before = total[here]
                # Of two sums of nothing, neither has a share; their difference would be nan.
                both = torch.logaddexp(before, sum_BSH1).clamp_(min=torch.finfo(sum_BSH1.dtype).min)
                out[here].mul_((before - both).exp_()).add_(o_BSHW.mul_((sum_BSH1 - both).exp_()))
                total[here] = both
            known[part.rows] = [True] * (part.rows.stop - part.rows.start)
    assert out is not None
    return out.to(q_BSHW.dtype)


def _fused(q_BSHW: Tensor, segment: Segment, k_GTHW: Tensor, v_GTHW: Tensor) -> tuple[Tensor, Tensor]:
    """Attend to one segment; return ``[B, S, H, W]`` and the scores' log-sum-exp ``[B, S, H, 1]``, float32 or float64.

    Queries of rows that share a prefix stand behind one another in memory, so that they are one row's without a copy.
    """
    branches, mask = segment.branches, None
    if segment.mask is not None and not segment.is_causal:
        mask = segment.mask[:, : q_BSHW.shape[1]].to(q_BSHW.dtype)
        if branches > 1:
            mask = mask.expand(q_BSHW.shape[0], q_BSHW.shape[1], -1).unflatten(0, (-1, branches)).flatten(1, 2)
        mask = mask.unsqueeze(1)
    q_GnHW = q_BSHW.unflatten(0, (-1, branches)).flatten(1, 2)
    out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(x.transpose(1, 2) for x in (q_GnHW, k_GTHW, v_GTHW)),
        is_causal=segment.is_causal,
        attn_mask=mask,
        scale=1.0,  # queries are scaled
    )
    out, logsumexp = out.transpose(1, 2).to(logsumexp.dtype), logsumexp.transpose(1, 2).unsqueeze(-1)
    if mask is not None:
        # A row that sees nothing of the segment: what the kernel makes of it is not defined.
        blind = (mask.amax(dim=-1) == float("-inf")).transpose(1, 2).unsqueeze(-1)
        out, logsumexp = out.masked_fill(blind, 0), logsumexp.masked_fill(blind, float("-inf"))
    return tuple(x.unflatten(1, (branches, -1)).flatten(0, 1) for x in (out, logsumexp))


def _of_bounded_size(segment: Segment, width: int) -> Iterator[Segment]:
    """Take a segment's rows in slices where keys or values of ``width`` numbers a slot would be too many."""
    rows, slots = segment.latent_GTW.shape[:2]
    step = max(1, _MOST_EXPANDED // max(1, slots * width))
    if step >= rows:
        yield segment
        return
    for start in range(0, rows, step):
        first, stop = start * segment.branches, (start + step) * segment.branches
        mask = segment.mask
        yield segment._replace(
            latent_GTW=segment.latent_GTW[start : start + step],
            first_row=segment.first_row + first,
            mask=mask if mask is None or mask.shape[0] == 1 else mask[first:stop],
        )


def _attend(
    q_BJMW: Tensor,
    segments: Sequence[Segment],
    keys_and_values: Callable[[Tensor], tuple[Tensor, Tensor]],
    num_queries: int,
) -> Tensor:
    """Attend with J kinds of keys and M = S * (H / J) queries of each, S outermost; return ``[B, J, M, value width]``.

    ``keys_and_values`` makes ``[G, J, T, width]`` of a segment's latents.
    """
    parts = [keys_and_values(segment.latent_GTW) for segment in segments]
    num_columns = max(segment.columns.stop for segment in segments)
    heads = q_BJMW.shape[2] // num_queries
    step = max(1, _MOST_SCORES // (q_BJMW.shape[0] * q_BJMW.shape[1] * heads * num_columns))
    if step >= num_queries:
        return _attend_slice(q_BJMW, segments, parts, slice(0, num_queries), num_columns)
    outs = []
    for start in range(0, num_queries, step):
        queries = slice(start, min(start + step, num_queries))
        q = q_BJMW[:, :, queries.start * heads : queries.stop * heads]
        outs.append(_attend_slice(q, segments, parts, queries, num_columns))
    return torch.cat(outs, dim=2)


def _attend_slice(
    q_BJMW: Tensor,
    segments: Sequence[Segment],
    parts: Sequence[tuple[Tensor, Tensor]],
    queries: slice,
    num_columns: int,
) -> Tensor:
    pieces = []
    for segment, (keys, _) in zip(segments, parts, strict=True):
        s_BJMT = _ungrouped(_grouped(q_BJMW[segment.rows], segment) @ keys.mT, segment)
        if segment.mask is not None:
            mask = segment.mask if segment.mask.shape[1] == 1 else segment.mask[:, queries]
            by_query = s_BJMT.unflatten(2, (queries.stop - queries.start, -1))
            s_BJMT = (by_query + mask[:, None, :, None]).flatten(2, 3)
        pieces.append(s_BJMT)
    # Where every segment is every row's, scores stand side by side as they are.
    of_all = all(segment.rows == slice(0, q_BJMW.shape[0]) for segment in segments)
    if of_all:
        scores = torch.cat(pieces, dim=-1) if len(pieces) > 1 else pieces[0]
    else:
        # A row's columns of a segment that is not its own stay at minus infinity.
        scores = pieces[0].new_full((*q_BJMW.shape[:3], num_columns), float("-inf"))
        for segment, s_BJMT in zip(segments, pieces, strict=True):
            scores[segment.rows, ..., segment.columns] = s_BJMT
    p = scores.softmax(dim=-1, dtype=_softmax_dtype(scores.dtype)).to(scores.dtype)
    out = None
    for segment, (_, values) in zip(segments, parts, strict=True):
        p_BJMT = p[segment.rows, ..., segment.columns]
        o_BJMV = _ungrouped(_grouped(p_BJMT, segment) @ values, segment)
        if of_all:
            out = o_BJMV if out is None else out.add_(o_BJMV)
            continue
        if out is None:
            out = o_BJMV.new_zeros((*q_BJMW.shape[:3], o_BJMV.shape[-1]))
        out[segment.rows] += o_BJMV
    assert out is not None
    return out


def _grouped(x: Tensor, segment: Segment) -> Tensor:
    """Put the rows that share a segment's row behind one another: ``[G * n, J, M, *]`` to ``[G, J, n * M, *]``."""
    if segment.branches == 1:
        return x
    return x.unflatten(0, (-1, segment.branches)).transpose(1, 2).flatten(2, 3)


def _ungrouped(x: Tensor, segment: Segment) -> Tensor:
    """Undo :func:`_grouped`."""
    if segment.branches == 1:
        return x
    return x.unflatten(2, (segment.branches, -1)).transpose(1, 2).flatten(0, 1)


def _softmax_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32
