"""Balance losses for a model that is not ours, in any Trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor, nn

from lightning_dsv3.balance import data_parallel_group, sum_over_ranks
from lightning_dsv3.balance.observer import in_recompute
from lightning_dsv3.config import BalanceArgs, ConfigError, did_you_mean
from lightning_dsv3.config.balance import BALANCE_METHODS
from lightning_dsv3.layers.router import Router, RouterOutput
from lightning_dsv3.ops.balance_methods import BalanceTerms, CountWindow, balance_terms
from lightning_dsv3.ops.routing import affinity, gate_values

ReadRouter = Callable[[nn.Module, Any], RouterOutput]


def routing_from_logits(logits: Tensor, chosen: Tensor, scoring_func: str = "softmax") -> RouterOutput:
    """Return what the balance losses take of a router, from its logits.

    Args:
        logits: Router logits ``[..., E]`` that carry a gradient.
        chosen: Chosen experts, integers ``[..., K]``.
        scoring_func: How the router makes affinities of logits: ``softmax`` or ``sigmoid``.

    Returns:
        Affinities and logits in float32; gate values are the chosen affinities, divided by their sum.

    Example:
        >>> routing = routing_from_logits(torch.zeros(2, 3, 4), torch.zeros(2, 3, 1, dtype=torch.int64))
        >>> routing.affinity_TE.shape, routing.affinity_TE[0, 0].item()
        (torch.Size([6, 4]), 0.25)
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits_TE = logits.reshape(-1, logits.shape[-1]).float()
        expert_TK = chosen.detach().reshape(-1, chosen.shape[-1]).to(torch.int64)
        affinity_TE = affinity(logits_TE, scoring_func)
        gate_TK = gate_values(affinity_TE, expert_TK, norm_topk_prob=True, routed_scaling_factor=1.0)
    return RouterOutput(gate_TK, expert_TK, affinity_TE, logits_TE)


def _softmax_router(module: nn.Module, output: Any) -> RouterOutput:
    return routing_from_logits(output[0], output[2], "softmax")


def _sigmoid_router(module: nn.Module, output: Any) -> RouterOutput:
    return routing_from_logits(output[0], output[2], "sigmoid")


def _our_router(module: nn.Module, output: Any) -> RouterOutput:
    assert isinstance(output, RouterOutput)
    return output


# Routers of transformers 5, whose output is (logits, weights, indices).
KNOWN_ROUTERS: dict[str, ReadRouter] = {
    "MixtralTopKRouter": _softmax_router,
    "Qwen2MoeTopKRouter": _softmax_router,
    "Qwen3MoeTopKRouter": _softmax_router,
    "OlmoeTopKRouter": _softmax_router,
    "DeepseekV3TopkRouter": _sigmoid_router,
    "Glm4MoeTopkRouter": _sigmoid_router,
}


class BalanceLossCallback(Callback):
    """Adds balance losses to the loss of a model that is not ours.

    The routers are watched by forward hooks within ``training_step``, the losses are computed from what they put out,
    and their sum is added to the loss that ``training_step`` returns. So they are in the one backward: gradient
    accumulation, a gradient scaler, DDP, FSDP and clipping treat them as they treat the loss itself, and activation
    checkpointing, which repeats a forward later, adds nothing twice. Each is logged as ``train/balance/<method>``,
    summed over the routers.

    For this, ``training_step`` of the module is replaced while ``fit`` runs, and put back afterwards. With gradient
    accumulation, ``global_batch`` counts the micro-batches so far. Micro-batches of different sizes have the weight
    that Lightning gives them, the same for each.

    What it does not do: manual optimization, reentrant checkpointing (its first forward has no gradient), a
    LightningModule that ``torch.compile`` has compiled as a whole, and leaving padding out. ``DeepSeekV3Module`` has
    these losses built in (``balance=[...]``). In a training loop of your own call
    :func:`lightning_dsv3.ops.balance_methods.balance_terms`.

    Args:
        balance: Any of ``sequence``, ``batch``, ``global_batch``, ``v2``, ``cv2`` and ``z``.
        balance_args: Their parameters, as in ``{"sequence": {"alpha": 1e-4}}``; see
            :class:`~lightning_dsv3.config.BalanceArgs`.
        routers: How to read routers, by class name; tried before the known ones. ``read(module, output)`` returns a
            :class:`~lightning_dsv3.layers.router.RouterOutput`, usually by :func:`routing_from_logits`.
        num_groups: Groups of experts, V2's devices.
        groups_per_token: Groups that a token may use.
        num_sequences: Returns the number of equally long sequences of a batch. Default: Lightning's batch size.

    Raises:
        ConfigError: An unknown method or parameter.
        MisconfigurationException: No router was found or called, the logits have no gradient, or the module optimizes
            manually.

    Example:
        >>> callback = BalanceLossCallback(
        ...     ["sequence", "z"], routers={"MyRouter": lambda router, out: routing_from_logits(out[0], out[1])}
        ... )
    """

    def __init__(
        self,
        balance: Sequence[str] = ("sequence",),
        balance_args: BalanceArgs | Mapping[str, Mapping[str, Any]] | None = None,
        routers: Mapping[str, ReadRouter] | None = None,
        num_groups: int = 1,
        groups_per_token: int = 1,
        num_sequences: Callable[[Any], int] = extract_batch_size,
    ) -> None:
        super().__init__()
        losses = [name for name in BALANCE_METHODS if name != "aux_free"]
        for name in balance:
            if name not in losses:
                raise ConfigError(f"balance={list(balance)}: {name!r} is no loss: {did_you_mean(name, losses)}")
        self.balance = tuple(balance)
        self.balance_args = BalanceArgs.of(balance_args)
        v2 = self.balance_args.v2
        if "v2" in balance and num_groups == 1 and (v2.device_alpha or v2.communication_alpha):
            raise ConfigError(
                f"balance={list(balance)}: v2 balances groups of experts and num_groups=1; give num_groups and "
                'groups_per_token, or balance_args={"v2": {"device_alpha": 0, "communication_alpha": 0}}'
            )
        self._readers = {**KNOWN_ROUTERS, **(routers or {})}
        self._num_groups, self._groups_per_token = num_groups, groups_per_token
        self._num_sequences = num_sequences
        self._window = CountWindow()
        # What each router call in training_step put out, and how to read it; None outside of training_step.
        self._collected: list[tuple[str, ReadRouter, nn.Module, Any]] | None = None
        self._handles: list[Any] = []
        self._module: pl.LightningModule | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Hook the routers, before anything is compiled, and take the place of ``training_step``."""
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"BalanceLossCallback adds to the loss that training_step returns, and {type(pl_module).__name__} "
                "optimizes manually: call lightning_dsv3.ops.balance_methods.balance_terms in training_step instead."
            )
        self._attach(trainer, pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hook what the module has built in its own ``setup`` or ``configure_model``."""
        self._attach(trainer, pl_module)
        if not self._handles:
            raise MisconfigurationException(
                f"BalanceLossCallback found no router in {type(pl_module).__name__}: it knows ours and the classes "
                f"{', '.join(self._readers)}. Show it yours: "
                'routers={"YourRouter": lambda router, output: routing_from_logits(output[0], output[1])}.'
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a window of counts."""
        self._window.reset()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Begin a window of counts."""
        self._window.reset()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let go of the model."""
        self._detach()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the model."""
        self._detach()

    def _attach(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._detach()
        for name, module in pl_module.named_modules():
            read = self._reader_of(module)
            if read is not None:
                self._handles.append(module.register_forward_hook(self._hook(name, read)))
        self._module = pl_module
        inner = pl_module.training_step

        def training_step(*args: Any, **kwargs: Any) -> Any:
            self._collected = []
            try:
                output = inner(*args, **kwargs)
                if output is None:
                    return None  # Lightning skips this batch
                batch = args[0] if args else kwargs["batch"]
                return _with_added_loss(output, self._loss(trainer, pl_module, batch))
            finally:
                self._collected = None

        # What Lightning follows to see that training_step is overridden.
        training_step.__wrapped__ = inner  # type: ignore[attr-defined]
        # In the instance's own dict: it hides the class's method, and deleting it brings that back.
        pl_module.__dict__["training_step"] = training_step

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._module is not None:
            self._module.__dict__.pop("training_step", None)
            self._module = None

    def _reader_of(self, module: nn.Module) -> ReadRouter | None:
        if isinstance(module, Router):
            return _our_router
        # Names of base classes too: FSDP2 puts a subclass of its own in the place of a module's class.
        names = [kind.__name__ for kind in type(module).__mro__]
        return next((self._readers[name] for name in names if name in self._readers), None)

    def _hook(self, name: str, read: ReadRouter) -> Callable[[nn.Module, Any, Any], None]:
        # Nothing is computed here: inside a checkpointed region it would have to be repeated with the forward.
        def collect(module: nn.Module, args: Any, output: Any) -> None:
            if self._collected is not None and module.training and not in_recompute():
                self._collected.append((name, read, module, output))

        return collect

    def _loss(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> Tensor:
        if not self._collected:
            raise MisconfigurationException(
                f"training_step called none of the {len(self._handles)} routers that BalanceLossCallback has found: a "
                "router must be called as a module (not through its .forward), in training mode."
            )
        num_sequences = self._num_sequences(batch)
        with torch.autocast(pl_module.device.type, enabled=False):
            terms: BalanceTerms = balance_terms(
                [_read(*call) for call in self._collected],
                methods=self.balance,
                args=self.balance_args,
                num_sequences=num_sequences,
                num_groups=self._num_groups,
                groups_per_token=self._groups_per_token,
                window=self._window,
                sum_over_ranks=lambda counts: sum_over_ranks(counts, data_parallel_group(trainer)),
            )
        for name, value in (terms.losses | terms.figures).items():
            pl_module.log(f"train/balance/{name}", value.detach(), batch_size=num_sequences)
        return torch.stack(list(terms.losses.values())).sum()


def _with_added_loss(output: Any, added: Tensor) -> Any:
    if isinstance(output, Tensor):
        return output + added
    if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
        return {**output, "loss": output["loss"] + added}
    raise MisconfigurationException(
        f"training_step returned {type(output).__name__}: BalanceLossCallback adds to a tensor or a dict with 'loss'."
    )


def _read(name: str, read: ReadRouter, module: nn.Module, output: Any) -> RouterOutput:
    routed = read(module, output)
    if not routed.logits_TE.requires_grad and any(p.requires_grad for p in module.parameters()):
        raise MisconfigurationException(
            f"The logits of router {name} have no gradient, so balance losses cannot reach it. Reentrant "
            "activation checkpointing does that: use checkpoint(..., use_reentrant=False), in transformers "
            'gradient_checkpointing_kwargs={"use_reentrant": False}. So does a router that puts out detached '
            "logits."
        )
    return routed
