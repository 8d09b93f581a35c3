"""Any checkpoint to a model that is ready to infer, with its tokenizer: what generation and evaluation start from.

    last.ckpt                          a Lightning checkpoint: one file
    last.ckpt/                         the same, sharded: a folder with .metadata and meta.pt
    runs/<time>-<name>/                a run folder: its checkpoints/last.ckpt, or else the newest one there
    a folder with config.json          safetensors in the Hugging Face layout

A Lightning checkpoint is read as tensors and plain containers (``weights_only``), without Lightning and without the
module's class. Where weights were averaged in training (EMA, SWA), the averaged ones are its ``state_dict`` and are
taken, with the routing bias as training left it.

Text is encoded as the model has seen it; see :mod:`lightning_dsv3.checkpoint.tokens`.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from lightning_dsv3.checkpoint.errors import CheckpointError
from lightning_dsv3.checkpoint.huggingface import load_hf_checkpoint
from lightning_dsv3.checkpoint.tokens import read_tokens
from lightning_dsv3.config import ConfigError, DeepSeekV3Config
from lightning_dsv3.model import DeepSeekV3

_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
_KINDS = "a .ckpt, a run folder, a sharded checkpoint or a Hugging Face folder"
# The module's attribute that holds the DeepSeekV3.
_MODULE_PREFIX = "model."


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, and how text becomes its tokens.

    Attributes:
        model: The model; nothing in it wants a gradient.
        tokenizer: Its tokenizer.
        eos_token_ids: Tokens that end a text; none where nothing says which.
        bos_token_id: Begin of sentence, or None.
        pad_token_id: Padding, or None.
        prefix: What stands before a text.
        checkpoint: The file or folder that was read; in a run folder the one that was taken.
        tokenizer_source: Where the tokenizer comes from.
        averaged: Whether the weights are averages over training.
    """

    model: DeepSeekV3
    tokenizer: Tokenizer
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    pad_token_id: int | None
    prefix: tuple[int, ...]
    checkpoint: Path
    tokenizer_source: str
    averaged: bool

    def encode(self, text: str) -> list[int]:
        """Return a text's tokens behind the prefix, at least one: an empty text is a begin or an end of sentence.

        Raises:
            ValueError: An empty text where neither is known.
        """
        tokens = [*self.prefix, *self.tokenizer.encode(text, add_special_tokens=False).ids]
        if not tokens:
            starts = self.eos_token_ids[:1] if self.bos_token_id is None else (self.bos_token_id,)
            if not starts:
                raise ValueError(
                    "the prompt is empty, and the tokenizer has no begin or end of sentence: give some text"
                )
            tokens = list(starts)
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special ones left out."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text


def load_for_inference(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    tokenizer: str | os.PathLike[str] | None = None,
) -> LoadedModel:
    """Load a checkpoint of any kind, and its tokenizer.

    The tokenizer is the one given, else the one beside the checkpoint (a run folder's or a Hugging Face folder's
    ``tokenizer.json``), else for a Lightning checkpoint DeepSeek's, cut to the model's vocabulary as training cuts it.

    Args:
        path: A ``.ckpt``, a run folder, a sharded checkpoint or a Hugging Face folder; see the module's text.
        dtype: Dtype of the weights, or its name as in ``bfloat16``; None keeps what is stored. The routing bias is
            float32 in any case.
        device: Where to.
        tokenizer: A ``tokenizer.json``, or a folder with one.

    Raises:
        CheckpointError: A checkpoint or tokenizer that is not there, cannot be read, or does not fit; the text names it
            and the fix.

    Example:
        >>> import tempfile
        >>> from lightning_dsv3.checkpoint import save_hf_checkpoint
        >>> from lightning_dsv3.data import load_tokenizer, save_tokenizer
        >>> folder = Path(tempfile.mkdtemp())
        >>> config = DeepSeekV3Config.from_preset("tiny", num_hidden_layers=2, vocab_size=512)
        >>> save_hf_checkpoint(DeepSeekV3(config), folder)
        >>> save_tokenizer(load_tokenizer(512), folder / "tokenizer.json")
        >>> loaded = load_for_inference(folder, dtype="bfloat16")
        >>> loaded.model.head.weight.dtype, loaded.eos_token_ids, loaded.decode(loaded.encode("the cat"))
        (torch.bfloat16, (1,), 'the cat')
    """
    dtype, device = _dtype(dtype), _device(device)
    path = _find(Path(path))
    is_hf = path.is_dir() and not (path / ".metadata").is_file()
    averaged = False
    if is_hf:
        try:
            model = load_hf_checkpoint(path, dtype=dtype).to(device)
        except ConfigError as error:
            raise CheckpointError(f"{path / 'config.json'}: {error}") from error
    else:
        checkpoint = _read(path / "meta.pt" if path.is_dir() else path)
        averaged = "current_model_state" in checkpoint
        build = _from_shards if path.is_dir() else _from_file
        model = build(path, _config(path, checkpoint), checkpoint, dtype, device)
    model.eval().requires_grad_(False)
    tokens = read_tokens(path, tokenizer, model.config.vocab_size, is_hf=is_hf)
    return LoadedModel(
        model,
        tokens.tokenizer,
        eos_token_ids=tokens.eos,
        bos_token_id=tokens.bos,
        pad_token_id=tokens.pad,
        prefix=tokens.prefix,
        checkpoint=path,
        tokenizer_source=tokens.source,
        averaged=averaged,
    )


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise CheckpointError(f"dtype={name!r}: is not one of {', '.join(_DTYPES)}; None keeps what is stored")
    return _DTYPES[name]


def _device(device: torch.device | str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).splitlines()[0]
        raise CheckpointError(f"device={str(device)!r}: cannot be used here ({why}); cpu always can") from error


def _find(path: Path) -> Path:
    """Return the checkpoint that a user names, of a run folder the one to take."""
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file or folder; give {_KINDS}")
    if path.is_file():
        if path.suffix in (".safetensors", ".json"):
            raise CheckpointError(f"{path}: is one file of a checkpoint; give its folder, {path.parent}")
        return path
    if any((path / name).is_file() for name in (".metadata", "config.json")):
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    last = folder / "last.ckpt"
    found = [last] if last.exists() else sorted(folder.glob("*.ckpt"), key=lambda file: file.stat().st_mtime)
    if not found:
        # A folder that Lightning began to write ends in .ckpt and has none of its files yet.
        begun = "a sharded checkpoint without .metadata: it was not written to its end"
        raise CheckpointError(
            f"{path}: is {begun}; take an earlier one"
            if path.suffix == ".ckpt"
            else f"{path}: holds no checkpoint (config.json, .metadata, or checkpoints/*.ckpt); give {_KINDS}"
        )
    return found[-1] if found[-1].is_file() else _find(found[-1])


def _read(path: Path) -> dict[str, Any]:
    """Read what Lightning saved; tensors stay in the file until they are asked for."""
    if not zipfile.is_zipfile(path):
        what = "is damaged, unfinished, or no checkpoint of Lightning's" if path.exists() else "is missing"
        raise CheckpointError(f"{path}: {what}; take another checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"{named.group(1)} and perhaps more" if named else "what is no tensor and no plain container"
        raise CheckpointError(
            f"{path}: holds {what}, which is not loaded, as unpickling it could run anything; if you trust the file, "
            "load it where its classes are known and save plain values and tensors"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: cannot be read ({why}); it is damaged, or another kind of file") from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path}: holds a {type(checkpoint).__name__} and is not a checkpoint of Lightning's")
    return checkpoint


def _config(path: Path, checkpoint: Mapping[str, Any]) -> DeepSeekV3Config:
    values = checkpoint.get("hyper_parameters")
    values = values.get("config") if isinstance(values, Mapping) else None
    if not isinstance(values, Mapping):
        raise CheckpointError(
            f"{path}: has no model configuration (hyper_parameters.config), so it is not of a DeepSeekV3Module; load "
            "its model with its own class and write a folder with save_hf_checkpoint"
        )
    try:
        return DeepSeekV3Config.from_dict(values)
    except ConfigError as error:
        raise CheckpointError(f"{path}: hyper_parameters.config: {error}") from error


def _from_file(
    path: Path,
    config: DeepSeekV3Config,
    checkpoint: Mapping[str, Any],
    dtype: torch.dtype | None,
    device: torch.device,
) -> DeepSeekV3:
    state = checkpoint.get("state_dict")
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: has no state_dict, so there are no weights; give {_KINDS}")
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in state.items() if isinstance(tensor, Tensor)}

    def read(wanted: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        # Copied, as a file that is written over while it is mapped would take the process with it.
        return {name: state[name].to(device=device, dtype=kind, copy=True) for name, kind in wanted.items()}

    return _build(path, config, shapes, read, dtype)


def _from_shards(
    path: Path,
    config: DeepSeekV3Config,
    checkpoint: Mapping[str, Any],
    dtype: torch.dtype | None,
    device: torch.device,
) -> DeepSeekV3:
    from lightning_dsv3.checkpoint.sharded import ShardedState  # torch.distributed.checkpoint takes its time

    state = ShardedState(path)

    def read(wanted: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        tensors = {n: torch.empty(state.shapes[n][0], dtype=kind, device=device) for n, kind in wanted.items()}
        state.read_into(tensors)
        return tensors

    return _build(path, config, state.shapes, read, dtype)


def _build(
    path: Path,
    config: DeepSeekV3Config,
    shapes: Mapping[str, tuple[torch.Size, torch.dtype]],
    read: Callable[[Mapping[str, torch.dtype]], dict[str, Tensor]],
    dtype: torch.dtype | None,
) -> DeepSeekV3:
    """Build a model and give it the tensors of a module's state dict, each in memory once."""
    with torch.device("meta"):
        model = DeepSeekV3(config)
    expected = {f"{_MODULE_PREFIX}{name}": tensor.shape for name, tensor in model.state_dict().items()}
    ours = {name: stored for name, stored in shapes.items() if name.startswith(_MODULE_PREFIX)}
    _check_names(path, expected, ours)
    wanted = {}
    for name, (shape, stored) in ours.items():
        if shape != expected[name]:
            raise CheckpointError(
                f"{path}: {name}: shape {list(shape)} where its configuration asks for {list(expected[name])}; "
                "the file is of two models"
            )
        if stored not in _DTYPES.values():
            raise CheckpointError(f"{path}: {name}: dtype {stored}; weights are read as {', '.join(_DTYPES)}")
        wanted[name] = torch.float32 if name.endswith("router.bias") else dtype or stored
    if config.tie_word_embeddings:
        del wanted[f"{_MODULE_PREFIX}head.weight"]
    state = {name.removeprefix(_MODULE_PREFIX): tensor for name, tensor in read(wanted).items()}
    if config.tie_word_embeddings:
        state["head.weight"] = state["embedding.weight"]
    model.load_state_dict(state, assign=True)
    if config.tie_word_embeddings:
        model.head.weight = model.embedding.weight  # `assign` makes two parameters of one
    return model


def _check_names(path: Path, expected: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    for names, verb in ((set(expected) - set(ours), "is missing"), (set(ours) - set(expected), "is not expected")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise CheckpointError(
                f"{path}: {min(names)} {verb}{more}: its tensors are not those of its configuration; "
                "was the module a class of its own?"
            )
