"""Activation checkpointing: blocks keep their input and run again in the backward, for memory against time.

    block           the whole block runs again
    keep_routing    the same, but the chosen experts and their dispatch order are kept, so that no top-k and no sort is
                    repeated; a few integers per token and chosen expert

A choice that is repeated can differ from the first one where kernels are not deterministic, and the backward then
belongs to another forward; `keep_routing` rules that out. Affinities are recomputed in both, as the gate's gradient
needs them; where one kernel makes them with the choice, `keep_routing` keeps them too, E floats per token.

A block changes its class and nothing else, so that parameters' names, hooks and copies of the model stay what they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from lightning_dsv3.layers.block import TransformerBlock
from lightning_dsv3.layers.router import RouterOutput
from lightning_dsv3.ops.attention import Positions
from lightning_dsv3.ops.latent_attention import LayerCache

ContextFn = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]

# In a block only the router calls topk, or its kernel, and only the dispatch sorts. By name, as the kernel's operator
# is there only once its module has been imported.
_ROUTING_OPS = {"aten::topk", "aten::sort", "lightning_dsv3::route"}


def _routing_policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_routing = op.name().partition(".")[0] in _ROUTING_OPS
    return CheckpointPolicy.MUST_SAVE if is_routing else CheckpointPolicy.PREFER_RECOMPUTE


class _CheckpointedBlock(TransformerBlock):
    """A block whose activations are recomputed."""

    context_fn: ContextFn = staticmethod(noop_context_fn)

    def forward(
        self, x_BSD: Tensor, positions: Positions, cache: LayerCache | None = None
    ) -> tuple[Tensor, RouterOutput | None]:
        """As the block's own."""
        if not torch.is_grad_enabled():
            return super().forward(x_BSD, positions, cache)
        # Nothing in a block draws random numbers, so there is no state of a generator to keep.
        return checkpoint(
            super().forward, x_BSD, positions,
            use_reentrant=False, preserve_rng_state=False, context_fn=self.context_fn,
        )  # fmt: skip


class _RoutingKeepingBlock(_CheckpointedBlock):
    """A block whose activations are recomputed, but for the routing."""

    context_fn = staticmethod(functools.partial(create_selective_checkpoint_contexts, _routing_policy))


_CLASS_OF_POLICY: dict[str, type[TransformerBlock]] = {
    "none": TransformerBlock,
    "block": _CheckpointedBlock,
    "keep_routing": _RoutingKeepingBlock,
}


def checkpoint_blocks(model: nn.Module, policy: str = "block") -> nn.Module:
    """Let every transformer block of ``model``, those of MTP modules too, recompute its activations in the backward.

    Outputs, gradients, expert counts and the state dict stay those of the plain model.

    Args:
        model: Any module that holds transformer blocks; changed in place. May be called again with another policy.
        policy: ``block``, ``keep_routing`` (see the module docstring), or ``none`` to undo it.

    Returns:
        ``model``.

    Raises:
        ValueError: An unknown policy, or a model without transformer blocks.

    Example:
        >>> from lightning_dsv3 import DeepSeekV3, DeepSeekV3Config
        >>> model = DeepSeekV3(DeepSeekV3Config.from_preset("tiny", num_hidden_layers=2))
        >>> model = checkpoint_blocks(model, "keep_routing")
    """
    if policy not in _CLASS_OF_POLICY:
        raise ValueError(f"policy={policy!r} is not one of {', '.join(_CLASS_OF_POLICY)}")
    blocks = [module for module in model.modules() if isinstance(module, TransformerBlock)]
    if not blocks:
        raise ValueError(f"{type(model).__name__} holds no TransformerBlock; give the DeepSeekV3 itself")
    for block in blocks:
        block.__class__ = _CLASS_OF_POLICY[policy]
    return model
