"""Scoring and continuing many texts with one model: every token of their prefix tree is computed once.

Nodes of the tree are taken in batches, the longest first; a batch's caches live until all that is behind it is done,
so memory holds one path of batches and not the tree. The children of a batch fork its cache: rows that go on from the
same one read it where it lies. Rows of different lengths run packed, so padding costs nothing but in attention.

Results do not depend on how nodes are put into batches, but for rounding. So a batch that memory does not hold is run
in halves, and those that come after it are smaller.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from lightning_dsv3.evaluation.prefix_tree import (
    Node,
    count_inputs,
    path,
    prefix_tree,
    walk,
    without_short_runs,
)
from lightning_dsv3.inference import Decoder, LatentCache, Sampling
from lightning_dsv3.inference.cache import extend_rows
from lightning_dsv3.metrics import MTPAcceptance
from lightning_dsv3.model import DeepSeekV3

_log = logging.getLogger(__name__)
T = TypeVar("T")

# Logits that are in memory at a time; on a CPU so few that memory is used again and not fetched anew.
_MOST_LOGITS = {"cpu": 1 << 22}
_MOST_LOGITS_ELSEWHERE = 1 << 25
# A batch is cut where its rows, padded to the longest, would be so many times its tokens, if it is worth it. On a CPU
# attention takes rows of like length together, and only copies are padded.
_MOST_PADDED = {"cpu": 4.0}
_MOST_PADDED_ELSEWHERE = 1.3
_MOST_PADDING = 1024
# Rows that are decoded together, unless the caller says how many.
_DECODED_ROWS = 64
# Of the tree's tokens, one in so many may be read more often than once where that saves passes of few tokens.
_ONE_REPEATED_IN = 25

# A prompt to decode: its number, the tokens of it that are left, and the row of the cache that holds those before.
_Prompt = tuple[int, Sequence[int], int]


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
        max_tokens: New tokens of a batch at most, if it has more than one row. Halved where memory runs out.
        min_shared: Tokens that texts have in common are run once if they are as many; fewer where it costs little.

    Attributes:
        counts: Tokens so far.
    """

    def __init__(
        self, model: DeepSeekV3, *, max_rows: int | None = None, max_tokens: int = 8192, min_shared: int = 16
    ) -> None:
        self.model = model
        self.min_shared = min_shared
        self.max_rows = max_rows
        self.max_tokens = max_tokens
        self.counts = TokenCounts()
        self._decoded_rows = _DECODED_ROWS
        self._most_padded = _MOST_PADDED.get(model.head.weight.device.type, _MOST_PADDED_ELSEWHERE)
        self._has_said_so = False

    def score(
        self, sequences: Sequence[Sequence[int]], first_scored: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Scored]]:
        """Score token sequences; yields the number of each and its scores, as soon as they are known.

        Args:
            sequences: Token ids, at least two of each, at most ``max_position_embeddings + 1``.
            first_scored: The first token of each sequence whose log-probability is wanted, 1 or more; by default all.
        """
        roots = prefix_tree(sequences)
        unique = count_inputs(roots)
        self.counts.asked += sum(len(sequence) - 1 for sequence in sequences)
        self.counts.unique += unique
        roots = without_short_runs(roots, self.min_shared, unique // _ONE_REPEATED_IN)
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

        def run(batch: Sequence[tuple[Node, int]]) -> LatentCache:
            forked = LatentCache(self.model.config, len(batch)) if cache is None else cache.fork([r for _, r in batch])
            hidden = self._extend(forked, [list(node.tokens[: node.num_inputs]) for node, _ in batch])
            self._score_tokens(hidden, [node for node, _ in batch], wanted)
            return forked

        yield from (result for node, _ in nodes if not node.num_inputs for result in _finished(node))
        for batch, forked in self._passes([(node, row) for node, row in nodes if node.num_inputs], run):
            yield from (result for node, _ in batch for result in _finished(node))
            children = [(child, row) for row, (node, _) in enumerate(batch) for child in node.children]
            if children:
                yield from self._score_behind(forked, children, wanted)

    def _extend(self, cache: LatentCache, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Run rows of tokens; return the states of all, row by row, ``[T, D]``."""
        hidden = extend_rows(self.model, cache, tokens)
        self.counts.computed += len(hidden)
        return hidden

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
        most = _MOST_LOGITS.get(hidden_TD.device.type, _MOST_LOGITS_ELSEWHERE)
        step = max(1, most // self.model.config.vocab_size)
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
            rows: Sequence[_Prompt], cache: LatentCache | None, is_whole: bool = False
        ) -> Iterator[tuple[int, list[int]]]:
            """Decode rows together. If the cache has the whole of them, their last token is read once more."""
            lengths = [cache.lengths[row] - is_whole for _, _, row in rows] if cache is not None else None
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
            yield from self._decode(sorted(whole, key=_longest_first), partial(finish, cache=None))
            return
        roots = prefix_tree(prompts)
        unique = sum(len(node.tokens) for node in walk(roots))
        self.counts.unique += unique
        roots = without_short_runs(roots, self.min_shared, unique // _ONE_REPEATED_IN)
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
        leaves = sorted(leaves, key=_longest_first) if cache is None else leaves
        yield from self._decode(leaves, partial(finish, cache=cache))

        def run(batch: Sequence[tuple[Node, int]]) -> LatentCache:
            forked = LatentCache(self.model.config, len(batch)) if cache is None else cache.fork([r for _, r in batch])
            self._extend(forked, [list(node.tokens) for node, _ in batch])
            return forked

        shared = [(node, row) for node, row in nodes if node.children or len(node.ends) > 1]
        for batch, forked in self._passes(shared, run):
            # A prompt that ends here has its last token read once more, to have something that predicts.
            ended = [(number, [node.tokens[-1]], row) for row, (node, _) in enumerate(batch) for number in node.ends]
            yield from self._decode(ended, partial(finish, cache=forked, is_whole=True))
            children = [(child, row) for row, (node, _) in enumerate(batch) for child in node.children]
            if children:
                yield from self._generate_behind(forked, children, finish)

    def _passes(
        self, nodes: Sequence[tuple[Node, int]], run: Callable[[Sequence[tuple[Node, int]]], T]
    ) -> Iterator[tuple[Sequence[tuple[Node, int]], T]]:
        """Run nodes in batches; yield each batch and what came of it. What memory does not hold is run in halves."""
        for batch in self._batches(nodes):
            waiting: list[Sequence[tuple[Node, int]]] = [batch]
            while waiting:
                part = waiting.pop()
                try:
                    result = run(part)
                except torch.OutOfMemoryError:
                    if len(part) == 1:
                        raise
                    waiting += [part[len(part) // 2 :], part[: len(part) // 2]]
                else:
                    yield part, result
                    continue
                # Here, as the exception holds what has failed until it is left.
                self._take_less(sum(len(node.tokens) for node, _ in part) // 2)

    def _decode(
        self, rows: Sequence[_Prompt], finish: Callable[[Sequence[_Prompt]], Iterator[tuple[int, list[int]]]]
    ) -> Iterator[tuple[int, list[int]]]:
        """Decode rows, as many together as memory holds. What has finished before it ran out is not done again."""
        waiting = list(rows)
        while waiting:
            part = waiting[: self.max_rows or self._decoded_rows]
            finished, held = set(), True
            try:
                for number, tokens in finish(part):
                    finished.add(number)
                    yield number, tokens
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise
                held = False
            waiting = [*(row for row in part if not held and row[0] not in finished), *waiting[len(part) :]]
            if not held:
                self._decoded_rows = len(part) // 2
                self.max_rows = None if self.max_rows is None else self._decoded_rows
                self._take_less(self.max_tokens)

    def _take_less(self, max_tokens: int) -> None:
        """Go on after memory has run out."""
        self.max_tokens = max(1, min(self.max_tokens, max_tokens))
        torch.cuda.empty_cache()
        if not self._has_said_so:
            _log.warning("memory does not hold a batch: going on with smaller ones; what has been computed is kept")
        self._has_said_so = True

    def _batches(self, nodes: Sequence[tuple[Node, int]]) -> Iterator[list[tuple[Node, int]]]:
        """Put nodes of like length into batches; in each, rows that go on from the same one stand together."""
        batch: list[tuple[Node, int]] = []
        tokens, left, most = 0, sum(max(1, node.num_inputs) for node, _ in nodes), 0.0
        for node, row in sorted(nodes, key=lambda item: -len(item[0].tokens)):
            size = max(1, node.num_inputs)
            if batch and (tokens + size > most or len(batch) == self.max_rows or self._is_uneven(batch, tokens, size)):
                yield sorted(batch, key=lambda item: item[1])
                batch, tokens, left = [], 0, left - tokens
            if not batch:
                # No more than may be, and so that no small batch is left over.
                most = left / math.ceil(left / self.max_tokens)
            batch.append((node, row))
            tokens += size
        if batch:
            yield sorted(batch, key=lambda item: item[1])

    def _is_uneven(self, batch: Sequence[tuple[Node, int]], tokens: int, size: int) -> bool:
        """Whether a batch, the longest row of which comes first, is padded too much if a row of ``size`` joins it."""
        padded = (len(batch) + 1) * len(batch[0][0].tokens)
        return padded - tokens - size > _MOST_PADDING and padded > self._most_padded * (tokens + size)


def _longest_first(prompt: _Prompt) -> int:
    return -len(prompt[1])


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
