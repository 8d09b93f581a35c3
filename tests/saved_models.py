"""One trained model, saved in every way: a real run's folder, and what else its checkpoint can be made into."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from tiny_run import SHAPE, balance, quiet_trainer, tiny_data
from torch import Tensor

from lightning_dsv3.callbacks.run_folder import RunFolder
from lightning_dsv3.checkpoint import save_hf_checkpoint
from lightning_dsv3.config import DeepSeekV3Config, RunConfig
from lightning_dsv3.data.tokenizer import EOS_TOKEN_ID
from lightning_dsv3.model import DeepSeekV3
from lightning_dsv3.module import DeepSeekV3Module


def trained_run(folder: Path, *callbacks: Any, **shape: Any) -> tuple[Path, DeepSeekV3]:
    """Train for two steps, from weights with which every text goes on in its own way; return run folder and model."""
    torch.manual_seed(0)
    module = DeepSeekV3Module(DeepSeekV3Config.from_preset("tiny", **(SHAPE | shape)), learning_rate=1e-2)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
        module.model.head.weight[EOS_TOKEN_ID] = 0  # never the likeliest token: tests that want an end name another
    config = RunConfig(runs_dir=str(folder), model=module.model.config)
    run = RunFolder(config)
    quiet_trainer(*callbacks, balance(), run, max_steps=2, limit_val_batches=0).fit(module, tiny_data())
    return run.path, module.model.eval()


def save_sharded(checkpoint: Path, folder: Path, key: str) -> Path:
    """Write a checkpoint as Lightning's sharding strategies do: tensors apart, everything else in ``meta.pt``."""
    values = torch.load(checkpoint, weights_only=True)
    state = {key: values.pop("state_dict"), "optimizer_0": values.pop("optimizer_states")[0]}
    folder.mkdir(parents=True)
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    torch.save(values, folder / "meta.pt")
    return folder


def save_hf(run: Path, model: DeepSeekV3, folder: Path) -> Path:
    save_hf_checkpoint(model, folder)
    shutil.copy(run / "tokenizer.json", folder)
    return folder


@torch.no_grad()
def plain_greedy(model: DeepSeekV3, ids: list[int], count: int) -> list[int]:
    """Take the likeliest token of a whole forward pass, again and again."""
    new: list[int] = []
    for _ in range(count):
        logits: Tensor = model(torch.tensor([ids + new])).logits
        new.append(int(logits[0, -1].argmax()))
    return new
