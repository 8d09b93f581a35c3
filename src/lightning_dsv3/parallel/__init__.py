"""What acts on a built model from outside and changes no result: activation checkpointing and compilation."""

from lightning_dsv3.parallel.activation_checkpointing import checkpoint_blocks
from lightning_dsv3.parallel.compilation import compile_model

__all__ = ["checkpoint_blocks", "compile_model"]
