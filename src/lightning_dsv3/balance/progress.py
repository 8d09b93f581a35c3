"""MaxVio in a Trainer's progress bar: the mean over the layers, and the worst layer by name.

``self.log(..., prog_bar=True)`` does not serve here. It knows numbers only, and keeps every key that it was ever given,
so that it cannot name a layer that changes; and Lightning reads what is logged so in every batch, for which the host
waits for the device even if the bar is drawn every hundredth. Every bar asks ``get_metrics`` for what it shows, when it
is about to show it, and that is the method that Lightning documents for changing what is shown. So the figures are
worked out there, at most once per step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_dsv3.balance.loads import max_violations

MEAN = "MaxVio"


class ViolationInBar:
    """Shows the latest step's MaxVio in a progress bar, as ``MaxVio=0.52, worst layer 3=1.24``.

    The two are also in ``trainer.progress_bar_metrics`` from then on, like all that a bar shows.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._get_metrics: Any = None
        self._names: list[str] = []
        self._counts: Sequence[Tensor] = []
        self._shown: dict[str, float] = {}

    def attach(self, trainer: Any, layers: Sequence[str]) -> None:
        """Show from now on what :meth:`update` is given.

        Args:
            trainer: A Trainer; one without a progress bar is left as it is.
            layers: Names of the layers.
        """
        self.detach()
        self._names = short_names(layers)
        self._bar = bar = trainer.progress_bar_callback
        if bar is None:
            return
        get_metrics = bar.get_metrics

        def with_violation(trainer: Any, pl_module: Any) -> Any:
            if self._bar is bar:
                self._show(trainer.progress_bar_metrics)
            return get_metrics(trainer, pl_module)

        bar.get_metrics = self._get_metrics = with_violation

    def update(self, counts: Sequence[Tensor]) -> None:
        """Give the loads of a step, int64 ``[E]`` for each layer. Nothing is computed until a bar asks."""
        self._counts = counts

    def detach(self) -> None:
        """Leave the bar as it was."""
        # What somebody else has put around it since stays, and passes through.
        if self._bar is not None and vars(self._bar).get("get_metrics") is self._get_metrics:
            del self._bar.get_metrics
        self._bar, self._counts, self._shown = None, [], {}

    def _show(self, metrics: dict[str, Any]) -> None:
        if not self._counts:
            return
        violations = max_violations(self._counts).tolist()  # the host waits here, and here alone
        self._counts = []
        for key in self._shown:  # the worst layer was perhaps another
            metrics.pop(key, None)
        seen = {name: value for name, value in zip(self._names, violations, strict=True) if not math.isnan(value)}
        self._shown = {}
        if seen:
            worst = max(seen, key=seen.__getitem__)
            self._shown = {MEAN: sum(seen.values()) / len(seen), f"worst {worst}": seen[worst]}
        metrics.update(self._shown)


def short_names(layers: Sequence[str]) -> list[str]:
    """Return names of layers that are short enough for a progress bar.

    ``layer_3`` and ``mtp_1`` become ``layer 3`` and ``mtp 1``. Of paths, which private routers have for names, the
    index is left where it tells all layers apart, and else what is not the same in all of them.

    Example:
        >>> short_names(["layer_0", "layer_1", "mtp_1"])
        ['layer 0', 'layer 1', 'mtp 1']
        >>> short_names(["model.blocks.3.gate", "model.blocks.12.gate"])
        ['layer 3', 'layer 12']
        >>> short_names(["encoder.blocks.0.gate", "decoder.blocks.0.gate"])
        ['encoder', 'decoder']
    """
    if not any("." in name for name in layers):
        return [re.sub(r"_(\d+)$", r" \1", name) for name in layers]
    parts = [name.split(".") for name in layers]
    indices = [[part for part in path if part.isdecimal()] for path in parts]
    if all(len(path) == 1 for path in indices) and len({path[0] for path in indices}) == len(layers):
        return [f"layer {path[0]}" for path in indices]
    head, tail = _common(parts), _common([path[::-1] for path in parts])
    return [".".join(path[head : len(path) - tail]) for path in parts] if len(layers) > 1 else list(layers)


def _common(paths: Sequence[Sequence[str]]) -> int:
    """Return how many components at the start are the same in all paths, of each at least one left out."""
    shortest = min(len(path) for path in paths) - 1
    same = [len({path[i] for path in paths}) == 1 for i in range(shortest)]
    return same.index(False) if False in same else shortest
