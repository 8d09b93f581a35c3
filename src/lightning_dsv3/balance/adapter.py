"""How a router class shows its choices and its bias: the extension point for private routers."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from lightning_dsv3.layers.router import Router

_BLOCK_ROUTER = re.compile(r"(?:^|\.)blocks\.(\d+)\.feed_forward\.router$")
_MTP_ROUTER = re.compile(r"(?:^|\.)mtp\.(\d+)\.block\.feed_forward\.router$")


class RouterAdapter(ABC):
    """Describes one kind of router to the observer.

    The observer puts a forward hook on every module that an adapter matches, and asks the adapter what the
    module's output means. An adapter holds no state: one object serves every layer.

    Example:
        >>> class GateAdapter(RouterAdapter):
        ...     def matches(self, module):
        ...         return type(module).__name__ == "MyGate"
        ...
        ...     def num_experts(self, module):
        ...         return module.proj.out_features
        ...
        ...     def chosen_experts(self, module, output):
        ...         weights, indices = output
        ...         return indices
        ...
        ...     def bias(self, module):
        ...         return module.e_score_correction_bias
        >>> from lightning_dsv3.callbacks import AuxFreeBalanceCallback
        >>> callback = AuxFreeBalanceCallback(routers=[GateAdapter()])
    """

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Return whether ``module`` is a router of this kind."""

    @abstractmethod
    def num_experts(self, module: nn.Module) -> int:
        """Return the number of experts that ``module`` chooses from."""

    @abstractmethod
    def chosen_experts(self, module: nn.Module, output: Any) -> Tensor:
        """Return the chosen experts from the module's output: integers ``[..., K]``, tokens in order."""

    @abstractmethod
    def bias(self, module: nn.Module) -> Tensor | None:
        """Return the float32 ``[E]`` that is added to the affinities for the choice, or None without one.

        It is asked for anew at every update, and written in place.
        """

    def layer_name(self, path: str) -> str:
        """Return the layer's name in logs and load files, from the module's dotted path without wrappers."""
        return path


class DeepSeekV3RouterAdapter(RouterAdapter):
    """The routers of :class:`lightning_dsv3.DeepSeekV3`, main model and MTP modules."""

    def matches(self, module: nn.Module) -> bool:
        """Return whether ``module`` is our router."""
        return isinstance(module, Router)

    def num_experts(self, module: nn.Module) -> int:
        """Return N_r."""
        assert isinstance(module, Router)
        return module.num_experts

    def chosen_experts(self, module: nn.Module, output: Any) -> Tensor:
        """Return ``RouterOutput.expert_TK``."""
        chosen: Tensor = output.expert_TK
        return chosen

    def bias(self, module: nn.Module) -> Tensor | None:
        """Return the float32 buffer, or None for a ``topk_method`` without bias."""
        assert isinstance(module, Router)
        return module.bias

    def layer_name(self, path: str) -> str:
        """Return ``layer_<index of the block>`` or ``mtp_<depth>``, which starts at 1 as in the report."""
        if match := _BLOCK_ROUTER.search(path):
            return f"layer_{match[1]}"
        if match := _MTP_ROUTER.search(path):
            return f"mtp_{int(match[1]) + 1}"
        return path


NATIVE_ADAPTERS: tuple[RouterAdapter, ...] = (DeepSeekV3RouterAdapter(),)
"""The kinds of router that are recognised without being told."""
