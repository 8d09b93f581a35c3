"""A new plan after the load has drifted, with few experts moved.

A GPU that is to hold an expert it does not hold yet must load that expert's weights: that is one move. Where on the GPU
the expert stands is free, and which of the new plan's GPUs is which of the old ones is free too (within a node where
groups stay in nodes). Two ways to the new plan:

* from scratch, then :func:`align` gives each planned GPU to the old one that already holds most of its experts;
* :func:`replan`: change the old plan step by step where it is worst, until it is as good as one from scratch up to a
  tolerance. A step replaces one replica of an expert that has others (one move) or exchanges two replicas between GPUs
  (two moves), whichever lightens the busy GPUs most for a move.

Shapes: L layers, X cells (a layer, or a node's share of it), E experts, G GPUs, S slots of a GPU.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_dsv3.config import DeepSeekV3Config
from lightning_dsv3.config.errors import did_you_mean
from lightning_dsv3.inference.placement import Placement, PlacementError, load_table, placement_of
from lightning_dsv3.inference.placement_policies import Floats, Ints
from lightning_dsv3.inference.placement_search import balanced_cells, count_replicas, peak_load

DTYPE_BYTES = {"fp8": 1, "bf16": 2, "fp16": 2, "fp32": 4}
# Power of the GPUs' relative loads whose sum a step lowers: near enough to the maximum, and it sees all busy GPUs.
_SQUARINGS = 4
_STEPS = 1000


def expert_bytes(config: DeepSeekV3Config, dtype: str) -> int:
    """Return the bytes of one routed expert's weights; the scales of FP8 blocks (0.02 %) are not counted.

    Args:
        config: Gives the expert's three matrices of hidden_size x moe_intermediate_size.
        dtype: fp8, bf16, fp16 or fp32.

    >>> expert_bytes(DeepSeekV3Config.from_preset("671b"), "fp8")
    44040192
    """
    if dtype not in DTYPE_BYTES:
        raise PlacementError(f"dtype={dtype!r}: there is no such type; {did_you_mean(dtype, DTYPE_BYTES)}")
    return 3 * config.hidden_size * config.moe_intermediate_size * DTYPE_BYTES[dtype]


def moved_experts(old: Placement, new: Placement) -> Tensor:
    """Return how many experts GPUs must load to go from one plan to the other, int64 ``[L]``."""
    _check_alike(old, new)
    return torch.from_numpy(_moves(old.experts_by_gpu, new.experts_by_gpu, old.num_experts))


def align(old: Placement, new: Placement) -> Placement:
    """Return the new plan with its GPUs and slots in the order that moves few experts away from the old one."""
    _check_alike(old, new)
    nodes = old.num_nodes if new.keeps_groups else 1
    aligned = np.stack(
        [
            _align_layer(old_GS, new_GS, old.num_experts, nodes)
            for old_GS, new_GS in zip(old.experts_by_gpu, new.experts_by_gpu, strict=True)
        ]
    )
    return _with_experts(new, aligned)


def replan(
    placement: Placement,
    load: Tensor | npt.ArrayLike,
    *,
    tolerance: float = 0.02,
    max_moves: int | None = None,
) -> Placement:
    """Change a plan for a new load, moving few experts.

    A layer (or a node's share of it, where groups stay in nodes) whose busiest GPU is within the tolerance of a plan
    from scratch is left alone. Others are changed step by step until they are; where steps do not lead there, the plan
    from scratch is taken, aligned. So the result is within the tolerance, unless ``max_moves`` ends it before.

    Args:
        placement: The plan in force. Its policy does not matter.
        load: The new load ``[L, E]``.
        tolerance: How far the busiest GPU may be above a plan from scratch, as a share.
        max_moves: Experts that may be loaded in all layers and GPUs together; None for no limit. The worst layers
            come first.

    Raises:
        PlacementError: A table that does not fit the plan; a negative tolerance or limit.

    Example:
        >>> from lightning_dsv3.inference.placement import plan_placement
        >>> plan = plan_placement([[90, 30, 20, 20]], num_slots=6, num_gpus=2)
        >>> new = replan(plan, [[20, 90, 20, 30]])
        >>> int(moved_experts(plan, new)), round(float(new.imbalance([[20, 90, 20, 30]])), 3)
        (1, 1.0)
    """
    if not tolerance >= 0:
        raise PlacementError(f"tolerance={tolerance} must be 0 or more: a share of the busiest GPU's load")
    if max_moves is not None and max_moves < 0:
        raise PlacementError(f"max_moves={max_moves} must be 0 or more, or None for no limit")
    load_LE = load_table(load)
    placement.imbalance(load_LE)  # refuses a table of another model
    cells = _Cells(placement, load_LE)
    fresh_XP, _ = balanced_cells(cells.load_XE, cells.old_XGS[0].size, cells.old_XGS.shape[1])
    fresh_XGS = fresh_XP.reshape(cells.old_XGS.shape)
    goal_X = peak_load(cells.load_XE, fresh_XGS) * (1 + tolerance)
    left = np.inf if max_moves is None else max_moves
    new_XGS = cells.old_XGS.copy()
    excess_X = peak_load(cells.load_XE, new_XGS) / np.where(goal_X > 0, goal_X, 1)
    for cell in np.argsort(-excess_X, kind="stable"):
        if excess_X[cell] <= 1 or left <= 0:
            break
        load_E, old_GS = cells.load_XE[cell], cells.old_XGS[cell]
        found_GS, reached = _relieve(load_E, old_GS, goal_X[cell], left)
        if not reached:
            aligned_GS = _align_layer(old_GS, fresh_XGS[cell], len(load_E), 1)
            if _moves(old_GS[None], aligned_GS[None], len(load_E))[0] <= left:
                found_GS = aligned_GS
        new_XGS[cell] = found_GS
        left -= _moves(old_GS[None], found_GS[None], len(load_E))[0]
    return _with_experts(placement, cells.experts_by_gpu(new_XGS))


class _Cells:
    """A plan by cells that do not exchange experts: layers, or each node's share of a layer where groups stay there."""

    def __init__(self, placement: Placement, load_LE: Floats) -> None:
        experts_LGS = placement.experts_by_gpu
        num_layers, num_gpus, room = experts_LGS.shape
        nodes = placement.num_nodes if placement.keeps_groups else 1
        self._shape = experts_LGS.shape
        by_node = experts_LGS.reshape(num_layers * nodes, -1)
        # [X, E / nodes]: the experts of a cell, in order; a cell's own numbers are places in it
        self._expert_XE = np.stack([np.unique(experts) for experts in by_node])
        local = [np.searchsorted(own, experts) for own, experts in zip(self._expert_XE, by_node, strict=True)]
        self.old_XGS = np.stack(local).reshape(num_layers * nodes, num_gpus // nodes, room)
        self.load_XE = load_LE[np.repeat(np.arange(num_layers), nodes)[:, None], self._expert_XE]

    def experts_by_gpu(self, local_XGS: Ints) -> Ints:
        """Return the experts ``[L, G, S]`` that a cell's own numbers stand for."""
        experts = self._expert_XE[np.arange(len(local_XGS))[:, None, None], local_XGS]
        return experts.reshape(self._shape)


def _relieve(load_E: Floats, old_GS: Ints, goal: float, max_moves: float) -> tuple[Ints, bool]:
    """Change a cell step by step; return the best state on the way and whether it reaches the goal."""
    state_GS, best_GS = old_GS, old_GS
    best = peak_load(load_E[None], old_GS[None])[0]
    for _ in range(_STEPS):
        changed_GS = _best_step(load_E, state_GS)
        if changed_GS is None or _moves(old_GS[None], changed_GS[None], len(load_E))[0] > max_moves:
            break
        state_GS = changed_GS
        peak = peak_load(load_E[None], state_GS[None])[0]
        if peak < best:
            best, best_GS = peak, state_GS
        if best <= goal:
            return best_GS, True
    return best_GS, bool(best <= goal)


def _best_step(load_E: Floats, expert_GS: Ints) -> Ints | None:
    """Return the plan after the step that lowers the sum of powers of loads most for a move, None if none does."""
    counts_E = count_replicas(expert_GS[None], len(load_E))[0]
    share_E = load_E / counts_E
    load_G = share_E[expert_GS].sum(axis=1)
    heavy = int(load_G.argmax())
    best_gain, best_GS = 1e-9, None
    now = _power(load_G / load_G.mean())
    for moves, (gpu, slot, *values), powers in (
        (1, *_replacements(load_E, expert_GS, counts_E, load_G, heavy)),
        (2, *_exchanges(share_E, expert_GS, load_G, heavy)),
    ):
        if not len(powers):
            continue
        choice = int(powers.argmin())
        gain = (now - powers[choice]) / now / moves
        if gain > best_gain:
            best_gain, best_GS = gain, expert_GS.copy()
            at = gpu[choice], slot[choice]
            if moves == 1:
                best_GS[at] = values[0][choice]
            else:
                other = values[0][choice], values[1][choice]
                best_GS[at], best_GS[other] = expert_GS[other], expert_GS[at]
    return best_GS


def _replacements(
    load_E: Floats, expert_GS: Ints, counts_E: Ints, load_G: Floats, heavy: int
) -> tuple[tuple[Ints, Ints, Ints], Floats]:
    """Return (GPU, slot, new expert) of replacements that lighten the heaviest GPU, and the sums after them.

    Either an expert of that GPU gets a further replica somewhere, or a replica on it makes way for another expert.
    Only an expert with a replica elsewhere can make way.
    """
    num_gpus, num_experts = len(expert_GS), len(load_E)
    held_GE = np.zeros((num_gpus, num_experts), bool)
    held_GE[np.arange(num_gpus)[:, None], expert_GS] = True
    spare_GS = counts_E[expert_GS] > 1
    on_heavy = np.zeros(num_experts, bool)
    on_heavy[expert_GS[heavy]] = True
    wanted_GSE = spare_GS[:, :, None] & ~held_GE[:, None, :]
    wanted_GSE[:heavy] &= on_heavy
    wanted_GSE[heavy + 1 :] &= on_heavy
    gpu, slot, new = np.nonzero(wanted_GSE)
    old = expert_GS[gpu, slot]
    # What one replica less or more of an expert does to the GPUs that hold it.
    less_E = load_E / np.maximum(counts_E - 1, 1) - load_E / counts_E
    more_E = load_E / (counts_E + 1) - load_E / counts_E
    copies_EG = count_replicas(expert_GS, num_experts).T.astype(np.float64)
    after = load_G + copies_EG[old] * less_E[old, None] + copies_EG[new] * more_E[new, None]
    rows = np.arange(len(gpu))
    after[rows, gpu] += load_E[new] / (counts_E[new] + 1) - load_E[old] / np.maximum(counts_E[old] - 1, 1)
    return (gpu, slot, new), _power(after / load_G.mean())


def _exchanges(
    share_E: Floats, expert_GS: Ints, load_G: Floats, heavy: int
) -> tuple[tuple[Ints, Ints, Ints, Ints], Floats]:
    """Return (GPU, slot, other GPU, its slot) of exchanges with the heaviest GPU, and the sums after them."""
    own_S = expert_GS[heavy]
    # Neither GPU may hold the expert that it gets.
    fits_SG = ~(own_S[:, None, None] == expert_GS).any(axis=2)
    fits_GS = ~np.isin(expert_GS, own_S)
    slot, other, other_slot = np.nonzero(fits_SG[:, :, None] & fits_GS)
    difference = share_E[own_S[slot]] - share_E[expert_GS[other, other_slot]]
    relative_G = load_G / load_G.mean()
    change = difference / load_G.mean()
    rest = _powers(relative_G).sum() - _powers(relative_G[heavy]) - _powers(relative_G[other])
    sums: Floats = rest + _powers(relative_G[heavy] - change) + _powers(relative_G[other] + change)
    return (np.full(len(slot), heavy), slot, other, other_slot), sums


def _power(relative_G: Floats) -> Floats:
    total: Floats = _powers(relative_G).sum(axis=-1)
    return total


def _powers(relative: Floats) -> Floats:
    for _ in range(_SQUARINGS):
        relative = relative * relative
    return relative


def _align_layer(old_GS: Ints, new_GS: Ints, num_experts: int, nodes: int) -> Ints:
    num_gpus = len(old_GS)
    old_GE, new_GE = (count_replicas(experts, num_experts).astype(np.float32) for experts in (old_GS, new_GS))
    common = new_GE @ old_GE.T
    node_G = np.arange(num_gpus) // (num_gpus // nodes)
    common[node_G[:, None] != node_G] = 0
    # The pairs with most in common first; those that have nothing in common with anyone who is left, in order.
    pairs = np.argwhere(common > 0)
    pairs = pairs[np.argsort(-common[pairs[:, 0], pairs[:, 1]], kind="stable")]
    old_of = np.full(num_gpus, -1)
    taken = np.zeros(num_gpus, bool)
    for new_gpu, old_gpu in pairs.tolist():
        if old_of[new_gpu] < 0 and not taken[old_gpu]:
            old_of[new_gpu], taken[old_gpu] = old_gpu, True
    for node in range(nodes):
        old_of[(old_of < 0) & (node_G == node)] = np.flatnonzero(~taken & (node_G == node))
    aligned_GS = np.empty_like(old_GS)
    for new_gpu, old_gpu in enumerate(old_of):
        aligned_GS[old_gpu] = _keep_slots(old_GS[old_gpu].tolist(), new_GS[new_gpu].tolist())
    return aligned_GS


def _keep_slots(old: list[int], new: list[int]) -> list[int]:
    """Return the new experts with those that were here before in their old slots."""
    arriving = list(new)
    slots: list[int | None] = []
    for expert in old:
        stays = expert in arriving
        slots.append(expert if stays else None)
        if stays:
            arriving.remove(expert)
    return [arriving.pop(0) if expert is None else expert for expert in slots]


def _moves(old_XGS: Ints, new_XGS: Ints, num_experts: int) -> Ints:
    num_cells, _, room = old_XGS.shape
    before, after = (count_replicas(experts.reshape(-1, room), num_experts) for experts in (old_XGS, new_XGS))
    moves_X: Ints = np.maximum(after - before, 0).reshape(num_cells, -1).sum(axis=1)
    return moves_X


def _with_experts(placement: Placement, experts_LGS: Ints) -> Placement:
    flat_LP = experts_LGS.reshape(len(experts_LGS), -1)
    changed = placement_of(flat_LP, placement.num_experts, placement.num_gpus)
    return dataclasses.replace(
        placement,
        physical_to_logical=changed.physical_to_logical,
        logical_to_physical=changed.logical_to_physical,
        replica_counts=changed.replica_counts,
    )


def _check_alike(old: Placement, new: Placement) -> None:
    for name in ("num_gpus", "num_slots", "num_experts"):
        if getattr(old, name) != getattr(new, name):
            raise PlacementError(
                f"the plans differ in {name}: {getattr(old, name)} and {getattr(new, name)}; moves are counted between "
                "plans of one deployment"
            )
    if len(old.physical_to_logical) != len(new.physical_to_logical):
        raise PlacementError(
            f"the plans have {len(old.physical_to_logical)} and {len(new.physical_to_logical)} layers: not of one model"
        )
