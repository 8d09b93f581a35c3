"""Generating text: greedy or sampled, plain or with drafts of the MTP modules.

A round feeds each row its last token and the drafts behind it, in one pass of the main model. It tells which drafts
stand and what follows them; without drafts that is plain decoding. A row leaves the batch when it has finished, and
what a row generates depends neither on its neighbours nor, but for rounding, on drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lightning_dsv3.inference.cache import LatentCache, extend
from lightning_dsv3.inference.drafting import Choice, MTPDrafter
from lightning_dsv3.inference.sampling import RowRandomness, Sampling, draw, verify_greedy, verify_sampled
from lightning_dsv3.inference.text import TextStream
from lightning_dsv3.metrics import MTPAcceptance
from lightning_dsv3.model import DeepSeekV3
from lightning_dsv3.ops.acceptance import length_counts

# Columns of a prompt that are run at a time.
_PREFILL_COLUMNS = 4096


class NewTokens(NamedTuple):
    """What a round gave a row.

    Attributes:
        row: Its number in the batch that was given.
        tokens: New tokens, at least one.
        finished: ``""`` while the row goes on, else why it does not: ``eos``, ``stop`` or ``length``.
    """

    row: int
    tokens: list[int]
    finished: str


def generate(
    model: DeepSeekV3,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seeds: int | Sequence[int] | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    stop: Sequence[str] = (),
    decode: Callable[[list[int]], str] | None = None,
    speculative: bool = False,
    num_drafts: int | None = None,
    acceptance: MTPAcceptance | None = None,
    progress: bool = False,
) -> Tensor:
    """Continue texts.

    Args:
        model: The model; it runs where it is and in the dtype it has.
        input_ids: Prompts, int64 ``[B, S]``.
        max_new_tokens: New tokens of a row at most.
        attention_mask: 1 for tokens and 0 for padding, ``[B, S]``, where prompts have different lengths; padding may
            be on the left or on the right.
        do_sample: Draw tokens; otherwise the likeliest is taken.
        temperature: For ``do_sample``, see :class:`Sampling`, as the next two.
        top_k: See there.
        top_p: See there.
        seeds: A seed for each row, or one from which each row gets its own; None takes one from torch's generator.
        eos_token_id: A row ends with the first of these; None never ends one early.
        pad_token_id: What follows a row's end, by default the first ``eos_token_id``, or 0.
        stop: A row ends with the token that completes one of these strings, also across tokens. Needs ``decode``.
        decode: From token ids to text, as in ``Tokenizer.decode``.
        speculative: Draft with the MTP modules. Greedy output stays the same, sampled output is distributed the same.
        num_drafts: Drafts of a round, by default one per MTP module; beyond that the last is used again.
        acceptance: Is told which drafts were accepted.
        progress: Show a bar of new tokens.

    Returns:
        Prompts and what follows, int64 ``[B, S + new]``, as long as the longest row.

    Raises:
        ValueError: A prompt that leaves no room for ``max_new_tokens`` positions, an empty one, or an impossible
            argument; the text names it.

    Example:
        >>> from lightning_dsv3 import DeepSeekV3, DeepSeekV3Config
        >>> model = DeepSeekV3(DeepSeekV3Config.from_preset("tiny", num_hidden_layers=2)).eval()
        >>> prompt = torch.tensor([[5, 6, 7]])
        >>> plain = generate(model, prompt, max_new_tokens=8)
        >>> plain.shape, torch.equal(plain, generate(model, prompt, max_new_tokens=8, speculative=True))
        (torch.Size([1, 11]), True)
    """
    prompts = _prompts(input_ids, attention_mask)
    eos = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    decoder = Decoder(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p) if do_sample else None,
        seeds=seeds,
        eos_token_ids=eos,
        stop=stop,
        decode=decode,
        num_drafts=(len(model.mtp) if num_drafts is None else num_drafts) if speculative else None,
        acceptance=acceptance,
    )
    new: list[list[int]] = [[] for _ in prompts]
    with tqdm(total=len(prompts) * max_new_tokens, unit="token", disable=not progress, dynamic_ncols=True) as bar:
        for made in decoder:
            for row, tokens, finished in made:
                new[row] += tokens
                bar.update(len(tokens) if not finished else max_new_tokens - len(new[row]) + len(tokens))
    pad = pad_token_id if pad_token_id is not None else eos[0] if eos else 0
    longest = max(map(len, new))
    rows = torch.tensor([tokens + [pad] * (longest - len(tokens)) for tokens in new], dtype=input_ids.dtype)
    return torch.cat([input_ids, rows.view(len(new), longest).to(input_ids.device)], dim=1)


class Decoder:
    """Continues prompts round by round; iterating yields what each round gave to the rows that still go on.

    Args:
        model: The model.
        prompts: Token ids of each row's prompt.
        max_new_tokens: As in :func:`generate`, as what follows.
        sampling: None takes the likeliest token.
        seeds: See there.
        eos_token_ids: See there.
        stop: See there.
        decode: See there.
        num_drafts: None decodes plainly.
        acceptance: See there.
        cache: Holds the beginning of each row's text, which ``prompts`` then goes on from; a fork of a common prefix,
            for example. Not with drafts, as the MTP modules have not seen it.
    """

    def __init__(
        self,
        model: DeepSeekV3,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        seeds: int | Sequence[int] | None = None,
        eos_token_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        decode: Callable[[list[int]], str] | None = None,
        num_drafts: int | None = None,
        acceptance: MTPAcceptance | None = None,
        cache: LatentCache | None = None,
    ) -> None:
        size = len(prompts)
        if stop and decode is None:
            raise ValueError("stop: strings are found in text; give decode, as in decode=tokenizer.decode")
        self._model = model
        self._cache = LatentCache(model.config, size) if cache is None else cache
        _check(model, prompts, self._cache, max_new_tokens)
        self._drafter = None
        if num_drafts is not None:
            _check_drafts(model, prompts, num_drafts, cache)
            self._drafter = MTPDrafter(model, size, num_drafts)
        self._prompts = [list(prompt) for prompt in prompts]
        self._max_new_tokens = max_new_tokens
        self._sampling = sampling
        self._random = RowRandomness(_row_seeds(seeds, size))
        self._eos = frozenset(eos_token_ids)
        self._streams = [TextStream(decode, stop) for _ in prompts] if decode is not None and stop else None
        self._acceptance = acceptance
        self._device = model.head.weight.device
        self._rows = list(range(size))  # numbers of the rows that go on
        self._made = [0] * size  # new tokens of each of them

    @torch.no_grad()
    def __iter__(self) -> Iterator[list[NewTokens]]:
        """Yield the rounds; a decoder is used once."""
        if not self._rows or self._max_new_tokens == 0:
            return
        round_ = self._prefill()
        while True:
            going, news = self._judge(round_.made)
            yield news
            if not going:
                return
            if len(going) < len(self._rows):
                round_ = round_.select(going)
                self._retire(going)
            round_ = self._decode_round(round_)

    def _prefill(self) -> _Round:
        """Run the prompts, and choose the first token of each row."""
        lengths = [len(prompt) for prompt in self._prompts]
        longest = max(lengths)
        ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in self._prompts], device=self._device)
        kept, last = [], []
        for start in range(0, longest, _PREFILL_COLUMNS):
            part = ids[:, start : start + _PREFILL_COLUMNS]
            width = part.shape[1]
            output = extend(self._model, self._cache, part, [min(max(n - start, 0), width) for n in lengths])
            if self._drafter is not None:
                kept.append(self._drafter.states(output))
            last.append(output.hidden[range(len(lengths)), [min(max(n - start - 1, 0), width - 1) for n in lengths]])
        end = torch.tensor([(n - 1) // _PREFILL_COLUMNS for n in lengths], device=self._device)
        hidden = torch.stack(last)[end, torch.arange(len(lengths), device=self._device)]
        uniform = self._random.uniform(1, self._device)
        token = self._choose(self._model.head(hidden), uniform[:, 0]).token
        states = next_tokens = None
        if self._drafter is not None:
            states = torch.cat(kept, dim=1)
            next_tokens = torch.cat([ids[:, 1:], token.unsqueeze(1)], dim=1)
            behind = torch.tensor(lengths, device=self._device).unsqueeze(1) - 1
            next_tokens.scatter_(1, behind, token.unsqueeze(1))
        return _Round([[t] for t in token.tolist()], token, states, next_tokens, lengths)

    def _decode_round(self, before: _Round) -> _Round:
        """Draft, if there is a drafter, and let the main model judge the drafts and go on from them."""
        size, drafter = len(self._rows), self._drafter
        most = 0 if drafter is None else drafter.num_drafts
        # The last token that a row may have is never fed, so a draft in its place would not be judged.
        wanted = [min(most, self._max_new_tokens - made - 1) for made in self._made]
        # As many numbers in every round, so that what a row draws does not hang on what others want.
        uniform = self._random.uniform(2 * most + 1, self._device)
        drafts, q = before.token.new_zeros(size, 0), None
        if drafter is not None and max(wanted) > 0:
            assert before.states is not None
            assert before.next_tokens is not None
            numbers = iter(uniform[:, :most].unbind(1))
            drafts, q = drafter.draft(
                before.states, before.next_tokens, before.known, lambda logits: self._choose(logits, next(numbers))
            )
        begin = list(self._cache.lengths)
        fed = torch.cat([before.token.unsqueeze(1), drafts], dim=1)
        num_drafts = [min(n, drafts.shape[1]) for n in wanted]
        output = extend(self._model, self._cache, fed, [n + 1 for n in num_drafts])
        logits = self._model.head(output.hidden)
        drafted = torch.tensor(num_drafts, device=self._device)
        if self._sampling is None:
            accepted, token = verify_greedy(logits, drafts, drafted)
        else:
            p = self._sampling.probabilities(logits)
            q = p[:, :0] if q is None else q
            accepted, token = verify_sampled(p, q, drafts, drafted, uniform[:, most:][:, -1 - drafts.shape[1] :])
        if self._acceptance is not None and drafts.shape[1]:
            self._acceptance.update(*length_counts(accepted, drafted, num_drafts=drafts.shape[1]))
        next_tokens = torch.cat([drafts, token.unsqueeze(1)], dim=1).scatter(
            1, accepted.unsqueeze(1), token.unsqueeze(1)
        )
        known = (accepted + 1).tolist()
        self._cache.truncate([length + n for length, n in zip(begin, known, strict=True)])
        made = [tokens[:n] for tokens, n in zip(next_tokens.tolist(), known, strict=True)]
        return _Round(made, token, None if drafter is None else drafter.states(output), next_tokens, known)

    def _choose(self, logits: Tensor, uniform: Tensor) -> Choice:
        if self._sampling is None:
            return Choice(logits.argmax(dim=-1), None)
        p = self._sampling.probabilities(logits)
        return Choice(draw(p, uniform), p)

    def _judge(self, made: list[list[int]]) -> tuple[list[int], list[NewTokens]]:
        """Cut each row's new tokens where it ends; return which go on, and what is new."""
        going, news = [], []
        for index, (row, tokens) in enumerate(zip(self._rows, made, strict=True)):
            finished = ""
            for count, token in enumerate(tokens, start=1):
                finished = self._end(row, token, self._made[index] + count)
                if finished:
                    tokens = tokens[:count]
                    break
            self._made[index] += len(tokens)
            news.append(NewTokens(row, tokens, finished))
            if not finished:
                going.append(index)
        return going, news

    def _end(self, row: int, token: int, count: int) -> str:
        if token in self._eos:
            return "eos"
        if self._streams is not None:
            self._streams[row].push([token])
            if self._streams[row].stopped:
                return "stop"
        return "length" if count >= self._max_new_tokens else ""

    def _retire(self, going: list[int]) -> None:
        self._cache = self._cache.select(going)
        self._random.select(going)
        if self._drafter is not None:
            self._drafter.select(going)
        self._rows = [self._rows[index] for index in going]
        self._made = [self._made[index] for index in going]


class _Round(NamedTuple):
    """What a round leaves for the next: each row's new tokens, the last of them, and what the drafter takes in."""

    made: list[list[int]]
    token: Tensor
    states: Tensor | None
    next_tokens: Tensor | None
    known: list[int]

    def select(self, rows: list[int]) -> _Round:
        states = None if self.states is None else self.states[rows]
        next_tokens = None if self.next_tokens is None else self.next_tokens[rows]
        made, known = [self.made[row] for row in rows], [self.known[row] for row in rows]
        return _Round(made, self.token[rows], states, next_tokens, known)


def _prompts(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids: shape {list(input_ids.shape)}; give [rows, tokens], as in ids.unsqueeze(0)")
    if attention_mask is None:
        return input_ids.tolist()
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: shape {list(attention_mask.shape)}, but input_ids {list(input_ids.shape)}; they are alike"
        )
    rows = zip(input_ids.tolist(), attention_mask.bool().tolist(), strict=True)
    return [[token for token, real in zip(ids, mask, strict=True) if real] for ids, mask in rows]


def _check(model: DeepSeekV3, prompts: Sequence[Sequence[int]], cache: LatentCache, max_new_tokens: int) -> None:
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 0")
    if cache.batch_size != len(prompts):
        raise ValueError(f"cache: has {cache.batch_size} rows for {len(prompts)} prompts")
    most, vocab_size = model.config.max_position_embeddings, model.config.vocab_size
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {row} is empty: give it one token at least, as in the begin of sentence")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ValueError(f"prompt {row} has a token that is not from 0 to vocab_size - 1 = {vocab_size - 1}")
        length = cache.lengths[row] + len(prompt)
        # The last token is not fed.
        if length + max(max_new_tokens - 1, 0) > most:
            raise ValueError(
                f"prompt {row} has {length} tokens and max_new_tokens={max_new_tokens}: together more than the model's "
                f"max_position_embeddings={most}; shorten the prompt or ask for fewer tokens"
            )


def _check_drafts(
    model: DeepSeekV3, prompts: Sequence[Sequence[int]], num_drafts: int, cache: LatentCache | None
) -> None:
    if cache is not None:
        raise ValueError("cache: the MTP modules have not seen its tokens; draft without it, or use it without drafts")
    if num_drafts < 1 and len(model.mtp):
        raise ValueError(f"num_drafts={num_drafts}: must be at least 1, or speculative=False")
    for row, prompt in enumerate(prompts):
        if len(prompt) < min(len(model.mtp), num_drafts):
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens: to draft, it needs one for each of the {len(model.mtp)} MTP "
                "modules; lengthen it, or speculative=False"
            )


def _row_seeds(seeds: int | Sequence[int] | None, size: int) -> list[int]:
    if seeds is None:
        seeds = int(torch.randint(0, 2**62, ()))
    if isinstance(seeds, int):
        return [seeds + row for row in range(size)]
    if len(seeds) != size:
        raise ValueError(f"seeds: has {len(seeds)} values for {size} rows")
    return list(seeds)
