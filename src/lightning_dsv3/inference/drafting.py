"""Drafts from the MTP modules (report, sections 2.2 and 5.4.3).

When the tokens t_0 .. t_m are known, and so the main model's states h^0 up to position m - 1, module k's state at
position i is h^k_i = TRM_k(M_k [Emb(t_{i+k}) ; h^{k-1}_i]), and the head predicts t_{i+k+1} from it. At position m - 1

    module 1 reads t_m and drafts d_1, the token m + 1,
    module 2 reads d_1 and drafts d_2,    ...    module D reads d_{D-1} and drafts d_D;
    module D again, one position on, with its own last state in place of h^{D-1}, reads d_D and drafts d_{D+1}, ...

A module has a latent cache of its own, of the positions i whose token i + k is known: m - k + 1 of them. What it
computed with drafts is forgotten at once, as they may fail; the positions are then computed again with what took their
place. The first of these needs h^{k-1} at the last position that module k - 1 did not forget: that one is carried over.

Shapes: B rows, S positions, D model, V vocabulary, K drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dsv3.inference.cache import LatentCache
from lightning_dsv3.model import DeepSeekV3, DeepSeekV3Output


class Choice(NamedTuple):
    """A token of each row.

    Attributes:
        token: int64 ``[B]``.
        distribution: What it was drawn from, float32 ``[B, V]``; None if it is the likeliest.
    """

    token: Tensor
    distribution: Tensor | None


class Drafts(NamedTuple):
    """Drafts of each row.

    Attributes:
        tokens: int64 ``[B, K]``.
        distributions: What they were drawn from, float32 ``[B, K, V]``; None if they are the likeliest.
    """

    tokens: Tensor
    distributions: Tensor | None


class MTPDrafter:
    """Keeps the MTP modules' caches beside the main model's, and drafts.

    Args:
        model: A model with MTP modules.
        batch_size: B.
        num_drafts: K; beyond the number of modules the last one is used again.

    Raises:
        ValueError: A model without MTP modules.
    """

    def __init__(self, model: DeepSeekV3, batch_size: int, num_drafts: int) -> None:
        if not len(model.mtp):
            raise ValueError(
                "speculative=True: the model has no MTP module to draft with (num_nextn_predict_layers=0); "
                "generate with speculative=False"
            )
        self.num_drafts = num_drafts
        self.depth = min(len(model.mtp), num_drafts)
        self._model = model
        self._caches = [LatentCache(model.config, batch_size, num_layers=1) for _ in range(self.depth)]
        self._carried: list[Tensor] = []  # of modules 2, 3, ...: h^{k-1} at their first position, [B, 1, D]

    def states(self, output: DeepSeekV3Output) -> Tensor:
        """Return the states that the first module reads, ``[B, S, D]``."""
        return output.hidden if self._model.config.mtp_input_state == "final_norm" else output.residual

    def select(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows."""
        self._caches = [cache.select(rows) for cache in self._caches]
        self._carried = [carried[list(rows)] for carried in self._carried]

    @torch.no_grad()
    def draft(
        self, states: Tensor, next_tokens: Tensor, num_known: Sequence[int], choose: Callable[[Tensor], Choice]
    ) -> Drafts:
        """Take in what has become known, and draft what may follow.

        Args:
            states: The main model's states of the positions since the last call, ``[B, S, D]``, of :meth:`states`. At
                the first call a row has at least as many as there are modules.
            next_tokens: The token behind each of these positions, int64 ``[B, S]``.
            num_known: How many of the S are a row's, at least 1.
            choose: Chooses from logits ``[B, V]``.
        """
        is_first = not self._carried and not any(self._caches[0].lengths)
        hidden, counts, tokens = states, list(num_known), next_tokens
        chosen: list[Choice] = []
        carried, kept = [], []
        for k in range(1, self.depth + 1):
            if k > 1:
                tokens = _append(tokens, [n + k - 2 for n in num_known], chosen[-1].token)
                if not is_first:
                    hidden, counts = torch.cat([self._carried[k - 2], hidden], dim=1), [n + 1 for n in counts]
            begin = self._caches[k - 1].lengths
            read = tokens[:, k - 1 :] if is_first else tokens
            before, after = self._run(k, hidden, read, counts)
            hidden = after if self._model.config.mtp_chain_state == "post_norm" else before
            chosen.append(choose(self._model.head(_column(after, [n - 1 for n in counts]).squeeze(1))))
            # Of the tokens that were read the last k - 1 are drafts.
            kept.append([b + n - (k - 1) for b, n in zip(begin, counts, strict=True)])
            carried.append(_column(hidden, [n - k for n in counts]))
        self._chain(_column(hidden, [n - 1 for n in counts]), chosen, choose)
        self._carried = carried[:-1]
        for cache, lengths in zip(self._caches, kept, strict=True):
            cache.truncate(lengths)
        distributions = [choice.distribution for choice in chosen if choice.distribution is not None]
        return Drafts(
            torch.stack([choice.token for choice in chosen], dim=1),
            torch.stack(distributions, dim=1) if distributions else None,
        )

    def _chain(self, hidden: Tensor, chosen: list[Choice], choose: Callable[[Tensor], Choice]) -> None:
        """Use the last module again, from its state at the last position, for the drafts that are still wanted."""
        most = self._model.config.max_position_embeddings
        while len(chosen) < self.num_drafts:
            # At the very end of the context a row has no further position; its draft is not asked for.
            counts = [int(length < most) for length in self._caches[-1].lengths]
            if not any(counts):
                chosen.append(chosen[-1])
                continue
            before, after = self._run(self.depth, hidden, chosen[-1].token.unsqueeze(1), counts)
            hidden = after if self._model.config.mtp_chain_state == "post_norm" else before
            chosen.append(choose(self._model.head(after.squeeze(1))))

    def _run(self, k: int, hidden: Tensor, tokens: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Run module k on positions that follow those in its cache; return its states before and after its norm."""
        extension = self._caches[k - 1].prepare(hidden.shape[1], counts).on(hidden.device)
        with torch.compiler.set_stance("force_eager"):
            hidden, embedding = extension.pack(hidden), self._model.embedding(extension.pack(tokens))
            before, after, _ = self._model.mtp[k - 1](hidden, embedding, extension.positions, extension.layer(0))
        extension.commit()
        return extension.unpack(before), extension.unpack(after)


def _append(tokens: Tensor, counts: Sequence[int], token: Tensor) -> Tensor:
    """Put a token behind the ``counts`` first of each row: ``[B, S]`` to ``[B, S + 1]``."""
    wider = torch.cat([tokens, tokens.new_zeros(tokens.shape[0], 1)], dim=1)
    return wider.scatter_(1, torch.tensor(list(counts), device=tokens.device).unsqueeze(1), token.unsqueeze(1))


def _column(x: Tensor, index: Sequence[int]) -> Tensor:
    """Return one position of each row: ``[B, S, D]`` to ``[B, 1, D]``."""
    row = torch.arange(x.shape[0], device=x.device)
    return x[row, torch.tensor(list(index), device=x.device)].unsqueeze(1)
