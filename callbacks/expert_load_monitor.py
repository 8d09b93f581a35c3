"""Which experts do the work in validation, by layer and by domain (report, Figure 9)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_dsv3.balance import (
    COMMON_MASK_KEY,
    NATIVE_ADAPTERS,
    RouterAdapter,
    RouterObserver,
    data_parallel_group,
    expert_loads,
    find_routers,
    load_statistics,
    max_over_ranks,
    no_router_message,
    padding_mask,
    save_loads,
)
from lightning_dsv3.plots import expert_load_figure, figure_pixels, plotting_problem, save_figure

ALL = "all"
"""Domain of rows that say nothing about theirs."""


class ExpertLoadMonitor(Callback):
    """Counts the load of every expert in validation.

    The counts are kept by domain when batches carry ``domain`` (integers ``[B]``, one per row, index into the
    domains' names), else as one domain ``all``. Padding does not count: positions where the batch's mask is 0, and rows
    whose ``labels`` are all -100. The sanity check does not count. Ranks are summed. A layer that validation does not
    run is left out.

    After each validation it logs, for every layer and for all of them together:

    ==================================  =============================================================  =============
    key                                 value                                                          all layers
    ==================================  =============================================================  =============
    ``val/moe/<layer>/max_violation``   MaxVio of the whole validation set (arXiv 2408.15664:          mean
                                        MaxVio_global); 0 is balanced
    ``val/moe/<layer>/load_entropy``    entropy of the load over that of an even one; 1 is balanced    mean
    ``val/moe/<layer>/dead_experts``    experts that no token of it chose                              sum
    ``moe/<layer>/bias_norm``           length of the routing bias, less its mean                      mean
    ``moe/<layer>/bias_drift``          length of its change since the validation before               mean
    ==================================  =============================================================  =============

    The key for all layers has no ``<layer>/``. The mean of a bias is taken off, as a number added to every bias of a
    layer changes no choice. A router without a bias has no such figures, and the first validation has no drift. The
    five figures of 58 layers are 290 columns of a CSV file; ``per_layer=False`` leaves those for all layers.

    Loggers that take images (TensorBoard, W&B) get the loads as a figure, ``val/expert_load``: the relative load by
    layer and domain, as in the report's Figure 9. ``figures_dir`` gets the same as ``expert_load.png``. Loads are kept
    of the first validation and of the last, also over a resume, in the form of the load file::

        {"format": 1, "layers": [name], "domains": [name],
         "counts": {domain: [[int per expert] per layer]}, "tokens": {domain: n}}

    Args:
        routers: How private routers show their choices; tried before the built-in kinds.
        domains: Names of the domains. Default: ``trainer.datamodule.domains``, if there is one.
        per_layer: Log the figures of every layer, not only those for all layers.
        mask_key: Key or attribute of the batch where its mask is, as in ``AuxFreeBalanceCallback``: bools or integers
            ``[B, S]``, 0 for padding. Under the default name it may be missing; None counts what it hides like text.
        figures_dir: Folder for ``expert_load.png``, drawn anew after each validation. None draws no file.

    Raises:
        MisconfigurationException: No router was found, a batch's domain has no name, or a mask does not tell which
            of a router's tokens are padding.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> monitor = ExpertLoadMonitor()
        >>> trainer = Trainer(callbacks=[monitor], logger=False, enable_checkpointing=False)
        >>> monitor.loads is None  # until a validation has run
        True
    """

    def __init__(
        self,
        routers: Sequence[RouterAdapter] | None = None,
        domains: Sequence[str] | None = None,
        *,
        per_layer: bool = True,
        figures_dir: str | os.PathLike[str] | None = None,
        mask_key: str | None = COMMON_MASK_KEY,
    ) -> None:
        super().__init__()
        self.first_loads: dict[str, Any] | None = None
        self.loads: dict[str, Any] | None = None
        self._adapters = (*(routers or ()), *NATIVE_ADAPTERS)
        self._given_domains = domains
        self._domains: list[str] = []
        self._per_layer = per_layer
        self._figures_dir = figures_dir
        self._mask_key = mask_key
        # Of the last validation, by layer, less their mean: what the drift is measured against.
        self._biases: dict[str, Tensor] = {}
        self._said_why_no_figure = False
        self._said_why_no_bias = False
        self._observer = RouterObserver([], training=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the last loads to ``path``, atomically.

        Raises:
            RuntimeError: No validation has run yet.
        """
        if self.loads is None:
            raise RuntimeError("ExpertLoadMonitor has no loads yet: run a validation first.")
        save_loads(self.loads, path)

    def state_dict(self) -> dict[str, Any]:
        """Return the loads as plain containers, and the biases of the last validation."""
        return {"first_loads": self.first_loads, "loads": self.loads, "biases": self._biases}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the loads and biases of a checkpoint."""
        self.first_loads = state_dict["first_loads"]
        self.loads = state_dict["loads"]
        self._biases = dict(state_dict.get("biases", {}))  # checkpoints before them have none

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put the hooks on before anything is compiled."""
        if stage in ("fit", "validate"):
            self._attach(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach to what ``configure_model`` has built, and start at 0."""
        self._attach(trainer, pl_module)
        if not self._observer.routers:
            raise MisconfigurationException(no_router_message(pl_module, self._adapters))
        self._observer.start(trainer.strategy.root_device)

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count from here, by the domain of each row."""
        self._observer.open(self._groups(batch), mask=padding_mask(batch, self._mask_key))

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count to here."""
        self._observer.close()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sum over ranks, keep the loads, log and draw them. A sanity check's counts are dropped."""
        if trainer.sanity_checking:
            return
        group = data_parallel_group(trainer)
        counts = self._observer.take(group)
        # A rank that has had no batch does not know K.
        num_chosen = max_over_ranks(
            torch.tensor(self._observer.num_experts_per_tok, device=trainer.strategy.root_device), group
        )
        names = [router.name for router in self._observer.routers]
        by_domain = {
            domain: [counts_GE[index] for counts_GE in counts] for index, domain in enumerate([*self._domains, ALL])
        }
        if self._domains and not any(counts_E.any() for counts_E in by_domain[ALL]):
            del by_domain[ALL]
        self.loads = expert_loads(names, by_domain, num_chosen.tolist())
        self.first_loads = self.first_loads or self.loads

        self._log_loads(pl_module, names, [counts_GE.sum(dim=0) for counts_GE in counts])
        self._log_biases(pl_module)
        if trainer.is_global_zero and self.loads["layers"]:
            self._draw(trainer, self.loads)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let go of the model."""
        self._observer.detach()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the model."""
        self._observer.detach()

    def _attach(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        routers = find_routers(pl_module, self._adapters)
        domains = self._given_domains or getattr(getattr(trainer, "datamodule", None), "domains", None) or []
        changed = [router.module for router in routers] != [router.module for router in self._observer.routers]
        if changed or list(domains) != self._domains or not self._observer.routers:
            self._observer.detach()
            self._domains = list(domains)
            # One group more than domains, for rows without one.
            self._observer = RouterObserver(routers, training=False, num_groups=len(self._domains) + 1)
        self._observer.attach()

    def _log_loads(self, pl_module: pl.LightningModule, names: Sequence[str], counts: Sequence[Tensor]) -> None:
        assert self.loads is not None
        violation_L, entropy_L, dead_L = load_statistics(counts)
        dead_L = torch.where(violation_L.isnan(), 0, dead_L).to(torch.float32)
        ran = [name in self.loads["layers"] for name in names]
        for key, values_L, all_layers in (
            ("max_violation", violation_L, violation_L.nanmean()),
            ("load_entropy", entropy_L, entropy_L.nanmean()),
            ("dead_experts", dead_L, dead_L.sum()),
        ):
            by_layer = dict(compress(zip(names, values_L.unbind(), strict=True), ran))
            self._log(pl_module, "val/moe", key, by_layer, all_layers)

    def _log_biases(self, pl_module: pl.LightningModule) -> None:
        before, self._biases = self._biases, self._centred_biases()
        norms = {name: bias_E.norm() for name, bias_E in self._biases.items()}
        drifts = {
            name: (bias_E - before[name].to(bias_E.device)).norm()
            for name, bias_E in self._biases.items()
            # A callback may be used for one model after another.
            if name in before and before[name].shape == bias_E.shape
        }
        for key, by_layer in (("bias_norm", norms), ("bias_drift", drifts)):
            if by_layer:
                self._log(pl_module, "moe", key, by_layer, torch.stack(list(by_layer.values())).mean())

    def _log(
        self, pl_module: pl.LightningModule, prefix: str, key: str, by_layer: Mapping[str, Tensor], all_layers: Tensor
    ) -> None:
        # The values are the same on every rank; sync_dist only tells Lightning so.
        pl_module.log(f"{prefix}/{key}", all_layers, sync_dist=True)
        for name, value in by_layer.items() if self._per_layer else ():
            pl_module.log(f"{prefix}/{name}/{key}", value, sync_dist=True)

    def _centred_biases(self) -> dict[str, Tensor]:
        """Return every router's bias less its mean, float32 ``[E]``, as the model holds it now."""
        biases = {}
        # Under inference_mode they would be tensors that a later fit cannot use.
        with torch.inference_mode(False), torch.no_grad():
            for router in self._observer.routers:
                try:
                    bias_E = router.bias
                except MisconfigurationException as error:  # sharded: what watches does not stop a run for that
                    if not self._said_why_no_bias:
                        rank_zero_warn(f"No figures of a routing bias are logged: {error}")
                        self._said_why_no_bias = True
                    continue
                if bias_E is not None:
                    bias_E = bias_E.to(torch.float32)
                    biases[router.name] = bias_E - bias_E.mean()
        return biases

    def _draw(self, trainer: pl.Trainer, loads: Mapping[str, Any]) -> None:
        takers = [taker for logger in trainer.loggers if (taker := _image_taker(logger)) is not None]
        if not (takers or self._figures_dir is not None) or self._said_why_no_figure:
            return
        if problem := plotting_problem():
            rank_zero_warn(f"The expert load is not drawn: {problem}")
            self._said_why_no_figure = True
            return
        figure = expert_load_figure(loads)
        if self._figures_dir is not None:
            save_figure(figure, Path(self._figures_dir) / "expert_load.png")
        if takers:
            pixels = figure_pixels(figure)
            for take in takers:
                take("val/expert_load", pixels, trainer.global_step)

    def _groups(self, batch: Any) -> Tensor:
        """Return the group of each row: its domain, or the last group without one; -1 for padding."""
        content = batch if isinstance(batch, Mapping) else {}
        domain_B, labels = content.get("domain"), content.get("labels")
        if domain_B is None:
            num_rows = 1 if labels is None else len(labels)
            domain_B = torch.full((num_rows,), len(self._domains))
        elif domain_B.numel() and int(domain_B.max()) >= len(self._domains):
            raise MisconfigurationException(
                f"The batch has domain {int(domain_B.max())}, and only {len(self._domains)} domains have a "
                f"name: {self._domains}. Pass ExpertLoadMonitor(domains=[...]), or give the datamodule "
                "`.domains`."
            )
        if labels is not None:
            is_padding_B = (labels == -100).reshape(len(labels), -1).all(dim=1)
            domain_B = torch.where(is_padding_B, -1, domain_B.to(labels.device))
        return domain_B


def _image_taker(logger: Any) -> Callable[[str, Any, int], None] | None:
    """Return what logs an image ``[height, width, 3]`` under a key at a step, or None where there is no such thing.

    Told by the methods, as ``pytorch_lightning`` has the same loggers as classes of its own.
    """
    if hasattr(logger, "log_image"):  # WandbLogger has it
        return lambda key, pixels, step: logger.log_image(key, [pixels], step)
    add_image = getattr(getattr(logger, "experiment", None), "add_image", None)  # TensorBoardLogger's
    return None if add_image is None else partial(add_image, dataformats="HWC")
