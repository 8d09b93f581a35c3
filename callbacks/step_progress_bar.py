"""A progress bar over the whole run, for training data that have no end."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar


class StepProgressBar(TQDMProgressBar):
    """Lightning's bar counts an epoch's batches; this one counts the run's optimizer steps, and knows the time left.

    A Trainer without ``max_steps`` gets Lightning's own bar.

    Example:
        >>> trainer = Trainer(max_steps=10, callbacks=[StepProgressBar()], logger=False, enable_checkpointing=False)
    """

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Start at the step that the run is at."""
        super().on_train_epoch_start(trainer)
        if trainer.max_steps > 0:
            bar = self.train_progress_bar
            bar.reset(total=trainer.max_steps)
            bar.initial = bar.n = trainer.global_step
            bar.set_description("Training")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the steps done."""
        if trainer.max_steps <= 0:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            return
        bar, step = self.train_progress_bar, trainer.global_step
        if self._should_update(step, trainer.max_steps) and not bar.disable:
            bar.n = step
            bar.set_postfix(self.get_metrics(trainer, pl_module))

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return what modules log to the bar, without the logger's version number."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics
