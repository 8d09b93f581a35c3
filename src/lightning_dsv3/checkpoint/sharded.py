"""Sharded checkpoints: folders that FSDPStrategy and ModelParallelStrategy write with torch.distributed.checkpoint.

    __0_0.distcp, __1_0.distcp, ...   pieces of tensors, of the model and of the optimizer
    .metadata                         which piece is where: a pickle
    meta.pt                           everything that is not sharded, hyperparameters among it

torch reads ``.metadata`` with plain ``pickle``, which runs whatever the file says. Here it is read with the few classes
that it is made of, and nothing else.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, load
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from lightning_dsv3.checkpoint.errors import CheckpointError

# What stands before the names of a module's tensors: ModelParallelStrategy's word, then FSDPStrategy's.
_STATE_KEYS = ("state_dict.", "model.")
_INCOMPLETE = "perhaps it was not written to its end; take an earlier checkpoint"


class ShardedState:
    """The module's tensors in a sharded checkpoint.

    Args:
        folder: The folder.

    Attributes:
        shapes: Shape and dtype of each tensor, by its name in the module's state dict.

    Raises:
        CheckpointError: ``.metadata`` cannot be read, or holds what it should not.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reader = _Reader(folder)
        stored: Mapping[str, Any] = self._reader.read_metadata().state_dict_metadata
        self._key = next((key for key in _STATE_KEYS if any(name.startswith(key) for name in stored)), "")
        self.shapes: dict[str, tuple[torch.Size, torch.dtype]] = {
            name.removeprefix(self._key): (entry.size, entry.properties.dtype)
            for name, entry in stored.items()
            if name.startswith(self._key) and isinstance(entry, TensorStorageMetadata)
        }

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors, by their names in the module's state dict; only their pieces are read.

        Raises:
            CheckpointError: A file is missing or damaged.
        """
        state = {f"{self._key}{name}": tensor for name, tensor in tensors.items()}
        try:
            with warnings.catch_warnings():
                # It warns that it takes this for one process, which is what `no_dist` says.
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                load(state, storage_reader=self._reader, no_dist=True)
        except CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))
            if not isinstance(cause, Exception):
                raise cause from None  # Ctrl-C
            raise CheckpointError(f"{self._folder}: cannot be read ({_first_line(cause)}); {_INCOMPLETE}") from error


class _Reader(FileSystemReader):
    """Reads a folder, and ``.metadata`` without running what it may hold."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        except Exception as error:  # a damaged pickle may raise anything
            raise CheckpointError(f"{path}: cannot be read ({_first_line(error)}); {_INCOMPLETE}") from error
        if not isinstance(metadata, Metadata) or metadata.storage_data is None:
            raise CheckpointError(f"{path}: is not metadata of torch.distributed.checkpoint; {_INCOMPLETE}")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    _ALLOWED = frozenset(
        {
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
            ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
            ("torch.distributed.checkpoint.metadata", "Metadata"),
            ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
            ("torch.distributed.checkpoint.metadata", "StorageMeta"),
            ("torch.distributed.checkpoint.metadata", "TensorProperties"),
            ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
            ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if module in ("pathlib", "pathlib._local") and name.endswith("Path"):
            return PurePosixPath  # the folder that it was written to, which nobody asks for
        if (module, name) == ("builtins", "getattr"):
            return _enum_member  # how some versions of Python write an enum's member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in self._ALLOWED:
            raise CheckpointError(f"holds {module}.{name}, which is not loaded, as unpickling it could run anything")
        return super().find_class(module, name)


def _enum_member(kind: Any, name: str) -> Any:
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise CheckpointError("holds builtins.getattr, which is not loaded, as unpickling it could run anything")
    return kind[name]


def _first_line(error: object) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
