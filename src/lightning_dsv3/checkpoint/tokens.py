"""A checkpoint's tokenizer: which file, which tokens are special, and what stands before a text.

Text is encoded as the model has seen it. In our training data an end of sentence stands before every document
(:mod:`lightning_dsv3.data.packing`), and a special token's name inside a text is text. In a Hugging Face folder
``tokenizer_config.json`` says whether a begin of sentence stands first, and special tokens' names are those tokens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from lightning_dsv3.checkpoint.errors import CheckpointError
from lightning_dsv3.config import ConfigError

# Names that DeepSeek's tokenizers give to special tokens; other files say theirs in tokenizer_config.json.
_DEEPSEEK_NAMES = {"bos": "<｜begin▁of▁sentence｜>", "eos": "<｜end▁of▁sentence｜>", "pad": "<｜▁pad▁｜>"}


class Tokens(NamedTuple):
    """A tokenizer and its special tokens.

    Attributes:
        tokenizer: The tokenizer.
        eos: Tokens that end a text; none where nothing says which.
        bos: Begin of sentence, or None.
        pad: Padding, or None.
        prefix: What stands before a text.
        source: Where the tokenizer comes from.
    """

    tokenizer: Tokenizer
    eos: tuple[int, ...]
    bos: int | None
    pad: int | None
    prefix: tuple[int, ...]
    source: str


def read_tokens(path: Path, given: str | os.PathLike[str] | None, vocab_size: int, *, is_hf: bool) -> Tokens:
    """Read the tokenizer of a checkpoint.

    Args:
        path: The checkpoint.
        given: A ``tokenizer.json``, or a folder with one; None looks beside the checkpoint.
        vocab_size: The model's; no id may be beyond.
        is_hf: Whether the checkpoint is a Hugging Face folder.

    Raises:
        CheckpointError: A file that is missing or damaged, or a tokenizer of another model.
    """
    file = _tokenizer_file(path, given, is_hf=is_hf)
    if file is None:
        tokenizer, source = _packaged_tokenizer(path, vocab_size), f"DeepSeek's, cut to {vocab_size} ids"
    else:
        source = str(file)
        try:
            tokenizer = Tokenizer.from_file(source)
        except Exception as error:  # the type that tokenizers raises
            raise CheckpointError(f"{file}: cannot be read as a tokenizer ({error}); fetch it again") from error
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= vocab_size:
        raise CheckpointError(
            f"{source}: the tokenizer has ids up to {largest}, and the model of {path} has vocab_size={vocab_size}; "
            "give the tokenizer that it was trained with"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = not is_hf
    values = _values(file, "tokenizer_config.json")
    models = [_values(path / name, name) for name in ("generation_config.json", "config.json")] if is_hf else []
    eos, bos, pad = (_special_ids(kind, tokenizer, values, models, vocab_size, path) for kind in ("eos", "bos", "pad"))
    if is_hf:
        adds = values.get("add_bos_token")
        # Where nobody says, the file's own template does.
        prefix = bos[:1] if (adds if adds is not None else bos and tokenizer.encode("").ids[:1] == [bos[0]]) else ()
    else:
        prefix = eos[:1]
    return Tokens(tokenizer, eos, next(iter(bos), None), next(iter(pad), None), prefix, source)


def _tokenizer_file(path: Path, given: str | os.PathLike[str] | None, *, is_hf: bool) -> Path | None:
    """Return the ``tokenizer.json`` to read; None for the packaged one."""
    if given is not None:
        file = Path(given) / "tokenizer.json" if Path(given).is_dir() else Path(given)
        if not file.is_file():
            raise CheckpointError(f"tokenizer={str(given)!r}: {file} is not there; give a tokenizer.json or its folder")
        return file
    if is_hf:
        file = path / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(
                f"{path}: has no tokenizer.json; put the model's own there, or name one with tokenizer=FILE, as in the "
                "run folder that the model comes from"
            )
        return file
    path = path.resolve()
    folders = [path.parent, path.parent.parent] if path.parent.name == "checkpoints" else [path.parent]
    return next((folder / "tokenizer.json" for folder in folders if (folder / "tokenizer.json").is_file()), None)


def _packaged_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    from lightning_dsv3.data.tokenizer import FULL_VOCAB_SIZE, load_tokenizer  # needed where nothing else is there

    try:
        return load_tokenizer(min(vocab_size, FULL_VOCAB_SIZE))
    except ConfigError as error:
        raise CheckpointError(f"{path}: no tokenizer.json is beside it ({error}); give tokenizer=FILE") from error


def _values(beside: Path | None, name: str) -> dict[str, Any]:
    """Read a JSON object beside a file; empty where there is none."""
    if beside is None or not (file := beside.with_name(name)).is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); fetch it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: must hold an object; fetch it again")
    return values


def _special_ids(
    kind: str,
    tokenizer: Tokenizer,
    values: Mapping[str, Any],
    models: Sequence[Mapping[str, Any]],
    vocab_size: int,
    path: Path,
) -> tuple[int, ...]:
    """Return the ids of ``eos``, ``bos`` or ``pad``: as the model's files say, else by the token's name."""
    key = f"{kind}_token_id"
    for value in (model[key] for model in models if model.get(key) is not None):
        ids = tuple(value) if isinstance(value, list) else (value,)
        if not all(isinstance(i, int) and 0 <= i < vocab_size for i in ids):
            raise CheckpointError(f"{path}: {key}={value!r} is no token from 0 to {vocab_size - 1}; correct its json")
        return ids
    named = values.get(f"{kind}_token")
    named = named.get("content") if isinstance(named, Mapping) else named
    known = (tokenizer.token_to_id(name) for name in (named, _DEEPSEEK_NAMES[kind]) if isinstance(name, str))
    return tuple(i for i in known if i is not None)[:1]
