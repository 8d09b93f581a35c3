"""``lm_eval --model dsv3``: a DeepSeek-V3 checkpoint behind lm-eval's interface.

Numbers are those of lm-eval's own ``hf`` model on the same weights; texts are truncated, joined and cut as there. What
differs is the work: requests that begin alike are computed once (:mod:`lightning_dsv3.evaluation.engine`), and a
log-likelihood brings the counts of tokens that a perplexity needs
(:class:`~lightning_dsv3.evaluation.likelihood.Likelihood`).
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers import Tokenizer
from tqdm.auto import tqdm

from lightning_dsv3.checkpoint import LoadedModel, load_for_inference
from lightning_dsv3.config import ConfigError
from lightning_dsv3.evaluation.engine import Engine
from lightning_dsv3.evaluation.likelihood import Likelihood
from lightning_dsv3.evaluation.lm_options import (
    GenerationOptions,
    chosen_device,
    flag,
    launched_ranks,
    most_rows,
    whole_number,
)
from lightning_dsv3.evaluation.lm_text import ChatTemplate, text_encoder
from lightning_dsv3.metrics import MTPAcceptance
from lightning_dsv3.model import DeepSeekV3

_log = logging.getLogger(__name__)

# The report's evaluations use 2048 or 4096 by benchmark (DeepSeek LLM, section 5.1).
_MAX_LENGTH = 4096


class DSV3LM(TemplateLM):
    """A model for lm-eval.

    Args:
        checkpoint: A Lightning ``.ckpt``, a run folder, a sharded checkpoint, or a Hugging Face folder.
        tokenizer: A ``tokenizer.json`` or a folder with one; by default the checkpoint's.
        dtype: Dtype of the weights as in ``bfloat16``; by default as stored.
        device: Where to; a GPU that is not there is the CPU, as with ``hf``, since lm-eval asks for one by default.
            Each of several ranks of a machine takes the GPU of its number.
        batch_size: Rows of a pass; ``auto`` for as many as the engine's budget of tokens holds, which is halved where
            memory runs out. Scores do not depend on it but for rounding.
        max_batch_size: Most rows with ``auto``.
        max_length: Longest text in tokens; by default 4096, or what the model has if that is less. Longer ones lose
            their beginning.
        max_gen_toks: New tokens where a task does not say.
        add_bos_token: Put the begin of sentence before every text; by default what the model has seen there: as a
            Hugging Face folder's tokenizer says, and the end of sentence for a model of this package.
        prefix_token_id: What an empty context is; by default what stands before every text, else the begin, else the
            end of sentence.
        whole_sequence: Also score contexts, for the perplexity of the whole sequence.
        speculative: Draft with the MTP modules when generating. Drafting prompts do not share what they begin with.
        num_drafts: Drafts of a round, by default one per MTP module.
        model: A model that is there already, in place of ``checkpoint``; needs ``tokenizer``.

    Raises:
        ConfigError: An argument that cannot be.
    """

    backend = "causal"

    def __init__(
        self,
        checkpoint: str | os.PathLike[str] | None = None,
        tokenizer: str | os.PathLike[str] | Tokenizer | None = None,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str | None = "auto",
        max_batch_size: int | str | None = None,
        max_length: int | str | None = None,
        max_gen_toks: int | str = 256,
        add_bos_token: bool | str | None = None,
        prefix_token_id: int | str | None = None,
        whole_sequence: bool | str = True,
        speculative: bool | str = False,
        num_drafts: int | str | None = None,
        model: DeepSeekV3 | None = None,
    ) -> None:
        super().__init__()
        ranks = launched_ranks()
        self._device = (
            chosen_device(device, ranks) if model is None else torch.device(device or model.head.weight.device)
        )
        self._loaded = _loaded(checkpoint, tokenizer, dtype, self._device, model)
        self._model = self._loaded.model
        self.tokenizer = self._loaded.tokenizer
        known = self._model.config.max_position_embeddings
        self._max_length = min(_MAX_LENGTH, known) if max_length is None else whole_number("max_length", max_length, 1)
        if self._max_length > known:
            raise ConfigError(f"max_length={self._max_length}: the model has max_position_embeddings={known}")
        self._max_gen_toks = whole_number("max_gen_toks", max_gen_toks, 1)
        self.batch_size = most_rows(batch_size, max_batch_size)
        self._engine = Engine(self._model, max_rows=self.batch_size)
        self._bos = self._loaded.prefix if add_bos_token is None else self._begin(flag("add_bos_token", add_bos_token))
        self._prefix_token_id = None if prefix_token_id is None else whole_number("prefix_token_id", prefix_token_id, 0)
        self._whole_sequence = flag("whole_sequence", whole_sequence)
        self._num_drafts = None
        if flag("speculative", speculative):
            self._num_drafts = len(self._model.mtp) if num_drafts is None else whole_number("num_drafts", num_drafts, 1)
            if not len(self._model.mtp):
                raise ConfigError("speculative=true: the checkpoint has no MTP module to draft with; leave it out")
        self._encode = text_encoder(self.tokenizer)
        self._join_ranks(ranks)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        if not self._loaded.eos_token_ids:
            raise ConfigError("tokenizer: nothing says which token ends a text; give prefix_token_id=N")
        return self._loaded.eos_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is."""
        if self._prefix_token_id is not None:
            return self._prefix_token_id
        if self._loaded.prefix:
            return self._loaded.prefix[0]
        return self.eot_token_id if self._loaded.bos_token_id is None else self._loaded.bos_token_id

    @property
    def max_length(self) -> int:
        """Longest text in tokens."""
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        """New tokens where a task does not say."""
        return self._max_gen_toks

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._device

    @property
    def tokenizer_name(self) -> str:
        """Where the tokenizer comes from; part of the key of cached requests."""
        return self._loaded.tokenizer_source.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Return what a results file says of the model."""
        count = self._model.config.num_parameters()
        return {
            "model_num_parameters": count.total,
            "model_dtype": str(self._model.head.weight.dtype),
            "dsv3_model_info": {
                "name": str(self._loaded.checkpoint),
                "architecture": "MoE" if self._model.config.num_moe_layers else "Dense",
                "num_parameters_total": count.total,
                "num_parameters_activated": count.activated,
                "max_length": self._max_length,
                "tokenizer": self._loaded.tokenizer_source,
                "averaged_weights": self._loaded.averaged,
            },
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the tokens of a text, behind the begin of sentence where the model has seen one."""
        tokens = self._encode(string)
        bos = list(self._bos)
        if add_special_tokens is False or not bos or tokens[: len(bos)] == bos:
            return tokens
        return [*bos, *tokens]

    def tok_decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special ones left out."""
        return self._loaded.decode(tokens)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the chat template to use, for ``--apply_chat_template [NAME]``; None for none."""
        return self._chat_template.choose(chat_template) if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as the text that the model has been trained on."""
        return self._chat_template.apply(chat_history, add_generation_prompt)

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        return ChatTemplate(self._loaded.tokenizer_source)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, all its tokens; those too long are scored in windows.

        As with ``hf``, each token is scored in one window, and each window but the first sees one token before those it
        scores; the last one is filled up from behind. A begin of sentence is what the first token is predicted from
        and is not scored itself.
        """
        windows: list[tuple[None, list[int], list[int]]] = []
        owner: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            rolling = get_rolling_token_windows(
                token_list=tokens, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            for context, continuation in map(make_disjoint_window, rolling):
                windows.append((None, context, continuation))
                owner.append(number)
        totals = [0.0] * len(requests)
        left = Counter(owner)

        def add(index: int, pair: Likelihood) -> None:
            number = owner[index]
            totals[number] += pair[0]
            left[number] -= 1
            if not left[number]:
                self.cache_hook.add_partial("loglikelihood_rolling", requests[number].args, totals[number])

        self._score(windows, disable_tqdm, "Scoring texts", add, contexts=False)
        return totals

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        results: list[Any] = [None] * len(requests)

        def keep(index: int, pair: Likelihood) -> None:
            results[index] = pair
            self.cache_hook.add_partial("loglikelihood", requests[index][0], pair)

        self._score(requests, disable_tqdm, "Scoring options", keep, contexts=self._whole_sequence)
        return results

    def _score(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool,
        title: str,
        keep: Callable[[int, Likelihood], None],
        *,
        contexts: bool,
    ) -> None:
        """Score continuations behind contexts, and tell ``keep`` of each as soon as it is known."""
        sequences: list[list[int]] = []
        first: list[int] = []
        too_long = 0
        for _, context, continuation in requests:
            context = context or [self.prefix_token_id]  # of white space alone, which lm-eval gives to the continuation
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens: it must have one at least and max_length="
                    f"{self.max_length} at most; shorten it or raise max_length"
                )
            sequence = [*context, *continuation]
            too_long += len(sequence) > self.max_length + 1
            sequences.append(sequence[-(self.max_length + 1) :])
            first.append(len(sequences[-1]) - len(continuation))
        self._say_what_was_cut(too_long, len(requests))
        with self._bar(len(requests), title, disable_tqdm) as bar:
            for index, scored in self._engine.score(sequences, None if contexts else first):
                begin = first[index] - 1
                of_context = scored.logprobs[:begin] if contexts else None
                keep(
                    index,
                    Likelihood(
                        float(scored.logprobs[begin:].sum()),
                        bool(scored.greedy[begin:].all()),
                        num_tokens=len(scored.logprobs) - begin,
                        context_logprob=None if of_context is None else float(of_context.sum()),
                        context_tokens=0 if of_context is None else begin,
                    ),
                )
                bar.update()
                bar.set_postfix_str(str(self._engine.counts), refresh=False)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes behind each context, up to the first stop string."""
        results: list[str] = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        with self._bar(len(requests), "Generating", disable_tqdm) as bar:
            for numbers in alike.values():
                options = GenerationOptions(
                    requests[numbers[0]].args[1],
                    max_gen_toks=self.max_gen_toks,
                    max_length=self.max_length,
                    end=self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False),
                )
                most = self.max_length - options.max_new_tokens
                whole = [self._prompt(requests[number].args[0]) for number in numbers]
                self._say_what_was_cut(sum(len(prompt) > most for prompt in whole), len(whole))
                prompts = [prompt[-most:] for prompt in whole]
                acceptance = None if self._num_drafts is None else MTPAcceptance(self._num_drafts)
                for index, tokens in self._engine.generate(
                    prompts,
                    max_new_tokens=options.max_new_tokens,
                    sampling=options.sampling,
                    seeds=options.seeds(len(prompts)),
                    eos_token_ids=self._loaded.eos_token_ids,
                    stop=options.until,
                    decode=self.tok_decode,
                    num_drafts=self._num_drafts,
                    acceptance=acceptance,
                ):
                    number = numbers[index]
                    text = postprocess_generated_text(self.tok_decode(tokens), list(options.until), None)
                    results[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update()
                    bar.set_postfix_str(str(self._engine.counts), refresh=False)
                if acceptance is not None:
                    rates = ", ".join(f"{rate:.3f}" for rate in acceptance.compute().reshape(-1).tolist())
                    _log.info("drafts accepted, by position: %s", rates)
        return results

    def _prompt(self, text: str) -> list[int]:
        return self.tok_encode(text) or [self.prefix_token_id]

    def _say_what_was_cut(self, too_long: int, count: int) -> None:
        if too_long:
            _log.warning("%d of %d texts lost their beginning: max_length=%d tokens", too_long, count, self.max_length)

    def _begin(self, wanted: bool) -> tuple[int, ...]:
        if not wanted:
            return ()
        if self._loaded.bos_token_id is None:
            raise ConfigError("add_bos_token=true: the tokenizer has no begin of sentence")
        return (self._loaded.bos_token_id,)

    def _bar(self, total: int, title: str, disable: bool) -> tqdm:
        return tqdm(total=total, desc=title, disable=disable or self.rank != 0, dynamic_ncols=True)

    # lm-eval divides the requests among ranks and gathers what each has; every rank has the whole model, so that no
    # rank waits for another within a pass.

    def _join_ranks(self, world_size: int) -> None:
        if world_size == 1:
            return
        if not torch.distributed.is_initialized():
            on_gpu = self._device.type == "cuda"
            if on_gpu:
                torch.cuda.set_device(self._device)
            # lm-eval's barriers wait for the slowest rank, whose requests may take hours longer.
            torch.distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(weeks=52))
        self._rank, self._world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return every rank's tensor, stacked."""
        if self.world_size == 1:
            return tensor
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        torch.distributed.all_gather(gathered, tensor)
        return torch.stack(gathered) if tensor.dim() == 0 else torch.cat(gathered)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Return every rank's object on rank ``dst``."""
        if self.world_size == 1:
            return [obj]
        gathered: list[Any] | None = [None] * self.world_size if self.rank == dst else None
        torch.distributed.gather_object(obj, gathered, dst=dst)
        return gathered

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            torch.distributed.barrier()


def _loaded(
    checkpoint: str | os.PathLike[str] | None,
    tokenizer: str | os.PathLike[str] | Tokenizer | None,
    dtype: str | None,
    device: torch.device,
    model: DeepSeekV3 | None,
) -> LoadedModel:
    if (checkpoint is None) == (model is None):
        raise ConfigError("checkpoint: give --model_args checkpoint=PATH (or, in Python, a model in its place)")
    if model is None:
        assert checkpoint is not None
        if isinstance(tokenizer, Tokenizer):
            raise ConfigError("tokenizer: give a path with a checkpoint; a Tokenizer goes with a model")
        return load_for_inference(checkpoint, dtype=dtype, device=device, tokenizer=tokenizer)
    if not isinstance(tokenizer, Tokenizer):
        raise ConfigError("tokenizer: a model in place of a checkpoint needs its Tokenizer")
    eos = tokenizer.token_to_id("<｜end▁of▁sentence｜>")
    known = () if eos is None else (eos,)
    return LoadedModel(
        model,
        tokenizer,
        eos_token_ids=known,
        bos_token_id=tokenizer.token_to_id("<｜begin▁of▁sentence｜>"),
        pad_token_id=None,
        prefix=known,
        checkpoint=Path("a model in memory"),
        tokenizer_source="given",
        averaged=False,
    )
