"""Whether an optimizer has really stepped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class OptimizerStepWatcher:
    """Tells real optimizer steps from those that a gradient scaler skipped.

    ``trainer.global_step`` counts a skipped step like any other. Two signs give it away. A plain optimizer's
    ``step`` is not called, so its post-hook does not fire. A fused optimizer's is called, and leaves the
    parameters alone if the scaler's ``found_inf``, which it carries during the call, is not 0. That one stays
    a tensor: reading it would make the host wait for the device.
    """

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._steps: list[bool | Tensor] = []
        self._unwatched = False

    def watch(self, optimizers: Iterable[Any]) -> None:
        """Watch ``optimizers``, and only them. What is no torch optimizer counts as stepping always."""
        self.stop()
        for optimizer in optimizers:
            if isinstance(optimizer, Optimizer):
                self._handles.append(optimizer.register_step_post_hook(self._on_step))
            else:
                self._unwatched = True

    def stop(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._steps.clear()
        self._unwatched = False

    @property
    def seen(self) -> bool:
        """Whether a watched optimizer's step has been called since the last :meth:`take`."""
        return bool(self._steps)

    def take(self) -> bool | Tensor:
        """Return whether any optimizer has moved parameters since the last call.

        Returns:
            A bool, or a bool tensor where only the device knows.
        """
        steps, self._steps = self._steps, []
        if self._unwatched or any(step is True for step in steps):
            return True
        if not steps:
            return False
        return torch.stack([step for step in steps if isinstance(step, Tensor)]).any()

    def _on_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        self._steps.append(True if found_inf is None else (found_inf == 0).reshape(()))
