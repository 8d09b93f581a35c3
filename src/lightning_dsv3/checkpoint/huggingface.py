"""Read and write folders of safetensors with a ``config.json``, as Hugging Face, vLLM and SGLang load them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
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
_CHECK_CONFIG = "check config.json against the files"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
    with torch.device("meta"):
        model = DeepSeekV3(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    expected = {name: shape for entry in entries for name, shape in entry.part_shapes(shapes[entry.name]).items()}
    tensors.check_names(expected, mtp_copies(config))
    state = {entry.name: tensors.assemble(entry, expected, dtype) for entry in entries}
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
            self.files = self._read_index()
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

    def check_names(self, expected: Mapping[str, Sequence[int]], copies: Mapping[str, str]) -> None:
        """Name every tensor that is missing or not expected."""
        allowed = {*expected, *copies, "lm_head.weight"}  # a tied head may be stored as well
        if missing := sorted(set(expected) - set(self.files)):
            shape = list(expected[missing[0]])
            raise CheckpointError(
                f"{self.folder}: {missing[0]}, of shape {shape}, is missing{_and_more(missing)}; {_CHECK_CONFIG}"
            )
        # Old conversions carry the rotary table; it is a function of the configuration.
        extra = sorted(n for n in set(self.files) - allowed if not n.endswith("rotary_emb.inv_freq"))
        if extra:
            raise CheckpointError(
                f"{self.folder}: {extra[0]} is not a tensor of this configuration{_and_more(extra)}; {_CHECK_CONFIG}"
            )

    def assemble(self, entry: Entry, expected: Mapping[str, Sequence[int]], dtype: torch.dtype | None) -> Tensor:
        """Read one of our tensors from its parts."""
        dtype = torch.float32 if entry.name.endswith("router.bias") else dtype
        rows = [torch.cat([self._read(name, expected[name]) for name in part]) for part in entry.parts]
        kinds = {str(row.dtype) for row in rows}
        if len(kinds) > 1:
            raise CheckpointError(
                f"{self.folder}: {entry.parts[0][0]} and its neighbours are of different dtypes "
                f"({', '.join(sorted(kinds))}); store one layer's experts in one dtype"
            )
        tensor = torch.stack(rows) if entry.stacked else rows[0]
        return tensor.to(dtype) if dtype is not None else tensor

    def _read(self, name: str, shape: Sequence[int]) -> Tensor:
        file = self.files[name]
        with self._open(file) as handle:
            try:
                tensor: Tensor = handle.get_tensor(name)
            except SafetensorError as error:
                raise CheckpointError(
                    f"{self.folder / file}: {name} is not in it although {_INDEX} says so ({error}); fetch both again"
                ) from error
        if list(tensor.shape) != list(shape):
            raise CheckpointError(
                f"{self.folder}: {name}: shape {list(tensor.shape)} where config.json asks for {list(shape)}"
            )
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(
                f"{self.folder}: {name}: dtype {str(tensor.dtype).removeprefix('torch.')}; weights are read as "
                f"float32, bfloat16, float16 or float64: convert the checkpoint first"
            )
        return tensor

    def _read_index(self) -> dict[str, str]:
        files = _read_json(self.folder / _INDEX).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise CheckpointError(f"{self.folder / _INDEX}: has no weight_map {{tensor: file}}; fetch it again")
        return files

    def _open(self, file: str) -> Any:
        try:
            return safe_open(self.folder / file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder / file}: cannot be read ({error}); fetch it again") from error


def _and_more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


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
