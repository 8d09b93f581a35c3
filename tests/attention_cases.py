"""What tests of attention share: operands, a plain loop, and what stands in for kernels that cannot run here."""

from __future__ import annotations

import contextlib
import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from lightning_dsv3.ops import backends
from lightning_dsv3.ops.backends import forced_kernels
from lightning_dsv3.ops.documents import Documents

# Relative error of a tensor: sums over a row in another order; in bfloat16 also probabilities of 8 bits.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
WIDTHS = [(24, 16), (16, 24), (16, 16)]
SCALE = 0.3
HALF = (torch.bfloat16, torch.float16)


def numbers(*rows: list[int], device: str = "cpu") -> Tensor:
    """Document numbers of rows that are made of documents of these lengths."""
    parts = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows]
    return torch.stack(parts).to(device)


# One row of one document, one that ends with a document of one token, and one where two of them meet.
LAYOUTS = {"packed": numbers([150], [40, 109, 1], [1, 1, 126, 3, 19]), "whole": None}
rows_of_one_length = st.integers(1, 23).flatmap(
    lambda length: st.lists(
        st.sets(st.integers(1, max(1, length - 1))).map(
            lambda cuts: np.diff([0, *sorted(cut for cut in cuts if cut < length), length]).tolist()
        ),
        min_size=1, max_size=3,
    )
)  # fmt: skip


def operands(
    widths: tuple[int, int], dtype: torch.dtype, batch: int = 3, length: int = 150, device: str = "cpu"
) -> list[Tensor]:
    """Queries, keys and values as ``latent_heads`` leaves them: heads beside their positions in memory."""
    qk, v = widths
    generator = torch.Generator().manual_seed(1)
    made = (torch.randn(batch, length, 2, width, generator=generator, dtype=torch.float64) for width in (qk, qk, v))
    return [x.to(device, dtype).transpose(1, 2).requires_grad_() for x in made]


def documents_of(layout: str, device: str = "cpu") -> Documents | None:
    number = LAYOUTS[layout]
    return None if number is None else Documents(number.to(device))


def with_gradients(kernel: Callable[..., Tensor], tensors: list[Tensor], made: Documents | None) -> list[Tensor]:
    """Output and gradients of a kernel, in float64."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = kernel(*leaves, SCALE, made)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view(out.shape)
    (out.double() * weight).sum().backward()
    return [out.detach().double(), *(x.grad.double() for x in leaves)]


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm())


def assert_close(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    for name, mine, other in zip(("out", "q", "k", "v"), ours, theirs, strict=True):
        assert mine.shape == other.shape
        assert relative_error(mine, other) < tolerance, name


def each_document_alone(q: Tensor, k: Tensor, v: Tensor, scale: float, number: Tensor | None) -> Tensor:
    """Attention by two loops, over rows and over documents."""
    if number is None:
        number = torch.zeros(q.shape[0], q.shape[2], dtype=torch.int64)
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for row, ids in enumerate(number.tolist()):
        start = 0
        for _, group in itertools.groupby(ids):
            part = (row, slice(None), slice(start, start := start + len(list(group))))
            scores = torch.einsum("hqd,hkd->hqk", q[part], k[part]) * scale
            visible = torch.ones(scores.shape[-2:]).tril().bool()
            out[part] = scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v[part]
    return out


@contextlib.contextmanager
def flex_on_the_cpu() -> Iterator[None]:
    """Let flex_attention take gradients on a CPU, where its form that stores all scores has them but is refused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
        patch.setitem(backends._RULES, ("attention", "flex"), lambda case: None)
        torch.compiler.reset()
        with forced_kernels():  # a table of choices of its own
            yield
        torch.compiler.reset()


class Flash3(types.ModuleType):
    """Stands in for ``flash_attn_interface``: its two functions' signatures, what its C++ checks, the plain formula.

    As the releases before April 2025 it has no backward for two widths, and returns the sums' logarithms as well.
    """

    def __init__(self, *, returns_sums: bool = False) -> None:
        super().__init__("flash_attn_interface")
        self.returns_sums = returns_sums
        self.calls: list[dict[str, Any]] = []

    def flash_attn_func(
        self, q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        batch, length = q.shape[:2]
        starts = torch.arange(0, batch * length + 1, length, dtype=torch.int32)
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        return self._attend(*flat, starts, softmax_scale, causal, (batch, length), deterministic=deterministic)

    def flash_attn_varlen_func(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        assert type(max_seqlen_q) is type(max_seqlen_k) is int
        assert max_seqlen_q == max_seqlen_k >= int(cu_seqlens_q.diff().max())
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert all(x.dim() == 3 for x in (q, k, v))
        return self._attend(q, k, v, cu_seqlens_q, softmax_scale, causal, None, deterministic=deterministic)

    def _attend(self, q, k, v, starts, scale, causal, rows, *, deterministic):
        assert q.dtype == k.dtype == v.dtype
        assert q.dtype in HALF
        assert all(x.stride(-1) == 1 and x.shape[-1] % 8 == 0 for x in (q, k, v))
        assert starts.dtype == torch.int32
        assert starts.is_contiguous()
        assert (int(starts[0]), int(starts[-1])) == (0, q.shape[0])
        assert causal
        qk_dim, v_dim = q.shape[-1], v.shape[-1]
        if qk_dim != v_dim:
            assert (128 < qk_dim <= 192 and 96 < v_dim <= 128) or qk_dim <= 64, "unequal widths"
        self.calls.append({"widths": (qk_dim, v_dim), "sequences": len(starts) - 1, "deterministic": deterministic})
        q, k, v = (x.float() for x in (q, k, v))
        parts = [
            each_document_alone(*(x[a:b].transpose(0, 1)[None] for x in (q, k, v)), scale, None)[0].transpose(0, 1)
            for a, b in itertools.pairwise(starts.tolist())
        ]
        out = torch.cat(parts)
        if out.requires_grad and qk_dim != v_dim:
            out.register_hook(self._refuse)
        out = out.bfloat16() if rows is None else out.unflatten(0, rows).bfloat16()
        return (out, torch.empty(0)) if self.returns_sums else out

    @staticmethod
    def _refuse(grad: Tensor) -> None:
        raise RuntimeError("out must have shape (batch_size, seqlen_q, num_heads, head_size)")
