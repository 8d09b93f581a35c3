"""Inference: the latent cache."""

from lightning_dsv3.inference.cache import LatentCache, extend

__all__ = ["LatentCache", "extend"]
