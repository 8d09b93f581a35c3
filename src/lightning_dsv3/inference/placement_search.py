"""The ``balanced`` policy: the published replica counts, packed so that no GPU holds two replicas of one expert.

Two replicas of an expert on one GPU are one replica that takes memory twice. They can be avoided whenever a GPU has no
more slots than there are experts: give no expert more replicas than there are GPUs, list all replicas expert by
expert, and deal them out to the GPUs in turn. What follows keeps that property and looks for balance:

1. *replicate* greedily, with at most G replicas of an expert. With one slot on each GPU this is the optimum.
2. *deal* in rounds, one replica to each GPU, the heaviest replica to the lightest GPU. A round that begins with further
   replicas of the last round's last expert passes over the GPUs that have it; never more than G, they all find a place.
3. *improve*: pair heavy GPUs with light ones and exchange the one replica each that brings a pair closest together;
   when that comes to rest, exchange between the heaviest GPU and any other, until no such exchange helps.
4. Where that is not near the mean, try other replica counts: all of them if they are few, else :func:`_search_targets`.
5. Where the published plan is still better, start 3 from it, its doubles resolved; then try counts one replica away.
   The best is kept.

One demand can exclude the other. Loads 1.0, 0.9 and 0.1 on two GPUs of two slots: {a, a}, {b, c} is even, but every
plan without doubles splits one load evenly over both GPUs and is at least 5 % off. Then no doubles are the rule, and
the plan may be above the published one; it happens with few experts on few GPUs, and hardly ever with two slots on each
of many. Both of the report's deployments kept below it, or level, in a thousand tables (``benchmarks/placement.py``).

Everything runs on all cells at once, in a fixed number of rounds: the result does not depend on the machine's speed.

Shapes: X cells (a layer, or a node's share of it), E experts, P slots, G GPUs, S = P / G slots of a GPU.
"""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import numpy.typing as npt

from lightning_dsv3.inference.placement_policies import Floats, Ints, published_cells, replicate

_SWEEPS, _PATIENCE, _FINAL_EXCHANGES = 24, 4, 200
_CLOSE = 5e-4  # a load this near to the lowest possible one is not worth more search
_FAR = 2e-3  # one this far from it asks for other replica counts
# How far the heaviest replica goes from the lightest possible one to a GPU's mean load, and whether the slots that this
# sets free go to the heaviest of the experts with one replica, or to the lightest.
_TARGETS = (
    (0.2, True), (0.35, True), (0.5, True), (0.65, True), (0.75, True), (0.85, True), (0.95, True),
    (0.3, False), (0.5, False), (0.75, False),
)  # fmt: skip
_FINE_TARGETS = tuple((part / 40, heaviest_first) for part in range(1, 41) for heaviest_first in (True, False))
_NEIGHBOURS, _FEW_EXPERTS, _COUNT_ROUNDS = 8, 16, 8
_FEW_COUNTS = 500
# With two slots on a GPU: what two experts of one replica each may make up, in a GPU's mean load.
_PAIRS = ((0.95, 1.02), (0.8, 1.005))


def balanced_cells(load_XE: Floats, num_slots: int, num_gpus: int) -> tuple[Ints, Ints]:
    """Place each cell's experts; a :data:`~lightning_dsv3.inference.placement_policies.CellPolicy`.

    With as many slots on a GPU as experts, or more, all GPUs hold the same: even, and no more doubles than must be.
    """
    num_experts, room = load_XE.shape[1], num_slots // num_gpus
    load_XE = load_XE.astype(np.float64)
    if room == 1:
        expert_XP, rank_XP, _ = replicate(load_XE, num_slots)
        return expert_XP, rank_XP
    if room >= num_experts:
        expert_XP = np.tile(np.arange(room) % num_experts, (len(load_XE), num_gpus))
        return expert_XP, replica_ranks(expert_XP, num_experts)
    published_XP, _ = published_cells(load_XE.astype(np.float32), num_slots, num_gpus)
    _, _, counts_XE = replicate(load_XE, num_slots, most=num_gpus)
    expert_XGS = _improve(load_XE, deal(load_XE, counts_XE, num_gpus))
    published_XGS = published_XP.reshape(expert_XGS.shape)
    least_X = load_XE.sum(axis=1) / num_gpus
    off = peak_load(load_XE, expert_XGS) > least_X * (1 + _FAR)
    if off.any():
        expert_XGS[off] = _search_targets(load_XE[off], expert_XGS[off], published_XGS[off], thorough=False)
        every_CE = _every_count(num_experts, num_slots, num_gpus)
        if every_CE is not None:
            every_XGS = _best_of(load_XE[off], np.stack([every_CE] * int(off.sum())), num_gpus)
            expert_XGS[off] = _better(load_XE[off], expert_XGS[off], every_XGS)
    expert_XP = _not_above(load_XE, expert_XGS, published_XGS).reshape(-1, num_slots)
    return expert_XP, replica_ranks(expert_XP, num_experts)


def _not_above(load_XE: Floats, expert_XGS: Ints, published_XGS: Ints) -> Ints:
    """Return the plan, replaced by one no less even than the published one in those cells where it is less even.

    Neither the given plan nor its replacement has doubles. Where none is found that is as even, the given one stays.
    """
    expert_XGS = expert_XGS.copy()
    for search in (_search_from_published, _search_targets, _search_counts):
        above = peak_load(load_XE, expert_XGS) > peak_load(load_XE, published_XGS) * (1 + 1e-12)
        if not above.any():
            break
        expert_XGS[above] = search(load_XE[above], expert_XGS[above], published_XGS[above])
    return expert_XGS


def gpu_load(load_XE: Floats, expert_XGS: Ints) -> Floats:
    """Return each GPU's load ``[X, G]``: its slots' shares, an expert's load split evenly over all its replicas."""
    counts_XE = count_replicas(expert_XGS, load_XE.shape[1])
    share_XE = load_XE / np.maximum(counts_XE, 1)
    cells_X11 = np.arange(len(load_XE))[:, None, None]
    load_XG: Floats = share_XE[cells_X11, expert_XGS].sum(axis=2)
    return load_XG


def peak_load(load_XE: Floats, expert_XGS: Ints) -> Floats:
    """Return the load of the busiest GPU ``[X]``."""
    peak_X: Floats = gpu_load(load_XE, expert_XGS).max(axis=1)
    return peak_X


def count_replicas(expert_X: Ints, num_experts: int) -> Ints:
    """Return the number of replicas of each expert ``[X, E]`` from the experts of slots ``[X, ...]``."""
    flat_XP = expert_X.reshape(len(expert_X), -1)
    keys = flat_XP + np.arange(len(flat_XP))[:, None] * num_experts
    return np.bincount(keys.ravel(), minlength=len(flat_XP) * num_experts).reshape(len(flat_XP), num_experts)


def replica_ranks(expert_XP: Ints, num_experts: int) -> Ints:
    """Return for each slot how many slots before it hold the same expert ``[X, P]``."""
    order_XP = np.argsort(expert_XP, axis=1, kind="stable")
    counts_XE = count_replicas(expert_XP, num_experts)
    first_XE = np.cumsum(counts_XE, axis=1) - counts_XE
    sorted_XP = np.take_along_axis(expert_XP, order_XP, axis=1)
    rank_XP = np.empty_like(expert_XP)
    places_XP = np.arange(expert_XP.shape[1]) - np.take_along_axis(first_XE, sorted_XP, axis=1)
    np.put_along_axis(rank_XP, order_XP, places_XP, axis=1)
    return rank_XP


def deal(load_XE: Floats, counts_XE: Ints, num_gpus: int) -> Ints:
    """Deal all replicas out in rounds, without doubles.

    Args:
        load_XE: Load of each expert.
        counts_XE: Replicas of each expert, 1 to G; their sum is a multiple of G.
        num_gpus: GPUs G.

    Returns:
        Expert of each slot, int64 ``[X, G, S]``.
    """
    num_cells = len(load_XE)
    cells_X1 = np.arange(num_cells)[:, None]
    share_XE = load_XE / counts_XE
    order_XE = np.argsort(-share_XE, axis=1, kind="stable")
    replica_XP = np.repeat(order_XE.ravel(), counts_XE[cells_X1, order_XE].ravel()).reshape(num_cells, -1)
    rounds_XSG = replica_XP.reshape(num_cells, -1, num_gpus)
    expert_XGS = np.empty((num_cells, num_gpus, rounds_XSG.shape[1]), np.int64)
    load_XG = np.zeros((num_cells, num_gpus))
    for number in range(rounds_XSG.shape[1]):
        dealt_XG = rounds_XSG[:, number]
        gpu_XG = np.argsort(load_XG, axis=1, kind="stable")
        if number:
            straddling_X1 = rounds_XSG[:, number - 1, -1:]
            still_X1 = (dealt_XG == straddling_X1).sum(axis=1, keepdims=True)
            # Only the last round can hold it: an expert has at most G replicas, one after the other.
            without_XG = expert_XGS[cells_X1, gpu_XG, number - 1] != straddling_X1
            chosen_XG = without_XG & (np.cumsum(without_XG, axis=1) <= still_X1)
            gpu_XG = np.take_along_axis(gpu_XG, np.argsort(~chosen_XG, axis=1, kind="stable"), axis=1)
        expert_XGS[cells_X1, gpu_XG, number] = dealt_XG
        load_XG[cells_X1, gpu_XG] += share_XE[cells_X1, dealt_XG]
    return expert_XGS


def _improve(load_XE: Floats, expert_XGS: Ints) -> Ints:
    """Exchange replicas between GPUs, counts and the absence of doubles kept, until the busiest GPU is at rest."""
    num_gpus = expert_XGS.shape[1]
    if num_gpus == 1:
        return expert_XGS
    counts_XE = count_replicas(expert_XGS, load_XE.shape[1])
    share_XE = load_XE / counts_XE
    floor_X = _floor(load_XE, share_XE, num_gpus, expert_XGS.shape[2]) * (1 + _CLOSE)
    expert_XGS = expert_XGS.copy()
    half = num_gpus // 2
    active = np.arange(len(load_XE))
    lowest_X, lowest_at_X = np.full(len(load_XE), np.inf), np.zeros(len(load_XE), np.int64)
    for sweep in range(_SWEEPS):
        load_XG, weight = _loads(share_XE[active], expert_XGS[active])
        peak = load_XG.max(axis=1)
        sinks = peak < lowest_X[active] * (1 - 1e-9)
        lowest_X[active[sinks]], lowest_at_X[active[sinks]] = peak[sinks], sweep
        busy = (peak > floor_X[active]) & (sweep - lowest_at_X[active] < _PATIENCE)
        active, load_XG, weight = active[busy], load_XG[busy], weight[busy]
        if not len(active):
            break
        order_XG = np.argsort(load_XG, axis=1)
        heavy, light = order_XG[:, : -half - 1 : -1], np.roll(order_XG[:, :half], sweep // 2 % half, axis=1)
        _exchange(expert_XGS, weight, load_XG, active, heavy, light)
    return _relieve_heaviest(share_XE, expert_XGS, floor_X)


def _floor(load_XE: Floats, share_XE: Floats, num_gpus: int, room: int) -> Floats:
    """Return a load that no plan with these replica counts and without doubles is below, ``[X]``."""
    # The heaviest replica has the replicas of room - 1 other experts beside it.
    lightest_XC = np.partition(share_XE, room - 1, axis=1)[:, : room - 1]
    floor_X: Floats = np.maximum(load_XE.sum(axis=1) / num_gpus, share_XE.max(axis=1) + lightest_XC.sum(axis=1))
    return floor_X


def _relieve_heaviest(share_XE: Floats, expert_XGS: Ints, floor_X: Floats) -> Ints:
    """Exchange between the heaviest GPU and whichever other makes the pair lightest, until that helps no cell."""
    num_gpus = expert_XGS.shape[1]
    active = np.arange(len(share_XE))
    for _ in range(_FINAL_EXCHANGES):
        load_XG, weight = _loads(share_XE[active], expert_XGS[active])
        busy = load_XG.max(axis=1) > floor_X[active]
        active, load_XG, weight = active[busy], load_XG[busy], weight[busy]
        if not len(active):
            break
        order_XG = np.argsort(load_XG, axis=1)
        heavy = np.repeat(order_XG[:, -1:], num_gpus - 1, axis=1)
        helped = _exchange(expert_XGS, weight, load_XG, active, heavy, order_XG[:, :-1], only_best=True)
        active = active[helped]
    return expert_XGS


def _exchange(
    expert_XGS: Ints,
    weight_AGS: Floats,
    load_AG: Floats,
    active: Ints,
    heavy: Ints,
    light: Ints,
    only_best: bool = False,
) -> npt.NDArray[np.bool_]:
    """Make the exchange that brings each pair of GPUs closest together, in place; nothing where none does.

    Args:
        expert_XGS: Experts of all cells.
        weight_AGS: Load of each replica of the active cells.
        load_AG: Load of their GPUs.
        active: The active cells' numbers.
        heavy: The heavier GPU of each pair, ``[A, H]``.
        light: The lighter one. Pairs of one cell have no GPU in common, unless only the best exchange is made.
        only_best: Make one exchange in a cell: that after which the heavier GPU of its pair is lightest.

    Returns:
        Whether each active cell was changed, ``[A]``.
    """
    room = expert_XGS.shape[2]
    cells, rows = active[:, None], np.arange(len(active))[:, None]
    expert_heavy, expert_light = expert_XGS[cells, heavy], expert_XGS[cells, light]
    same = expert_heavy[..., :, None] == expert_light[..., None, :]
    # A replica whose expert the other GPU has stays where it is.
    given = np.where(same.any(axis=-1), -np.inf, weight_AGS[rows, heavy])
    taken = np.where(same.any(axis=-2), np.inf, weight_AGS[rows, light])
    half_gap = (load_AG[rows, heavy] - load_AG[rows, light]) / 2
    rest = np.abs(half_gap[..., None, None] - (given[..., :, None] - taken[..., None, :]))
    rest = rest.reshape(*half_gap.shape, room * room)
    choice = rest.argmin(axis=-1)
    best = np.take_along_axis(rest, choice[..., None], axis=-1)[..., 0]
    helps = best < half_gap * (1 - 1e-9)
    if only_best:
        peak = np.where(helps, load_AG[rows, light] + half_gap + best, np.inf)
        keep = np.zeros_like(helps)
        keep[rows[:, 0], peak.argmin(axis=1)] = True
        helps &= keep
    row, pair = np.nonzero(helps)
    slot_heavy, slot_light = np.divmod(choice[row, pair], room)
    cell, gpu_heavy, gpu_light = active[row], heavy[row, pair], light[row, pair]
    expert_XGS[cell, gpu_heavy, slot_heavy] = expert_light[row, pair, slot_light]
    expert_XGS[cell, gpu_light, slot_light] = expert_heavy[row, pair, slot_heavy]
    changed: npt.NDArray[np.bool_] = np.any(helps, axis=1)
    return changed


def _loads(share_XE: Floats, expert_XGS: Ints) -> tuple[Floats, Floats]:
    weight_XGS = share_XE[np.arange(len(share_XE))[:, None, None], expert_XGS]
    return weight_XGS.sum(axis=2), weight_XGS


def _search_from_published(load_XE: Floats, expert_XGS: Ints, published_XGS: Ints) -> Ints:
    """Improve the published plan, its doubles resolved, and return the better one for each cell."""
    counts_XE = count_replicas(published_XGS, load_XE.shape[1])
    starts_XGS = expert_XGS.copy()
    for cell, share_E in enumerate(load_XE / counts_XE):
        resolved_GS = _resolve_doubles(share_E, published_XGS[cell])
        if resolved_GS is not None:
            starts_XGS[cell] = resolved_GS
    return _better(load_XE, expert_XGS, _improve(load_XE, starts_XGS))


def _resolve_doubles(share_E: Floats, expert_GS: Ints) -> Ints | None:
    """Exchange every second replica on a GPU for one of another GPU; None where some double has no such partner."""
    expert_GS = expert_GS.copy()
    for gpu, experts_S in enumerate(expert_GS):
        for slot in range(1, len(experts_S)):
            expert = experts_S[slot]
            if expert not in experts_S[:slot]:
                continue
            load_G = share_E[expert_GS].sum(axis=1)
            possible_GS = ~(expert_GS == expert).any(axis=1)[:, None] & ~np.isin(expert_GS, experts_S)
            if not possible_GS.any():
                return None
            other_GS = load_G[:, None] - share_E[expert_GS] + share_E[expert]
            own_GS = load_G[gpu] + share_E[expert_GS] - share_E[expert]
            peak_GS = np.where(possible_GS, np.maximum(other_GS, own_GS), np.inf)
            where = np.unravel_index(peak_GS.argmin(), peak_GS.shape)
            experts_S[slot], expert_GS[where] = expert_GS[where], expert
    return expert_GS


def _search_targets(load_XE: Floats, expert_XGS: Ints, published_XGS: Ints, thorough: bool = True) -> Ints:
    """Try counts whose heaviest replica is between the lightest possible and a GPU's mean load; keep what is better.

    Greedy counts make heavy replicas light and nearly equal. Where they weigh, say, 0.6 of a GPU's mean load and are
    more than there are GPUs, some GPU has two of them, 1.2, however they are packed. Fewer and heavier ones, at most
    one on each GPU, leave slots with which lesser experts become easy to pack.
    """
    num_cells, num_experts = load_XE.shape
    num_gpus = expert_XGS.shape[1]
    num_slots = published_XGS[0].size
    _, _, greedy_XE = replicate(load_XE, num_slots, most=num_gpus)
    lightest_X1 = (load_XE / greedy_XE).max(axis=1, keepdims=True)
    mean_X1 = load_XE.sum(axis=1, keepdims=True) / num_gpus
    tried = []
    for part, heaviest_first in _FINE_TARGETS if thorough else _TARGETS:
        target_X1 = lightest_X1 + part * np.maximum(mean_X1 - lightest_X1, 0)
        # A load that is the target times a whole number stays at it.
        needed_XE = np.ceil(load_XE / np.where(target_X1 > 0, target_X1, 1) * (1 - 1e-12)).astype(np.int64)
        counts_XE = needed_XE.clip(1, num_gpus)
        free_X1 = num_slots - counts_XE.sum(axis=1, keepdims=True)
        single_XE = counts_XE == 1
        key_XE = np.where(single_XE, -load_XE if heaviest_first else load_XE, np.inf)
        order_XE = np.argsort(key_XE, axis=1, kind="stable")
        chosen_XE = (np.arange(num_experts) < free_X1) & np.take_along_axis(single_XE, order_XE, axis=1)
        np.put_along_axis(counts_XE, order_XE, np.take_along_axis(counts_XE, order_XE, axis=1) + chosen_XE, axis=1)
        tried.append(_top_up(load_XE, counts_XE, num_slots, num_gpus))
    if expert_XGS.shape[2] == 2:
        for below, above in _PAIRS:
            paired_XE = _paired_singles(load_XE, mean_X1[:, 0] * below, mean_X1[:, 0] * above)
            tried.append(_top_up(load_XE, np.ones_like(paired_XE, np.int64), num_slots, num_gpus, paired_XE))
    if thorough:
        return _better(load_XE, expert_XGS, _best_of(load_XE, np.stack(tried, axis=1), num_gpus))
    # The plan that is best as dealt is nearly always best in the end.
    load = np.tile(load_XE, (len(tried), 1))
    dealt = deal(load, np.concatenate(tried), num_gpus)
    best_X = peak_load(load, dealt).reshape(-1, num_cells).argmin(axis=0)
    return _better(load_XE, expert_XGS, _improve(load_XE, dealt[best_X * num_cells + np.arange(num_cells)]))


def _paired_singles(load_XE: Floats, low_X: Floats, high_X: Floats) -> npt.NDArray[np.bool_]:
    """Return experts that, one replica of two of them on a GPU of two slots, make up ``low`` to ``high``: ``[X, E]``.

    Light experts have one replica anyhow. Beside each a heavy one in one piece spares slots for all the others.
    """
    paired_XE = np.zeros(load_XE.shape, bool)
    for paired_E, load_E, low, high in zip(paired_XE, load_XE, low_X, high_X, strict=True):
        order = np.argsort(load_E, kind="stable").tolist()
        loads = load_E.tolist()
        first, last = 0, len(order) - 1
        while first < last:
            both = loads[order[first]] + loads[order[last]]
            if both > high:
                last -= 1
            elif both < low:
                first += 1
            else:
                paired_E[[order[first], order[last]]] = True
                first, last = first + 1, last - 1
    return paired_XE


def _top_up(
    load_XE: Floats, counts_XE: Ints, num_slots: int, num_gpus: int, fixed_XE: npt.NDArray[np.bool_] | None = None
) -> Ints:
    """Give what is left of the slots to the experts with the busiest replicas, at most G to each; fixed ones last."""
    share_XE = np.where(counts_XE < num_gpus, load_XE / counts_XE, -np.inf)
    if fixed_XE is not None:
        share_XE = np.where(fixed_XE, -1 / np.maximum(load_XE, 1e-300), share_XE)
    cells = np.arange(len(load_XE))
    left_X = num_slots - counts_XE.sum(axis=1)
    while len(cells := cells[left_X[cells] > 0]):
        expert_A = share_XE[cells].argmax(axis=1)
        count_A = counts_XE[cells, expert_A] + 1
        counts_XE[cells, expert_A] = count_A
        share_XE[cells, expert_A] = np.where(count_A < num_gpus, load_XE[cells, expert_A] / count_A, -np.inf)
        left_X[cells] -= 1
    return counts_XE


def _search_counts(load_XE: Floats, expert_XGS: Ints, published_XGS: Ints) -> Ints:
    """Try counts one replica away from the last ones, again and again, also where that makes it worse for a while.

    It sets out from the plan's own counts and from the published ones, and returns the best plan on both ways.
    """
    num_experts, num_gpus = load_XE.shape[1], expert_XGS.shape[1]
    capped_XE = np.minimum(count_replicas(published_XGS, num_experts), num_gpus)
    starts_XE = _top_up(load_XE, capped_XE, published_XGS[0].size, num_gpus)
    counts_XE = np.concatenate([count_replicas(expert_XGS, num_experts), starts_XE])
    load, best_XGS = (
        np.concatenate([load_XE, load_XE]),
        np.concatenate([expert_XGS, deal(load_XE, starts_XE, num_gpus)]),
    )
    goal_X = np.tile(peak_load(load_XE, published_XGS), 2)
    active = np.arange(len(load))
    for _ in range(_COUNT_ROUNDS):
        tried_XGS = _best_of(load[active], _neighbours(load[active], counts_XE[active], num_gpus), num_gpus)
        counts_XE[active] = count_replicas(tried_XGS, num_experts)
        best_XGS[active] = _better(load[active], best_XGS[active], tried_XGS)
        active = active[peak_load(load[active], best_XGS[active]) > goal_X[active]]
        if not len(active):
            break
    return _better(load_XE, *(_better(load_XE, expert_XGS, way) for way in np.split(best_XGS, 2)))


def _best_of(load_XE: Floats, counts_XCE: Ints, num_gpus: int) -> Ints:
    """Return the best plan that has one of C counts, for each cell."""
    num_cells, num_counts, num_experts = counts_XCE.shape
    load = np.repeat(load_XE, num_counts, axis=0)
    tried = _improve(load, deal(load, counts_XCE.reshape(-1, num_experts), num_gpus))
    best_X = peak_load(load, tried).reshape(num_cells, num_counts).argmin(axis=1)
    return tried[np.arange(num_cells) * num_counts + best_X]


def _neighbours(load_XE: Floats, counts_XE: Ints, num_gpus: int) -> Ints:
    """Return counts with one replica taken from an expert that can spare it and given to a busy one, ``[X, C, E]``."""
    num_cells, num_experts = load_XE.shape
    wanted = _NEIGHBOURS if num_experts > _FEW_EXPERTS else num_experts
    donors = receivers = min(wanted, num_experts)
    after_XE = np.where(counts_XE > 1, load_XE / np.maximum(counts_XE - 1, 1), np.inf)
    donor_XD = np.argsort(after_XE, axis=1, kind="stable")[:, :donors]
    before_XE = np.where(counts_XE < num_gpus, load_XE / counts_XE, -np.inf)
    receiver_XR = np.argsort(-before_XE, axis=1, kind="stable")[:, :receivers]
    counts = np.broadcast_to(counts_XE[:, None, None], (num_cells, donors, receivers, num_experts)).copy()
    cell, d, r = np.indices(counts.shape[:-1])
    counts[cell, d, r, donor_XD[cell, d]] -= 1
    counts[cell, d, r, receiver_XR[cell, r]] += 1
    # A donor with one replica, or a receiver with G, leaves the counts as they are.
    possible = ((counts >= 1) & (counts <= num_gpus)).all(axis=-1, keepdims=True)
    return np.where(possible, counts, counts_XE[:, None, None]).reshape(num_cells, -1, num_experts)


@functools.lru_cache
def _every_count(num_experts: int, num_slots: int, most: int) -> Ints | None:
    """Return all counts of 1 to ``most`` replicas that make up the slots ``[C, E]``, None where they are too many."""
    if math.comb(num_slots - 1, num_experts - 1) > _FEW_COUNTS:
        return None
    marks = itertools.combinations(range(1, num_slots), num_experts - 1)
    edges = np.array([(0, *mark, num_slots) for mark in marks])
    counts = np.diff(edges, axis=1)
    return counts[counts.max(axis=1) <= most]


def _better(load_XE: Floats, first_XGS: Ints, second_XGS: Ints) -> Ints:
    better_X = peak_load(load_XE, second_XGS) < peak_load(load_XE, first_XGS)
    return np.where(better_X[:, None, None], second_XGS, first_XGS)
