"""Metrics of balance and of language modelling."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

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
