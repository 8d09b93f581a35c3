"""What the counts say: how even each layer's load is, and the load file that other tools read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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


class LoadStatistics(NamedTuple):
    """How even the load is, one value per layer.

    Attributes:
        max_violation: MaxVio, float32 ``[L]``: 0 is balanced; nan for a layer without tokens.
        load_entropy: Entropy of the layer's load distribution over that of the even one, float32 ``[L]``: 1 is
            balanced, 0 is one expert for all; nan for a layer without tokens.
        dead_experts: Experts that no token chose, int64 ``[L]``; all of them in a layer without tokens.
    """

    max_violation: Tensor
    load_entropy: Tensor
    dead_experts: Tensor


def load_statistics(counts: Sequence[Tensor]) -> LoadStatistics:
    """Tell how even each layer's load is.

    Args:
        counts: Load of each layer's experts, int64 ``[E]``; layers may differ in E.

    Example:
        >>> statistics = load_statistics([torch.tensor([4, 4, 4, 4]), torch.tensor([2, 2, 0, 0])])
        >>> statistics.max_violation, statistics.load_entropy, statistics.dead_experts
        (tensor([0., 1.]), tensor([1.0000, 0.5000]), tensor([0, 2]))
    """
    if len({counts_E.shape for counts_E in counts}) == 1:
        return _load_statistics(torch.stack(list(counts)))
    layers = [_load_statistics(counts_E) for counts_E in counts]
    return LoadStatistics(*(torch.stack(values) for values in zip(*layers, strict=True)))


def _load_statistics(counts_E: Tensor) -> LoadStatistics:
    num_experts = counts_E.shape[-1]
    share_E = counts_E.to(torch.float32) / counts_E.sum(dim=-1, keepdim=True).to(torch.float32)
    # H(p) / ln E = 1 - sum_i p_i ln(E p_i) / ln E, in the form that also holds for one expert, whose load is even.
    divergence = torch.xlogy(share_E, num_experts * share_E).sum(dim=-1)
    return LoadStatistics(
        max_violation(counts_E), 1 - divergence / math.log(max(num_experts, 2)), (counts_E == 0).sum(dim=-1)
    )


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
