"""Checkpoints: the Hugging Face layout of DeepSeek-V2 and V3 for exchange, and any kind of them for inference."""

from lightning_dsv3.checkpoint.errors import CheckpointError
from lightning_dsv3.checkpoint.huggingface import load_hf_checkpoint, save_hf_checkpoint
from lightning_dsv3.checkpoint.loading import LoadedModel, load_for_inference

__all__ = ["CheckpointError", "LoadedModel", "load_for_inference", "load_hf_checkpoint", "save_hf_checkpoint"]
