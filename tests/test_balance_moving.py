"""One step's movement of the biases, below callback and loops; and routers' names below Fabric's wrapper."""

from __future__ import annotations

import pytest
import torch
from foreign_training import build_model
from lightning.fabric import Fabric
from tiny_moe import RATE, Gate, GateAdapter, TinyMoE
from torch import nn

from lightning_dsv3.balance import NATIVE_ADAPTERS, Float32Biases, find_routers, move_biases


class TestMoveBiases:
    """The one function below the callback and loops."""

    @pytest.mark.parametrize(
        ("arguments", "moves"),
        [
            ({}, [True, True]),
            ({"stepped": False}, [False, False]),
            ({"stepped": torch.tensor(False)}, [False, False]),
            ({"stepped": torch.tensor(True)}, [True, True]),
            ({"broken_forwards": torch.tensor([0, 1])}, [True, False]),
            ({"held": {"layer_0"}}, [False, True]),
            ({"freeze_after_tokens": 6}, [False, False]),
            ({"freeze_after_tokens": 7}, [True, True]),
            ({"update_rate": lambda tokens: RATE * (tokens == 7)}, [True, True]),
            ({"update_rate": lambda tokens: RATE * (tokens != 7)}, [False, False]),
        ],
    )
    def test_a_bias_moves_unless_there_is_a_reason(self, arguments, moves):
        routers = find_routers(TinyMoE())
        common = {
            "update_rate": RATE,
            "rule": "sign",
            "tokens_seen": torch.tensor(7),
            "stepped": True,
            "broken_forwards": torch.zeros(2, dtype=torch.int64),
        }
        counts = [torch.tensor([9, 1, 1, 1, 1, 1]), torch.tensor([1, 1, 1, 1, 10])]
        move_biases(routers, counts, Float32Biases(), **{**common, **arguments})
        expected = [[-RATE] + [RATE] * 5, [RATE] * 4 + [-RATE]]
        for router, values, moved in zip(routers, expected, moves, strict=True):
            assert torch.equal(router.bias, torch.tensor(values) * moved)

    def test_a_rate_that_is_none_is_refused(self):
        with pytest.raises(ValueError, match="update_rate"):
            move_biases(
                find_routers(TinyMoE()),
                [torch.ones(6), torch.ones(5)],
                Float32Biases(),
                lambda tokens: -1.0,
                "sign",
                tokens_seen=torch.tensor(7),
                stepped=True,
                broken_forwards=torch.zeros(2),
            )


class TestFabricsWrapper:
    @pytest.mark.parametrize("compiled", [False, True])
    def test_paths_and_names_of_private_routers_have_nothing_of_the_wrapper(self, compiled):
        module = TinyMoE()
        module.gates = nn.ModuleList([Gate(), Gate()])
        adapters = [GateAdapter(), *NATIVE_ADAPTERS]
        given = find_routers(module, adapters)
        wrapped = Fabric(accelerator="cpu", devices=1).setup_module(torch.compile(module) if compiled else module)
        found = find_routers(wrapped, adapters)
        assert [(router.name, router.path) for router in found] == [(router.name, router.path) for router in given]
        assert [router.name for router in found] == ["layer_0", "mtp_1", "gates.0", "gates.1"]
        assert [router.holder for router in found] == [router.holder for router in given]

    def test_a_bias_beside_the_router_is_found_through_the_wrapper(self):
        """MiniMax-M2 keeps it on the block around the router: the parent is looked up by its full path."""
        model = build_model("minimax_m2")
        wrapped = Fabric(accelerator="cpu", devices=1).setup_module(model)
        biases = [router.bias_tensor for router in find_routers(wrapped)]
        assert len(biases) == 2
        assert all(a is b.bias_tensor for a, b in zip(biases, find_routers(model), strict=True))
