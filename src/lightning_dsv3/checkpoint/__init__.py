"""Checkpoints for exchange: the Hugging Face layout of DeepSeek-V2 and V3."""

from lightning_dsv3.checkpoint.errors import CheckpointError
from lightning_dsv3.checkpoint.huggingface import load_hf_checkpoint, save_hf_checkpoint

__all__ = ["CheckpointError", "load_hf_checkpoint", "save_hf_checkpoint"]
