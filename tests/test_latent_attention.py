"""Attention to segments of a cache against loops in float64: both forms, fused and with scores in memory."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dsv3.ops import latent_attention
from lightning_dsv3.ops.latent_attention import Segment, absorbed_attention, expanded_attention

H, C, R, N = 2, 6, 4, 5
NEVER = 10**9
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2}


def random_segments(generator, branches, num_queries, prefix, before):
    """Rows that share prefixes of which they see more or less, with tokens of their own before the new ones."""
    segments, column, first = [], 0, 0
    rows = sum(branches)
    for count in branches if prefix else ():
        # A row may see nothing at all of what it shares.
        visible = torch.randint(0, prefix + 1, (count,), generator=generator)
        mask = hidden_behind(visible[:, None], prefix) if count % 2 else None
        segments.append(Segment(latents(generator, 1, prefix), first, count, column, mask))
        first += count
    column += prefix
    seen = torch.randint(0, before + 1, (rows,), generator=generator)[:, None] + torch.arange(1, num_queries + 1)
    width = before + num_queries
    # Of two pieces of memory the first may have all that a query sees, and the second nothing.
    cut = width // 2 if before else width
    own = latents(generator, rows, width)
    for start, stop in ((0, cut), (cut, width)):
        if start < stop:
            mask = hidden_behind(seen - start, stop - start)
            segments.append(Segment(own[:, start:stop], 0, 1, column, mask, is_causal=not before))
            column += stop - start
    return segments


def latents(generator, *shape):
    return torch.randn(*shape, C + R, generator=generator, dtype=torch.float64)


def hidden_behind(visible, width):
    return torch.zeros(*visible.shape, width, dtype=torch.float64).masked_fill_(
        torch.arange(width) >= visible.unsqueeze(-1), -math.inf
    )


def by_loops(q, segments, key_and_value):
    out = []
    for row in range(q.shape[0]):
        for query in range(q.shape[1]):
            for head in range(q.shape[2]):
                scores, values = [], []
                for segment in segments:
                    if not segment.rows.start <= row < segment.rows.stop:
                        continue
                    at = row - segment.first_row
                    for slot, latent in enumerate(segment.latent_GTW[at // segment.branches]):
                        mask = segment.mask
                        if mask is not None and mask[at % mask.shape[0], query % mask.shape[1], slot] < 0:
                            continue
                        key, value = key_and_value(latent, head)
                        scores.append(q[row, query, head] @ key)
                        values.append(value)
                out.append(torch.stack(scores).softmax(0) @ torch.stack(values))
    return torch.stack(out).view(*q.shape[:3], -1)


@pytest.mark.parametrize("v_head_dim", [5, 12])
@pytest.mark.parametrize("few", [1, NEVER], ids=["fused", "scores in memory"])
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    branches=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    num_queries=st.integers(1, 5),
    prefix=st.integers(0, 5),
    before=st.integers(0, 4),
    dtype=st.sampled_from(list(TOLERANCES)),
    most=st.sampled_from([1, 1 << 20]),
)
def test_both_forms_are_the_softmax_over_all_that_a_query_sees(
    few, v_head_dim, seed, branches, num_queries, prefix, before, dtype, most
):
    generator = torch.Generator().manual_seed(seed)
    segments = random_segments(generator, branches, num_queries, prefix, before)
    up = torch.randn(H, N + v_head_dim, C, generator=generator, dtype=torch.float64)
    rows = sum(branches)
    q = torch.randn(rows, num_queries, H, N + R, generator=generator, dtype=torch.float64) / 2
    absorbed_q = torch.cat([torch.einsum("bshn,hnc->bshc", q[..., :N], up[:, :N]), q[..., N:]], dim=-1)
    expected = by_loops(
        q,
        segments,
        lambda latent, head: (torch.cat([up[head, :N] @ latent[:C], latent[C:]]), up[head, N:] @ latent[:C]),
    )

    cast = [
        s._replace(latent_GTW=s.latent_GTW.to(dtype), mask=s.mask if s.mask is None else s.mask.to(dtype))
        for s in segments
    ]
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(latent_attention, "_FUSED_QUERIES", few)
        patch.setattr(latent_attention, "_MOST_EXPANDED", most)
        expanded = expanded_attention(
            q.to(dtype),
            cast,
            lambda latent: torch.einsum("gtc,huc->gthu", latent, up.to(dtype)),
            latent_dim=C,
            v_head_dim=v_head_dim,
        )
        absorbed = absorbed_attention(absorbed_q.to(dtype), cast, latent_dim=C)
    for form, out in (
        ("expanded", expanded),
        ("absorbed", torch.einsum("bshc,hvc->bshv", absorbed, up[:, N:].to(dtype))),
    ):
        assert out.dtype == dtype
        error = (out.double() - expected).abs().max() / expected.abs().max()
        assert error < TOLERANCES[dtype], form


def test_the_fused_kernel_is_for_many_queries_without_gradients(monkeypatch):
    called = []
    fused = latent_attention._attend_fused
    monkeypatch.setattr(latent_attention, "_attend_fused", lambda *a: called.append(a[0].shape[1]) or fused(*a))
    many = latent_attention._FUSED_QUERIES
    for queries in (many - 1, many):
        segments = random_segments(torch.Generator().manual_seed(0), [2], queries, 4, 0)
        q = torch.randn(2, queries, H, C + R, dtype=torch.float64, requires_grad=True)
        absorbed_attention(q, segments, latent_dim=C).sum().backward()
        assert q.grad is not None
        with torch.no_grad():
            absorbed_attention(q, segments, latent_dim=C)
    assert called == [many]
