"""The published placement of redundant experts (deepseek-ai/EPLB), and the parts of it that every policy shares.

Two greedy rules do all the work:

* *replicate*: give each extra slot to the expert whose replicas are busiest, by load / number of replicas. This makes
  the busiest replica as light as any choice of counts can.
* *pack*: take items from the heaviest to the lightest, each to the lightest pack that still has room. All packs end
  with the same number of items.

The hierarchical policy packs groups of experts to nodes, replicates inside each node, and packs each node's replicas
to its GPUs, so that tokens which a router limits to few groups also stay on few nodes. The global policy is the same
with one group and one node. Where groups cannot be shared out evenly between nodes, hierarchical means global.

All layers are worked on at once: the loops below run over items, each step is a few operations on all layers.
Loads are float32 here, as in the published code, so that near-ties fall alike. Among equals the first one is first; the
published code leaves their order to torch's unstable sort. That decides which of two equal replicas is number 0, and no
GPU's load.

Shapes: L layers, N nodes, X = L * N cells (a node's share of a layer), E experts, P slots, G GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]
# (load [X, E], slots, GPUs of a cell) -> expert of each slot [X, P], and which of its expert's replicas it is [X, P]
CellPolicy = Callable[[Floats, int, int], tuple[Ints, Ints]]


def replicate(load_XE: Floats, num_slots: int, most: int | None = None) -> tuple[Ints, Ints, Ints]:
    """Share out slots so that the busiest replica is as light as possible.

    Args:
        load_XE: Load of each expert; its dtype is the one that is computed in.
        num_slots: Slots P >= E of a cell.
        most: Largest number of replicas of one expert, P <= E * most; without it there is no limit.

    Returns:
        Expert of each replica ``[X, P]`` (first one of each, then the extra ones as they were given), which of its
        expert's replicas it is ``[X, P]``, and the number of replicas ``[X, E]``; int64.
    """
    num_cells, num_experts = load_XE.shape
    expert_XP = np.empty((num_cells, num_slots), np.int64)
    rank_XP = np.zeros((num_cells, num_slots), np.int64)
    counts_XE = np.ones((num_cells, num_experts), np.int64)
    expert_XP[:, :num_experts] = np.arange(num_experts)
    share_XE = load_XE.copy()
    if most == 1:
        share_XE[:] = -1
    cells = np.arange(num_cells)
    for slot in range(num_experts, num_slots):
        expert_X = share_XE.argmax(axis=1)
        count_X = counts_XE[cells, expert_X]
        expert_XP[:, slot], rank_XP[:, slot] = expert_X, count_X
        count_X = count_X + 1
        counts_XE[cells, expert_X] = count_X
        # The quotient in the load's own precision: int64 would make it float64.
        share_X = load_XE[cells, expert_X] / count_X.astype(load_XE.dtype)
        share_XE[cells, expert_X] = share_X if most is None else np.where(count_X >= most, -1, share_X)
    return expert_XP, rank_XP, counts_XE


def pack(weight_XN: Floats, num_packs: int) -> tuple[Ints, Ints]:
    """Pack the heaviest item first, each to the lightest pack with room; ties go to the earlier item and pack.

    Args:
        weight_XN: Weight of N items, N a multiple of ``num_packs``.
        num_packs: Packs, which get N / num_packs items each.

    Returns:
        Pack of each item, and its place in the pack: int64 ``[X, N]``.
    """
    num_cells, num_items = weight_XN.shape
    room = num_items // num_packs
    pack_XN, place_XN = np.zeros((2, num_cells, num_items), np.int64)
    if room == 1:
        pack_XN[:] = np.arange(num_items)
        return pack_XN, place_XN
    cells = np.arange(num_cells)
    # Full packs weigh infinity; what they would weigh is not needed any more.
    packed_XK = np.zeros((num_cells, num_packs), weight_XN.dtype)
    filled_XK = np.zeros((num_cells, num_packs), np.int64)
    for item_X in np.argsort(-weight_XN, axis=1, kind="stable").T:
        pack_X = packed_XK.argmin(axis=1)
        place_X = filled_XK[cells, pack_X]
        pack_XN[cells, item_X], place_XN[cells, item_X] = pack_X, place_X
        filled_XK[cells, pack_X] = place_X + 1
        weight_X = packed_XK[cells, pack_X] + weight_XN[cells, item_X]
        packed_XK[cells, pack_X] = np.where(place_X + 1 < room, weight_X, np.inf)
    return pack_XN, place_XN


def published_cells(load_XE: Floats, num_slots: int, num_gpus: int) -> tuple[Ints, Ints]:
    """Replicate and pack each cell by itself; the :data:`CellPolicy` of the published algorithm."""
    replica_XP, rank_XP, counts_XE = replicate(load_XE, num_slots)
    share_XE = load_XE / counts_XE.astype(load_XE.dtype)
    gpu_XP, place_XP = pack(np.take_along_axis(share_XE, replica_XP, axis=1), num_gpus)
    replica_at_XP = _inverse(gpu_XP * (num_slots // num_gpus) + place_XP)
    return np.take_along_axis(replica_XP, replica_at_XP, axis=1), np.take_along_axis(rank_XP, replica_at_XP, axis=1)


def published(load_LE: Floats, num_slots: int, num_gpus: int, num_nodes: int, num_groups: int) -> tuple[Ints, Ints]:
    """Return the published plan; one node and one group give the global policy.

    Args:
        load_LE: Load of each expert.
        num_slots: Slots P, a multiple of ``num_gpus``.
        num_gpus: GPUs, a multiple of ``num_nodes``.
        num_nodes: Nodes; ``num_groups`` is a multiple of it.
        num_groups: Groups of consecutive experts that stay in a node.

    Returns:
        Expert of each slot, and which of its expert's replicas it is: int64 ``[L, P]``.
    """
    load_LE = load_LE.astype(np.float32)
    return within_nodes(published_cells, load_LE, num_slots, num_gpus, num_nodes, num_groups)


def within_nodes(
    policy: CellPolicy, load_LE: Floats, num_slots: int, num_gpus: int, num_nodes: int, num_groups: int
) -> tuple[Ints, Ints]:
    """Pack groups to nodes and let ``policy`` place each node's experts in the node's slots.

    Args and returns as of :func:`published`.
    """
    num_layers, num_experts = load_LE.shape
    size = num_experts // num_groups
    # torch's sum, as in the published code: near-ties between groups fall alike.
    group_load = torch.from_numpy(load_LE).unflatten(-1, (num_groups, size)).sum(-1).numpy()
    node, place = pack(group_load, num_nodes)
    position = (node * (num_groups // num_nodes) + place) * size
    # expert_at: the experts in the order of their nodes
    expert_at_LE = _inverse((position[:, :, None] + np.arange(size)).reshape(num_layers, num_experts))
    cell_XE = np.take_along_axis(load_LE, expert_at_LE, axis=1).reshape(num_layers * num_nodes, -1)
    local_XP, rank_XP = policy(cell_XE, num_slots // num_nodes, num_gpus // num_nodes)
    first_N = np.arange(num_nodes)[:, None] * (num_experts // num_nodes)
    at_LP = (local_XP.reshape(num_layers, num_nodes, -1) + first_N).reshape(num_layers, num_slots)
    return np.take_along_axis(expert_at_LE, at_LP, axis=1), rank_XP.reshape(num_layers, num_slots)


def _inverse(permutation_XN: Ints) -> Ints:
    inverse_XN = np.empty_like(permutation_XN)
    places_XN = np.broadcast_to(np.arange(permutation_XN.shape[1]), permutation_XN.shape)
    np.put_along_axis(inverse_XN, permutation_XN, places_XN, axis=1)
    return inverse_XN
