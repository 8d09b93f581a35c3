"""The routers of Hugging Face models, told by what they are: no family is listed, and nothing is imported.

A router is a module whose class comes from a ``transformers`` modelling file, or from code that a model repository
brings along (``transformers_modules``), whose class name ends in Router, Gate or Gating, and which says from how many
experts it chooses. Its output is a tuple in which one tensor of integers holds the chosen experts.

The bias has three homes, by family: the router (``e_score_correction_bias``), a module inside it (``moe_statics`` of
ERNIE, shape ``[1, E]``), or the MoE block around it, which passes it to the router as an argument (``minimax_m2``,
``lfm2_moe``, ``afmoe``, ``hy_v3``). It is a buffer in most families and a parameter in some.

``gpt_oss`` has a parameter named ``bias`` in its router. That is part of its logits, is trained, and is not this.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dsv3.balance.adapter import RouterAdapter

INSTALLED_BIAS = "selection_bias"
"""Name of the buffer that :func:`lightning_dsv3.balance.install_biases` gives a router."""

_HOMES = ("transformers.models.", "transformers_modules.")
_ENDINGS = ("Router", "Gate", "Gating")
_BIAS_NAMES = (INSTALLED_BIAS, "e_score_correction_bias", "expert_bias")
_NUM_EXPERTS_NAMES = ("n_routed_experts", "num_experts", "num_local_experts")
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)
_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.")
_OTHER_WAY = (
    " Describe how it chooses with a lightning_dsv3.balance.RouterAdapter (routers=[...]), or take the callback out."
)
_REFUSALS = {
    "DbrxRouter": "it returns logits only, and the choice is made elsewhere." + _OTHER_WAY,
    "JetMoeTopKGating": "it returns the choices sorted by expert, without saying whose they are." + _OTHER_WAY,
    "SwitchTransformersTop1Router": "experts have a capacity and drop tokens; a bias has no place in its argmax."
    + _OTHER_WAY,
    "NllbMoeTop2Router": "experts have a capacity and drop tokens; a bias has no place in its argmax." + _OTHER_WAY,
    "ZayaRouter": "its output gives tokens that skip all experts to expert 0, so that they cannot be told apart."
    + _OTHER_WAY,
}


class HuggingFaceRouterAdapter(RouterAdapter):
    """Routers of ``transformers`` models, with the bias on the router, inside it, or on the block around it."""

    def matches(self, module: nn.Module) -> bool:
        """Return whether ``module`` is a learned router over experts; hash routers, fixed tables, are not."""
        name = router_class_name(module)
        if name is None or name.endswith("HashRouter"):
            return False
        return name in _REFUSALS or _stated_num_experts(module) is not None

    def refusal(self, module: nn.Module) -> str | None:
        """Return why routers of this class cannot be observed."""
        return _REFUSALS.get(router_class_name(module) or "")

    def num_experts(self, module: nn.Module) -> int:
        """Return the number of experts; identity experts, which the bias covers as well, are among them."""
        for holder in (module, getattr(module, "moe_statics", None)):
            bias = selection_bias(holder)
            if bias is not None:
                return bias.numel()
        stated = _stated_num_experts(module)
        assert stated is not None, "matches() has looked"
        return stated

    def chosen_experts(self, module: nn.Module, output: Any) -> Tensor:
        """Return the chosen experts ``[..., K]``."""
        if router_class_name(module) == "Llama4Router":
            # It returns sigmoid scores ``[T, E]`` that are 0 for all experts but the chosen ones.
            return output[0].detach().topk(num_chosen(module), dim=-1).indices
        return chosen_experts(output, num_chosen(module), type(module).__name__)

    def bias(self, module: nn.Module) -> Tensor | None:
        """Return the bias that ``module`` holds."""
        return selection_bias(module)

    def bias_holder(self, module: nn.Module, parent: nn.Module | None) -> nn.Module:
        """Return the router, the statistics inside it, or the block around it, whichever holds the bias."""
        for holder in (module, getattr(module, "moe_statics", None), parent):
            bias = selection_bias(holder)
            if holder is not None and bias is not None:
                return holder
        return module

    def layer_name(self, path: str) -> str:
        """Return ``layer_<index of the layer>``; the whole path where a model has several stacks of layers."""
        return numbered_layer(path)


def numbered_layer(path: str) -> str:
    """Return ``layer_<index>`` for a path through a numbered layer, else the path."""
    match = _LAYER.search(path)
    return f"layer_{match[1]}" if match else path


def router_class_name(module: nn.Module) -> str | None:
    """Return the name of the Hugging Face router class of ``module``, or None.

    Base classes are looked at as well, as ``fully_shard`` puts a class of its own before the module's.
    """
    for cls in type(module).__mro__:
        if cls.__module__.startswith(_HOMES) and cls.__name__.endswith(_ENDINGS):
            return cls.__name__
    return None


def selection_bias(holder: object) -> Tensor | None:
    """Return the selection bias that is an attribute of ``holder``, or None."""
    for name in _BIAS_NAMES:
        tensor = getattr(holder, name, None)
        if isinstance(tensor, Tensor):
            return tensor
    return None


def num_chosen(module: nn.Module) -> int | None:
    """Return K as the router states it, or None."""
    config = getattr(module, "config", None)
    for owner, name in ((module, "top_k"), (config, "top_k_experts"), (config, "num_experts_per_tok")):
        stated = getattr(owner, name, None)
        if isinstance(stated, int):
            return stated
    return None


def chosen_experts(output: Any, num_experts_per_tok: int | None, name: str) -> Tensor:
    """Return the tensor of expert ids in a router's output.

    Args:
        output: What the router returned: a tuple, a mapping, or one tensor.
        num_experts_per_tok: K, where it is known.
        name: The router's class, for the error.

    Raises:
        ValueError: No tensor, or more than one, can be the ids.
    """
    ids = [
        tensor
        for tensor in output_tensors(output)
        if tensor.dim() > 1 and tensor.dtype in _INTEGERS and num_experts_per_tok in (None, tensor.shape[-1])
    ]
    if len(ids) == 1:
        return ids[0]
    shapes = [f"{tensor.dtype} {list(tensor.shape)}" for tensor in output_tensors(output)]
    raise ValueError(
        f"{name} returned {shapes}: {len(ids)} of these can be the chosen experts (integers [..., "
        f"{num_experts_per_tok or 'K'}]). Say which with a lightning_dsv3.balance.RouterAdapter: routers=[...]."
    )


def output_tensors(output: Any) -> list[Tensor]:
    """Return the tensors directly in a module's output."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output
    return [value for value in values if isinstance(value, Tensor)] if hasattr(values, "__iter__") else []


def _stated_num_experts(module: nn.Module) -> int | None:
    for owner in (module, getattr(module, "config", None)):
        for name in _NUM_EXPERTS_NAMES:
            stated = getattr(owner, name, None)
            if isinstance(stated, int):
                return stated
    return None
