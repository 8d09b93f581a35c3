"""Choosing tokens: distributions, draws that belong to a row, and the test that drafts must pass.

Speculative decoding (arXiv 2211.17192) accepts a draft d that was drawn from q with probability min(1, p(d) / q(d)),
and draws from the normalised rest max(p - q, 0) in place of the first that fails. What comes out is distributed as p.
Greedy decoding is the case where both are one token: a draft passes if it is the likeliest one.

Shapes: B rows, V vocabulary, K drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a distribution is made of logits.

    Attributes:
        temperature: Logits are divided by it; above 0.
        top_k: Only so many of the likeliest tokens, and those as likely as the last of them; None for all.
        top_p: Only the likeliest tokens that together have this probability, and at least one; 1 for all.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"temperature={self.temperature}: must be above 0; for the likeliest token do_sample=False"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: must be at least 1, or None for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be above 0 and at most 1")

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return float32 probabilities ``[..., V]``; first ``top_k``, then ``top_p`` of what is left.

        >>> Sampling(top_p=0.6).probabilities(torch.tensor([0.5, 0.3, 0.2]).log())
        tensor([0.6250, 0.3750, 0.0000])
        """
        logits = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        p = logits.softmax(dim=-1)
        if self.top_p < 1:
            ordered, index = p.sort(dim=-1, descending=True, stable=True)
            # A token stays if those before it do not have top_p yet.
            beyond = ordered.cumsum(dim=-1) - ordered >= self.top_p
            beyond[..., 0] = False
            p = torch.zeros_like(p).scatter(-1, index, ordered.masked_fill(beyond, 0.0))
            p = p / p.sum(dim=-1, keepdim=True)
        return p


class RowRandomness:
    """Random numbers of each row, from a seed of its own: what a row draws does not depend on its neighbours.

    Args:
        seeds: One per row.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def uniform(self, count: int, device: torch.device) -> Tensor:
        """Return ``count`` numbers from [0, 1) for each row, float64 ``[B, count]``."""
        numbers = [torch.rand(count, generator=g, dtype=torch.float64) for g in self._generators]
        return torch.stack(numbers).to(device)

    def select(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows."""
        self._generators = [self._generators[row] for row in rows]


def draw(p: Tensor, uniform: Tensor) -> Tensor:
    """Draw a token from each distribution by the inverse of its cumulative sum.

    Args:
        p: Weights ``[..., V]``, at least one above 0; they need not sum to 1.
        uniform: Numbers from [0, 1), ``[...]``.

    Returns:
        Tokens, int64 ``[...]``; never one of weight 0.

    >>> draw(torch.tensor([0.0, 1.0, 0.0, 3.0]).expand(3, -1), torch.tensor([0.0, 0.24, 0.26]))
    tensor([1, 1, 3])
    """
    cumulative = p.to(torch.float64).cumsum(dim=-1)
    point = uniform.to(torch.float64).unsqueeze(-1) * cumulative[..., -1:]
    token = torch.searchsorted(cumulative, point, right=True).squeeze(-1)
    # Rounding may put the point on the end itself: the last token that has any weight.
    last = (cumulative < cumulative[..., -1:]).sum(dim=-1)
    return torch.minimum(token, last)


class Verdict(NamedTuple):
    """What became of drafts.

    Attributes:
        accepted: How many of each row's drafts stand, int64 ``[B]``.
        token: The token behind them, int64 ``[B]``.
    """

    accepted: Tensor
    token: Tensor


def verify_greedy(logits: Tensor, drafts: Tensor, num_drafts: Tensor) -> Verdict:
    """Accept drafts while they are the likeliest tokens.

    Args:
        logits: The main model's at the token before each draft and at the last draft, ``[B, K + 1, V]``.
        drafts: int64 ``[B, K]``.
        num_drafts: How many of them are a row's, int64 ``[B]``.
    """
    best = logits.argmax(dim=-1)
    accepted = _leading(drafts == best[:, :-1], num_drafts)
    return Verdict(accepted, best.gather(1, accepted.unsqueeze(1)).squeeze(1))


def verify_sampled(p: Tensor, q: Tensor, drafts: Tensor, num_drafts: Tensor, uniform: Tensor) -> Verdict:
    """Accept drafts so that what comes out is distributed as the main model's tokens.

    Args:
        p: The main model's distributions at the token before each draft and at the last draft, ``[B, K + 1, V]``.
        q: Distributions that the drafts were drawn from, ``[B, K, V]``.
        drafts: int64 ``[B, K]``.
        num_drafts: How many of them are a row's, int64 ``[B]``.
        uniform: Numbers from [0, 1), ``[B, K + 1]``.
    """
    chosen = drafts.unsqueeze(-1)
    p_d, q_d = (x.gather(-1, chosen).squeeze(-1) for x in (p[:, :-1], q))
    accepted = _leading(uniform[:, :-1] * q_d < p_d, num_drafts)
    row = torch.arange(p.shape[0], device=p.device)
    rest = p[row, accepted]
    if q.shape[1]:
        last = accepted.clamp(max=q.shape[1] - 1)
        failed = (accepted < num_drafts).unsqueeze(-1)
        rest = torch.where(failed, (rest - q[row, last]).clamp(min=0), rest)
    return Verdict(accepted, draw(rest, uniform[:, -1]))


def _leading(passed: Tensor, num_drafts: Tensor) -> Tensor:
    """Count the drafts before the first that fails."""
    real = torch.arange(passed.shape[1], device=passed.device) < num_drafts.unsqueeze(1)
    return (passed & real).to(torch.int64).cumprod(dim=1).sum(dim=1)
