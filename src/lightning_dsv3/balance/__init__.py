"""Observing routers and owning their bias: what the callbacks are made of.

Nothing here knows a Trainer's hooks. :func:`find_routers` finds the routers of any model,
:class:`RouterObserver` counts the experts that they choose, :func:`update_biases` applies the report's rule,
and the ownership functions make sure that one thing alone moves a bias.
"""

from __future__ import annotations

from lightning_dsv3.balance.adapter import DeepSeekV3RouterAdapter, NativeUpdater, RouterAdapter
from lightning_dsv3.balance.averaging import averaged_copies, copy_biases
from lightning_dsv3.balance.biases import Float32Biases, require_float32_bias, update_biases, valid_rate
from lightning_dsv3.balance.discovery import (
    NATIVE_ADAPTERS,
    ObservedRouter,
    find_routers,
    matching_routers,
    no_router_message,
)
from lightning_dsv3.balance.health import broken_layers, require_finite_routing
from lightning_dsv3.balance.hugging_face import HuggingFaceRouterAdapter
from lightning_dsv3.balance.installation import install_biases, install_biases_before_loading
from lightning_dsv3.balance.loads import LoadStatistics, expert_loads, load_statistics, max_violations, save_loads
from lightning_dsv3.balance.loops import balanced
from lightning_dsv3.balance.moving import move_biases
from lightning_dsv3.balance.observer import RouterObserver, in_recompute
from lightning_dsv3.balance.ownership import bias_owner, claim_bias, native_updaters, release_bias
from lightning_dsv3.balance.padding import COMMON_MASK_KEY, padding_mask
from lightning_dsv3.balance.progress import ViolationInBar
from lightning_dsv3.balance.ranks import data_parallel_group, max_over_ranks, sum_over_ranks
from lightning_dsv3.balance.steps import OptimizerStepWatcher

__all__ = [
    "COMMON_MASK_KEY",
    "NATIVE_ADAPTERS",
    "DeepSeekV3RouterAdapter",
    "Float32Biases",
    "HuggingFaceRouterAdapter",
    "LoadStatistics",
    "NativeUpdater",
    "ObservedRouter",
    "OptimizerStepWatcher",
    "RouterAdapter",
    "RouterObserver",
    "ViolationInBar",
    "averaged_copies",
    "balanced",
    "bias_owner",
    "broken_layers",
    "claim_bias",
    "copy_biases",
    "data_parallel_group",
    "expert_loads",
    "find_routers",
    "in_recompute",
    "install_biases",
    "install_biases_before_loading",
    "load_statistics",
    "matching_routers",
    "max_over_ranks",
    "max_violations",
    "move_biases",
    "native_updaters",
    "no_router_message",
    "padding_mask",
    "release_bias",
    "require_finite_routing",
    "require_float32_bias",
    "save_loads",
    "sum_over_ranks",
    "update_biases",
    "valid_rate",
]
