"""A load that drifts between domains, replayed through plans: the report's second challenge, made visible.

Experts specialise (report, Figure 9), so a plan made for one mixture of traffic is off when the traffic changes: what
is balanced over a training batch need not be over the requests of an hour (section 4.5.3, "domain-shift-induced load
imbalance during inference"). :func:`drift` makes a trace from loads measured by domain, :func:`simulate` replays it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_dsv3.inference.placement import (
    Placement,
    PlacementError,
    load_table,
    lower_bound,
    placement_of,
    plan_placement,
)
from lightning_dsv3.inference.placement_policies import Floats
from lightning_dsv3.inference.replanning import align, moved_experts, replan

STRATEGIES = ("unplanned", "planned once", "re-planned fully", "re-planned in steps")


@dataclass(frozen=True, eq=False)
class Simulation:
    """What a trace does to plans.

    Attributes:
        imbalance: For each strategy the imbalance over time, float64 ``[T, L]``.
        moved: For each strategy the experts loaded in all layers before each step, int64 ``[T]``.
        bound: Imbalance that no plan, made with the step's own load known, is below, float64 ``[T, L]``.
    """

    imbalance: dict[str, Tensor]
    moved: dict[str, Tensor]
    bound: Tensor


def drift(tables: Sequence[Tensor | npt.ArrayLike], steps: int) -> Floats:
    """Return a trace that goes evenly from each table to the next.

    Args:
        tables: Two or more load tables ``[L, E]``, such as one per domain; they count as shares of a layer's load.
        steps: Length T of the trace, at least one step for each table.

    Returns:
        Load at each step, float64 ``[T, L, E]``; every layer of a step adds up to 1, or 0 where the tables have none.

    Example:
        >>> drift([[[2, 0]], [[0, 4]]], steps=3)[:, 0].tolist()
        [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]
    """
    if len(tables) < 2:
        raise PlacementError("a drift needs at least two domains' loads; a CSV table has one")
    if steps < len(tables):
        raise PlacementError(f"steps={steps}: a drift through {len(tables)} domains needs at least as many steps")
    shares = np.stack([load_table(table) for table in tables])
    total = shares.sum(axis=-1, keepdims=True)
    shares = shares / np.where(total > 0, total, 1)
    place_T = np.linspace(0, len(tables) - 1, steps)
    first_T = np.minimum(place_T.astype(np.int64), len(tables) - 2)
    part_T11 = (place_T - first_T)[:, None, None]
    trace: Floats = (1 - part_T11) * shares[first_T] + part_T11 * shares[first_T + 1]
    return trace


def simulate(
    trace: Tensor | npt.ArrayLike,
    *,
    num_slots: int,
    num_gpus: int,
    num_nodes: int = 1,
    num_groups: int = 1,
    keep_groups: bool = False,
    interval: int = 1,
    tolerance: float = 0.02,
    max_moves: int | None = None,
) -> Simulation:
    """Replay a load trace through four strategies.

    ==================== ===============================================================================================
    unplanned            experts in order, without replicas where they divide evenly between the GPUs (see
                         :func:`unplanned`)
    planned once         the balanced plan for the trace's mean, kept
    re-planned fully     that plan first; every ``interval`` steps a plan from scratch, aligned to the one before
    re-planned in steps  that plan first; every ``interval`` steps :func:`~lightning_dsv3.inference.replanning.replan`
    ==================== ===============================================================================================

    A new plan knows only the loads of the ``interval`` steps before it, as in a real deployment.

    Args:
        trace: Load at each step ``[T, L, E]``.
        num_slots: As the following, see :func:`~lightning_dsv3.inference.placement.plan_placement`.
        num_gpus: GPUs.
        num_nodes: Nodes.
        num_groups: Groups of experts.
        keep_groups: Groups stay in a node.
        interval: Steps between plans; the report re-plans about every ten minutes.
        tolerance: See :func:`~lightning_dsv3.inference.replanning.replan`.
        max_moves: Its limit for each re-planning.
    """
    trace_TLE = np.asarray(trace.cpu() if isinstance(trace, Tensor) else trace, dtype=np.float64)
    if trace_TLE.ndim != 3:
        raise PlacementError(f"trace has shape {list(trace_TLE.shape)}; it must be [steps, layers, experts]")
    if interval < 1:
        raise PlacementError(f"interval={interval} must be 1 or more steps")
    num_steps, num_layers, num_experts = trace_TLE.shape

    def fresh(load_LE: Floats) -> Placement:
        return plan_placement(
            load_LE, num_slots=num_slots, num_gpus=num_gpus, num_nodes=num_nodes, num_groups=num_groups,
            keep_groups=keep_groups,
        )  # fmt: skip

    first = fresh(trace_TLE.mean(axis=0))
    plans = dict.fromkeys(STRATEGIES, first)
    plans["unplanned"] = unplanned(num_layers, num_experts, num_slots, num_gpus)
    imbalance: dict[str, list[Tensor]] = {name: [] for name in STRATEGIES}
    moved = {name: torch.zeros(num_steps, dtype=torch.int64) for name in STRATEGIES}
    for step, load_LE in enumerate(trace_TLE):
        if step and step % interval == 0:
            seen_LE = trace_TLE[step - interval : step].mean(axis=0)
            new = {
                "re-planned fully": align(plans["re-planned fully"], fresh(seen_LE)),
                "re-planned in steps": replan(
                    plans["re-planned in steps"], seen_LE, tolerance=tolerance, max_moves=max_moves
                ),
            }
            for name, plan in new.items():
                moved[name][step] = moved_experts(plans[name], plan).sum()
            plans |= new
        for name, plan in plans.items():
            imbalance[name].append(plan.imbalance(load_LE))
    bound = lower_bound(trace_TLE.reshape(-1, num_experts), num_slots=num_slots, num_gpus=num_gpus)
    return Simulation(
        {name: torch.stack(values) for name, values in imbalance.items()}, moved, bound.reshape(num_steps, num_layers)
    )


def unplanned(num_layers: int, num_experts: int, num_slots: int, num_gpus: int) -> Placement:
    """Return the placement that needs no plan: experts in order.

    Without replicas, on as many slots as there are experts, where these divide evenly between the GPUs; otherwise slot
    p of all slots holds expert p mod E, so that the first experts have replicas.
    """
    used = num_experts if num_experts % num_gpus == 0 else num_slots
    experts_LP = np.tile(np.arange(used) % num_experts, (num_layers, 1))
    return placement_of(experts_LP, num_experts, num_gpus)
