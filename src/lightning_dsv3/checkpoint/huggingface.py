"""Read and write folders of safetensors with a ``config.json``, as Hugging Face, vLLM and SGLang load them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_dsv3.checkpoint.errors import CheckpointError
from lightning_dsv3.checkpoint.layout import Entry, layout, mtp_copies
from lightning_dsv3.config import DeepSeekV3Config
from lightning_dsv3.model import DeepSeekV3

_INDEX = "model.safetensors.index.json"


def load_hf_checkpoint(folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> DeepSeekV3:
    """Build a model from a folder with ``config.json`` and safetensors, one file or an index.

    Args:
        folder: The folder.
        dtype: Dtype of the weights; None keeps what is stored. The routing bias is float32 in any case.

    Returns:
        The model. A folder without MTP tensors gives a model without MTP, whatever its ``config.json`` says.

    Raises:
        CheckpointError: An absent or unreadable file, or a tensor that is missing, not expected or of another shape.
        ConfigError: Another architecture.
    """
    path = Path(folder)
    config = DeepSeekV3Config.from_hf(_read_json(path / "config.json"))
    tensors = _Tensors(path)
    first_mtp = f"model.layers.{config.num_hidden_layers}."
    if not any(name.startswith(first_mtp) for name in tensors.files):
        config = dataclasses.replace(config, num_nextn_predict_layers=0)
    entries = list(layout(config))
    tensors.check_names(entries, mtp_copies(config))

    with torch.device("meta"):
        model = DeepSeekV3(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    state = {entry.name: tensors.assemble(entry, shapes[entry.name], dtype) for entry in entries}
    if config.tie_word_embeddings:
        state["head.weight"] = state["embedding.weight"]
    model.load_state_dict(state, assign=True)
    if config.tie_word_embeddings:
        model.head.weight = model.embedding.weight  # `assign` makes two parameters of one
    return model


def save_hf_checkpoint(
    model: DeepSeekV3,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a folder that ``DeepseekV3ForCausalLM.from_pretrained`` (or V2's) and :func:`load_hf_checkpoint` read.

    MTP modules go to the layers behind the last, with the copies of embedding and head that the released folder has.
    Files are written under temporary names and renamed, ``config.json`` last, so that a folder is complete or absent.

    Args:
        model: The model.
        folder: Where to; made when absent.
        dtype: Dtype of the weights, None for the model's own. The routing bias is written in float32 in any case.
        max_shard_bytes: A file holds at most so many bytes; more files get an index.

    Raises:
        CheckpointError: The folder holds a checkpoint already.
        ConfigError: A configuration that no Hugging Face class computes.
    """
    path = Path(folder)
    values = model.config.to_hf()
    if path.exists() and any(path.glob("*.safetensors")):
        raise CheckpointError(f"{path}: holds safetensors files already; choose another folder or empty it")
    path.mkdir(parents=True, exist_ok=True)

    shards = list(_shards(_their_tensors(model, dtype), max_shard_bytes))
    weight_map: dict[str, str] = {}
    size = 0
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        temporary = path / f".{name}.tmp"
        save_file(shard, temporary, metadata={"format": "pt"})
        temporary.replace(path / name)
        weight_map |= dict.fromkeys(shard, name)
        size += sum(tensor.nbytes for tensor in shard.values())
    if len(shards) > 1:
        _write_json(path / _INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    stored = next(iter(shards[0].values())).dtype
    _write_json(path / "config.json", values | {"torch_dtype": str(stored).removeprefix("torch.")})


class _Tensors:
    """The tensors of a folder, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / _INDEX).exists():
            self.files: dict[str, str] = _read_json(folder / _INDEX)["weight_map"]
        else:
            files = sorted(file.name for file in folder.glob("*.safetensors"))
            if len(files) != 1:
                raise CheckpointError(
                    f"{folder}: found {len(files)} safetensors files and no {_INDEX}; one of both is needed"
                )
            with self._open(files[0]) as handle:
                self.files = dict.fromkeys(handle.keys(), files[0])
        scaled = sorted(name for name in self.files if name.endswith("_scale_inv"))
        if scaled:
            raise CheckpointError(
                f"{folder}: {scaled[0]} and {len(scaled) - 1} more: FP8 blocks; convert to BF16 first"
            )

    def check_names(self, entries: list[Entry], copies: dict[str, str]) -> None:
        """Name every tensor that is missing or not expected."""
        needed = {name for entry in entries for part in entry.parts for name in part}
        allowed = needed | set(copies) | {"lm_head.weight"}  # a tied head may be stored as well
        missing, extra = sorted(needed - set(self.files)), sorted(set(self.files) - allowed)
        # Old conversions carry this table; it is a function of the configuration.
        extra = [name for name in extra if not name.endswith("rotary_emb.inv_freq")]
        for what, names in (("is missing", missing), ("is not a tensor of this configuration", extra)):
            if names:
                more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
                raise CheckpointError(f"{self.folder}: {names[0]} {what}{more}; check config.json against the files")

    def assemble(self, entry: Entry, shape: torch.Size, dtype: torch.dtype | None) -> Tensor:
        """Read one of our tensors from its parts."""
        dtype = torch.float32 if entry.name.endswith("router.bias") else dtype
        rows = [torch.cat([self._read(name) for name in part]) for part in entry.parts]
        tensor = torch.stack(rows) if entry.stacked else rows[0]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{self.folder}: {', '.join(entry.parts[0])}: shape {list(tensor.shape)} where config.json "
                f"asks for {list(shape)}"
            )
        return tensor.to(dtype) if dtype is not None else tensor

    def _read(self, name: str) -> Tensor:
        with self._open(self.files[name]) as handle:
            tensor: Tensor = handle.get_tensor(name)
        return tensor

    def _open(self, file: str) -> Any:
        try:
            return safe_open(self.folder / file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder / file}: cannot be read ({error}); fetch it again") from error


def _their_tensors(model: DeepSeekV3, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    state = model.state_dict()
    for entry in layout(model.config):
        tensor = state[entry.name].detach().cpu()
        tensor = tensor.to(torch.float32 if entry.name.endswith("router.bias") else dtype or tensor.dtype)
        for rows, names in zip(tensor if entry.stacked else [tensor], entry.parts, strict=True):
            for name, part in zip(names, rows.chunk(len(names)), strict=True):
                yield name, part.clone(memory_format=torch.contiguous_format)
    for copy, ours in mtp_copies(model.config).items():
        tensor = state[ours].detach().cpu()
        yield copy, tensor.to(dtype or tensor.dtype, copy=True)


def _shards(tensors: Iterator[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    if shard:
        yield shard


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); a Hugging Face folder needs it") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold an object")
    return values


def _write_json(path: Path, values: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
