"""Inference: latent cache, generation with and without drafts, placement of redundant experts."""

from lightning_dsv3.inference.cache import LatentCache, extend
from lightning_dsv3.inference.drafting import MTPDrafter
from lightning_dsv3.inference.generation import Decoder, NewTokens, generate
from lightning_dsv3.inference.sampling import Sampling
from lightning_dsv3.inference.text import TextStream

__all__ = ["Decoder", "LatentCache", "MTPDrafter", "NewTokens", "Sampling", "TextStream", "extend", "generate"]
