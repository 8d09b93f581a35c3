"""What acts on a built model from outside: activation checkpointing, compilation (which change no result), and FP8."""

from lightning_dsv3.parallel.activation_checkpointing import checkpoint_blocks
from lightning_dsv3.parallel.compilation import compile_model
from lightning_dsv3.parallel.fp8 import FP8Conversion, convert_from_fp8, convert_to_fp8

__all__ = ["FP8Conversion", "checkpoint_blocks", "compile_model", "convert_from_fp8", "convert_to_fp8"]
