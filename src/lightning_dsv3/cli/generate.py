"""``dsv3 generate``: text from any checkpoint, as it is made, or many prompts in batches."""

from __future__ import annotations

import argparse
import io
import json
import re
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from tqdm.auto import tqdm

from lightning_dsv3.checkpoint import CheckpointError, LoadedModel, load_for_inference
from lightning_dsv3.config import ConfigError
from lightning_dsv3.inference import Decoder, Sampling, TextStream
from lightning_dsv3.metrics import MTPAcceptance

_DESCRIPTION = """\
Continues texts with a trained model, and prints them as they grow. The checkpoint may be a run folder (its last
checkpoint is taken), a .ckpt, a sharded checkpoint, or a Hugging Face folder.
"""

_EPILOG = """\
Without --temperature each token is the likeliest one, and the text always the same. With it tokens are drawn: low
values stay close to the likeliest, 1 is what the model believes. --top-k and --top-p leave the unlikely ones out. A
prompt's text hangs on --seed and its number alone, not on --batch-size. (But for rounding.)

--speculative lets the model's MTP modules draft tokens that the main model then checks, several in one pass. The text
stays the same, or distributed the same; it comes faster where drafts are accepted and passes are bound by memory. The
last line then says which share of the drafts was accepted at each position, of those whose predecessors were, and how
many tokens a pass gave.

Several prompts are printed in their order, with an empty line between them. --output writes a line for each:
  {"prompt": ..., "text": ..., "finish_reason": "eos" | "stop" | "length" | "interrupted", "num_tokens": n}
num_tokens counts the end of sentence and the tokens of a stop string, text leaves them out.

Ctrl-C ends the pass at hand and prints what there is, a second one stops at once; exit code 130.

examples:
  dsv3 generate --checkpoint runs/20261125-101500-tiny "The sea was"
  dsv3 generate --checkpoint last.ckpt "def fibonacci(n):" --temperature 0.7 --top-p 0.95 --seed 1 --stop "\\n\\n"
  dsv3 generate --checkpoint DeepSeek-V2-Lite --dtype bfloat16 --speculative "Attention is"
  echo "Once upon a time" | dsv3 generate --checkpoint runs/20261125-101500-tiny -
  dsv3 generate --checkpoint last.ckpt --prompts prompts.jsonl --batch-size 16 --output texts.jsonl
"""

_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "0": "\0", "\\": "\\"}
_LARGEST_SEED = 2**62


def generate(words: Sequence[str]) -> int:
    """Generate text from a checkpoint; return the exit code."""
    options = _parser().parse_intermixed_args(words)
    _check(options)
    prompts = _prompts(options)
    with _one_error():
        loaded = load_for_inference(
            options.checkpoint, dtype=options.dtype, device=_device(options.device), tokenizer=options.tokenizer
        )
        run = _Run(loaded, options, prompts)
    if not options.quiet:
        print(f"dsv3: {_described(loaded)}", file=sys.stderr)
    with _output(options, len(prompts)) as show:
        interrupted = run.generate(show)
    if not options.quiet:
        print(f"dsv3: {run.summary()}", file=sys.stderr)
    return 130 if interrupted else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dsv3 generate",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("texts", nargs="*", metavar="PROMPT", help='texts to go on from; "-" reads one from stdin')
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="what to load; see above")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help='a prompt per line; a .jsonl has objects with the field "prompt"'
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="at most so many; 128")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="draw tokens; 0 does not")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest that have probability P")
    parser.add_argument("--seed", type=int, metavar="N", help="makes draws repeatable; by default another each time")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help=r"end before this text, as in \n\n; repeatable",
    )
    parser.add_argument("--speculative", action="store_true", help="draft with the MTP modules")
    parser.add_argument("--num-drafts", type=int, metavar="N", help="drafts in a pass; one per MTP module")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts at a time; 8")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights; as they are stored")
    parser.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1; cuda where there is one")
    parser.add_argument("--tokenizer", metavar="PATH", help="a tokenizer.json or its folder; the checkpoint's own")
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl", help="write there instead of printing")
    parser.add_argument("--quiet", action="store_true", help="print what is generated alone: no prompts, no figures")
    return parser


def _check(options: argparse.Namespace) -> None:
    for name in ("max_new_tokens", "batch_size", "num_drafts", "top_k"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    _check_sampling(options)
    if options.num_drafts is not None and not options.speculative:
        raise ConfigError(f"--num-drafts {options.num_drafts}: nothing is drafted; give --speculative as well")
    if options.output is not None:
        _check_output(options.output)
    if not all(options.stop):
        raise ConfigError("--stop: an empty text would end every text at once; leave it out")


def _check_output(path: Path) -> None:
    if path.suffix != ".jsonl":
        raise ConfigError(f"--output {path}: a JSON object per line is written; give a name in .jsonl")
    if not path.parent.is_dir():
        raise ConfigError(f"--output {path}: there is no folder {path.parent}; make it first")


def _check_sampling(options: argparse.Namespace) -> None:
    if not 0 <= options.temperature < float("inf"):
        raise ConfigError(f"--temperature {options.temperature}: must be 0, for the likeliest tokens, or above")
    if options.top_p is not None and not 0 < options.top_p <= 1:
        raise ConfigError(f"--top-p {options.top_p}: must be above 0 and at most 1")
    for name in ("top_k", "top_p"):
        if getattr(options, name) is not None and not options.temperature:
            raise ConfigError(f"--{name.replace('_', '-')}: says what to draw from; give --temperature T as well")
    if options.seed is not None and not 0 <= options.seed < _LARGEST_SEED:
        raise ConfigError(f"--seed {options.seed}: must be from 0 to 2^62 - 1")


def _prompts(options: argparse.Namespace) -> list[str]:
    prompts = list(options.texts)
    if prompts.count("-") > 1:
        raise ConfigError("-: stdin can be read once; give it once")
    if "-" in prompts:
        prompts[prompts.index("-")] = _decoded(sys.stdin.buffer.read(), "stdin").removesuffix("\n")
    if options.prompts is not None:
        prompts += _read_prompts(options.prompts)
    if not prompts:
        raise ConfigError('no prompt; give one in quotation marks, --prompts FILE, or - for stdin ("" begins a text)')
    for prompt in prompts:
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise ConfigError(f"prompt {prompt!r}: is not UTF-8")
    return prompts


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = _decoded(path.read_bytes(), f"--prompts {path}").replace("\r\n", "\n").split("\n")
    except OSError as error:
        raise ConfigError(f"--prompts {path}: cannot be read ({error.strerror or error})") from error
    if path.suffix != ".jsonl":
        prompts = [line for line in lines if line.strip()]
    else:
        prompts = [_json_prompt(path, n, line) for n, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise ConfigError(f"--prompts {path}: holds no prompt")
    return prompts


def _json_prompt(path: Path, number: int, line: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, TypeError, KeyError, IndexError):
        prompt = None
    if not isinstance(prompt, str):
        raise ConfigError(f'--prompts {path}, line {number}: must be an object like {{"prompt": "The sea was"}}')
    return prompt


def _decoded(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: is not UTF-8 ({error.reason} at byte {error.start}); convert it first") from error


def _unescaped(text: str) -> str:
    r"""Put in the characters that ``\n``, ``\r``, ``\t``, ``\0``, ``\\``, ``\xHH`` and ``\uHHHH`` stand for.

    >>> _unescaped(r"a\n\u00e9\\n\d")
    'a\né\\n\\d'
    """
    escape = r"\\(?:([nrt0\\])|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4}))"
    return re.sub(escape, lambda m: _ESCAPES[m[1]] if m[1] else chr(int(m[2] or m[3], 16)), text)


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _described(loaded: LoadedModel) -> str:
    weight = loaded.model.head.weight
    kind = f"{'averaged weights, ' if loaded.averaged else ''}{str(weight.dtype).removeprefix('torch.')}"
    return f"{loaded.checkpoint} ({kind}, {weight.device}); tokenizer: {loaded.tokenizer_source}"


@contextmanager
def _one_error() -> Iterator[None]:
    """Turn what loading and generating refuse into the command's one line."""
    try:
        yield
    except (CheckpointError, ValueError) as error:
        raise ConfigError(str(error)) from error


@dataclass
class _Text:
    """A prompt and what has been made of it.

    Attributes:
        prompt: The prompt.
        stream: Makes text of tokens.
        text: What can be shown.
        begun: Whether it is in a batch already.
        num_tokens: New tokens.
        num_passes: Passes of the main model that made them, the prompt's own left out.
        finish_reason: ``""`` while it goes on.
    """

    prompt: str
    stream: TextStream
    text: str = ""
    begun: bool = False
    num_tokens: int = 0
    num_passes: int = -1
    finish_reason: str = ""

    def add(self, tokens: Sequence[int], finish_reason: str) -> None:
        self.num_tokens += len(tokens)
        self.num_passes += 1
        self.text += self.stream.push(tokens)
        if finish_reason:
            self.finish(finish_reason)

    def finish(self, reason: str) -> None:
        self.text += self.stream.finish()
        self.finish_reason = reason


_Show = Callable[[Sequence[_Text]], None]


class _CtrlC:
    """Notes a Ctrl-C, so that no text is cut while it is printed; a second one raises as ever.

    Attributes:
        pressed: Whether there was one.
    """

    def __init__(self) -> None:
        self.pressed = False
        # Where Ctrl-C is ignored, as in the background of a shell, or is another's, it stays so.
        self._is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def __enter__(self) -> _CtrlC:
        if self._is_ours:
            signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _on_signal(self, *_: object) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True


class _Run:
    """Generates for all prompts, batch by batch.

    Args:
        loaded: Model and tokenizer.
        options: The command's.
        prompts: Texts.

    Raises:
        ValueError: A prompt or an option with which the model cannot generate.
    """

    def __init__(self, loaded: LoadedModel, options: argparse.Namespace, prompts: Sequence[str]) -> None:
        self._loaded, self._options = loaded, options
        self._stop = [_unescaped(text) for text in options.stop]
        self._seed = secrets.randbelow(2**31) if options.seed is None else options.seed
        self._sampling = None
        if options.temperature:
            top_p = 1.0 if options.top_p is None else options.top_p
            self._sampling = Sampling(options.temperature, options.top_k, top_p)
        self._acceptance: MTPAcceptance | None = None
        self._num_drafts: int | None = None
        if options.speculative:
            self._num_drafts = options.num_drafts or len(loaded.model.mtp)
        self._texts = [_Text(prompt, TextStream(loaded.decode, self._stop)) for prompt in prompts]
        self._ids = [loaded.encode(prompt) for prompt in prompts]
        self._seconds = 0.0
        self._decoder(range(len(prompts)))  # takes no memory yet; refuses a bad prompt before the first is begun
        if self._num_drafts:
            self._acceptance = MTPAcceptance(self._num_drafts).to(loaded.model.head.weight.device)

    def generate(self, show: _Show) -> bool:
        """Generate; return whether Ctrl-C ended it."""
        start = time.perf_counter()
        with _CtrlC() as ctrl_c:
            for _ in self._rounds(show):
                if ctrl_c.pressed:
                    break
        self._seconds = time.perf_counter() - start
        for text in self._texts:
            if text.begun and not text.finish_reason:
                text.finish("interrupted")
        show(self._texts)
        return ctrl_c.pressed

    def _rounds(self, show: _Show) -> Iterator[None]:
        size, count = self._options.batch_size, len(self._texts)
        for first in range(0, count, size):
            batch = range(first, min(first + size, count))
            for index in batch:
                self._texts[index].begun = True
            show(self._texts)
            for made in self._decoder(batch):
                for row, tokens, finish_reason in made:
                    self._texts[batch[row]].add(tokens, finish_reason)
                show(self._texts)
                yield

    def _decoder(self, batch: range) -> Decoder:
        return Decoder(
            self._loaded.model,
            [self._ids[index] for index in batch],
            max_new_tokens=self._options.max_new_tokens,
            sampling=self._sampling,
            seeds=[self._seed + index for index in batch],
            eos_token_ids=self._loaded.eos_token_ids,
            stop=self._stop,
            decode=self._loaded.decode,
            num_drafts=self._num_drafts,
            acceptance=self._acceptance,
        )

    def summary(self) -> str:
        """Return the closing line."""
        tokens = sum(text.num_tokens for text in self._texts)
        line = f"{tokens} tokens in {self._seconds:.2f} s, {tokens / max(self._seconds, 1e-9):.1f} tokens/s"
        if self._sampling is not None:
            line += f", seed {self._seed}"
        if self._acceptance is not None:
            begun = [text for text in self._texts if text.num_tokens]
            passes = sum(text.num_passes for text in begun)
            drafted, accepted = self._acceptance.num_drafted.tolist(), self._acceptance.num_accepted.tolist()
            rates = [f"{yes / all_:.0%}" if all_ else "-" for yes, all_ in zip(accepted, drafted, strict=True)]
            # A prompt's pass gives one token whatever is drafted.
            per_pass = f"{(tokens - len(begun)) / passes:.2f}" if passes else "-"
            line += f"; drafts accepted by position: {' '.join(rates)}; {per_pass} tokens per pass"
        return line


class _Printer:
    """Prints the first text that is not finished as it grows, and those behind it when it is their turn.

    Args:
        file: Where to.
        with_prompts: Print each prompt before its text.
    """

    def __init__(self, file: TextIO, with_prompts: bool) -> None:
        self._file, self._with_prompts = file, with_prompts
        self._next = 0  # the first text that is not finished
        self._shown = 0  # characters of it

    def __call__(self, texts: Sequence[_Text]) -> None:
        """Print what is new."""
        while self._next < len(texts) and (text := texts[self._next]).begun:
            whole = (text.prompt if self._with_prompts else "") + text.text
            if self._next and not self._shown and whole:
                print(file=self._file)
            print(whole[self._shown :], end="", file=self._file, flush=True)
            self._shown = len(whole)
            if not text.finish_reason:
                return
            print(file=self._file, flush=True)
            self._next, self._shown = self._next + 1, 0


class _JsonLines:
    """Writes finished texts as lines of JSON, in the order of their prompts.

    Args:
        file: Where to.
        bar: Counts them.
    """

    def __init__(self, file: TextIO, bar: tqdm) -> None:
        self._file, self._bar = file, bar
        self._next = 0

    def __call__(self, texts: Sequence[_Text]) -> None:
        """Write what has been finished."""
        while self._next < len(texts) and (text := texts[self._next]).finish_reason:
            values = {
                "prompt": text.prompt,
                "text": text.text,
                "finish_reason": text.finish_reason,
                "num_tokens": text.num_tokens,
            }
            print(json.dumps(values, ensure_ascii=False), file=self._file, flush=True)
            self._next += 1
            self._bar.update()


@contextmanager
def _output(options: argparse.Namespace, num_prompts: int) -> Iterator[_Show]:
    """Open where texts go."""
    if options.output is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to stop
        yield _Printer(sys.stdout, with_prompts=not options.quiet)
        return
    try:
        file = options.output.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {options.output}: cannot be written ({error.strerror or error})") from error
    # The bar's None: where stderr is a terminal.
    with file, tqdm(total=num_prompts, unit="text", disable=options.quiet or None, dynamic_ncols=True) as bar:
        yield _JsonLines(file, bar)
