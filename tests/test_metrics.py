"""Metrics of balance and of language modelling."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch import nn
from torchmetrics import MetricCollection

from lightning_dsv3.metrics import BitsPerByte, ExpertLoad, ExpertSpecialization, MaxViolation


class TestBitsPerByte:
    def test_is_nats_over_ln2_and_bytes(self):
        torch.manual_seed(0)
        metric = BitsPerByte()
        losses = [torch.rand(2, 7), torch.rand(3, 5)]
        token_bytes = [torch.randint(1, 9, (2, 7)), torch.randint(1, 9, (3, 5))]
        for loss, num in zip(losses, token_bytes, strict=True):
            metric.update(loss, num)
        nats = sum(loss.double().sum().item() for loss in losses)
        num_bytes = sum(num.sum().item() for num in token_bytes)
        assert metric.compute().item() == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-12)

    def test_special_tokens_are_in_neither_sum(self):
        metric = BitsPerByte()
        metric.update(torch.tensor([math.log(2), 100.0, float("nan")]), torch.tensor([1, 0, 0]))
        assert metric.compute().item() == pytest.approx(1.0)

    def test_a_long_sum_stays_exact(self):
        metric = BitsPerByte()
        metric.update(torch.tensor([2.0**25]), torch.tensor([2**25]))
        for _ in range(64):
            metric.update(torch.tensor([0.125]), torch.tensor([1]))
        assert metric.nats.item() == 2**25 + 8
        assert metric.num_bytes.item() == 2**25 + 64

    @pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.float()])
    def test_sums_stay_in_float64_when_the_module_is_cast(self, cast):
        owner = nn.Module()
        owner.metric = BitsPerByte()
        owner.metric.update(torch.tensor([0.3]), torch.tensor([1]))
        cast(owner)
        assert owner.metric.nats.dtype == torch.float64

    def test_is_nan_before_any_byte(self):
        metric = BitsPerByte()
        metric.update(torch.ones(2), torch.zeros(2, dtype=torch.int64))
        assert metric.compute().isnan()

    def test_other_shapes_are_refused(self):
        with pytest.raises(ValueError, match=r"\[2\].*\[3\]"):
            BitsPerByte().update(torch.ones(2), torch.ones(3, dtype=torch.int64))


class TestMaxViolation:
    def test_is_that_of_the_sum_and_not_the_mean_of_the_batches(self):
        metric = MaxViolation(num_experts=2)
        metric.update(torch.tensor([4, 0]))
        metric.update(torch.tensor([0, 4]))
        assert metric.compute() == 0

    def test_is_the_mean_of_the_layers_that_have_tokens(self):
        metric = MaxViolation(num_experts=2, num_layers=3)
        metric.update(torch.tensor([[4, 0], [2, 2], [0, 0]]))
        assert metric.compute() == pytest.approx(0.5)

    def test_large_counts_stay_exact(self):
        metric = MaxViolation(num_experts=2)
        metric.update(torch.tensor([2**40, 2**40]))
        metric.update(torch.tensor([1, 0]))
        assert metric.counts.tolist() == [[2**40 + 1, 2**40]]

    def test_starts_again_after_reset(self):
        metric = MaxViolation(num_experts=2)
        metric.update(torch.tensor([4, 0]))
        metric.reset()
        metric.update(torch.tensor([3, 3]))
        assert metric.compute() == 0

    @pytest.mark.parametrize("counts", [torch.zeros(3, dtype=torch.int64), torch.zeros(2)])
    def test_wrong_counts_are_refused(self, counts):
        with pytest.raises(ValueError, match=r"integer counts \[1, 2\]"):
            MaxViolation(num_experts=2).update(counts)


# Counts [L, E] of three micro-batches of rank 0 and two of rank 1; layer 1 of the third is empty.
COUNTS_OF_RANK = [
    [[[6, 2, 1, 3], [3, 3, 3, 3]], [[0, 0, 5, 7], [12, 0, 0, 0]], [[4, 4, 4, 0], [0, 0, 0, 0]]],
    [[[0, 4, 5, 3], [1, 2, 3, 6]], [[9, 1, 1, 1], [0, 12, 0, 0]]],
]
LEVELS = ("global", "batch", "micro_batch")


def expected_violation(level: str, num_groups: int, counts_of_rank: list[Any] = COUNTS_OF_RANK) -> float:
    """MaxVio in plain Python: what is added up, the group loads, the mean over updates, the mean over layers."""

    def violation(parts: list[list[int]]) -> float | None:
        load = [sum(column) for column in zip(*parts, strict=True)]
        size = len(load) // num_groups
        groups = [sum(load[start : start + size]) for start in range(0, len(load), size)]
        return max(groups) * num_groups / sum(groups) - 1 if any(groups) else None

    layers = []
    for layer in range(2):
        ranks = [[update[layer] for update in updates] for updates in counts_of_rank]
        every = [counts for updates in ranks for counts in updates]
        if level == "global":
            added = [every]
        elif level == "micro_batch":
            added = [[counts] for counts in every]
        else:
            added = [[u[n] for u in ranks if n < len(u)] for n in range(max(map(len, ranks)))]
        values = [value for parts in added if (value := violation(parts)) is not None]
        layers.append(sum(values) / len(values))
    return sum(layers) / 2


def metrics_of_every_kind() -> dict[tuple[str, int], MaxViolation]:
    return {
        (level, groups): MaxViolation(num_experts=4, num_layers=2, level=level, num_groups=groups)
        for level in LEVELS
        for groups in (4, 2, 1)
    }


def compute_on_rank(num_updates: tuple[int, ...], call: str) -> dict[tuple[str, int], float]:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    metrics = metrics_of_every_kind()
    for counts in COUNTS_OF_RANK[rank][: num_updates[rank]]:
        for metric in metrics.values():
            getattr(metric, call)(torch.tensor(counts))
    values = {kind: metric.compute().item() for kind, metric in metrics.items()}
    # A second value, after more, must not have taken the other rank's part for its own.
    for metric in metrics.values():
        metric.update(torch.tensor(COUNTS_OF_RANK[rank][0]))
        metric.compute()
        metric.reset()
        metric.update(torch.tensor([[2, 2, 2, 2]] * 2))
    assert all(metric.compute() == 0 for metric in metrics.values())
    return values


class TestLevelsAndGroups:
    @pytest.mark.parametrize("num_groups", [4, 2, 1])
    @pytest.mark.parametrize("level", LEVELS)
    def test_on_one_rank_every_update_is_a_batch(self, level, num_groups):
        metric = MaxViolation(num_experts=4, num_layers=2, level=level, num_groups=num_groups)
        for counts in COUNTS_OF_RANK[0]:
            metric.update(torch.tensor(counts))
        expected = expected_violation(level, num_groups, COUNTS_OF_RANK[:1])
        assert metric.compute().item() == pytest.approx(expected, rel=1e-6, abs=1e-7)
        assert metric.compute().dtype == torch.float32

    @pytest.mark.parametrize("call", ["update", "forward"])
    @pytest.mark.parametrize("num_updates", [(2, 2), (3, 2), (1, 2), (3, 0), (0, 2)])
    def test_two_ranks(self, num_updates, call):
        counts = [COUNTS_OF_RANK[rank][:number] for rank, number in enumerate(num_updates)]
        first, second = run_on_ranks(2, compute_on_rank, num_updates, call)
        assert first == second
        for (level, num_groups), value in first.items():
            assert value == pytest.approx(expected_violation(level, num_groups, counts), rel=1e-6, abs=1e-7)

    def test_levels_and_groups_differ_in_what_these_tests_use(self):
        """So that a level that computed another one's value would be seen."""
        values = [expected_violation(level, groups) for level in LEVELS for groups in (4, 2)]
        assert len({round(value, 6) for value in values}) == 6

    def test_less_added_up_is_never_better_balanced(self):
        torch.manual_seed(0)
        metrics = metrics_of_every_kind()
        for _ in range(5):
            counts = torch.stack([torch.bincount(torch.randint(0, 4, (63,)), minlength=4) for _ in range(2)])
            for metric in metrics.values():
                metric.update(counts)
        for groups in (4, 2):
            whole, batch, micro = (metrics[level, groups].compute() for level in LEVELS)
            assert whole < batch == micro

    @pytest.mark.parametrize("level", LEVELS)
    def test_nothing_seen_is_nan(self, level):
        metric = MaxViolation(num_experts=3, level=level)
        with pytest.warns(UserWarning, match="before the ``update``"):
            assert metric.compute().isnan()
        metric.update(torch.zeros(3, dtype=torch.int64))
        assert metric.compute().isnan()

    @pytest.mark.parametrize("level", LEVELS)
    def test_a_cast_of_the_owner_changes_nothing(self, level):
        owner = nn.Module()
        owner.metric = MaxViolation(num_experts=3, level=level)
        owner.metric.update(torch.tensor([2**25 + 1, 2**25 - 1, 2**25]))
        owner.bfloat16()
        owner.metric.update(torch.tensor([2**25 - 1, 2**25 + 1, 2**25]))
        expected = 0.0 if level == "global" else 2.0**-25
        assert owner.metric.compute().item() == pytest.approx(expected, rel=1e-6)

    def test_a_collection_keeps_them_apart(self):
        metrics = {f"{level}_{groups}": metric for (level, groups), metric in metrics_of_every_kind().items()}
        collection = MetricCollection(metrics)
        for counts in COUNTS_OF_RANK[1]:
            collection.update(torch.tensor(counts))
        for name, value in collection.compute().items():
            level, groups = name.rsplit("_", 1)
            assert value.item() == pytest.approx(expected_violation(level, int(groups), COUNTS_OF_RANK[1:]), abs=1e-6)

    @pytest.mark.parametrize("num_groups", [0, -2, 4, 12])
    def test_uneven_groups_are_refused(self, num_groups):
        with pytest.raises(ValueError, match=rf"num_groups={num_groups} does not divide num_experts=6"):
            MaxViolation(num_experts=6, num_groups=num_groups)

    def test_an_unknown_level_is_refused_with_the_known_ones(self):
        with pytest.raises(ValueError, match=r"level='step'; give one of global, batch, micro_batch"):
            MaxViolation(num_experts=6, level="step")


class TestExpertLoad:
    def test_is_load_over_mean_by_layer(self):
        metric = ExpertLoad(num_experts=3, num_layers=2)
        metric.update(torch.tensor([[1, 2, 3], [0, 0, 6]]))
        metric.update(torch.tensor([[1, 2, 3], [6, 0, 0]]))
        assert metric.compute().tolist() == [[0.5, 1.0, 1.5], [1.5, 0.0, 1.5]]


class TestExpertSpecialization:
    def test_is_0_when_domains_use_experts_alike(self):
        metric = ExpertSpecialization(num_domains=2, num_experts=3)
        metric.update(torch.tensor([1, 2, 3]), domain=0)
        metric.update(torch.tensor([100, 200, 300]), domain=1)
        assert metric.compute().item() == pytest.approx(0, abs=1e-6)

    @pytest.mark.parametrize("num_domains", [2, 3, 4])
    def test_is_log2_D_when_domains_share_no_expert(self, num_domains):
        metric = ExpertSpecialization(num_domains=num_domains, num_experts=num_domains)
        for domain in range(num_domains):
            counts = torch.zeros(num_domains, dtype=torch.int64)
            counts[domain] = 10 ** (domain + 1)
            metric.update(counts, domain)
        assert metric.compute().item() == pytest.approx(math.log2(num_domains), rel=1e-6)

    def test_is_the_jensen_shannon_divergence_averaged_over_layers(self):
        counts = torch.tensor([[[5, 1, 2], [3, 3, 3]], [[1, 1, 8], [9, 0, 1]]])
        metric = ExpertSpecialization(num_domains=2, num_experts=3, num_layers=2)
        for domain in (0, 1):
            metric.update(counts[domain], domain)

        def entropy(p):
            return -sum(x * math.log2(x) for x in p if x)

        expected = 0.0
        for layer in range(2):
            p = [[c / sum(row) for c in row] for row in counts[:, layer].tolist()]
            mean = [(a + b) / 2 for a, b in zip(*p, strict=True)]
            expected += (entropy(mean) - (entropy(p[0]) + entropy(p[1])) / 2) / 2
        assert metric.compute().item() == pytest.approx(expected, rel=1e-5)

    def test_a_domain_without_tokens_takes_no_part(self):
        two = ExpertSpecialization(num_domains=2, num_experts=2)
        three = ExpertSpecialization(num_domains=3, num_experts=2)
        for metric in (two, three):
            metric.update(torch.tensor([3, 1]), 0)
            metric.update(torch.tensor([1, 3]), 1)
        assert three.compute() == two.compute()

    @pytest.mark.parametrize("domain", [-1, 2])
    def test_a_domain_that_does_not_exist_is_refused(self, domain):
        with pytest.raises(ValueError, match=rf"domain={domain}; give the index of one of 2 domains"):
            ExpertSpecialization(num_domains=2, num_experts=2).update(torch.tensor([1, 1]), domain)
