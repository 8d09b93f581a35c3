"""The published placement of redundant experts and the best possible one, written down as plainly as they are told."""

from __future__ import annotations

import functools
import itertools

import numpy as np


def pack(weights, num_packs):
    """Heaviest item first, each to the lightest pack that has room; returns the items of each pack in order."""
    room = len(weights) // num_packs
    if room == 1:
        return [[item] for item in range(len(weights))]
    packs, sums = [[] for _ in range(num_packs)], [np.float32(0)] * num_packs
    for item in sorted(range(len(weights)), key=lambda item: -weights[item]):  # sorted keeps ties in order
        lightest = min((pack for pack in range(num_packs) if len(packs[pack]) < room), key=lambda pack: sums[pack])
        packs[lightest].append(item)
        sums[lightest] += weights[item]
    return packs


def replicate(weights, num_replicas):
    """Each extra replica to the expert with the largest load per replica; returns (expert, which replica) pairs."""
    counts = [1] * len(weights)
    replicas = [(expert, 0) for expert in range(len(weights))]
    while len(replicas) < num_replicas:
        shares = [weight / np.float32(count) for weight, count in zip(weights, counts, strict=True)]
        expert = shares.index(max(shares))
        replicas.append((expert, counts[expert]))
        counts[expert] += 1
    return replicas, counts


def published_layer(load, num_slots, num_gpus, num_nodes, num_groups):
    """Return the (expert, which replica) of every slot of one layer."""
    if num_groups % num_nodes:
        num_nodes = num_groups = 1
    load = [np.float32(value) for value in load]
    size = len(load) // num_groups
    members = [list(range(group * size, (group + 1) * size)) for group in range(num_groups)]
    group_loads = [np.float32(sum(float(load[expert]) for expert in experts)) for experts in members]
    slots = []
    for groups in pack(group_loads, num_nodes):
        experts = [expert for group in groups for expert in members[group]]
        replicas, counts = replicate([load[expert] for expert in experts], num_slots // num_nodes)
        shares = [load[experts[local]] / np.float32(counts[local]) for local, _ in replicas]
        for items in pack(shares, num_gpus // num_nodes):
            slots += [(experts[replicas[item][0]], replicas[item][1]) for item in items]
    return slots


def imbalance(load, experts, num_gpus):
    """Return busiest GPU / mean of one layer in float64, slot by slot."""
    counts = [0] * len(load)
    for expert in experts:
        counts[expert] += 1
    room = len(experts) // num_gpus
    gpus = [sum(float(load[e]) / counts[e] for e in experts[g * room : (g + 1) * room]) for g in range(num_gpus)]
    return max(gpus) / (sum(gpus) / num_gpus)


def has_twins(experts, num_gpus):
    """Whether some GPU holds an expert twice."""
    room = len(experts) // num_gpus
    return any(len(set(experts[g * room : (g + 1) * room])) < room for g in range(num_gpus))


@functools.lru_cache
def all_placements(num_experts, num_slots, num_gpus, twins):
    """Every way to fill GPUs, order of GPUs and of slots aside: ``[N, G, S]``."""
    pick = itertools.combinations_with_replacement if twins else itertools.combinations
    one_gpu = list(pick(range(num_experts), num_slots // num_gpus))
    every = itertools.combinations_with_replacement(one_gpu, num_gpus)
    return np.array([gpus for gpus in every if len(set(itertools.chain(*gpus))) == num_experts])


def optimum(load, num_slots, num_gpus, twins):
    """Return the lowest imbalance of all placements."""
    experts = all_placements(len(load), num_slots, num_gpus, twins)
    counts = np.stack([(experts == expert).sum(axis=(1, 2)) for expert in range(len(load))], axis=1)
    shares = (load / counts)[np.arange(len(experts))[:, None, None], experts]
    return shares.sum(axis=2).max(axis=1).min() * num_gpus / load.sum()


def tables(kind, num_layers, num_experts, seed):
    """Load tables: random, Zipf-like (an exponent for each layer) or spiky (three experts far above the others)."""
    rng = np.random.default_rng(seed)
    if kind == "random":
        return rng.random((num_layers, num_experts))
    if kind == "zipf":
        loads = np.arange(1, num_experts + 1) ** -rng.uniform(0.3, 1.5, (num_layers, 1))
        return rng.permuted(loads, axis=1)
    loads = rng.random((num_layers, num_experts))
    for row in loads:
        row[rng.choice(num_experts, min(3, num_experts), replace=False)] *= rng.uniform(5, 100)
    return loads
