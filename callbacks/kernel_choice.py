"""Which implementations a run uses: forced where asked for, and told in one line once they are known."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_dsv3.config import KernelConfig
from lightning_dsv3.ops.backends import forced_kernels, used_kernels


class KernelChoice(Callback):
    """Force implementations of operations while the Trainer works, and say which ones the first step was computed by.

    Without arguments it only tells. ``lightning_dsv3.ops.backends.force_kernels`` does the same outside a Trainer. A
    checkpoint knows nothing of either: it can be resumed or evaluated with other implementations, on another machine.

    Args:
        config: The implementation of each operation, ``kernels.*`` of a run's configuration.
        names: Single ones by operation, over those of ``config``.

    Raises:
        ConfigError: An unknown operation or implementation; at the first step, one that cannot be had here.

    Example:
        >>> trainer = Trainer(callbacks=[KernelChoice(router="torch")], logger=False, enable_checkpointing=False)
    """

    def __init__(self, config: KernelConfig | None = None, **names: str) -> None:
        super().__init__()
        self._names = {**(asdict(config) if config is not None else {}), **names}
        KernelConfig.from_dict(self._names)
        self._forced = contextlib.ExitStack()
        self._told = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Force, before a precision plugin converts the module and before anything is compiled."""
        self._forced.close()
        self._forced.enter_context(forced_kernels(**self._names))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell, once: by now forward and backward have chosen."""
        if self._told or not (used := used_kernels()):
            return
        self._told = True
        told = ", ".join(f"{op} {' and '.join(names)}" for op, names in used.items())
        pl_module.print(f'kernels on {pl_module.device.type}: {told}; "dsv3 doctor" tells why')

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the choice to what it was left to before."""
        self._forced.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the choice to what it was left to before: after an error there is no teardown."""
        self._forced.close()
