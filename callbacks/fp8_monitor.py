"""What training loses in FP8: numbers that saturate, numbers that vanish, and the relative error, layer by layer."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_dsv3.layers.fp8 import compute_dtype
from lightning_dsv3.ops.quantize import ACTIVATION_BLOCK, WEIGHT_BLOCK, QuantizationError, quantization_error
from lightning_dsv3.parallel.fp8 import is_fp8


class FP8Monitor(Callback):
    """Logs what the operands of FP8 products lose, every so many optimizer steps.

    ``operand`` is ``input`` (the activation, 1 x 128 tiles), ``weight`` (128 x 128) or ``gradient`` (of the output,
    1 x 128). The 128 x 1 tiles of weight gradients, and the activation between the two products of routed experts, are
    not measured.

    ===========================================  ===================================================================
    key                                          value
    ===========================================  ===================================================================
    ``fp8/<module>/<operand>/clipped``           share of the numbers that saturate; 0 unless something is wrong
    ``fp8/<module>/<operand>/underflowed``       share of the numbers that are not 0 and become 0
    ``fp8/<module>/<operand>/relative_error``    length of the rounding error over that of the operand; some 0.025
                                                 where all numbers are in range
    ===========================================  ===================================================================

    The key without ``<module>/`` has the largest of all modules. Ranks are averaged, the largest is that of all ranks.
    The first micro-batch of a step is measured, which costs about as much as rounding its operands once more. The hooks
    that measure split the graphs of ``torch.compile``.

    Args:
        every_n_steps: Optimizer steps from one measurement to the next; the first step is measured.
        per_layer: Log the figures of every module, not only the largest: nine for each.

    Raises:
        MisconfigurationException: No module computes in FP8, or ``every_n_steps`` is less than 1.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_dsv3.precision import FP8BlockPrecision
        >>> trainer = Trainer(
        ...     plugins=[FP8BlockPrecision()], callbacks=[FP8Monitor(every_n_steps=100)], accelerator="cpu",
        ...     logger=False, enable_checkpointing=False,
        ... )
    """

    def __init__(self, every_n_steps: int = 50, per_layer: bool = True) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise MisconfigurationException(f"every_n_steps={every_n_steps}: must be 1 or more")
        self.every_n_steps, self.per_layer = every_n_steps, per_layer
        self._handles: list[RemovableHandle] = []
        self._measured: dict[tuple[str, str], QuantizationError] = {}
        self._last_step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Require something to measure."""
        self._last_step = -1
        if not any(is_fp8(module) for module in pl_module.modules()):
            raise MisconfigurationException(
                "FP8Monitor: no module computes in FP8; train with trainer.precision=fp8-block (FP8BlockPrecision), or "
                "call convert_to_fp8 on the model"
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Attach to the modules for the first micro-batch of a step that is measured."""
        step = trainer.global_step
        if step % self.every_n_steps or step == self._last_step:
            return
        self._last_step = step
        self._measured = {}
        for name, module in pl_module.named_modules():
            if is_fp8(module):
                hook = _Hook(name, self._measured)
                self._handles.append(module.register_forward_hook(hook))

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what was measured."""
        self._detach()
        if not self._measured:
            return
        layers: dict[str, Tensor] = {}
        largest: dict[str, Tensor] = {}
        for (name, operand), error in self._measured.items():
            for figure, value in error._asdict().items():
                layers[f"fp8/{name}/{operand}/{figure}"] = value
                key = f"fp8/{operand}/{figure}"
                largest[key] = torch.maximum(largest[key], value) if key in largest else value
        self._measured = {}
        pl_module.log_dict(largest, on_step=True, on_epoch=False, sync_dist=True, reduce_fx="max")
        if self.per_layer:
            pl_module.log_dict(layers, on_step=True, on_epoch=False, sync_dist=True)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._detach()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave no hook behind."""
        self._detach()

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class _Hook:
    """Measures the operands of one module in its forward pass, and the gradient of its output when it comes."""

    def __init__(self, name: str, measured: dict[tuple[str, str], QuantizationError]) -> None:
        self._name, self._measured = name, measured

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        pow2 = bool(module.pow2_scales)
        x = arguments[0].to(compute_dtype(arguments[0]))
        self._measured[self._name, "input"] = quantization_error(_rows(x), ACTIVATION_BLOCK, pow2)
        matrices = [m for p in module.parameters(recurse=False) if p.dim() > 1 for m in _matrices(p.detach())]
        self._measured[self._name, "weight"] = _together(matrices, pow2)
        if output.requires_grad:
            output.register_hook(lambda gradient: self._measure_gradient(gradient, pow2))

    def _measure_gradient(self, gradient: Tensor, pow2: bool) -> None:
        self._measured[self._name, "gradient"] = quantization_error(_rows(gradient), ACTIVATION_BLOCK, pow2)


def _rows(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1])


def _matrices(weight: Tensor) -> list[Tensor]:
    return list(weight.unbind(0)) if weight.dim() == 3 else [weight]


def _together(matrices: list[Tensor], pow2: bool) -> QuantizationError:
    """Return the error of matrices as if they were one, each with tiles of its own."""
    errors = [quantization_error(matrix, WEIGHT_BLOCK, pow2) for matrix in matrices]
    if len(errors) == 1:
        return errors[0]
    sizes = torch.tensor([matrix.numel() for matrix in matrices], device=matrices[0].device)
    lengths = torch.stack([matrix.double().norm() for matrix in matrices])
    clipped, underflowed, relative = (torch.stack(figures) for figures in zip(*errors, strict=True))
    error = (relative.double() * lengths).norm() / lengths.norm().clamp(min=torch.finfo(torch.float64).tiny)
    shares = sizes / sizes.sum()
    return QuantizationError((clipped * shares).sum(), (underflowed * shares).sum(), error.float())
