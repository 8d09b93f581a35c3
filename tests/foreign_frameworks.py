"""MoE layers of other frameworks: the real class where its package is installed and runs here, else a stand-in.

A stand-in has the attributes, the shapes and the update of the source that it was written from, and the module path by
which an adapter knows it. It claims nothing beyond that.
"""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIM, EXPERTS, CHOSEN = 8, 6, 2


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


class Layer(nn.Module):
    """One transformer layer's feed-forward part: `moe_enabled` and `moe` are torchtitan's names."""

    moe_enabled = True

    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(x)


class Model(nn.Module):
    """Layers in a ModuleDict, as torchtitan has them."""

    def __init__(self, *moes: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(index): Layer(moe) for index, moe in enumerate(moes)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


def torchtitan_moe() -> nn.Module:
    """torchtitan's MoE: the real one of 0.3.0, or the stand-in."""
    moe = _real_torchtitan_moe() if is_installed("torchtitan") else TitanMoE()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(std=0.5)
    return moe


def _real_torchtitan_moe() -> nn.Module:
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    return MoE.Config(
        num_experts=EXPERTS,
        router=TokenChoiceTopKRouter.Config(
            num_experts=EXPERTS,
            gate=Linear.Config(in_features=DIM, out_features=EXPERTS),
            top_k=CHOSEN,
        ),
        routed_experts=RoutedExperts.Config(
            inner_experts=GroupedExperts.Config(dim=DIM, hidden_dim=16, num_experts=EXPERTS),
            token_dispatcher=LocalTokenDispatcher.Config(num_experts=EXPERTS, top_k=CHOSEN),
        ),
    ).build()


class TokenChoiceTopKRouter(nn.Module):
    __module__ = "torchtitan.models.common.moe"

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(DIM, EXPERTS, bias=False)
        self.num_experts, self.top_k = EXPERTS, CHOSEN

    def forward(self, x: Tensor, expert_bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        scores = self.gate(x).float().sigmoid()
        ids = (scores if expert_bias is None else scores + expert_bias).topk(self.top_k, dim=-1, sorted=False).indices
        return scores.gather(-1, ids), ids, scores


class TitanMoE(nn.Module):
    __module__ = "torchtitan.models.common.moe"

    def __init__(self, bias_name: str = "expert_bias_E") -> None:
        super().__init__()
        self.router = TokenChoiceTopKRouter()
        self.bias_name = bias_name
        self.load_balance_coeff = 1e-3
        self.register_buffer(bias_name, torch.zeros(EXPERTS))
        self.register_buffer("tokens_per_expert_E", torch.zeros(EXPERTS), persistent=False)
        self.vectors = nn.Parameter(torch.randn(EXPERTS, DIM))

    def forward(self, x: Tensor) -> Tensor:
        gates, ids, _ = self.router(x, getattr(self, self.bias_name))
        if self.training:
            self.tokens_per_expert_E += F.one_hot(ids, EXPERTS).sum(dim=(0, 1, 2))
        return (gates.unsqueeze(-1) * self.vectors[ids]).sum(-2)


def register_titan_hook(optimizer: Any, model: nn.Module) -> None:
    """Do what torchtitan's trainer does after it has built its optimizers."""
    if is_installed("torchtitan"):
        from torchtitan.components.optimizer import register_moe_load_balancing_hook
    else:
        register_moe_load_balancing_hook = _standin_hook
    dims = SimpleNamespace(get_optional_mesh=lambda name: None, ep_enabled=False, tp=1)
    register_moe_load_balancing_hook(optimizer, [model], dims)


def _standin_hook(optimizer: Any, model_parts: list[nn.Module], parallel_dims: Any) -> None:
    def update(*args: Any) -> None:
        for layer in model_parts[0].layers.values():
            load = layer.moe.tokens_per_expert_E
            delta = layer.moe.load_balance_coeff * torch.sign(load.mean() - load)
            layer.moe.expert_bias_E.add_(delta - delta.mean())
            load.zero_()

    update.__qualname__ = "register_moe_load_balancing_hook.<locals>.<lambda>"
    optimizer.register_step_pre_hook(update)


def litgpt_moe() -> nn.Module:
    """litgpt's LLaMAMoE with its GroupedTopkRouter: the real one of 0.5.13, or the stand-in."""
    if is_installed("litgpt"):
        from litgpt import Config
        from litgpt.model import LLaMAMoE

        config = Config(
            n_embd=DIM,
            n_head=2,
            n_layer=1,
            n_expert=EXPERTS,
            n_expert_per_token=CHOSEN,
            n_expert_groups=2,
            n_topk_groups=1,
            n_topk_scores_per_group=2,
            moe_intermediate_size=8,
            mlp_class_name="LLaMAMoE",
        )
        moe = LLaMAMoE(config)
        nn.init.normal_(moe.gate.weight, std=0.5)
        return moe
    return Mixer(GroupedTopkRouter())


class Mixer(nn.Module):
    """A layer for a router that shows its gate values and ids first."""

    def __init__(self, router: nn.Module, name: str = "gate") -> None:
        super().__init__()
        self.name = name
        setattr(self, name, router)
        self.vectors = nn.Parameter(torch.randn(EXPERTS, DIM))

    def forward(self, x: Tensor) -> Tensor:
        gates, ids, *_ = getattr(self, self.name)(x.flatten(0, -2))
        return (gates.unsqueeze(-1) * self.vectors[ids]).sum(-2).view_as(x)


class _Scores(nn.Module):
    bias_name = "e_score_correction_bias"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, DIM))
        self.register_buffer(self.bias_name, torch.zeros(EXPERTS))

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.linear(x.float(), self.weight.float()).sigmoid()
        ids = (scores + getattr(self, self.bias_name)).topk(CHOSEN, dim=-1).indices
        return scores.gather(-1, ids), ids


class GroupedTopkRouter(_Scores):
    __module__ = "litgpt.model"
    config = SimpleNamespace(n_expert=EXPERTS, n_expert_per_token=CHOSEN)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.choose(x)


class Gate(_Scores):
    """NeMo AutoModel 0.7.0, nemo_automodel/components/moe/layers.py."""

    __module__ = "nemo_automodel.components.moe.layers"

    def __init__(self, bias_update_factor: float = 0.001) -> None:
        super().__init__()
        self.n_experts, self.topk = EXPERTS, CHOSEN
        self.bias_update_factor = bias_update_factor
        self._cumulative_expert_load: Tensor | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, None]:
        gates, ids = self.choose(x)
        if self.training and self.bias_update_factor > 0:
            load = torch.bincount(ids.flatten(), minlength=EXPERTS)
            before = self._cumulative_expert_load
            self._cumulative_expert_load = load if before is None else load + before
        return gates, ids, None

    def update_bias(self) -> None:
        assert self.bias_update_factor > 0
        load = self._cumulative_expert_load.float()
        self.e_score_correction_bias += self.bias_update_factor * torch.sign(load.mean() - load)
        self._cumulative_expert_load = None


class MoERouter(_Scores):
    """OLMo-core fa6c501, olmo_core/nn/moe/router.py."""

    __module__ = "olmo_core.nn.moe.router"
    bias_name = "score_bias"

    def __init__(self, bias_gamma: float | None = 0.001) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.bias_gamma = EXPERTS, CHOSEN, bias_gamma
        self.load = torch.zeros(EXPERTS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        gates, ids = self.choose(x)
        counts = torch.bincount(ids.flatten(), minlength=EXPERTS)
        self.load += counts
        return gates, ids, counts, None

    def post_batch(self, dry_run: bool = False) -> None:
        self.score_bias += self.bias_gamma * torch.sign(self.load.mean() - self.load)
        self.load.zero_()


class MoELinearRouter(MoERouter):
    __module__ = "olmo_core.nn.moe.router"


class TopKRouter(_Scores):
    """Megatron-Core 0.19.2, megatron/core/transformer/moe/router.py: (probs [T, E], routing_map bool [T, E])."""

    __module__ = "megatron.core.transformer.moe.router"
    bias_name = "expert_bias"

    def __init__(self, capacity_factor: float | None = None) -> None:
        super().__init__()
        self.topk, self.enable_expert_bias, self.frozen_expert_bias = CHOSEN, True, False
        self.config = SimpleNamespace(num_moe_experts=EXPERTS, moe_expert_capacity_factor=capacity_factor)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gates, ids = self.choose(x)
        probs = torch.zeros(len(x), EXPERTS).scatter(-1, ids, gates)
        return probs, torch.zeros(len(x), EXPERTS, dtype=torch.bool).scatter(-1, ids, True)


class MegatronMoE(nn.Module):
    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.router = TopKRouter(**arguments)
        self.vectors = nn.Parameter(torch.randn(EXPERTS, DIM))

    def forward(self, x: Tensor) -> Tensor:
        probs, _ = self.router(x.flatten(0, -2))
        return (probs @ self.vectors).view_as(x)
