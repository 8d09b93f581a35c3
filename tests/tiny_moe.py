"""A mixture of experts that a Trainer steps through in milliseconds, with its own record of what was routed.

The routers are the real ones, under the names that they have in DeepSeekV3. What an "expert" computes is one
vector. The module counts the experts that its forwards *return*, in plain Python, so that the observer is
held against something that hooks, recomputation and ranks cannot touch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_dsv3.balance import RouterAdapter
from lightning_dsv3.callbacks import AuxFreeBalanceCallback
from lightning_dsv3.config import DeepSeekV3Config
from lightning_dsv3.layers.router import Router

D = 8
RATE = 0.01


def make_router(num_experts: int = 6, k: int = 2, **overrides: Any) -> Router:
    config = DeepSeekV3Config.from_preset(
        "tiny",
        hidden_size=D,
        n_routed_experts=num_experts,
        num_experts_per_tok=k,
        n_group=1,
        topk_group=1,
        **overrides,
    )
    router = Router(config)
    nn.init.normal_(router.weight)
    return router


class Gate(nn.Module):
    """A private router in the manner of DeepSeek's inference code: (weights, indices) come out."""

    def __init__(self, num_experts: int = 4) -> None:
        super().__init__()
        self.proj = nn.Linear(D, num_experts, bias=False)
        self.correction = nn.Buffer(torch.zeros(num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.proj(x).sigmoid()
        indices = (scores + self.correction).topk(2, dim=-1).indices
        return scores.gather(-1, indices), indices.to(torch.int32)


class GateAdapter(RouterAdapter):
    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, Gate)

    def num_experts(self, module: Gate) -> int:
        return module.proj.out_features

    def chosen_experts(self, module: Gate, output: tuple[Tensor, Tensor]) -> Tensor:
        return output[1]

    def bias(self, module: Gate) -> Tensor:
        return module.correction


class Block(nn.Module):
    """x + sum_chosen gate * vector of the expert."""

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.feed_forward = nn.Module()
        self.feed_forward.router = router
        self.vectors = nn.Parameter(0.1 * torch.randn(router.num_experts, D))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        routing = self.feed_forward.router(x_TD)
        # The nonlinearity keeps an input for the backward, so that non-reentrant checkpointing has to repeat
        # the router.
        y_TD = (routing.gate_TK.unsqueeze(-1) * self.vectors[routing.expert_TK].float()).sum(1).to(x_TD.dtype)
        return torch.tanh(x_TD + y_TD), routing.expert_TK


class MTPModule(nn.Module):
    def __init__(self, router: Router) -> None:
        super().__init__()
        self.block = Block(router)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        return self.block(x_TD)


class MoE(nn.Module):
    """Blocks and an MTP module named as in DeepSeekV3, with `num_experts[l]` experts in layer l, MTP last."""

    def __init__(self, num_experts: Sequence[int] = (6, 5), k: int = 2, **overrides: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(make_router(n, k, **overrides)) for n in num_experts[:-1])
        self.mtp = nn.ModuleList([MTPModule(make_router(num_experts[-1], k, **overrides))])

    def layers(self) -> list[nn.Module]:
        return [*self.blocks, *self.mtp]

    def routers(self) -> list[Router]:
        return [m for m in self.modules() if isinstance(m, Router)]


class TinyMoE(pl.LightningModule):
    """
    Args:
        checkpointing: None, "reentrant", "non_reentrant", or "first_layer" (non-reentrant, one layer of
            several).
        lr: 0 leaves the weights alone, so that runs which differ in rounding choose the same experts.
    """

    def __init__(
        self,
        num_experts: Sequence[int] = (6, 5),
        *,
        checkpointing: str | None = None,
        lr: float = 0.01,
        forwards_per_step: int = 1,
        fused: bool = False,
        model: nn.Module | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = MoE(num_experts, **overrides) if model is None else model
        self.checkpointing = checkpointing
        self.lr = lr
        self.forwards_per_step = forwards_per_step
        self.fused = fused
        self.routed = [[0] * n for n in num_experts]
        # After each batch: global_step, what was routed so far, the biases.
        self.trace: list[tuple[int, list[list[int]], list[list[float]]]] = []

    def forward(self, x_BSD: Tensor, record: bool = False) -> Tensor:
        x_TD = x_BSD.flatten(0, 1)
        for index, layer in enumerate(self.model.layers()):
            if self.checkpointing is None or (self.checkpointing == "first_layer" and index > 0):
                x_TD, expert_TK = layer(x_TD)
            else:
                x_TD, expert_TK = checkpoint(layer, x_TD, use_reentrant=self.checkpointing == "reentrant")
            if record:
                for expert in expert_TK.flatten().tolist():
                    self.routed[index][expert] += 1
        return x_TD

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        x_BSD = batch["x"].requires_grad_(self.checkpointing == "reentrant")
        return torch.stack(
            [self(x_BSD, record=True).float().pow(2).mean() for _ in range(self.forwards_per_step)]
        ).sum()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        # Callbacks come first, so the biases are those after the callback's update.
        self.trace.append((self.trainer.global_step, [list(load) for load in self.routed], self.biases()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, fused=self.fused)

    def biases(self) -> list[list[float]]:
        return [router.bias.tolist() for router in self.model.routers() if router.bias is not None]


class ValidatedMoE(TinyMoE):
    """TinyMoE that can validate."""

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self(batch["x"])


def data(
    num_rows: int, *, rows_per_batch: int = 2, tokens: int = 7, seed: int = 1, offset: float = 0.4, **columns: Any
) -> DataLoader:
    """Rows [tokens, D] with a common offset, so that the experts' loads are uneven, and not the same at every step."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, tokens, D, generator=generator) + torch.linspace(-offset, offset, D)
    rows = [{"x": x[i]} | {name: column[i] for name, column in columns.items()} for i in range(num_rows)]
    return DataLoader(rows, batch_size=rows_per_batch)


class RestOf:
    """The batches of a loader from number `start` on, with the whole loader's length: what a resume goes on with."""

    def __init__(self, loader: DataLoader, start: int) -> None:
        self.loader = loader
        self.start = start

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.loader, self.start, None)


def make_trainer(*callbacks: Any, cls: type = pl.Trainer, **arguments: Any) -> Any:
    """A Trainer for one epoch on the CPU that writes nothing."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    return cls(callbacks=list(callbacks), **{**quiet, **arguments})


def fit(module: pl.LightningModule, rows: int = 8, rate: Any = RATE, ckpt_path: Any = None, **arguments: Any):
    """Fit with an AuxFreeBalanceCallback; return the Trainer and the callback."""
    loader = data(rows, rows_per_batch=arguments.pop("rows_per_batch", 2))
    loader = RestOf(loader, arguments.pop("start_batch", 0))
    callback = AuxFreeBalanceCallback(rate)
    trainer = make_trainer(callback, *arguments.pop("callbacks", ()), **arguments)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer, callback


def assert_follows_the_rule(
    module: TinyMoE, rate: float, num_updates: int, *, start: float = 0.0, skipped_steps: Sequence[int] = ()
) -> None:
    """Hold every bias after every batch against the report's rule on what the module routed, in plain Python.

    The loads of `skipped_steps` (values of global_step after them) are used up without moving a bias.
    """
    bias = [[start] * len(load) for load in module.routed]
    used = [[0] * len(load) for load in module.routed]
    step = updates = 0
    for global_step, routed, biases in module.trace:
        if global_step != step:
            window = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(routed, used, strict=True)]
            if global_step not in skipped_steps:
                bias = [_moved(*layer, rate) for layer in zip(bias, window, strict=True)]
                updates += 1
            step, used = global_step, routed
        assert biases == bias
    assert updates == num_updates
    assert any(b != start for layer in bias for b in layer)


def _moved(bias: list[float], load: list[int], rate: float) -> list[float]:
    mean = sum(load) / len(load)
    sign = torch.tensor([(mean > n) - (mean < n) for n in load], dtype=torch.float32)
    return (torch.tensor(bias) + rate * sign).tolist()
