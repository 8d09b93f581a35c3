"""A whole run in a second: the smallest model of every kind of layer, two domains of text, a quiet Trainer."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import lightning as L
import torch
from torch import Tensor

import lightning_dsv3
from lightning_dsv3.balance import find_routers
from lightning_dsv3.callbacks import AuxFreeBalanceCallback
from lightning_dsv3.config import DeepSeekV3Config

RATE = 0.01
LENGTH = 24
SHAPE = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 8, "n_routed_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
TEXTS = {
    "prose": [f"The {number}th of the old songs is sung at the {number % 7}th gate. " * 4 for number in range(40)],
    "code": [f"x{number} = {number * 7}\nprint(x{number} + {number})\n" * 4 for number in range(40)],
}


def tiny_module(package: ModuleType = lightning_dsv3, **arguments: Any) -> Any:
    """A module with the same weights at every call."""
    torch.manual_seed(0)
    config = DeepSeekV3Config.from_preset("tiny", **SHAPE)
    return package.DeepSeekV3Module(config, **({"learning_rate": 1e-2} | arguments))


def tiny_data(package: ModuleType = lightning_dsv3, **arguments: Any) -> Any:
    defaults = {"vocab_size": 300, "sequence_length": LENGTH, "batch_size": 4, "documents": TEXTS}
    return package.DeepSeekV3DataModule(**(defaults | arguments))


def quiet_trainer(*callbacks: Any, trainer_class: type = L.Trainer, **arguments: Any) -> Any:
    defaults = {
        "max_steps": 3, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0, "log_every_n_steps": 1,
    }  # fmt: skip
    return trainer_class(callbacks=list(callbacks), **(defaults | arguments))


def balance() -> AuxFreeBalanceCallback:
    return AuxFreeBalanceCallback(update_rate=RATE)


def biases(module: torch.nn.Module) -> dict[str, Tensor]:
    return {router.path: router.bias.clone() for router in find_routers(module)}


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    """Everything but the biases."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items() if not name.endswith("router.bias")}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def differ(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    assert a.keys() == b.keys()
    return any(not torch.equal(a[name], b[name]) for name in a)
