"""`AuxFreeBalanceCallback(rule=...)`: each rule on the counts of a real Trainer, by its name."""

from __future__ import annotations

import inspect

import pytest
import torch
from tiny_moe import TinyMoE, data, make_trainer

from lightning_dsv3.callbacks import AuxFreeBalanceCallback
from lightning_dsv3.config.balance import BIAS_RULES as NAMES
from lightning_dsv3.ops.balance import BIAS_RULES


@pytest.mark.parametrize("rule", BIAS_RULES)
def test_the_callback_moves_the_bias_by_its_rule_on_the_loads_of_every_step(rule):
    module = TinyMoE((6, 6, 5))
    make_trainer(AuxFreeBalanceCallback(0.01, rule=rule)).fit(module, data(6))
    expected = [torch.zeros(n) for n in (6, 6, 5)]
    used = [torch.zeros(n, dtype=torch.int64) for n in (6, 6, 5)]
    assert len(module.trace) == 3
    for _, routed, biases in module.trace:
        for layer, load in enumerate(map(torch.tensor, routed)):
            expected[layer] = BIAS_RULES[rule](expected[layer], load - used[layer], 0.01)
            used[layer] = load
            assert biases[layer] == expected[layer].tolist()
    assert all(bias.any() for bias in expected)


def test_the_rules_differ():
    biases = []
    for rule in BIAS_RULES:
        module = TinyMoE()
        make_trainer(AuxFreeBalanceCallback(0.01, rule=rule)).fit(module, data(2))
        biases.append(module.biases())
    assert biases[0] != biases[1] != biases[2] != biases[0]


def test_the_reports_rule_is_the_default_of_callback_and_configuration():
    assert inspect.signature(AuxFreeBalanceCallback).parameters["rule"].default == "sign" == NAMES[0]
    assert tuple(BIAS_RULES) == NAMES


def test_an_unknown_rule_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"rule='signs': did you mean 'sign'"):
        AuxFreeBalanceCallback(rule="signs")
