"""Plans as files: our own form, and what serving engines read.

==============  ======================================================================================================
json            ``{"format": 1, "num_gpus", "num_nodes", "keeps_groups", "layers": [name], "source": {...},
                "physical_to_logical": [L][P], "logical_to_physical": [L][E][R], "replica_counts": [L][E]}``
safetensors     the three maps as int64 tensors of the same names, the rest as metadata
sglang          ``{"physical_to_logical_map": [layers of the model][P]}`` for ``--init-expert-location FILE.json``. The
                map has a row for every layer of the model, dense ones too: those get the rule that slot p holds
                expert p mod E. MTP layers are left out
vllm            ``{"physical_to_logical_map": [L][P], "logical_to_physical_map": [L][E][R], "logical_replica_count":
                [L][E]}``: the arrays of vLLM's expert-parallel load balancer (``EplbState``), with R = redundant
                experts + 1. As far as we know vLLM starts from its own plan and reads no file
                (``--eplb-config '{"num_redundant_experts": ...}'``): hand the arrays to it in Python
vllm-ascend     ``{"moe_layer_count": L, "layer_list": [{"layer_id": i, "device_count": G, "device_list":
                [{"device_id": g, "device_expert": [expert]}]}]}`` for ``expert_map_path``. layer_id counts MoE layers
                from 0; MTP layers are left out, and a device may not hold an expert twice
==============  ======================================================================================================

The engines' forms are those of their public documentation and sources (vLLM's ``eplb_state`` page, SGLang's
``srt/eplb/expert_location.py``, vLLM-Ascend's expert map reader). They were not run against servers.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lightning_dsv3.config import DeepSeekV3Config
from lightning_dsv3.inference.placement import Placement, PlacementError, placement_of
from lightning_dsv3.inference.placement_policies import Ints

FORMAT = 1
ENGINES = ("sglang", "vllm", "vllm-ascend")
_MAPS = ("physical_to_logical", "logical_to_physical", "replica_counts")
_NUMBERED = re.compile(r"layer_(\d+)")
_MTP = re.compile(r"mtp_\d+")


def save_placement(placement: Placement, path: Path, source: Mapping[str, Any] | None = None) -> None:
    """Write a plan as ``.json`` or ``.safetensors``, complete or not at all.

    Args:
        placement: The plan.
        path: Where to; folders on the way are made.
        source: What it was planned from, kept with it.
    """
    about = {
        "format": FORMAT,
        "num_gpus": placement.num_gpus,
        "num_nodes": placement.num_nodes,
        "keeps_groups": placement.keeps_groups,
        "layers": list(placement.layers),
        "source": dict(source or {}),
    }
    if path.suffix == ".safetensors":
        tensors = {name: getattr(placement, name).contiguous() for name in _MAPS}
        write_bytes(path, save(tensors, {key: json.dumps(value) for key, value in about.items()}))
    elif path.suffix == ".json":
        write_json(path, about | {name: getattr(placement, name).tolist() for name in _MAPS})
    else:
        raise PlacementError(f"{path}: a plan is a .json or a .safetensors file; give a name that ends so")


def load_placement(path: Path) -> Placement:
    """Read a plan that :func:`save_placement` wrote.

    Raises:
        PlacementError: The file cannot be read or is no plan.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(str(path), framework="pt") as file:
                about = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
                experts = file.get_tensor("physical_to_logical").numpy()
                num_experts = file.get_tensor("replica_counts").shape[1]
        else:
            about = json.loads(path.read_text(encoding="utf-8"))
            experts = np.array(about["physical_to_logical"], dtype=np.int64)
            num_experts = len(about["replica_counts"][0])
        _check(about, experts, num_experts, path)
        return placement_of(
            experts, num_experts, about["num_gpus"], about["num_nodes"], about["keeps_groups"],
            layers=tuple(about["layers"]),
        )  # fmt: skip
    except (OSError, UnicodeDecodeError, SafetensorError) as error:
        raise PlacementError(
            f"{path}: the plan cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from error
    except PlacementError:
        raise
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise PlacementError(f"{path}: not a plan of dsv3 plan ({type(error).__name__}: {error})") from error


def _check(about: Mapping[str, Any], experts_LP: Ints, num_experts: int, path: Path) -> None:
    if about["format"] != FORMAT:
        raise PlacementError(f"{path}: plan of format {about['format']!r}; this version reads format {FORMAT}")
    if experts_LP.ndim != 2 or experts_LP.shape[1] % about["num_gpus"]:
        raise PlacementError(f"{path}: physical_to_logical must be [layers, slots], slots a multiple of num_gpus")
    for layer, experts_P in enumerate(experts_LP):
        if len(np.unique(experts_P)) != num_experts or experts_P.min() < 0 or experts_P.max() >= num_experts:
            raise PlacementError(f"{path}: layer {layer} must hold each of {num_experts} experts at least once")


def engine_form(placement: Placement, engine: str, model: DeepSeekV3Config | None = None) -> dict[str, Any]:
    """Return a plan as an engine reads it; see the module's docstring.

    Args:
        placement: The plan; its layers' names tell MTP layers, and layer numbers for SGLang.
        engine: sglang, vllm or vllm-ascend.
        model: For SGLang: gives the number of layers, and the first MoE layer where the names have no numbers.

    Raises:
        PlacementError: An engine that is not known, or a plan that it cannot take.
    """
    if engine not in ENGINES:
        raise PlacementError(f"engine={engine!r}: there is no such form; known: {', '.join(ENGINES)}")
    if model is not None and placement.num_experts != model.n_routed_experts:
        raise PlacementError(
            f"{engine}: the plan has {placement.num_experts} experts and the model {model.n_routed_experts} routed "
            "ones, which are all that this engine places"
        )
    names = placement.layers or tuple(f"row_{row}" for row in range(1, len(placement.physical_to_logical) + 1))
    rows = [row for row, name in enumerate(names) if not _MTP.fullmatch(name)]
    experts_LP = placement.physical_to_logical[rows]
    if engine == "sglang":
        return {
            "physical_to_logical_map": _all_layers(placement, [names[row] for row in rows], experts_LP.numpy(), model)
        }
    if engine == "vllm":
        slots_LER = placement.logical_to_physical[rows]
        wide = placement.num_slots - placement.num_experts + 1
        padded = torch.full((*slots_LER.shape[:2], wide), -1)
        padded[..., : slots_LER.shape[2]] = slots_LER
        return {
            "physical_to_logical_map": experts_LP.tolist(),
            "logical_to_physical_map": padded.tolist(),
            "logical_replica_count": placement.replica_counts[rows].tolist(),
        }
    twins = placement.twins[rows]
    if twins.any():
        raise PlacementError(
            f"vllm-ascend: {int(twins.sum())} replicas share a device with another of their expert, which its map "
            "cannot say; plan with policy balanced"
        )
    layers = [
        {
            "layer_id": number,
            "device_count": placement.num_gpus,
            "device_list": [{"device_id": gpu, "device_expert": held.tolist()} for gpu, held in enumerate(experts_GS)],
        }
        for number, experts_GS in enumerate(placement.experts_by_gpu[rows])
    ]
    return {"moe_layer_count": len(layers), "layer_list": layers}


def _all_layers(
    placement: Placement, names: list[str], experts_LP: Ints, model: DeepSeekV3Config | None
) -> list[list[int]]:
    numbers = [int(match[1]) for name in names if (match := _NUMBERED.fullmatch(name))]
    if len(numbers) < len(names):
        if model is None or len(names) != model.num_moe_layers:
            raise PlacementError(
                "sglang: the map needs each layer's number: name the layers layer_<number>, or give the model "
                "(--model) and a table with one row for each of its MoE layers"
            )
        numbers = list(range(model.first_k_dense_replace, model.num_hidden_layers))
    num_layers = max(numbers) + 1 if model is None else model.num_hidden_layers
    if max(numbers) >= num_layers:
        raise PlacementError(f"sglang: layer_{max(numbers)} is beyond the model's {num_layers} layers")
    rows = [[slot % placement.num_experts for slot in range(placement.num_slots)] for _ in range(num_layers)]
    for number, experts_P in zip(numbers, experts_LP, strict=True):
        rows[number] = experts_P.tolist()
    return rows


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, complete or not at all; folders on the way are made."""
    write_bytes(path, (json.dumps(content) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under a temporary name first, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
