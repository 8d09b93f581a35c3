"""Counts of all ranks together."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


def data_parallel_group(trainer: Any) -> Any:
    """Return the process group over which token counts add up, or None where one process sees all tokens.

    Args:
        trainer: A Trainer whose strategy has been set up.

    Returns:
        The ``data_parallel`` axis of a strategy with a mesh, as its tensor-parallel ranks see the same tokens
        and would count them again; otherwise all ranks.
    """
    if trainer.world_size == 1:
        return None
    mesh = getattr(trainer.strategy, "device_mesh", None)
    if mesh is not None and "data_parallel" in (mesh.mesh_dim_names or ()):
        return mesh["data_parallel"].get_group()
    return dist.group.WORLD


def sum_over_ranks(tensor: Tensor, group: Any) -> Tensor:
    """Add ``tensor`` up over the ranks of ``group``, in place, and return it; None leaves it as it is."""
    if group is not None:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
    return tensor


def max_over_ranks(tensor: Tensor, group: Any) -> Tensor:
    """Take the elementwise maximum of ``tensor`` over the ranks of ``group``, in place, and return it."""
    if group is not None:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return tensor
