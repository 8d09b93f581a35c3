"""The latent KV cache: kv_lora_rank + qk_rope_head_dim values per token and layer (report, section 2.1.1; V3: 576).

Rows are texts, each with a length of its own. The token at position p of a row lies p slots after the row's first, and
whatever lies behind a row's length is never read, so that

- ragged prompts, padded at the end, need no more than their lengths;
- ``truncate`` moves nothing: drafts that were not accepted are overwritten by what comes next;
- a pass that fails half-way leaves the cache as it was.

It grows by chunks, each at least half as large as all before it: nothing is copied, and there are few to read.

``fork`` makes a cache whose rows go on from rows of this one, any number of them from each. They read the common
prefix where it lies, and add to chunks of their own. A fork of a fork does the same.

    cache = LatentCache(model.config, batch_size=2)
    output = extend(model, cache, prompts, num_tokens=[5, 7])           # prompts [2, 7]
    branches = cache.fork([0, 0, 0, 1])                                 # four rows, from two prompts
    output = extend(model, branches, options)                           # options [4, S]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dsv3.config import DeepSeekV3Config
from lightning_dsv3.inference.reads import Chunk, Level, Read, plan_reads
from lightning_dsv3.model import DeepSeekV3, DeepSeekV3Output
from lightning_dsv3.ops.attention import Positions
from lightning_dsv3.ops.latent_attention import Segment, takes_segments_apart
from lightning_dsv3.ops.rope import rope_table

# Slots that a chunk has at least, but for the first of a longer text: much of that is read once and goes no further.
_SMALLEST_CHUNK = 64


class LatentCache:
    """Latents of all layers for the rows of a batch; see the module's text.

    Memory is taken in the dtype and on the device of the first latents.

    Args:
        config: The model's configuration.
        batch_size: B, the number of rows.
        num_layers: Layers that keep latents; the model's blocks by default, 1 for an MTP module.

    Attributes:
        lengths: Tokens of each row.
    """

    def __init__(self, config: DeepSeekV3Config, batch_size: int, *, num_layers: int | None = None) -> None:
        self.config = config
        self.num_layers = config.num_hidden_layers if num_layers is None else num_layers
        self.lengths: list[int] = [0] * batch_size
        self._starts: list[int] = [0] * batch_size  # position of the first token that is this cache's own
        self._levels: list[Level] = []  # prefixes, the oldest first
        self._chunks: list[Chunk] = []
        self._held: list[int] = [0] * batch_size  # tokens that forks read

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    @property
    def num_bytes(self) -> int:
        """Bytes that its own chunks take; prefixes belong to the caches that they were forked from."""
        return sum(chunk.latent.numel() * chunk.latent.element_size() for chunk in self._chunks)

    def fork(self, rows: Sequence[int], lengths: Sequence[int] | None = None) -> LatentCache:
        """Return a cache whose rows go on from rows of this one. Nothing is copied.

        Rows that go on from the same one are read together if they stand together.

        Args:
            rows: For each new row, the row here.
            lengths: How many tokens of it, by default all.

        Raises:
            ValueError: A length beyond the row's own, or within a prefix that this cache itself was forked from.
        """
        lengths = [self.lengths[row] for row in rows] if lengths is None else list(lengths)
        for row, length in zip(rows, lengths, strict=True):
            self._check_length(row, length, "fork")
        fork = LatentCache(self.config, len(rows), num_layers=self.num_layers)
        fork.lengths, fork._starts = list(lengths), list(lengths)
        fork._levels = [level.of(rows) for level in self._levels]
        fork._levels.append(
            Level(self._chunks, list(rows), [n - self._starts[r] for r, n in zip(rows, lengths, strict=True)])
        )
        for row, length in zip(rows, lengths, strict=True):
            self._held[row] = max(self._held[row], length)
        return fork

    def select(self, rows: Sequence[int]) -> LatentCache:
        """Return a cache with some of the rows, in the given order: their own chunks copied, prefixes shared."""
        chosen = LatentCache(self.config, len(rows), num_layers=self.num_layers)
        chosen.lengths = [self.lengths[row] for row in rows]
        chosen._starts = [self._starts[row] for row in rows]
        chosen._levels = [level.of(rows) for level in self._levels]
        used = max((self._own_length(row) for row in rows), default=0)
        index = torch.tensor(list(rows))
        for chunk in self._chunks:
            if chunk.start < used:
                chosen._chunks.append(Chunk(chunk.start, chunk.latent.index_select(1, index.to(chunk.latent.device))))
        return chosen

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget what is behind a length of each row.

        Raises:
            ValueError: A length beyond the row's own, within the prefix of a fork, or shorter than what forks read.
        """
        for row, length in enumerate(lengths):
            self._check_length(row, length, "truncate")
            if length < self._held[row]:
                raise ValueError(
                    f"lengths[{row}]={length}: forks of this cache read its first {self._held[row]} tokens; truncate "
                    "the forks, or fork where they part"
                )
        self.lengths = list(lengths)

    def prepare(self, num_new: int, num_tokens: Sequence[int] | None = None) -> Extension:
        """Make room for new tokens; they count once the extension is committed.

        Args:
            num_new: S, columns of the new tokens.
            num_tokens: How many of them are tokens of the row, the rest being padding at the end; all by default.

        Raises:
            ValueError: A row longer than ``max_position_embeddings``, or an impossible number of tokens.
        """
        tokens = [num_new] * self.batch_size if num_tokens is None else [int(n) for n in num_tokens]
        if len(tokens) != self.batch_size:
            raise ValueError(f"num_tokens: has {len(tokens)} values, and the cache {self.batch_size} rows")
        if not any(tokens):
            raise ValueError("num_tokens: no row has a new token; give at least one")
        for row, (length, new) in enumerate(zip(self.lengths, tokens, strict=True)):
            if not 0 <= new <= num_new:
                raise ValueError(f"num_tokens[{row}]={new}: must be from 0 to the {num_new} columns of the tokens")
            if length + new > self.config.max_position_embeddings:
                raise ValueError(
                    f"row {row} would have {length + new} tokens: the model has "
                    f"max_position_embeddings={self.config.max_position_embeddings}; shorten the text"
                )
        return Extension(self, num_new, tokens)

    def _own_length(self, row: int) -> int:
        return self.lengths[row] - self._starts[row]

    def _check_length(self, row: int, length: int, verb: str) -> None:
        if not self._starts[row] <= length <= self.lengths[row]:
            raise ValueError(
                f"{verb}: row {row} cannot have {length} tokens; it has {self.lengths[row]}"
                + (f", of which the first {self._starts[row]} are another cache's" if self._starts[row] else "")
            )

    def _grow(self, num_slots: int, like: Tensor) -> None:
        """Add a chunk if there are fewer slots in each row."""
        have = self._chunks[-1].stop if self._chunks else 0
        if have >= num_slots:
            return
        size = num_slots if have == 0 and num_slots > 1 else max(num_slots - have, have // 2, _SMALLEST_CHUNK)
        # Zeros, as what a mask hides is still multiplied: chance values could be NaN.
        latent = like.new_zeros(self.num_layers, self.batch_size, size, like.shape[-1])
        self._chunks.append(Chunk(have, latent))


class Extension:
    """What one forward pass needs of a cache: the same for all layers, so it is worked out once.

    A pass of the model takes it as its ``cache``; ``commit`` then makes the new tokens count.
    """

    def __init__(self, cache: LatentCache, num_new: int, num_tokens: Sequence[int]) -> None:
        self._cache = cache
        self._num_new, self._num_tokens = num_new, num_tokens
        self._own_lengths = [cache._own_length(row) for row in range(cache.batch_size)]
        self._is_alone = not cache._levels and not any(self._own_lengths)
        self._layout = None if all(n == num_new for n in num_tokens) else _Layout(num_tokens, num_new)
        self._aligned = len(set(self._own_lengths)) == 1
        self._reads: list[Read] | None = None
        self._writes: list[_Write] = []
        self._positions: Positions | None = None
        self._device = torch.device("cpu")

    def on(self, device: torch.device) -> Extension:
        """Say where the positions are wanted."""
        self._device = device
        return self

    @property
    def positions(self) -> Positions:
        """Where the new tokens stand; ``[S, R / 2]`` if in all rows alike, else ``[B, S, R / 2]`` or packed."""
        if self._positions is None:
            lengths = self._cache.lengths
            alike = len(set(lengths)) == 1 and self._layout is None
            first = torch.tensor(lengths[0] if alike else lengths)
            config = self._cache.config
            cos, sin = rope_table(
                self.pack((first.unsqueeze(-1) + torch.arange(self._num_new)).to(self._device)),
                dim=config.qk_rope_head_dim,
                theta=config.rope_theta,
                scaling=config.rope_scaling,
            )
            self._positions = Positions(cos, sin)
        return self._positions

    @property
    def num_queries(self) -> int:
        """The most new tokens that a row has."""
        return self._num_new

    def pack(self, x_BS: Tensor) -> Tensor:
        """Put the rows' tokens behind one another, ``[B, S, *]`` to ``[1, T, *]``, unless no row is padded."""
        return x_BS if self._layout is None else self._layout.pack(x_BS)

    def unpack(self, x: Tensor) -> Tensor:
        """Put packed rows side by side again; padding gets chance values."""
        return x if self._layout is None else self._layout.unpack(x)

    def layer(self, index: int) -> _LayerCache:
        """Return the cache of a layer."""
        return _LayerCache(self, index)

    def commit(self) -> None:
        """Make the new tokens part of their rows."""
        lengths = self._cache.lengths
        self._cache.lengths = [length + new for length, new in zip(lengths, self._num_tokens, strict=True)]

    def append(self, layer: int, latent_BSW: Tensor) -> list[Segment] | None:
        """Write a layer's latents; return what their tokens attend to, None where that is themselves alone."""
        if self._reads is None:
            self._cache._grow(max(self._own_lengths) + self._num_new, latent_BSW)
            self._writes = self._plan_writes(latent_BSW.device)
            # Rows that begin with these tokens attend as in training, unless most of that would be padding.
            by_length = self._layout is not None and takes_segments_apart(latent_BSW, self._num_new)
            self._is_alone = self._is_alone and not by_length
            self._reads = [] if self._is_alone else self._plan_reads(latent_BSW, by_length)
        for write in self._writes:
            write.chunk.latent[layer][write.target] = latent_BSW[write.source]
        return None if self._is_alone else [read.segment(layer) for read in self._reads]

    def _plan_reads(self, like: Tensor, by_length: bool) -> list[Read]:
        cache = self._cache
        return plan_reads(
            cache._levels,
            cache._chunks,
            self._own_lengths,
            self._num_tokens,
            num_new=self._num_new,
            like=like,
            by_length=by_length,
        )

    def _plan_writes(self, device: torch.device) -> list[_Write]:
        writes = []
        if self._aligned and self._layout is None:
            first = self._own_lengths[0]
            for chunk in self._cache._chunks:
                start, stop = max(chunk.start, first), min(chunk.stop, first + self._num_new)
                if start < stop:
                    columns = slice(start - chunk.start, stop - chunk.start)
                    writes.append(
                        _Write(chunk, (slice(None), columns), (slice(None), slice(start - first, stop - first)))
                    )
            return writes
        slots_BS = torch.tensor(self._own_lengths).unsqueeze(1) + torch.arange(self._num_new)
        rows_BS = torch.arange(len(self._own_lengths)).unsqueeze(1).expand_as(slots_BS)
        slots, rows = self.pack(slots_BS.to(device)), self.pack(rows_BS.to(device))
        for chunk in self._cache._chunks:
            source = ((slots >= chunk.start) & (slots < chunk.stop)).nonzero(as_tuple=True)
            if source[0].numel():
                writes.append(_Write(chunk, (rows[source], slots[source] - chunk.start), source))
        return writes


@torch.no_grad()
def extend(
    model: DeepSeekV3, cache: LatentCache, input_ids: Tensor, num_tokens: Sequence[int] | None = None
) -> DeepSeekV3Output:
    """Run the model on tokens that follow those in the cache, and keep them there.

    Args:
        model: The model.
        cache: Made for its configuration. Changed only when all went well.
        input_ids: New tokens of each row, int64 ``[B, S]``, padded at the end with any id.
        num_tokens: How many of the S are the row's, by default all. States behind them mean nothing.

    Returns:
        The states of the new tokens, without logits: ``model.head(output.hidden[...])`` gives those that are wanted.

    Raises:
        ValueError: A cache for another configuration or number of rows, or a text that is too long.
    """
    if cache.config is not model.config and cache.config != model.config:
        raise ValueError(f"cache: it was made for another configuration ({_differences(cache.config, model.config)})")
    if input_ids.dim() != 2 or input_ids.shape[0] != cache.batch_size:
        raise ValueError(
            f"input_ids: shape {list(input_ids.shape)}, but the cache has {cache.batch_size} rows; give [rows, tokens]"
        )
    extension = cache.prepare(input_ids.shape[1], num_tokens).on(input_ids.device)
    # A compiled model would be traced anew for every length.
    with torch.compiler.set_stance("force_eager"):
        output: DeepSeekV3Output = model(extension.pack(input_ids), return_logits=False, cache=extension)
    extension.commit()
    output.residual, output.hidden = extension.unpack(output.residual), extension.unpack(output.hidden)
    return output


@torch.no_grad()
def extend_rows(model: DeepSeekV3, cache: LatentCache, tokens: Sequence[Sequence[int]]) -> Tensor:
    """As :func:`extend`, of rows of any lengths, without padding.

    Args:
        model: The model.
        cache: As there.
        tokens: New tokens of each row.

    Returns:
        The states of all of them behind one another, row by row, ``[T, D]``.

    Raises:
        ValueError: As there.
    """
    counts = [len(row) for row in tokens]
    device = model.head.weight.device
    extension = cache.prepare(max(counts), counts).on(device)
    ids = torch.tensor([token for row in tokens for token in row], device=device)
    ids = ids.view(len(counts), -1) if len(set(counts)) == 1 else ids.unsqueeze(0)
    with torch.compiler.set_stance("force_eager"):
        output: DeepSeekV3Output = model(ids, return_logits=False, cache=extension)
    extension.commit()
    return output.hidden.flatten(0, 1)


class _Layout:
    """Where the tokens of padded rows ``[B, S]`` stand when they are packed, ``[1, T]``."""

    def __init__(self, num_tokens: Sequence[int], width: int) -> None:
        counts = torch.tensor(list(num_tokens))
        ends = counts.cumsum(0)
        columns = torch.arange(width)
        # Padding repeats a row's last token.
        self._packed_of = (ends - counts).unsqueeze(1) + torch.minimum(columns, (counts - 1).clamp(min=0).unsqueeze(1))
        self._packed_of.clamp_(max=int(ends[-1]) - 1)
        self._padded_of = (columns < counts.unsqueeze(1)).flatten().nonzero().squeeze(1)

    def pack(self, x_BS: Tensor) -> Tensor:
        self._padded_of = self._padded_of.to(x_BS.device)  # once: every layer comes here
        return x_BS.flatten(0, 1)[self._padded_of].unsqueeze(0)

    def unpack(self, x: Tensor) -> Tensor:
        self._packed_of = self._packed_of.to(x.device)
        return x[0, self._packed_of]


@dataclass(frozen=True)
class _Write:
    chunk: Chunk
    target: tuple
    source: tuple


@dataclass(frozen=True)
class _LayerCache:
    extension: Extension
    index: int

    @property
    def num_queries(self) -> int:
        return self.extension.num_queries

    def append(self, latent_BSW: Tensor) -> list[Segment] | None:
        return self.extension.append(self.index, latent_BSW)

    def unpack(self, x: Tensor) -> Tensor:
        return self.extension.unpack(x)

    def pack(self, x_BS: Tensor) -> Tensor:
        return self.extension.pack(x_BS)


def _differences(config: DeepSeekV3Config, other: DeepSeekV3Config) -> str:
    mine, theirs = config.to_dict(), other.to_dict()
    return ", ".join(f"{key}={mine[key]}, the model {theirs[key]}" for key in mine if mine[key] != theirs.get(key))
