"""FP8 training as a precision of the Trainer: the products of the report's recipe in FP8, the rest as in bf16-mixed.

    in FP8       both operands of forward, dgrad and wgrad of linear maps and experts, E4M3, each tile with a scale
    in BF16      what lies between the products: autocast, as in ``bf16-mixed``; embedding, head, attention
    in float32   parameters and their gradients, norms' and routers' arithmetic, losses, and the optimizer's state

See :mod:`lightning_dsv3.ops.fp8` for the products, :mod:`lightning_dsv3.layers.te` for how Transformer Engine computes
them, and :func:`lightning_dsv3.parallel.fp8.convert_to_fp8` for what is converted. The recipe's E5M6 activations, FP8
caches of SwiGLU's inputs and FP8 dispatch save memory and traffic and are in neither backend. The optimizer's moments
are float32, or BF16 as the report's by ``train.optimizer.moments=bfloat16``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.plugins import Precision
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_dsv3.config import ConfigError
from lightning_dsv3.layers.te import MicroBatches
from lightning_dsv3.parallel.fp8 import (
    FP8Conversion,
    convert_to_fp8,
    make_plain,
    plain_class,
    share_micro_batches,
)

FP8_BLOCK = "fp8-block"
"""What ``trainer.precision`` is called in a run's configuration."""


class FP8BlockSteps:
    """What :class:`FP8BlockPrecision` does, for the plugin class of either Lightning package."""

    precision: Any = FP8_BLOCK

    def __init__(
        self,
        backend: str = "auto",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        pow2_scales: bool = True,
    ) -> None:
        super().__init__()
        self.backend, self.include, self.exclude, self.pow2_scales = backend, include, exclude, pow2_scales
        self.conversion: FP8Conversion | None = None
        self._converted: list[nn.Module] = []  # by this plugin, not by hand
        self._module: nn.Module | None = None
        self._micro_batches = MicroBatches()

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Convert what the report computes in FP8; say once what that is."""
        plain = [m for m in module.modules() if plain_class(m) is None]
        conversion = convert_to_fp8(module, self.include, self.exclude, self.backend, self.pow2_scales)
        if self.conversion is None:
            rank_zero_info(conversion.summary())
        self.conversion = conversion
        self._converted = [m for m in plain if plain_class(m) is not None]
        self._module, self._micro_batches = module, MicroBatches()
        share_micro_batches(module, self._micro_batches)
        return module

    @contextlib.contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        """BF16 for everything between the FP8 products."""
        if self._micro_batches.sharded is None and self._module is not None:
            # A strategy shards after it has had the module converted.
            self._micro_batches.sharded = any(isinstance(p, DTensor) for p in self._module.parameters())
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        devices = {"cpu", accelerator.type} if accelerator is not None else {"cpu"}
        with contextlib.ExitStack() as stack:
            for device in devices:
                # As Lightning's bf16-mixed: a cached cast would outlive a change of the weight.
                stack.enter_context(torch.autocast(device, dtype=torch.bfloat16, cache_enabled=False))
            yield

    @contextlib.contextmanager
    def train_step_context(self) -> Generator[None, None, None]:
        """As :meth:`forward_context`; FP8 weights are kept where several micro-batches use them."""
        trainer = getattr(self._module, "_trainer", None)
        self._micro_batches.keep = trainer is not None and trainer.accumulate_grad_batches > 1
        with self.forward_context():
            yield

    def optimizer_step(self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any) -> Any:
        """Step, after which no FP8 weight is that of its parameter any more."""
        result = super().optimizer_step(optimizer, model, closure, **kwargs)  # type: ignore[misc]
        self._micro_batches.step += 1
        return result

    def teardown(self) -> None:
        """Give the module back as it was."""
        for module in self._converted:
            make_plain(module)
        self._converted, self._module = [], None

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run has to agree with."""
        if self.conversion is None:
            return {}
        return {"converted": list(self.conversion.converted), "pow2_scales": self.pow2_scales}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare with the checkpoint's run.

        Raises:
            ConfigError: Other modules, or other scales.
        """
        if self.conversion is None:
            return
        ours, theirs = set(self.conversion.converted), set(state_dict["converted"])
        if ours != theirs:
            told = [
                f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0] if names else "nothing"
                for names in (sorted(theirs - ours), sorted(ours - theirs))
            ]
            raise ConfigError(
                f"precision={FP8_BLOCK}: the checkpoint's run computed {told[0]} in FP8 that this one does not, and "
                f"this one {told[1]} that it did not; give include= and exclude= as in the first run"
            )
        if state_dict["pow2_scales"] != self.pow2_scales:
            raise ConfigError(
                f"pow2_scales={self.pow2_scales} of precision={FP8_BLOCK}: the checkpoint's run had "
                f"{state_dict['pow2_scales']}; give that"
            )

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Say it when a run begins to compute in FP8 on its way."""
        if type(self).__qualname__ not in checkpoint:
            rank_zero_warn("The checkpoint's run did not compute in FP8; from here on this one does.")


class FP8BlockPrecision(FP8BlockSteps, Precision):  # type: ignore[misc]
    """FP8 products with a scale per tile (report, section 3.3), as a plugin of ``lightning.pytorch.Trainer``.

    ``trainer.precision=fp8-block`` in a run's configuration is this with its defaults. While the Trainer works, the
    modules compute in FP8, in validation, test and prediction as in training; at the end they are plain again. Which
    ones they are is logged once and kept in checkpoints: resuming with others is an error. The weights themselves know
    nothing of it, so checkpoints load without FP8 as well. Parameters stay float32, so the optimizer works on master
    weights.

    Args:
        backend: ``te``: Transformer Engine, on a Hopper GPU. ``emulate``: operands are rounded to FP8 tiles and
            multiplied in float32, on any device: the numbers of FP8 training for studies, slower than BF16. ``auto``:
            ``te`` where it can be had, else ``emulate``; which of them is logged, with the reason. Checkpoints are the
            same, and a run may be resumed with another.
        include: Patterns of module names: compute only these in FP8.
        exclude: Patterns of module names that stay in BF16.
        pow2_scales: Round the scales of tiles up to powers of two; else they are ``amax / 448`` in float32.

    Raises:
        ConfigError: What cannot be converted, when the Trainer starts; another choice of modules than that of the run
            that is resumed.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(plugins=[FP8BlockPrecision()], accelerator="cpu", logger=False)
        >>> trainer.precision
        'fp8-block'
    """
