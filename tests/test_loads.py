"""How even a load is: MaxVio, entropy and dead experts of each layer."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_dsv3.balance.loads import load_statistics


def test_statistics_follow_their_formulas():
    counts = [5, 0, 2, 7, 1, 0, 3]
    shares = [count / sum(counts) for count in counts if count]
    entropy = -sum(share * math.log(share) for share in shares) / math.log(len(counts))
    [violation], [measured], [dead] = load_statistics([torch.tensor(counts)])
    assert violation.item() == pytest.approx(7 * 7 / 18 - 1, rel=1e-6)
    assert measured.item() == pytest.approx(entropy, rel=1e-6)
    assert dead.item() == 2


@pytest.mark.parametrize("num_experts", [1, 2, 6, 7, 255])
@pytest.mark.parametrize("load", [1, 3, 2**40 + 1])
def test_an_even_load_is_exactly_even(num_experts, load):
    even = load_statistics([torch.full((num_experts,), load)])
    assert [values.item() for values in even] == pytest.approx([0, 1, 0], abs=1e-6)


def test_one_expert_for_all_has_no_entropy():
    violation, entropy, dead = load_statistics([torch.tensor([0, 0, 9, 0, 0])])
    assert (violation.item(), dead.item()) == (4, 4)
    assert entropy.item() == pytest.approx(0, abs=1e-6)


def test_layers_may_differ_in_experts():
    counts = [torch.tensor([4, 1, 0]), torch.tensor([2, 2]), torch.tensor([0, 1, 2])]
    together = load_statistics(counts)
    alone = [load_statistics([counts_E]) for counts_E in counts]
    for index, values in enumerate(together):
        assert values.tolist() == [one[index].item() for one in alone]


def test_a_layer_without_tokens_is_nan_and_leaves_the_others_alone():
    violation, entropy, dead = load_statistics([torch.tensor([0, 0, 0]), torch.tensor([2, 2, 2])])
    assert violation.isnan().tolist() == entropy.isnan().tolist() == [True, False]
    assert dead.tolist() == [3, 0]


def test_the_device_is_never_read():
    # Meta tensors have no values: whatever would make the host wait for a GPU raises here.
    counts = [torch.empty(6, dtype=torch.int64, device="meta"), torch.empty(5, dtype=torch.int64, device="meta")]
    assert all(values.shape == (2,) for values in load_statistics(counts))
