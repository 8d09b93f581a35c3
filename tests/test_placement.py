"""Placement of redundant experts: the published policies against their description, the balanced one against them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from published_placement import has_twins, imbalance, optimum, published_layer, tables

from lightning_dsv3.inference.placement import POLICIES, PlacementError, lower_bound, plan_placement

KINDS = ("random", "zipf", "spiky")
# experts, slots, GPUs, nodes, groups
SHAPES = {
    "prefill": (256, 288, 32, 4, 8),
    "decode": (257, 320, 320, 40, 8),
    "tiny": (32, 40, 8, 2, 4),
    "odd": (15, 21, 7, 1, 1),
    "two slots": (64, 160, 80, 1, 1),
    "few experts": (8, 16, 4, 2, 4),
}


def plan(load, shape, policy, **more):
    _, slots, gpus, nodes, groups = shape
    return plan_placement(
        load, num_slots=slots, num_gpus=gpus, num_nodes=nodes, num_groups=groups, policy=policy, **more
    )


@pytest.mark.parametrize("kind", [*KINDS, "ties"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_hierarchical_and_global_are_the_published_algorithm(shape, kind):
    layers = 2 if shape[0] > 100 else 12
    if kind == "ties":
        load = np.random.default_rng(5).integers(0, 4, (layers, shape[0])).astype(np.float64)
    else:
        load = tables(kind, layers, shape[0], seed=3)
    for policy, nodes, groups in (("hierarchical", *shape[3:]), ("global", 1, 1)):
        placement = plan(load, shape, policy)
        for layer in range(layers):
            slots = published_layer(load[layer], shape[1], shape[2], nodes, groups)
            assert placement.physical_to_logical[layer].tolist() == [expert for expert, _ in slots]
            for slot, (expert, replica) in enumerate(slots):
                assert placement.logical_to_physical[layer, expert, replica] == slot


def test_the_example_of_the_published_code():
    # Load, deployment and plan are those of deepseek-ai/EPLB's README.
    load = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
    placement = plan_placement(load, num_slots=16, num_gpus=8, num_nodes=2, num_groups=4, policy="hierarchical")
    assert placement.physical_to_logical.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


def test_the_published_policies_see_float32():
    # 2**24 + 1 is not a float32: a tie with 2**24, which the first expert wins.
    load = [[2**24, 2**24 + 1, 1, 1]]
    assert plan_placement(load, num_slots=6, num_gpus=6, policy="global").replica_counts.tolist() == [[2, 2, 1, 1]]
    assert plan_placement(load, num_slots=5, num_gpus=5, policy="global").replica_counts.tolist() == [[2, 1, 1, 1]]
    assert plan_placement(load, num_slots=5, num_gpus=5).replica_counts.tolist() == [[1, 2, 1, 1]]


def test_hierarchical_keeps_groups_in_a_node_and_falls_back_to_global():
    load = tables("random", 3, 32, seed=0)
    kept = plan_placement(load, num_slots=48, num_gpus=8, num_nodes=2, num_groups=4, policy="hierarchical")
    assert nodes_of_groups(kept, 4) == 1
    uneven = plan_placement(load, num_slots=48, num_gpus=8, num_nodes=4, num_groups=2, policy="hierarchical")
    everywhere = plan_placement(load, num_slots=48, num_gpus=8, policy="global")
    assert torch.equal(uneven.physical_to_logical, everywhere.physical_to_logical)
    balanced = plan_placement(load, num_slots=48, num_gpus=8, num_nodes=2, num_groups=4, keep_groups=True)
    assert nodes_of_groups(balanced, 4) == 1
    assert (balanced.imbalance(load) <= kept.imbalance(load) * (1 + 1e-9)).all()
    assert not balanced.twins.any()


def nodes_of_groups(placement, num_groups):
    size = placement.num_experts // num_groups
    node = np.arange(placement.num_slots) // (placement.num_slots // placement.num_nodes)
    most = 0
    for experts in placement.physical_to_logical.numpy():
        most = max(most, *(len(set(node[experts // size == group])) for group in range(num_groups)))
    return most


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_three_maps_agree(shape, policy):
    load = tables("zipf", 3, shape[0], seed=1)
    placement = plan(load, shape, policy)
    physical, logical, counts = placement.physical_to_logical, placement.logical_to_physical, placement.replica_counts
    assert physical.shape == (3, shape[1])
    assert logical.shape == (3, shape[0], counts.max())
    assert {physical.dtype, logical.dtype, counts.dtype} == {torch.int64}
    for layer in range(3):
        for expert in range(shape[0]):
            slots = [slot for slot in logical[layer, expert].tolist() if slot >= 0]
            assert sorted(slots) == torch.nonzero(physical[layer] == expert).flatten().tolist()
            assert len(slots) == counts[layer, expert] >= 1
            assert logical[layer, expert, len(slots) :].eq(-1).all()
        expected = imbalance(load[layer], physical[layer].tolist(), shape[2])
        assert placement.imbalance(load)[layer].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["prefill", "decode", "tiny", "odd", "two slots"])
def test_balanced_is_never_above_the_published_plans_and_has_no_twins(name, kind):
    shape = SHAPES[name]
    for seed in range(2 if shape[0] > 100 else 6):
        load = tables(kind, 10, shape[0], seed)
        balanced = plan(load, shape, "balanced")
        for experts in balanced.physical_to_logical.tolist():
            assert not has_twins(experts, shape[2])
        for policy in ("hierarchical", "global"):
            published = plan(load, shape, policy)
            above = balanced.imbalance(load) > published.imbalance(load) * (1 + 1e-9)
            # With few experts, or two on a GPU, twins can be worth something: they split a load unevenly.
            assert not (above & (published.twins == 0) if name in ("odd", "two slots") else above).any()
        bound = lower_bound(load, num_slots=shape[1], num_gpus=shape[2])
        assert (balanced.imbalance(load) >= bound * (1 - 1e-9)).all()


@pytest.mark.slow
def test_balanced_is_never_above_the_published_plan_on_a_thousand_tables():
    for name in ("prefill", "decode"):
        shape = SHAPES[name]
        for kind in KINDS:
            load = tables(kind, 334, shape[0], seed=11)
            balanced, published = plan(load, shape, "balanced"), plan(load, shape, "global")
            assert not balanced.twins.any()
            assert (balanced.imbalance(load) <= published.imbalance(load) * (1 + 1e-9)).all()


def test_balanced_is_far_nearer_to_the_bound_than_the_published_plan():
    shape = SHAPES["prefill"]
    gaps = {"balanced": 0.0, "global": 0.0}
    for kind in KINDS:
        load = tables(kind, 20, 256, seed=7)
        bound = lower_bound(load, num_slots=288, num_gpus=32)
        for policy in gaps:
            gaps[policy] += float((plan(load, shape, policy).imbalance(load) / bound - 1).mean())
    assert gaps["balanced"] < 0.1 * gaps["global"]


@given(
    st.sampled_from([(3, 4, 2), (4, 6, 2), (4, 6, 3), (3, 6, 3), (5, 6, 2), (5, 8, 4), (4, 8, 4), (2, 4, 2)]),
    st.lists(st.integers(0, 100), min_size=5, max_size=5),
)
def test_small_tables_against_every_possible_placement(shape, numbers):
    experts, slots, gpus = shape
    load = np.array(numbers[:experts], dtype=np.float64) + 0.5
    placement = plan_placement(load[None], num_slots=slots, num_gpus=gpus)
    assert not has_twins(placement.physical_to_logical[0].tolist(), gpus)
    without_twins, best = optimum(load, slots, gpus, False), optimum(load, slots, gpus, True)
    found = float(placement.imbalance(load[None])[0])
    assert without_twins * (1 - 1e-9) <= found <= without_twins * 1.01
    assert float(lower_bound(load[None], num_slots=slots, num_gpus=gpus)[0]) <= best * (1 + 1e-9)
    published = imbalance(load, [expert for expert, _ in published_layer(load, slots, gpus, 1, 1)], gpus)
    # Above the published plan only where no plan without twins reaches that.
    assert found <= published * (1 + 1e-9) or without_twins > published


@given(
    st.integers(2, 5).flatmap(lambda room: st.tuples(st.integers(room, 24), st.just(room), st.integers(2, 8))),
    st.integers(0, 2**32 - 1),
)
def test_no_twins_whatever_the_shape(shape, seed):
    experts, room, gpus = shape
    gpus = max(gpus, -(-experts // room))
    load = np.random.default_rng(seed).gamma(0.3, 1, (3, experts))
    placement = plan_placement(load, num_slots=gpus * room, num_gpus=gpus)
    assert placement.twins_avoidable
    assert not any(has_twins(row, gpus) for row in placement.physical_to_logical.tolist())
    assert placement.replica_counts.sum(dim=1).eq(gpus * room).all()
    assert placement.replica_counts.min() >= 1


def test_no_twins_can_cost_balance():
    load = [[1.0, 0.9, 0.1]]
    published = plan_placement(load, num_slots=4, num_gpus=2, policy="global")
    balanced = plan_placement(load, num_slots=4, num_gpus=2)
    assert (published.imbalance(load).item(), published.twins.item()) == (pytest.approx(1), 1)
    assert (balanced.imbalance(load).item(), balanced.twins.item()) == (pytest.approx(1.05), 0)
    assert optimum(np.array(load[0]), 4, 2, False) == pytest.approx(1.05)


def test_inevitable_twins_are_counted():
    placement = plan_placement([[5, 1]], num_slots=6, num_gpus=2)
    assert not placement.twins_avoidable
    assert placement.twins.tolist() == [2]
    assert placement.imbalance([[5, 1]]).item() == 1


def test_the_bound_of_one_slot_on_a_gpu_is_reached():
    load = tables("zipf", 20, 257, seed=2)
    placement = plan(load, SHAPES["decode"], "balanced")
    bound = lower_bound(load, num_slots=320, num_gpus=320)
    torch.testing.assert_close(placement.imbalance(load), bound, rtol=1e-12, atol=0)


def test_the_bound_counts_what_stands_beside_a_busy_replica():
    # 100 alone makes 50 + 50; beside each replica stands at least one of 10.
    assert lower_bound([[100, 10, 10]], num_slots=4, num_gpus=2).item() == pytest.approx(1)
    # Four slots, no choice: 100, and 10 beside it; the mean is 60.
    assert lower_bound([[100, 10, 10, 0.001]], num_slots=4, num_gpus=2).item() >= 100 / 60.0005


def test_layers_without_load_are_balanced_by_definition():
    load = np.zeros((2, 8))
    load[1] = np.arange(8)
    for policy in POLICIES:
        placement = plan_placement(load, num_slots=12, num_gpus=4, policy=policy)
        assert placement.imbalance(load)[0] == 1
        assert torch.isfinite(placement.imbalance(load)).all()
    assert lower_bound(load, num_slots=12, num_gpus=4)[0] == 1


def test_plans_do_not_depend_on_scale_type_or_other_layers():
    load = tables("spiky", 4, 32, seed=4)
    whole = plan(load, SHAPES["tiny"], "balanced").physical_to_logical
    scaled = plan(torch.from_numpy(load * 2**20), SHAPES["tiny"], "balanced").physical_to_logical
    assert torch.equal(whole, scaled)
    alone = plan(load[2:3].tolist(), SHAPES["tiny"], "balanced").physical_to_logical
    assert torch.equal(whole[2:3], alone)


GOOD = {"num_slots": 6, "num_gpus": 2}


@pytest.mark.parametrize(
    ("load", "changes", "message"),
    [
        ([[1, float("nan"), 1, 1]], {}, r"load\[0, 1\] = nan is not a finite number"),
        ([[1, 1, 1, float("inf")]], {}, r"load\[0, 3\] = inf is not a finite number"),
        ([[1, 1, 1, 1], [1, 1, -2, 1]], {}, r"load\[1, 2\] = -2.0 is negative"),
        ([1, 2, 3, 4], {}, r"shape \[4\]; it must be \[layers, experts\]"),
        ([[]], {}, r"shape \[1, 0\]"),
        ([[1, 2], [3]], {}, "table of numbers"),
        ([["a", "b", "c", "d"]], {}, "table of numbers"),
        ([[1] * 8], {}, "num_slots=6 is fewer than the 8 experts.*give at least 8"),
        ([[1] * 4], {"num_slots": 7}, "num_slots=7 is not a multiple of num_gpus=2.*give 8"),
        ([[1] * 4], {"num_gpus": 0}, "num_gpus=0 must be a whole number, 1 or more"),
        ([[1] * 4], {"num_slots": 6.0}, "num_slots=6.0 must be a whole number"),
        ([[1] * 4], {"num_nodes": 3, "num_groups": 3, "policy": "hierarchical"}, "num_groups=3 does not divide the 4"),
        ([[1] * 4], {"num_nodes": 4, "num_groups": 4, "policy": "hierarchical"}, "num_gpus=2 is not a multiple of"),
        ([[1] * 4], {"policy": "balance"}, "policy='balance'.*did you mean 'balanced'"),
        ([[1] * 4], {"num_nodes": 2, "num_groups": 1, "keep_groups": True}, "keep_groups: 1 groups cannot"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_error(load, changes, message):
    with pytest.raises(PlacementError, match=message) as caught:
        plan_placement(load, **(GOOD | changes))
    assert "\n" not in str(caught.value)


def test_a_load_of_another_model_is_refused():
    placement = plan_placement([[1, 2, 3, 4]], **GOOD)
    with pytest.raises(PlacementError, match=r"load is \[1, 5\] and the plan is for \[1, 4\]"):
        placement.imbalance([[1, 2, 3, 4, 5]])
