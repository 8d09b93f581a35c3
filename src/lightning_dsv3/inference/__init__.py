"""Inference: latent cache, generation with and without drafts, placement of redundant experts."""

from lightning_dsv3.inference.cache import LatentCache, extend
from lightning_dsv3.inference.drafting import MTPDrafter
from lightning_dsv3.inference.generation import Decoder, NewTokens, generate
from lightning_dsv3.inference.load_tables import read_load_table
from lightning_dsv3.inference.load_trace import drift, simulate
from lightning_dsv3.inference.placement import Placement, PlacementError, lower_bound, plan_placement
from lightning_dsv3.inference.placement_files import engine_form, load_placement, save_placement
from lightning_dsv3.inference.replanning import align, expert_bytes, moved_experts, replan
from lightning_dsv3.inference.sampling import Sampling
from lightning_dsv3.inference.text import TextStream

__all__ = [
    "Decoder",
    "LatentCache",
    "MTPDrafter",
    "NewTokens",
    "Placement",
    "PlacementError",
    "Sampling",
    "TextStream",
    "align",
    "drift",
    "engine_form",
    "expert_bytes",
    "extend",
    "generate",
    "load_placement",
    "lower_bound",
    "moved_experts",
    "plan_placement",
    "read_load_table",
    "replan",
    "save_placement",
    "simulate",
]
