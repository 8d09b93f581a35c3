"""Redundant experts: how many replicas of each expert, and on which GPU (report, section 3.4).

With expert parallelism the busiest GPU sets the pace of every layer. Serving therefore keeps more physical experts than
logical ones and plans them from observed loads: a busy expert gets several replicas, which share its tokens evenly, and
the replicas are placed so that the GPUs are equally busy.

    load  [L, E]   tokens per expert and layer        P slots in all, S = P / G on each of G GPUs
    plan  [L, P]   the expert of each slot            slot p is on GPU p // S

    load of a GPU = sum over its slots of (load of the expert / its number of replicas)
    imbalance     = load of the busiest GPU / mean load of the GPUs                              1 is balanced

Three policies:

==============  ======================================================================================================
hierarchical    the published algorithm: groups of experts stay in a node. Where groups cannot be shared out evenly
                between the nodes it is the global one, as published
global          the published algorithm without nodes
balanced        never two replicas of an expert on one GPU while that is possible, and a search that ends below the
                published algorithms' imbalance or level with it; :mod:`.placement_search` has the one exception
==============  ======================================================================================================

Files, engines' forms: :mod:`.placement_files`. A plan after a drift: :mod:`.replanning`. A drift: :mod:`.load_trace`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_dsv3.config.errors import did_you_mean
from lightning_dsv3.inference.placement_policies import Floats, Ints, published, replicate, within_nodes
from lightning_dsv3.inference.placement_search import (
    balanced_cells,
    count_replicas,
    gpu_load,
    peak_load,
    replica_ranks,
)

POLICIES = ("balanced", "hierarchical", "global")


class PlacementError(ValueError):
    """A load table, a cluster or a plan that cannot work. The message names what is wrong and the fix."""


@dataclass(frozen=True, eq=False)
class Placement:
    """Where the replicas of every layer's experts are.

    Attributes:
        physical_to_logical: Expert of each slot, int64 ``[L, P]``; slot p is on GPU ``p // (P / num_gpus)``.
        logical_to_physical: Slots of each expert, int64 ``[L, E, R]`` with R the largest number of replicas of any
            expert, padded with -1.
        replica_counts: Replicas of each expert, int64 ``[L, E]``; at least 1.
        num_gpus: GPUs G.
        num_nodes: Nodes that the GPUs are in, G / num_nodes consecutive ones each.
        keeps_groups: Groups of experts stay in a node, so a GPU's experts cannot change places with another node's.
        layers: Names of the layers; empty for none.
    """

    physical_to_logical: Tensor
    logical_to_physical: Tensor
    replica_counts: Tensor
    num_gpus: int
    num_nodes: int = 1
    keeps_groups: bool = False
    layers: tuple[str, ...] = ()

    @property
    def experts_by_gpu(self) -> Ints:
        """Expert of each slot by GPU, int64 ``[L, G, S]``."""
        return self.physical_to_logical.numpy().reshape(len(self.physical_to_logical), self.num_gpus, -1)

    @property
    def num_experts(self) -> int:
        """Logical experts E."""
        return self.replica_counts.shape[1]

    @property
    def num_slots(self) -> int:
        """Physical experts P."""
        return self.physical_to_logical.shape[1]

    @property
    def twins(self) -> Tensor:
        """Replicas beyond the first of their expert on a GPU, int64 ``[L]``; they take memory and help nothing."""
        sorted_LGS = np.sort(self.experts_by_gpu, axis=2)
        return torch.from_numpy((sorted_LGS[..., 1:] == sorted_LGS[..., :-1]).sum(axis=(1, 2)))

    @property
    def twins_avoidable(self) -> bool:
        """Whether some plan for these GPUs, slots and experts has no twins: a GPU has no more slots than experts."""
        return self.num_slots // self.num_gpus <= self.num_experts

    def gpu_load(self, load: Tensor | npt.ArrayLike) -> Tensor:
        """Return each GPU's load under ``load [L, E]``, float64 ``[L, G]``."""
        return torch.from_numpy(gpu_load(self._table(load), self.experts_by_gpu))

    def imbalance(self, load: Tensor | npt.ArrayLike) -> Tensor:
        """Return the busiest GPU's load / the GPUs' mean load, float64 ``[L]``; 1 for a layer without load."""
        load_LE = self._table(load)
        return torch.from_numpy(relative_to_mean(peak_load(load_LE, self.experts_by_gpu), load_LE, self.num_gpus))

    def _table(self, load: Tensor | npt.ArrayLike) -> Floats:
        load_LE = load_table(load)
        if load_LE.shape != tuple(self.replica_counts.shape):
            raise PlacementError(
                f"load is {list(load_LE.shape)} and the plan is for {list(self.replica_counts.shape)} [layers, "
                "experts]: measure the load on the model that the plan is for"
            )
        return load_LE


def plan_placement(
    load: Tensor | npt.ArrayLike,
    *,
    num_slots: int,
    num_gpus: int,
    num_nodes: int = 1,
    num_groups: int = 1,
    policy: str = "balanced",
    keep_groups: bool = False,
) -> Placement:
    """Plan replicas and their GPUs from a load table.

    Args:
        load: Tokens of each expert, ``[L, E]``, any unit; finite, not negative.
        num_slots: Physical experts P of all GPUs together, at least E; a multiple of ``num_gpus``.
        num_gpus: GPUs of the deployment.
        num_nodes: Nodes that the GPUs are in.
        num_groups: Groups of consecutive experts, as the router's ``n_group``.
        policy: ``balanced``, ``hierarchical`` or ``global``; see :mod:`lightning_dsv3.inference.placement`.
        keep_groups: With ``balanced``: groups stay in a node, as with ``hierarchical``, at some cost in balance.
            Without it ``balanced`` does not look at nodes and groups.

    Raises:
        PlacementError: A table with nan, infinity or negative numbers, or of another shape; numbers that do not divide
            or do not suffice; an unknown policy.

    Example:
        >>> plan = plan_placement([[90, 30, 20, 20]], num_slots=6, num_gpus=2)
        >>> plan.replica_counts
        tensor([[2, 2, 1, 1]])
        >>> plan.imbalance([[90, 30, 20, 20]])
        tensor([1.], dtype=torch.float64)
    """
    load_LE = load_table(load)
    if policy not in POLICIES:
        raise PlacementError(f"policy={policy!r}: there is no such policy; {did_you_mean(policy, POLICIES)}")
    _check_cluster(load_LE.shape[1], num_slots, num_gpus, num_nodes, num_groups)
    grouped = num_groups % num_nodes == 0 and (policy == "hierarchical" or (policy == "balanced" and keep_groups))
    if keep_groups and policy == "balanced" and not grouped:
        raise PlacementError(
            f"keep_groups: {num_groups} groups cannot be shared out evenly between {num_nodes} nodes; "
            "give a multiple, or leave it out"
        )
    nodes, groups = (num_nodes, num_groups) if grouped else (1, 1)
    _check_groups(load_LE.shape[1], num_slots, num_gpus, nodes, groups)
    if policy == "balanced":
        expert_LP, rank_LP = within_nodes(balanced_cells, load_LE, num_slots, num_gpus, nodes, groups)
    else:
        expert_LP, rank_LP = published(load_LE, num_slots, num_gpus, nodes, groups)
    return placement_of(expert_LP, load_LE.shape[1], num_gpus, num_nodes, grouped and nodes > 1, rank_LP)


def placement_of(
    expert_LP: Ints,
    num_experts: int,
    num_gpus: int,
    num_nodes: int = 1,
    keeps_groups: bool = False,
    rank_LP: Ints | None = None,
    layers: tuple[str, ...] = (),
) -> Placement:
    """Return the placement whose slots hold these experts.

    Args:
        expert_LP: Expert of each slot ``[L, P]``.
        num_experts: Logical experts E.
        num_gpus: GPUs G.
        num_nodes: Nodes.
        keeps_groups: Groups of experts stay in a node.
        rank_LP: Which of its expert's replicas each slot is: the order in ``logical_to_physical``. By slot if None.
        layers: Names of the layers.
    """
    counts_LE = count_replicas(expert_LP, num_experts)
    rank_LP = replica_ranks(expert_LP, num_experts) if rank_LP is None else rank_LP
    slots_LER = np.full((*counts_LE.shape, counts_LE.max()), -1, np.int64)
    slots_LER[np.arange(len(expert_LP))[:, None], expert_LP, rank_LP] = np.arange(expert_LP.shape[1])
    return Placement(
        torch.from_numpy(np.ascontiguousarray(expert_LP)), torch.from_numpy(slots_LER), torch.from_numpy(counts_LE),
        num_gpus, num_nodes, keeps_groups, layers,
    )  # fmt: skip


def lower_bound(load: Tensor | npt.ArrayLike, *, num_slots: int, num_gpus: int) -> Tensor:
    """Return an imbalance that no plan is below, float64 ``[L]``.

    It is the largest of three: 1; the lightest that the busiest replica can be made, over the mean (with one slot on a
    GPU this is the optimum itself); and a bound that also counts what stands beside a busy replica. For the last,
    suppose that a plan has no GPU above T. Then expert e has at least ``m_e = ceil(load_e / T)`` replicas and, as the
    others need their m as well, at most ``m_e + F`` with F the slots that are left over, so that a replica of it weighs
    at least ``load_e / (m_e + F)``. Beside every replica are S - 1 others, together no lighter than the S - 1 lightest
    of those, C. So ``m_e`` is at least ``ceil(load_e / (T - C))``; and so on. If that needs more than P slots, there is
    no such plan: T is too small. The largest such T is found by bisection.

    Args:
        load: Load table ``[L, E]``.
        num_slots: Slots P.
        num_gpus: GPUs G.

    Example:
        >>> lower_bound([[6, 1, 1]], num_slots=4, num_gpus=4)
        tensor([1.5000], dtype=torch.float64)
    """
    load_LE = load_table(load)
    _check_cluster(load_LE.shape[1], num_slots, num_gpus, 1, 1)
    _, _, counts_LE = replicate(load_LE, num_slots)
    low_L = np.maximum(load_LE.sum(axis=1) / num_gpus, (load_LE / counts_LE).max(axis=1))
    room = num_slots // num_gpus
    # Layers in which T can be higher: the bound so far is excluded. The T in question is at most `room` times that: the
    # busiest replica and, as heavy, all beside it.
    open_X = np.flatnonzero(~_possible(load_LE, low_L, num_slots, room)) if room > 1 else np.arange(0)
    if len(open_X):
        load_XE, low_X = load_LE[open_X], low_L[open_X]
        high_X = room * low_X
        for _ in range(40):
            middle_X = (low_X + high_X) / 2
            possible_X = _possible(load_XE, middle_X, num_slots, room)
            low_X, high_X = np.where(possible_X, low_X, middle_X), np.where(possible_X, middle_X, high_X)
        low_L[open_X] = low_X
    return torch.from_numpy(relative_to_mean(low_L, load_LE, num_gpus))


def _possible(load_LE: Floats, limit_L: Floats, num_slots: int, room: int) -> npt.NDArray[np.bool_]:
    """Return whether a plan with no GPU above the limit is not yet excluded, ``[L]``."""
    beside_L = np.zeros(len(load_LE))
    possible_L = np.ones(len(load_LE), bool)
    for _ in range(3):
        left_L1 = np.maximum(limit_L - beside_L, 0)[:, None]
        # Rounding must not exclude what is exactly possible; nor may a limit of nothing divide.
        needed_LE = np.ceil(load_LE / np.maximum(left_L1, 1e-300) * (1 - 1e-12)).clip(1, num_slots + 1)
        free_L = num_slots - needed_LE.sum(axis=1)
        possible_L &= free_L >= 0
        most_LE = needed_LE + np.maximum(free_L, 0)[:, None]
        lightest_LE = load_LE / most_LE
        order_LE = np.argsort(lightest_LE, axis=1)
        most_LE = np.take_along_axis(most_LE, order_LE, axis=1)
        taken_LE = (room - 1 - (np.cumsum(most_LE, axis=1) - most_LE)).clip(0, most_LE)
        beside_L = (taken_LE * np.take_along_axis(lightest_LE, order_LE, axis=1)).sum(axis=1)
    return possible_L


def relative_to_mean(peak_L: Floats, load_LE: Floats, num_gpus: int) -> Floats:
    """Return a GPU's load over the GPUs' mean, ``[L]``; 1 where there is no load to be uneven."""
    mean_L = load_LE.sum(axis=1) / num_gpus
    return np.where(mean_L > 0, peak_L / np.where(mean_L > 0, mean_L, 1), 1.0)


def load_table(load: Tensor | npt.ArrayLike) -> Floats:
    """Return a checked load table, float64 ``[L, E]``.

    Raises:
        PlacementError: Not two-dimensional, empty, or with a number that is no load.
    """
    try:
        array = np.array(
            load.detach().cpu().to(torch.float64).numpy() if isinstance(load, Tensor) else load, dtype=np.float64
        )
    except (TypeError, ValueError) as error:
        raise PlacementError(f"load must be a table of numbers [layers, experts]: {error}") from error
    if array.ndim != 2 or array.size == 0:
        raise PlacementError(
            f"load has shape {list(array.shape)}; it must be [layers, experts] with at least one of each"
        )
    for wrong, what in ((~np.isfinite(array), "not a finite number"), (array < 0, "negative")):
        if wrong.any():
            layer, expert = np.argwhere(wrong)[0]
            raise PlacementError(
                f"load[{layer}, {expert}] = {array[layer, expert]} is {what}; loads are token counts, 0 or more"
            )
    return array


def _check_cluster(num_experts: int, num_slots: int, num_gpus: int, num_nodes: int, num_groups: int) -> None:
    given = {"num_slots": num_slots, "num_gpus": num_gpus, "num_nodes": num_nodes, "num_groups": num_groups}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise PlacementError(f"{name}={value!r} must be a whole number, 1 or more")
    if num_slots < num_experts:
        raise PlacementError(
            f"num_slots={num_slots} is fewer than the {num_experts} experts: every expert needs a slot; give at least "
            f"{-(-num_experts // num_gpus) * num_gpus}, a multiple of the {num_gpus} GPUs"
        )
    if num_slots % num_gpus:
        raise PlacementError(
            f"num_slots={num_slots} is not a multiple of num_gpus={num_gpus}: every GPU has as many slots; give "
            f"{-(-num_slots // num_gpus) * num_gpus}"
        )


def _check_groups(num_experts: int, num_slots: int, num_gpus: int, num_nodes: int, num_groups: int) -> None:
    if num_experts % num_groups:
        raise PlacementError(
            f"num_groups={num_groups} does not divide the {num_experts} experts; see the model's n_group"
        )
    if num_gpus % num_nodes:
        raise PlacementError(f"num_gpus={num_gpus} is not a multiple of num_nodes={num_nodes}: nodes are of equal size")
