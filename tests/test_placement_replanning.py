"""Plans after a drift: how many experts move, how good the plan is, and the drift itself."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from published_placement import tables

from lightning_dsv3.config import DeepSeekV3Config
from lightning_dsv3.inference.load_trace import STRATEGIES, drift, simulate, unplanned
from lightning_dsv3.inference.placement import PlacementError, lower_bound, placement_of, plan_placement
from lightning_dsv3.inference.replanning import align, expert_bytes, moved_experts, replan

CLUSTER = {"num_slots": 40, "num_gpus": 8}


def loads_to_make(old, new):
    """Experts that each GPU gets and did not have, counted one by one."""
    return [
        sum(
            sum((Counter(after.tolist()) - Counter(before.tolist())).values())
            for before, after in zip(old_layer, new_layer, strict=True)
        )
        for old_layer, new_layer in zip(old.experts_by_gpu, new.experts_by_gpu, strict=True)
    ]


def drifted(share, seed=0, experts=32):
    before, after = tables("spiky", 4, experts, seed), tables("spiky", 4, experts, seed + 100)
    return before, (1 - share) * before + share * after


def test_moves_are_counted_by_gpu_and_the_order_of_slots_is_free():
    old = placement_of(np.array([[0, 1, 2, 3, 0, 1]]), 4, 2)
    assert moved_experts(old, placement_of(np.array([[2, 1, 0, 1, 0, 3]]), 4, 2)).tolist() == [0]
    assert moved_experts(old, placement_of(np.array([[0, 1, 3, 3, 0, 2]]), 4, 2)).tolist() == [2]
    assert moved_experts(old, placement_of(np.array([[3, 0, 1, 0, 1, 2]]), 4, 2)).tolist() == [2]


@given(st.integers(0, 2**32 - 1))
def test_aligning_keeps_each_gpus_experts_together_and_moves_no_more(seed):
    before, after = drifted(0.5, seed % 1000)
    old, new = plan_placement(before, **CLUSTER), plan_placement(after, **CLUSTER)
    aligned = align(old, new)
    for planned, kept in zip(new.experts_by_gpu, aligned.experts_by_gpu, strict=True):
        assert sorted(map(sorted, planned.tolist())) == sorted(map(sorted, kept.tolist()))
    assert moved_experts(old, aligned).tolist() == loads_to_make(old, aligned)
    assert moved_experts(old, aligned).sum() <= moved_experts(old, new).sum()
    # What stays on a GPU stays in its slot.
    moved = (aligned.physical_to_logical != old.physical_to_logical).sum(dim=1)
    assert torch.equal(moved, moved_experts(old, aligned))


def test_a_permuted_plan_is_aligned_without_a_move():
    before, _ = drifted(0)
    old = plan_placement(before, **CLUSTER)
    shuffled = old.experts_by_gpu[:, np.random.default_rng(0).permutation(8)][:, :, ::-1].reshape(4, 40)
    assert torch.equal(align(old, placement_of(shuffled, 32, 8)).physical_to_logical, old.physical_to_logical)


@pytest.mark.parametrize("share", [0.1, 0.3, 1.0])
def test_replanning_reaches_the_tolerance_with_few_moves(share):
    before, after = drifted(share)
    old = plan_placement(before, **CLUSTER)
    fresh = plan_placement(after, **CLUSTER)
    new = replan(old, after, tolerance=0.03)
    assert (new.imbalance(after) <= fresh.imbalance(after) * 1.03 * (1 + 1e-9)).all()
    assert not new.twins.any()
    assert moved_experts(old, new).tolist() == loads_to_make(old, new)
    assert moved_experts(old, new).sum() <= 0.6 * moved_experts(old, align(old, fresh)).sum()


def test_replanning_leaves_a_good_plan_alone():
    before, _ = drifted(0)
    old = plan_placement(before, **CLUSTER)
    assert torch.equal(replan(old, before * 3).physical_to_logical, old.physical_to_logical)


@pytest.mark.parametrize("most", [0, 1, 2, 7, 30])
def test_no_more_moves_than_allowed_and_never_worse(most):
    before, after = drifted(0.8)
    old = plan_placement(before, **CLUSTER)
    new = replan(old, after, max_moves=most)
    assert sum(loads_to_make(old, new)) <= most
    assert (new.imbalance(after) <= old.imbalance(after) * (1 + 1e-9)).all()
    if most >= 7:
        assert new.imbalance(after).max() < old.imbalance(after).max()


def test_groups_stay_in_their_nodes_when_replanning():
    before, after = drifted(0.5)
    old = plan_placement(before, **CLUSTER, num_nodes=2, num_groups=4, keep_groups=True)
    new = replan(old, after)
    aligned = align(old, plan_placement(after, **CLUSTER, num_nodes=2, num_groups=4, keep_groups=True))
    for plan in (new, aligned):
        for experts in plan.physical_to_logical.numpy():
            assert set(experts[:20] // 8).isdisjoint(experts[20:] // 8)
    assert new.imbalance(after).mean() < old.imbalance(after).mean()
    assert not new.twins.any()


def test_one_expert_of_671b_in_fp8():
    config = DeepSeekV3Config.from_preset("671b")
    assert expert_bytes(config, "fp8") == 44_040_192
    assert expert_bytes(config, "bf16") == 88_080_384
    with pytest.raises(PlacementError, match=r"dtype='fp9'.*did you mean 'fp8'"):
        expert_bytes(config, "fp9")


def test_plans_of_other_deployments_are_refused():
    plan = plan_placement(tables("random", 2, 32, 0), **CLUSTER)
    with pytest.raises(PlacementError, match="differ in num_gpus: 8 and 4"):
        moved_experts(plan, plan_placement(tables("random", 2, 32, 0), num_slots=40, num_gpus=4))
    with pytest.raises(PlacementError, match="2 and 3 layers"):
        align(plan, plan_placement(tables("random", 3, 32, 0), **CLUSTER))
    with pytest.raises(PlacementError, match="the plan is for"):
        replan(plan, tables("random", 2, 16, 0))
    with pytest.raises(PlacementError, match="tolerance=-1"):
        replan(plan, tables("random", 2, 32, 0), tolerance=-1)
    with pytest.raises(PlacementError, match="max_moves=-1"):
        replan(plan, tables("random", 2, 32, 0), max_moves=-1)


def test_a_drift_passes_through_every_domain():
    first, second, third = (tables("random", 2, 6, seed) for seed in range(3))
    trace = drift([first, 10 * second, torch.from_numpy(third)], steps=9)
    assert trace.shape == (9, 2, 6)
    np.testing.assert_allclose(trace.sum(axis=-1), 1)
    for step, table in ((0, first), (4, second), (8, third)):
        np.testing.assert_allclose(trace[step], table / table.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(trace[1], 0.75 * trace[0] + 0.25 * trace[4])


def test_replanning_follows_a_drift_that_one_plan_does_not():
    trace = drift([tables("spiky", 3, 32, seed) for seed in range(3)], steps=21)
    result = simulate(trace, **CLUSTER, interval=2)
    means = {name: float(values.mean()) for name, values in result.imbalance.items()}
    assert list(means) == list(STRATEGIES)
    assert means["unplanned"] > means["planned once"] > 1.1 * means["re-planned fully"]
    assert means["re-planned in steps"] < 0.9 * means["planned once"]
    assert 0 < result.moved["re-planned in steps"].sum() < 0.6 * result.moved["re-planned fully"].sum()
    assert result.moved["planned once"].sum() == result.moved["unplanned"].sum() == 0
    assert result.moved["re-planned fully"].nonzero().flatten().tolist() == list(range(2, 21, 2))
    for values in result.imbalance.values():
        assert (values >= result.bound * (1 - 1e-9)).all()


def test_a_plan_knows_only_what_was_measured_before_it():
    tables_ = [tables("spiky", 2, 32, seed) for seed in range(2)]
    steady = np.stack([tables_[0]] * 4 + [tables_[1]] * 4)
    result = simulate(steady, **CLUSTER, interval=4)
    # At step 4 the load jumps; the plan made there is from steps 0 to 3.
    known = plan_placement(tables_[0], **CLUSTER)
    torch.testing.assert_close(result.imbalance["re-planned fully"][4], known.imbalance(tables_[1]))
    # Every plan from scratch is aligned to the one before it.
    first = plan_placement(steady.mean(axis=0), **CLUSTER)
    assert result.moved["re-planned fully"].sum() == moved_experts(first, align(first, known)).sum()
    assert result.moved["re-planned fully"].sum() < moved_experts(first, known).sum()
    mixed = plan_placement((tables_[0] + tables_[1]) / 2, **CLUSTER)
    torch.testing.assert_close(result.imbalance["planned once"][6], mixed.imbalance(tables_[1]))
    torch.testing.assert_close(result.bound[5], lower_bound(tables_[1], **CLUSTER))


def test_unplanned_has_replicas_only_where_experts_do_not_divide():
    assert unplanned(1, 8, 12, 4).physical_to_logical.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert unplanned(1, 7, 12, 4).physical_to_logical.tolist() == [[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: drift([[[1, 2]]], 5), "at least two domains"),
        (lambda: drift([[[1, 2]], [[2, 1]], [[1, 1]]], 2), "steps=2: a drift through 3 domains"),
        (lambda: simulate([[1, 2]], **CLUSTER), r"trace has shape \[1, 2\]"),
        (lambda: simulate([[[1, 2]]], num_slots=2, num_gpus=2, interval=0), "interval=0"),
    ],
)
def test_a_drift_that_cannot_be_replayed_is_one_error(call, message):
    with pytest.raises(PlacementError, match=message):
        call()
