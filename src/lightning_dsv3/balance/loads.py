"""What the counts say: violation by layer, and the load file that other tools read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_dsv3.ops.balance import max_violation

FORMAT = 1


def max_violations(counts: Sequence[Tensor]) -> Tensor:
    """Return MaxVio of each layer, float32 ``[L]``; nan for a layer without tokens.

    Args:
        counts: Load of each layer's experts, int64 ``[E]``; layers may differ in E.
    """
    if len({counts_E.shape for counts_E in counts}) == 1:
        return max_violation(torch.stack(list(counts)))
    return torch.stack([max_violation(counts_E) for counts_E in counts])


def expert_loads(
    layers: Sequence[str], counts: Mapping[str, Sequence[Tensor]], num_experts_per_tok: Sequence[int]
) -> dict[str, Any]:
    """Return the content of a load file. Layers that routed nothing are left out.

    Args:
        layers: Names of the layers.
        counts: For each domain one int64 ``[E]`` per layer; layers may differ in E.
        num_experts_per_tok: K of each layer.

    Returns:
        ``{"format": 1, "layers": [name], "domains": [name], "counts": {domain: [[int] per layer]},
        "tokens": {domain: routed tokens of the first layer}}``

    Example:
        >>> expert_loads(["layer_1"], {"code": [torch.tensor([3, 1])]}, [2])["tokens"]
        {'code': 2}
    """
    lists = {domain: [counts_E.tolist() for counts_E in layer_counts] for domain, layer_counts in counts.items()}
    used = [index for index in range(len(layers)) if any(any(lists[domain][index]) for domain in lists)]
    return {
        "format": FORMAT,
        "layers": [layers[index] for index in used],
        "domains": list(lists),
        "counts": {domain: [lists[domain][index] for index in used] for domain in lists},
        "tokens": {
            domain: sum(lists[domain][used[0]]) // num_experts_per_tok[used[0]] if used else 0 for domain in lists
        },
    }


def save_loads(loads: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a load file, first under a temporary name, so that a reader never sees half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(loads) + "\n", encoding="utf-8")
    os.replace(temporary, path)
