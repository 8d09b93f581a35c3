"""The experts of Hugging Face models that compute in FP8, where they are what ours are.

``transformers`` 5 keeps a layer's experts in one module of stacked matrices, and its decorator
``use_experts_implementation`` states how: gate above up projection or interleaved, transposed or not, with biases, with
a norm behind. Where a module states our layout, ``gate_up_proj`` ``[E, 2F, D]`` and ``down_proj`` ``[E, D, F]`` without
anything else, and its activation is SwiGLU (which is tried out on numbers), it becomes FP8 by a change of its class.
Nothing is imported from ``transformers`` and no family is listed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_dsv3.layers.fp8 import FP8Products, products_of_experts
from lightning_dsv3.ops.swiglu import swiglu

# What use_experts_implementation states, and what each has to be.
_STATED = {
    "has_gate": (True, "have no gate"),
    "is_concatenated": (True, "interleave gate and up projections"),
    "is_transposed": (False, "have transposed matrices"),
    "has_bias": (False, "have biases"),
    "has_post_expert_norm": (False, "are followed by a norm"),
    "_is_expert_parallel": (False, "are spread over ranks"),
}


class FP8FusedExperts(FP8Products):
    """Experts of ``transformers`` with FP8 operands; stands before the plain class among a class's bases."""

    gate_up_proj: Tensor
    down_proj: Tensor

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As the plain experts."""
        assert isinstance(self, nn.Module)
        y = products_of_experts(
            self, hidden_states, top_k_weights, top_k_index.long(), self.gate_up_proj, self.down_proj
        )
        return y.to(hidden_states.dtype)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made while the program runs, so a pickle names the plain one.
        return _blank, (type(self).__bases__[1],), vars(self).copy()


_FUSED_CLASS_OF: dict[type[nn.Module], type[nn.Module]] = {}


def fused_class_of(plain: type[nn.Module]) -> type[nn.Module]:
    """Return the FP8 form of a class of experts."""
    if plain not in _FUSED_CLASS_OF:
        text = {"__doc__": f"{plain.__name__} with FP8 operands."}
        _FUSED_CLASS_OF[plain] = type(f"FP8{plain.__name__}", (FP8FusedExperts, plain), text)
    return _FUSED_CLASS_OF[plain]


def plain_class_of_fused(module: nn.Module) -> type[nn.Module] | None:
    """Return the plain class of experts that became FP8 ones; None for any other module."""
    return type(module).__bases__[1] if isinstance(module, FP8FusedExperts) else None


def fused_experts_refusal(module: nn.Module) -> str | None:
    """Return why a module's stacked matrices cannot be computed as :class:`FP8FusedExperts`; None where they can."""
    told = [name for name in _STATED if name in vars(module)]
    parameters = dict(module.named_parameters(recurse=False))
    if not {"gate_up_proj", "down_proj"} <= set(parameters) or "has_gate" not in told:
        return f"a {type(module).__name__} is neither torch.nn.Linear, our Experts nor experts of transformers 5"
    for name in told:
        wanted, otherwise = _STATED[name]
        if getattr(module, name) is not wanted:
            return f"its experts {otherwise}"
    if more := sorted(set(parameters) - {"gate_up_proj", "down_proj"}):
        return f"its experts have {more[0]}"
    gate_up, down = parameters["gate_up_proj"], parameters["down_proj"]
    if gate_up.dim() != 3 or down.shape != (gate_up.shape[0], gate_up.shape[2], gate_up.shape[1] // 2):
        return f"its matrices are {list(gate_up.shape)} and {list(down.shape)}, not [E, 2F, D] and [E, D, F]"
    return None if _is_swiglu(module, down.shape[2]) else "its experts' activation is not SwiGLU"


@torch.no_grad()
def _is_swiglu(module: Any, width: int) -> bool:
    """Whether a module's activation is SwiGLU on some numbers, large ones among them, as some clamp those."""
    numbers = torch.linspace(-1000, 1000, 4 * width).sin().mul(torch.logspace(-2, 4, 4 * width)).view(2, 2 * width)
    return bool(torch.allclose(module._apply_gate(numbers), swiglu(numbers)))


def _blank(plain: type[nn.Module]) -> nn.Module:
    cls = fused_class_of(plain)
    return cls.__new__(cls)
