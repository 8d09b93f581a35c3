"""Scoring and continuing many texts with one model: every token of their prefix tree is computed once.

Nodes of the tree are taken in batches, the longest first; a batch's caches live until all that is behind it is done,
so memory holds one path of batches and not the tree. The children of a batch fork its cache: rows that go on from the
same one read it where it lies. Rows of different lengths run packed, so padding costs nothing but in attention.

Results do not depend on how nodes are put into batches, but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_dsv3.evaluation.prefix_tree import (
    Node,
    count_inputs,
    path,
    prefix_tree,
    walk,
    without_short_beginnings,
)
from lightning_dsv3.inference import Decoder, LatentCache, Sampling, extend
from lightning_dsv3.metrics import MTPAcceptance
from lightning_dsv3.model import DeepSeekV3

# Logits that are in memory at a time.
_MOST_LOGITS = 1 << 25
# A batch is cut where attention would work on more than so many times its pairs of tokens, if it is worth it.
_MOST_PADDED = 1.3
_MOST_PADDING = 100_000
# Rows that are decoded together, unless the caller says how many.
_DECODED_ROWS = 64


@dataclass
class TokenCounts:
    """Tokens that the model reads.

    Attributes:
        asked: Of all requests by themselves.
        unique: Of their prefix tree.
        computed: That the model was run on.
    """

    asked: int = 0
    unique: int = 0
    computed: int = 0

    def __str__(self) -> str:
        saved = 1 - self.computed / self.asked if self.asked else 0.0
        return f"{self.computed:,} of {self.asked:,} tokens computed, {saved:.0%} saved"


class Scored(NamedTuple):
    """A sequence, scored.

    Attributes:
        logprobs: Log-probability of each token but the first given those before, float64; nan where not asked for.
        greedy: Whether each is the likeliest.
    """

    logprobs: np.ndarray
    greedy: np.ndarray


class Engine:
    """Runs a model on many texts.

    Args:
        model: The model, in evaluation mode.
        max_rows: Rows of a batch at most; None for as many as ``max_tokens`` allows.
        max_tokens: New tokens of a batch at most, if it has more than one row.
        min_shared: A beginning of fewer tokens is run for each text that has it.

    Attributes:
        counts: Tokens so far.
    """

    def __init__(
        self, model: DeepSeekV3, *, max_rows: int | None = None, max_tokens: int = 4096, min_shared: int = 16
    ) -> None:
        self.model = model
        self.min_shared = min_shared
        self.max_rows = max_rows
        self.max_tokens = max_tokens
        self.counts = TokenCounts()

    def score(
        self, sequences: Sequence[Sequence[int]], first_scored: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Scored]]:
        """Score token sequences; yields the number of each and its scores, as soon as they are known.

        Args:
            sequences: Token ids, at least two of each, at most ``max_position_embeddings + 1``.
            first_scored: The first token of each sequence whose log-probability is wanted, 1 or more; by default all.
        """
        roots = prefix_tree(sequences)
        self.counts.asked += sum(len(sequence) - 1 for sequence in sequences)
        self.counts.unique += count_inputs(roots)
        roots = without_short_beginnings(roots, self.min_shared)
        wanted: dict[Node, int] = {}
        for node in reversed(list(walk(roots))):
            own = [1 if first_scored is None else first_scored[number] for number in node.ends]
            wanted[node] = min(own + [wanted[child] for child in node.children])
            node.logprobs = np.full(len(node.tokens), np.nan)
            node.greedy = np.zeros(len(node.tokens), dtype=bool)
        yield from self._score_behind(None, [(node, 0) for node in roots], wanted)

    def _score_behind(
        self, cache: LatentCache | None, nodes: Sequence[tuple[Node, int]], wanted: dict[Node, int]
    ) -> Iterator[tuple[int, Scored]]:
        """Score nodes that go on from rows of a cache, and all behind them."""
        yield from (result for node, _ in nodes if not node.num_inputs for result in _finished(node))
        for batch in self._batches([(node, row) for node, row in nodes if node.num_inputs]):
            forked = LatentCache(self.model.config, len(batch)) if cache is None else cache.fork([r for _, r in batch])
            hidden = self._extend(forked, [list(node.tokens[: node.num_inputs]) for node, _ in batch])
            self._score_tokens(hidden, [node for node, _ in batch], wanted)
            yield from (result for node, _ in batch for result in _finished(node))
            children = [(child, row) for row, (node, _) in enumerate(batch) for child in node.children]
            if children:
                yield from self._score_behind(forked, children, wanted)

    def _extend(self, cache: LatentCache, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Run rows of tokens; return the states of all, row by row, ``[T, D]``."""
        counts = [len(row) for row in tokens]
        longest = max(counts)
        device = self.model.head.weight.device
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in tokens], device=device)
        output = extend(self.model, cache, ids, counts)
        self.counts.computed += sum(counts)
        real = torch.arange(longest, device=device) < torch.tensor(counts, device=device).unsqueeze(1)
        return output.hidden[real]

    @torch.no_grad()
    def _score_tokens(self, hidden_TD: Tensor, nodes: Sequence[Node], wanted: dict[Node, int]) -> None:
        """Fill in the log-probabilities of what each state predicts: the node's next token, or its children's first."""
        states: list[int] = []
        targets: list[tuple[Node, int]] = []
        begin = 0
        for node in nodes:
            first = max(wanted[node] - node.depth, 1)
            states += range(begin + first - 1, begin + len(node.tokens) - 1)
            targets += [(node, index) for index in range(first, len(node.tokens))]
            for child in node.children:
                if wanted[child] <= child.depth:
                    states.append(begin + len(node.tokens) - 1)
                    targets.append((child, 0))
            begin += node.num_inputs
        if not targets:
            return
        state_P = torch.tensor(states, device=hidden_TD.device)
        token_P = torch.tensor([int(node.tokens[index]) for node, index in targets], device=hidden_TD.device)
        logprobs, greedy = [], []
        # States are in order, so those that are alike stand together and a chunk's logits are made once.
        unique_S, place_P = state_P.unique_consecutive(return_inverse=True)
        step = max(1, _MOST_LOGITS // self.model.config.vocab_size)
        for start in range(0, len(unique_S), step):
            logits_SV = self.model.head(hidden_TD[unique_S[start : start + step]]).float()
            here_P = (place_P >= start) & (place_P < start + step)
            rows_P, tokens_P = place_P[here_P] - start, token_P[here_P]
            chosen_P = logits_SV[rows_P, tokens_P]
            logprobs.append((chosen_P - logits_SV.logsumexp(dim=-1)[rows_P]).cpu())
            greedy.append((logits_SV.argmax(dim=-1)[rows_P] == tokens_P).cpu())
        values, flags = torch.cat(logprobs).double().tolist(), torch.cat(greedy).tolist()
        for (node, index), value, flag in zip(targets, values, flags, strict=True):
            node.logprobs[index], node.greedy[index] = value, flag

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        seeds: Sequence[int] | None = None,
        eos_token_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        decode: Callable[[list[int]], str] | None = None,
        num_drafts: int | None = None,
        acceptance: MTPAcceptance | None = None,
    ) -> Iterator[tuple[int, list[int]]]:
        """Continue prompts; yields the number of each and its new tokens, when it has finished.

        With drafts, prompts share nothing: the MTP modules have to see the whole of each.

        Args:
            prompts: Token ids, none of them empty.
            max_new_tokens: As in :func:`~lightning_dsv3.inference.generate`, as what follows.
            sampling: See there.
            seeds: See there.
            eos_token_ids: See there.
            stop: See there.
            decode: See there.
            num_drafts: See there.
            acceptance: See there.
        """

        def finish(
            rows: Sequence[tuple[int, Sequence[int], int]], cache: LatentCache | None, lengths: Sequence[int] | None
        ) -> Iterator[tuple[int, list[int]]]:
            """Decode rows (number, tokens left, row of the cache) together."""
            forked = None if cache is None else cache.fork([row for _, _, row in rows], lengths)
            decoder = Decoder(
                self.model,
                [tokens for _, tokens, _ in rows],
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                seeds=None if seeds is None else [seeds[number] for number, _, _ in rows],
                eos_token_ids=eos_token_ids,
                stop=stop,
                decode=decode,
                num_drafts=num_drafts,
                acceptance=acceptance,
                cache=forked,
            )
            self.counts.computed += sum(len(tokens) for _, tokens, _ in rows)
            new: list[list[int]] = [[] for _ in rows]
            for made in decoder:
                for row, tokens, finished in made:
                    new[row] += tokens
                    if finished:
                        yield rows[row][0], new[row]

        self.counts.asked += sum(map(len, prompts))
        if num_drafts is not None:
            self.counts.unique += sum(map(len, prompts))
            whole = [(number, prompt, 0) for number, prompt in enumerate(prompts)]
            for rows in self._row_batches(sorted(whole, key=lambda item: -len(item[1]))):
                yield from finish(rows, None, None)
            return
        roots = prefix_tree(prompts)
        self.counts.unique += sum(len(node.tokens) for node in walk(roots))
        roots = without_short_beginnings(roots, self.min_shared)
        yield from self._generate_behind(None, [(node, 0) for node in roots], finish)

    def _generate_behind(
        self,
        cache: LatentCache | None,
        nodes: Sequence[tuple[Node, int]],
        finish: Callable[..., Iterator[tuple[int, list[int]]]],
    ) -> Iterator[tuple[int, list[int]]]:
        """Continue the prompts that end in nodes which go on from rows of a cache, or behind them."""
        # What one prompt alone has is run by the decoder.
        leaves = [(node.ends[0], node.tokens, row) for node, row in nodes if not node.children and len(node.ends) == 1]
        for rows in self._row_batches(sorted(leaves, key=lambda item: -len(item[1])) if cache is None else leaves):
            yield from finish(rows, cache, None)
        shared = [(node, row) for node, row in nodes if node.children or len(node.ends) > 1]
        for batch in self._batches(shared):
            forked = LatentCache(self.model.config, len(batch)) if cache is None else cache.fork([r for _, r in batch])
            self._extend(forked, [list(node.tokens) for node, _ in batch])
            # A prompt that ends here has its last token read once more, to have something that predicts.
            ended = [(number, [node.tokens[-1]], row) for row, (node, _) in enumerate(batch) for number in node.ends]
            for rows in self._row_batches(ended):
                yield from finish(rows, forked, [forked.lengths[row] - 1 for _, _, row in rows])
            children = [(child, row) for row, (node, _) in enumerate(batch) for child in node.children]
            if children:
                yield from self._generate_behind(forked, children, finish)

    def _batches(self, nodes: Sequence[tuple[Node, int]]) -> Iterator[list[tuple[Node, int]]]:
        """Put nodes of like length into batches; in each, rows that go on from the same one stand together."""
        batch: list[tuple[Node, int]] = []
        tokens = attended = deepest = 0
        for node, row in sorted(nodes, key=lambda item: -len(item[0].tokens)):
            size, end = len(node.tokens), node.depth + len(node.tokens)
            # Attention alone is padded: to the longest row and the deepest.
            longest = len(batch[0][0].tokens) if batch else size
            padded = (len(batch) + 1) * longest * max(deepest, end)
            excess = padded - attended - size * end
            uneven = excess > _MOST_PADDING and padded > _MOST_PADDED * (attended + size * end)
            if batch and (tokens + size > self.max_tokens or len(batch) == self.max_rows or uneven):
                yield sorted(batch, key=lambda item: item[1])
                batch, tokens, attended, deepest = [], 0, 0, 0
            batch.append((node, row))
            tokens, attended, deepest = tokens + size, attended + size * end, max(deepest, end)
        if batch:
            yield sorted(batch, key=lambda item: item[1])

    def _row_batches(
        self, rows: Sequence[tuple[int, Sequence[int], int]]
    ) -> Iterator[Sequence[tuple[int, Sequence[int], int]]]:
        size = self.max_rows or _DECODED_ROWS
        for start in range(0, len(rows), size):
            yield rows[start : start + size]


def _finished(node: Node) -> Iterator[tuple[int, Scored]]:
    """Yield the sequences that end with a node whose tokens have been scored."""
    if not node.ends:
        return
    nodes = path(node)
    scored = Scored(
        np.concatenate([part.logprobs for part in nodes])[1:], np.concatenate([part.greedy for part in nodes])[1:]
    )
    for number in node.ends:
        yield number, scored
