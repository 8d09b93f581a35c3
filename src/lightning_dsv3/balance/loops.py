"""The balancing of ``AuxFreeBalanceCallback`` in a loop of one's own: plain PyTorch, or Lightning Fabric.

A Trainer tells a callback when a batch begins and when it ends. A loop tells nothing, so the moments are those that
every loop has:

* A forward of a router in training mode is counted, once. ``model.eval()`` is what keeps validation out.
* The optimizer's ``step`` ends a window: all that was counted since the one before is summed over the ranks and moves
  the biases, in a hook that runs after the step. Accumulated micro-batches are in the window without a word.
* A gradient scaler that meets an infinity does not call ``step`` at all, and looks like one more accumulated
  micro-batch. The loop alone knows better, and says so with :meth:`balanced.end_step`. (A fused optimizer is called
  all the same and keeps still; there it is known without a word.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_dsv3.balance.adapter import RouterAdapter
from lightning_dsv3.balance.biases import Float32Biases, valid_rate
from lightning_dsv3.balance.discovery import NATIVE_ADAPTERS, ObservedRouter, find_routers, no_router_message
from lightning_dsv3.balance.health import require_finite_routing
from lightning_dsv3.balance.loads import max_violations
from lightning_dsv3.balance.moving import move_biases
from lightning_dsv3.balance.observer import RouterObserver
from lightning_dsv3.balance.ownership import claim_bias, native_updaters, release_bias
from lightning_dsv3.balance.steps import OptimizerStepWatcher
from lightning_dsv3.ops.balance import BIAS_RULES


class balanced:  # noqa: N801 - reads as a phrase after `with`, like torch's no_grad
    """Keeps the experts of a model equally busy while it is trained inside the ``with`` block.

    It moves the routers' biases exactly as :class:`lightning_dsv3.callbacks.AuxFreeBalanceCallback` does, after every
    real step of ``optimizer``, and finds the same routers. Before the block the model is on its device, wrapped (DDP,
    ``fabric.setup``) and not yet run, so that nothing has been compiled without the hooks; after it, also after an
    exception, the model is as before, but for the biases.

    With a gradient scaler, say where each step ends: a step that it skipped then uses up its counts and moves nothing.
    Without that its counts would be added to those of the next step. ::

        scaler.step(optimizer)
        scaler.update()
        balance.end_step()

    Padding is counted like text unless the batch's mask is given before its forward: ``balance.mask(batch["mask"])``.

    Args:
        model: The model, or what wraps it.
        optimizer: The optimizer whose step ends a training step; of several, the one that steps last. Fabric's and
            Accelerate's wrappers are fine.
        update_rate: Bias update speed gamma: a number (0.001 in the report; 0 leaves the biases alone), or a function
            of the tokens seen, this step's included. A function makes the host wait for the device.
        routers: How private routers show their choices and bias; tried before the built-in kinds.
        rule: How a bias moves (:data:`lightning_dsv3.ops.balance.BIAS_RULES`).
        dry_run: Count only.
        group: Process group over which the ranks see different tokens. Default: all ranks, where there are several.

    Raises:
        TypeError: The optimizer is none of torch's.
        ValueError: ``update_rate`` is negative or not finite, or there is no such rule.
        MisconfigurationException: At ``with``: no router was found, none has a bias, or a bias has another owner or is
            sharded. At the first step: a router was not seen.
        RuntimeError: Gate values or a bias are not finite: at the step itself on a CPU; on other devices, so that no
            step waits, when a state is asked for or the block ends.

    Example:
        >>> from lightning_dsv3 import DeepSeekV3, DeepSeekV3Config
        >>> model = DeepSeekV3(DeepSeekV3Config.from_preset("tiny", vocab_size=64, hidden_size=16))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> with balanced(model, optimizer, update_rate=1e-3) as balance:
        ...     for ids in torch.randint(0, 64, (2, 1, 8)):
        ...         model(ids, labels=ids).loss.backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> balance.tokens_seen
        16
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        update_rate: float | Callable[[int], float] = 1e-3,
        *,
        routers: Sequence[RouterAdapter] | None = None,
        rule: str = "sign",
        dry_run: bool = False,
        group: Any = None,
    ) -> None:
        if rule not in BIAS_RULES:
            raise ValueError(f"rule={rule!r} is none of {', '.join(BIAS_RULES)}.")
        self.update_rate = update_rate if callable(update_rate) else valid_rate(update_rate)
        self.rule = rule
        self.dry_run = dry_run
        self._model = model
        self._optimizer = _torch_optimizer(optimizer)
        self._adapters = (*(routers or ()), *NATIVE_ADAPTERS)
        self._group = group
        self._observer = RouterObserver([])
        self._step_watcher = OptimizerStepWatcher()
        self._biases = Float32Biases()
        self._counts: list[Tensor] = []
        self._broken_forwards = torch.zeros(0, dtype=torch.int64)
        self._tokens_seen = torch.zeros((), dtype=torch.int64)
        self._has_stepped = False
        self._seen_all_routers = False
        self._undo = ExitStack()

    @property
    def tokens_seen(self) -> int:
        """Tokens of all ranks that the first router has routed in finished steps; makes the host wait."""
        return int(self._tokens_seen)

    @property
    def layers(self) -> list[str]:
        """Names of the layers, in the order of :attr:`max_violations`."""
        return [router.name for router in self._routers]

    @property
    def max_violations(self) -> Tensor:
        """MaxVio of each layer in the last step's whole batch, float32 ``[L]`` on the device; nan before a step.

        It is computed when it is read, and the host waits only for what is made of it: ``.mean().item()``.
        """
        if not self._counts:
            return torch.full((len(self._routers),), math.nan)
        return max_violations(self._counts)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(update_rate={self.update_rate!r}, dry_run={self.dry_run}, rule={self.rule!r})"

    def __enter__(self) -> balanced:
        # What has been taken before an error is given back at once.
        with ExitStack() as undo:
            self._attach(undo)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self._undo.close()
        if error_type is None:
            self._require_finite()

    def mask(self, mask: Tensor | None) -> None:
        """Leave padding out of the counts of the forwards from now on, until another mask is given.

        Args:
            mask: Bools or integers ``[B, S]`` of the batch, 0 for padding; None to count everything.
        """
        self._observer.open(mask=mask)

    def end_step(self) -> None:
        """End a step that a gradient scaler may have skipped: call it after every ``scaler.step(optimizer)``.

        After a real step it does nothing. All ranks call it, as they do ``scaler.step``.
        """
        if not self._has_stepped:
            self._end_window(stepped=False)
        self._has_stepped = False

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs besides the model, for a checkpoint between two steps.

        The counts of accumulated micro-batches are not in it, as their gradients are in no checkpoint either. It is not
        a collective: the first rank may call it alone.
        """
        self._require_finite()
        return {"tokens_seen": self.tokens_seen, "float32_biases": self._biases.state(self._routers)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was called, before or within the ``with`` block; the model is loaded apart."""
        self._tokens_seen = torch.tensor(state["tokens_seen"], dtype=torch.int64, device=self._tokens_seen.device)
        self._biases.load_state(state["float32_biases"])

    @property
    def _routers(self) -> list[ObservedRouter]:
        return self._observer.routers

    def _attach(self, undo: ExitStack) -> None:
        routers = find_routers(self._model, self._adapters)
        if not routers:
            raise MisconfigurationException(no_router_message(self._model, self._adapters))
        self._observer = RouterObserver(routers)
        if not self.dry_run:
            self._own_biases(undo)
        if self._group is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.group.WORLD
        device = _device_of(routers[0].module)
        self._broken_forwards = torch.zeros(len(routers), dtype=torch.int64, device=device)
        self._tokens_seen = self._tokens_seen.to(device)
        self._counts = []
        self._has_stepped = self._seen_all_routers = False
        self._observer.attach()
        undo.callback(self._observer.detach)
        self._observer.start(device)
        self._observer.open()
        # The watcher's hook comes first, so that it has seen the step which this one asks it about.
        self._step_watcher.watch([self._optimizer])
        undo.callback(self._step_watcher.stop)
        undo.callback(self._optimizer.register_step_post_hook(self._on_step).remove)

    def _own_biases(self, undo: ExitStack) -> None:
        with_bias = [(router, tensor) for router in self._routers if (tensor := router.bias_tensor) is not None]
        if not with_bias:
            raise MisconfigurationException(
                f"None of the {len(self._routers)} routers of {type(self._model).__name__} has a routing bias to move. "
                'Give them one (topk_method="noaux_tc" in DeepSeekV3Config, '
                "lightning_dsv3.balance.install_biases(model) for Hugging Face models), or count only: dry_run=True."
            )
        if updaters := native_updaters(self._routers, [self._optimizer]):
            names = ", ".join(sorted({updater.name for updater in updaters.values()}))
            raise MisconfigurationException(
                f"{names} moves the biases of {', '.join(updaters)} already, and two would double each step. Switch it "
                "off, or count only: dry_run=True."
            )
        for router, tensor in with_bias:
            claim_bias(router.module, self, router.name)
            undo.callback(release_bias, router.module, self)
            # A parameter without a gradient is one that weight decay leaves alone.
            tensor.requires_grad_(False)
            tensor.grad = None
            self._biases.of(router)

    def _on_step(self, *_: object) -> None:
        if not self._seen_all_routers:
            self._require_all_routers_seen()
        self._has_stepped = True
        self._end_window(self._step_watcher.take())

    def _end_window(self, stepped: bool | Tensor) -> None:
        counts = self._counts = self._observer.take(self._group)
        # K is 0 until a forward has been seen, and the counts with it.
        self._tokens_seen += counts[0].sum() // max(1, self._observer.num_experts_per_tok[0])
        self._broken_forwards = self._broken_forwards + self._observer.broken_forwards
        if not self.dry_run:
            move_biases(
                self._routers,
                counts,
                self._biases,
                self.update_rate,
                self.rule,
                tokens_seen=self._tokens_seen,
                stepped=stepped,
                broken_forwards=self._broken_forwards,
            )
        if self._tokens_seen.device.type == "cpu":
            self._require_finite()

    def _require_all_routers_seen(self) -> None:
        if unobserved := "; ".join(self._observer.unobserved()):
            raise MisconfigurationException(
                f"Nothing was counted before the first optimizer step for {unobserved}. A router must be called as a "
                "module (not through its .forward), in training mode, and compiled only within the `with` block; one "
                "that is not used in training has to be taken out of the model."
            )
        self._seen_all_routers = True

    def _require_finite(self) -> None:
        if not self.dry_run:
            require_finite_routing(self._routers, self._broken_forwards)


def _torch_optimizer(optimizer: Any) -> Optimizer:
    """Return the optimizer whose hooks fire, out of the wrappers of Fabric and Accelerate."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}, and its steps cannot be seen: give the torch.optim.Optimizer "
            "that steps (of several, the last one)."
        )
    return optimizer


def _device_of(module: nn.Module) -> torch.device:
    return next(iter([*module.parameters(), *module.buffers()])).device
