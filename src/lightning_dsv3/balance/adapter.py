"""How a router class shows its choices and its bias: the extension point for private routers."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_dsv3.layers.router import Router

_BLOCK_ROUTER = re.compile(r"(?:^|\.)blocks\.(\d+)\.feed_forward\.router$")
_MTP_ROUTER = re.compile(r"(?:^|\.)mtp\.(\d+)\.block\.feed_forward\.router$")


@dataclass(frozen=True)
class NativeUpdater:
    """Something else that moves a router's bias.

    Attributes:
        name: What it is, for messages.
        stop: Switches it off for this router; calling it again does nothing.
    """

    name: str
    stop: Callable[[], None]


class RouterAdapter(ABC):
    """Describes one kind of router to the observer.

    The observer puts a forward hook on every module that an adapter matches, and asks the adapter what the
    module's output means. An adapter holds no state: one object serves every layer.

    Four methods describe a router that holds its own bias. The others have defaults, for routers whose bias
    lives elsewhere (:meth:`bias_holder`), is moved by something else as well (:meth:`native_updater`), that
    count their choices themselves (:meth:`counts`), or that cannot be observed (:meth:`refusal`).

    Attributes:
        takes_float32_bias: Whether the forward works with a float32 bias beside weights of lower precision. If
            so, a bias that was cast is put back into float32 in place; otherwise the callback keeps the float32
            values to itself and writes rounded ones.
        sequence_first: Whether the tokens of the output are those of activations ``[S, B, D]`` in order, as
            Megatron-Core has them, and not of ``[B, S, D]``. It matters where padding is left out of the counts.

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

    takes_float32_bias: bool = True
    sequence_first: bool = False

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
        """Return the float32 tensor that is added to the affinities for the choice, or None without one.

        E values of any shape: ``[E]``, ``[1, E]``. It is asked for anew at every update, and written in place.

        Args:
            module: What :meth:`bias_holder` returned; the router itself unless that is overridden.
        """

    def counts(self, module: nn.Module, output: Any) -> Tensor | None:
        """Return the tokens of each expert, int64 ``[E]``, where the router itself has counted them, or None.

        They are taken where every token is to be counted, and have to be those of :meth:`chosen_experts`.
        """
        return None

    def bias_holder(self, module: nn.Module, parent: nn.Module | None) -> nn.Module:
        """Return the module that holds the bias of the router ``module``.

        Args:
            module: The router.
            parent: The module that the router is an attribute of, wrappers left out; None for the root.
        """
        return module

    def refusal(self, module: nn.Module) -> str | None:
        """Return why this router cannot be observed and what to do, or None if it can."""
        return None

    def native_updater(self, module: nn.Module, holder: nn.Module, optimizers: Sequence[Any]) -> NativeUpdater | None:
        """Return what moves the bias besides the callback, or None.

        Args:
            module: The router.
            holder: What holds its bias.
            optimizers: The Trainer's optimizers, whose hooks may be what moves it.
        """
        return None

    def layer_name(self, path: str) -> str:
        """Return the layer's name in logs and load files, from the module's dotted path without wrappers."""
        return path

    def mtp_depth(self, path: str) -> int:
        """Return the depth k of a router in an MTP module that sees S - k positions of a row, otherwise 0."""
        return 0


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

    def counts(self, module: nn.Module, output: Any) -> Tensor | None:
        """Return ``RouterOutput.counts_E``."""
        counts_E: Tensor | None = output.counts_E
        return counts_E

    def layer_name(self, path: str) -> str:
        """Return ``layer_<index of the block>`` or ``mtp_<depth>``, which starts at 1 as in the report."""
        if match := _BLOCK_ROUTER.search(path):
            return f"layer_{match[1]}"
        return f"mtp_{depth}" if (depth := self.mtp_depth(path)) else path

    def mtp_depth(self, path: str) -> int:
        """Return k of the k-th MTP module."""
        match = _MTP_ROUTER.search(path)
        return int(match[1]) + 1 if match else 0
