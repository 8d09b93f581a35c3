"""Text to batches: corpus, tokenizer, packing, and a data module that resumes exactly."""

from lightning_dsv3.data.datamodule import DeepSeekV3DataModule, SourceReport
from lightning_dsv3.data.tokenizer import load_tokenizer, save_tokenizer, token_bytes

__all__ = ["DeepSeekV3DataModule", "SourceReport", "load_tokenizer", "save_tokenizer", "token_bytes"]
