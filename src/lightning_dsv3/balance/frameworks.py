"""Routers of other training frameworks, told by module path and class name; nothing of theirs is imported.

Most of these frameworks also have a mechanism of their own that moves the bias. Where it is switched on, the router is
left alone, unless the callback is told to take over, which switches it off.

==============  ==============================  ============================  ==========================================
framework       router                          bias                          moved by
==============  ==============================  ============================  ==========================================
torchtitan      ``TokenChoiceTopKRouter``       ``MoE.expert_bias_E``         a hook before the optimizer's step
prime-rl        ``TokenChoiceTopKRouter``       ``MoE.expert_bias``           nothing
Megatron-Core   ``TopKRouter``                  ``expert_bias``               ``finalize_model_grads``
NeMo AutoModel  ``Gate``                        ``e_score_correction_bias``   ``model.update_moe_gate_bias()``
OLMo-core       ``MoELinearRouter``             ``score_bias``                ``model.post_batch()``
litgpt          ``GroupedTopkRouter``           ``e_score_correction_bias``   nothing
==============  ==============================  ============================  ==========================================

The contracts were read from source: torchtitan 0.3.0, Megatron-Core 0.19.2, NeMo AutoModel 0.7.0, OLMo-core fa6c501,
litgpt 0.5.13, prime-rl 559b447. The tests run torchtitan's and litgpt's real MoE layers where these packages are
installed; the other frameworks were met only as stand-ins that were written from their source.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dsv3.balance.adapter import NativeUpdater, RouterAdapter
from lightning_dsv3.balance.hugging_face import chosen_experts, numbered_layer

_TITAN_HOOK = "register_moe_load_balancing_hook"


class FrameworkRouterAdapter(RouterAdapter):
    """A router class of one framework.

    Attributes:
        home: Beginning of the module path.
        class_name: Name of the router class; classes that derive from it are meant as well.
        bias_names: Attributes that may hold the bias, on the router or on the block around it.
    """

    home: str
    class_name: str
    bias_names: tuple[str, ...]

    def matches(self, module: nn.Module) -> bool:
        """Return whether ``module`` is of the class, or of one that derives from it."""
        return any(
            cls.__name__ == self.class_name and (cls.__module__ + ".").startswith(f"{self.home}.")
            for cls in type(module).__mro__
        )

    def num_experts(self, module: Any) -> int:
        """Return E."""
        return int(module.num_experts)

    def chosen_experts(self, module: Any, output: Any) -> Tensor:
        """Return the chosen experts ``[..., K]``."""
        return chosen_experts(output, module.top_k, self.class_name)

    def bias(self, module: nn.Module) -> Tensor | None:
        """Return the bias."""
        for name in self.bias_names:
            tensor = getattr(module, name, None)
            if isinstance(tensor, Tensor):
                return tensor
        return None

    def bias_holder(self, module: nn.Module, parent: nn.Module | None) -> nn.Module:
        """Return the router, or the block around it if that has the bias."""
        if self.bias(module) is None and parent is not None and self.bias(parent) is not None:
            return parent
        return module

    def layer_name(self, path: str) -> str:
        """Return ``layer_<index of the layer>``, or the whole path of what is in no numbered layer."""
        return numbered_layer(path)


class TorchtitanRouterAdapter(FrameworkRouterAdapter):
    """torchtitan's ``MoE``, which holds ``expert_bias_E`` (0.3) or ``expert_bias`` (before) and passes it on."""

    home, class_name, bias_names = "torchtitan", "TokenChoiceTopKRouter", ("expert_bias_E", "expert_bias")

    def native_updater(self, module: nn.Module, holder: nn.Module, optimizers: Sequence[Any]) -> NativeUpdater | None:
        """Return the hook that ``register_moe_load_balancing_hook`` has put on an optimizer.

        A ``load_balance_coeff`` alone gives a bias that nothing moves.
        """
        # `OptimizersContainer` is an optimizer that holds others.
        everyone = [*optimizers, *(inner for outer in optimizers for inner in getattr(outer, "optimizers", ()))]
        hooks = [getattr(optimizer, "_optimizer_step_pre_hooks", {}) for optimizer in everyone]
        if not any(_is_titan_hook(hook) for by_id in hooks for hook in by_id.values()):
            return None

        def remove_hooks() -> None:
            for by_id in hooks:
                for key in [key for key, hook in by_id.items() if _is_titan_hook(hook)]:
                    del by_id[key]

        return NativeUpdater("torchtitan's optimizer hook (register_moe_load_balancing_hook)", remove_hooks)


class PrimeRLRouterAdapter(FrameworkRouterAdapter):
    """prime-rl's ``MoE``, which holds ``expert_bias`` and passes it on."""

    home, class_name, bias_names = "prime_rl", "TokenChoiceTopKRouter", ("expert_bias",)


class MegatronRouterAdapter(FrameworkRouterAdapter):
    """Megatron-Core's ``TopKRouter``, whose output is ``(probs [T, E], routing_map bool [T, E])``."""

    home, class_name, bias_names = "megatron.core", "TopKRouter", ("expert_bias",)
    sequence_first = True

    def num_experts(self, module: Any) -> int:
        """Return E."""
        return int(module.config.num_moe_experts)

    def refusal(self, module: Any) -> str | None:
        """Return why a router that drops tokens cannot be counted."""
        if getattr(module.config, "moe_expert_capacity_factor", None) is not None:
            return "moe_expert_capacity_factor drops tokens, so its map is no choice of K experts. Set it to None."
        return None

    def chosen_experts(self, module: Any, output: Any) -> Tensor:
        """Return the K places of every row of the map."""
        routing_map = output[1]
        if routing_map.dtype != torch.bool:
            return chosen_experts(output, module.topk, self.class_name)
        return routing_map.to(torch.uint8).topk(module.topk, dim=-1).indices

    def native_updater(self, module: Any, holder: nn.Module, optimizers: Sequence[Any]) -> NativeUpdater | None:
        """Return ``finalize_model_grads``, unless the router's flag keeps it off."""
        if module.frozen_expert_bias or not module.enable_expert_bias:
            return None
        return NativeUpdater("Megatron's finalize_model_grads", lambda: setattr(module, "frozen_expert_bias", True))


class AutoModelRouterAdapter(FrameworkRouterAdapter):
    """NeMo AutoModel's ``Gate``, whose output is ``(weights, indices, aux_loss)``."""

    home, class_name, bias_names = "nemo_automodel", "Gate", ("e_score_correction_bias",)

    def num_experts(self, module: Any) -> int:
        """Return E."""
        return int(module.n_experts)

    def chosen_experts(self, module: Any, output: Any) -> Tensor:
        """Return the chosen experts ``[T, K]``."""
        return chosen_experts(output, module.topk, self.class_name)

    def native_updater(self, module: Any, holder: nn.Module, optimizers: Sequence[Any]) -> NativeUpdater | None:
        """Return ``update_bias``, which the recipes call after each step."""
        return _method_updater(
            module, "update_bias", "NeMo AutoModel's update_moe_gate_bias", module.bias_update_factor > 0
        )


class OLMoCoreRouterAdapter(FrameworkRouterAdapter):
    """OLMo-core's ``MoELinearRouter``, whose output is ``(weights, indices, counts, aux_loss)``."""

    home, class_name, bias_names = "olmo_core", "MoERouter", ("score_bias",)

    def native_updater(self, module: Any, holder: nn.Module, optimizers: Sequence[Any]) -> NativeUpdater | None:
        """Return ``post_batch``, which the trainer calls before each step."""
        # bias_gamma cannot be cleared to stop it: the router would no longer add the bias.
        return _method_updater(module, "post_batch", "OLMo-core's post_batch", module.bias_gamma is not None)


class LitGPTRouterAdapter(FrameworkRouterAdapter):
    """litgpt's ``GroupedTopkRouter``, whose output is ``(weights, indices)``."""

    home, class_name, bias_names = "litgpt", "GroupedTopkRouter", ("e_score_correction_bias",)

    def num_experts(self, module: Any) -> int:
        """Return E."""
        return int(module.config.n_expert)

    def chosen_experts(self, module: Any, output: Any) -> Tensor:
        """Return the chosen experts ``[T, K]``."""
        return chosen_experts(output, module.config.n_expert_per_token, self.class_name)


FRAMEWORK_ADAPTERS: tuple[RouterAdapter, ...] = (
    TorchtitanRouterAdapter(),
    PrimeRLRouterAdapter(),
    MegatronRouterAdapter(),
    AutoModelRouterAdapter(),
    OLMoCoreRouterAdapter(),
    LitGPTRouterAdapter(),
)


def _is_titan_hook(hook: Any) -> bool:
    return _TITAN_HOOK in getattr(hook, "__qualname__", "")


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stand where an update was."""


def _method_updater(module: nn.Module, method: str, name: str, is_on: bool) -> NativeUpdater | None:
    if not is_on or getattr(module, method) is _nothing:
        return None
    return NativeUpdater(name, lambda: object.__setattr__(module, method, _nothing))
