"""Auxiliary-loss-free load balancing for any Trainer (report, section 2.1.2)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_dsv3.balance import (
    COMMON_MASK_KEY,
    NATIVE_ADAPTERS,
    Float32Biases,
    ObservedRouter,
    OptimizerStepWatcher,
    RouterAdapter,
    RouterObserver,
    ViolationInBar,
    averaged_copies,
    claim_bias,
    copy_biases,
    data_parallel_group,
    find_routers,
    install_biases,
    install_biases_before_loading,
    matching_routers,
    max_violations,
    move_biases,
    native_updaters,
    no_router_message,
    padding_mask,
    release_bias,
    require_finite_routing,
    sum_over_ranks,
    valid_rate,
)
from lightning_dsv3.config import did_you_mean
from lightning_dsv3.ops.balance import BIAS_RULES


class AuxFreeBalanceCallback(Callback):
    """Keeps the experts of a mixture of experts equally busy by moving the routers' bias, without a loss.

    It counts the experts that each router chooses in training, adds the counts up over ranks and accumulated
    micro-batches, and after each optimizer step moves every expert's bias by ``update_rate`` against its load
    (:func:`lightning_dsv3.ops.balance.bias_step`). Neither the model nor the module has a part in it.

    The routers are found at any depth and through wrappers: this package's; those of Hugging Face models, wherever
    their bias is; those of torchtitan, prime-rl, Megatron-Core, NeMo AutoModel, OLMo-core and litgpt; and any other
    through a :class:`~lightning_dsv3.balance.RouterAdapter`. One that cannot be balanced is an error with the remedy.

    What counts, exactly:

    * Each training forward, once: several per step add up; a forward that activation checkpointing repeats
      does not count again; validation, sanity checks and forwards outside a training batch do not count.
    * One update per optimizer step, at the end of the batch in which ``trainer.global_step`` changes, so also
      for the short last window of an epoch. Several optimizers, or several steps in one batch, make one
      update. The bias is then in the checkpoint of the same step.
    * A step that a gradient scaler skips uses up its counts and moves no bias. A batch for which
      ``training_step`` returned None under automatic optimization does not count.
    * Ranks that see different tokens are summed, with one collective per step for all layers together.

    Whenever the Trainer writes its logs (``log_every_n_steps``) it logs ``moe/<layer>/max_violation``, the
    MaxVio of the step's whole batch, and ``moe/max_violation``, their mean. The progress bar, whichever it is, shows
    the mean and the worst layer of the latest step whenever it is drawn: ``MaxVio=0.52, worst layer 3=1.24``.

    The bias is moved in float32, also in a model of lower precision: a bias that something has cast is put back into
    float32, with the values it had before the cast, unless the model has been given other values since (a checkpoint
    that is loaded wins). A bias that is a trainable parameter is taken from the optimizer (``requires_grad=False``), as
    weight decay would shrink it.

    Gate values or a bias that are not finite are an error that names the layer. The layer's bias does not move from the
    first such step on. The error comes with that step on a CPU; on other devices when the Trainer next writes its logs
    or ends, so that no step waits for the device.

    A checkpoint holds the tokens seen, and within an accumulation window its counts so far (the sum over
    ranks; after a resume they are with the first rank). Training resumes bit for bit where Lightning does, at
    optimizer steps.

    Averaged weights (Lightning's ``WeightAveraging`` and ``EMAWeightAveraging``) go together with the bias as it is,
    not with an average of it: in validation, in checkpoints and after training, whatever the callbacks' order.
    ``StochasticWeightAveraging`` averages parameters alone and so leaves the bias as it is by itself.

    It is found by name in one Trainer's checkpoints, works under ``lightning.pytorch.Trainer`` and, passed in
    a list, under ``pytorch_lightning.Trainer``, and may be used with several models one after the other.

    What it does not do: train with DeepSpeed.

    Args:
        update_rate: Bias update speed gamma: a number (0.001 in the report; 0 freezes the bias), or a
            function of the tokens seen, this step's included. A function is called once per step and makes
            the host wait for the device.
        routers: How private routers show their choices and bias; tried before the built-in kinds.
        dry_run: Measure and log only. Routers need no bias then.
        rule: How a bias moves (:data:`lightning_dsv3.ops.balance.BIAS_RULES`): ``sign``, the report's;
            ``proportional``, for softmax affinities, with a rate of 0.01; or ``centred``.
        install_bias: Give Hugging Face routers that have no bias one (:func:`lightning_dsv3.balance.install_biases`).
            It is in checkpoints as ``selection_bias``, and has no effect while it is 0. Their scores are mostly
            softmax probabilities, among which a fixed step is coarse: take ``rule="proportional"`` with
            ``update_rate=0.01``, and the report's ``sign`` with 0.001 for sigmoid scores.
        freeze: Layers whose bias stays as it is, as fine-tuning and RL want it: True for all, or names or paths as in
            the logs, ``*`` for any text. They are counted and logged all the same.
        freeze_after_tokens: All biases stay as they are from the first step that goes beyond so many tokens.
        take_over: Move also a bias that the routers' own framework moves (torchtitan's optimizer hook, Megatron's
            ``finalize_model_grads``, ...), and switch that off. By default such a bias is left to the framework.
        mask_key: Key or attribute of the batch where its mask is: bools or integers ``[B, S]``, 0 for padding, which is
            then no token to be counted. Under the default name it may be missing; None counts padding like text.

    Raises:
        ValueError: ``update_rate`` is negative or not finite, or there is no such rule or layer.
        MisconfigurationException: No router was found, none has a bias, a bias has another owner or is sharded, a
            router cannot be observed or was not seen in the first training batch, the strategy accumulates gradients
            itself, or a mask does not tell which of a router's tokens are padding.
        RuntimeError: Gate values or a bias are not finite.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[AuxFreeBalanceCallback()], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        update_rate: float | Callable[[int], float] = 1e-3,
        routers: Sequence[RouterAdapter] | None = None,
        dry_run: bool = False,
        rule: str = "sign",
        *,
        install_bias: bool = False,
        freeze: bool | Collection[str] = False,
        freeze_after_tokens: int | None = None,
        take_over: bool = False,
        mask_key: str | None = COMMON_MASK_KEY,
    ) -> None:
        super().__init__()
        if rule not in BIAS_RULES:
            raise ValueError(f"rule={rule!r}: {did_you_mean(rule, BIAS_RULES)}")
        self.update_rate = update_rate if callable(update_rate) else valid_rate(update_rate)
        self.dry_run = dry_run
        self.rule = rule
        self.install_bias = install_bias
        self.freeze = [freeze] if isinstance(freeze, str) else freeze
        self.freeze_after_tokens = freeze_after_tokens
        self.take_over = take_over
        self.mask_key = mask_key
        self._adapters = (*(routers or ()), *NATIVE_ADAPTERS)
        self._observer = RouterObserver([])
        self._step_watcher = OptimizerStepWatcher()
        self._bar = ViolationInBar()
        self._biases = Float32Biases()
        self._installs_at_load: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._frozen: set[str] = set()
        self._left_alone: set[str] = set()
        self._broken_forwards = torch.zeros(0, dtype=torch.int64)
        self._group: Any = None
        self._global_step = 0
        self._tokens_seen = torch.zeros((), dtype=torch.int64)
        self._seen_all_routers = False
        # Counts of the finished batches of an open accumulation window. The observer may hold part of a batch
        # more.
        self._window: Tensor | None = None
        self._restored_window: Mapping[str, Tensor] = {}

    @property
    def tokens_seen(self) -> int:
        """Tokens of all ranks that the first router has routed in finished optimizer steps."""
        return int(self._tokens_seen)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(update_rate={self.update_rate!r}, dry_run={self.dry_run}, rule={self.rule!r})"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the routers, own their biases, and put the hooks on before anything is compiled."""
        if self.install_bias:
            self._install(pl_module)
        if stage != "fit":
            return
        self._left_alone = set()
        if not self.take_over:  # hooks of optimizers, which are not there yet, are asked for in on_fit_start
            self._left_alone = set(native_updaters(find_routers(pl_module, self._adapters), ()))
        if trainer.strategy.handles_gradient_accumulation:
            raise MisconfigurationException(
                f"{type(trainer.strategy).__name__} accumulates gradients and skips steps by itself: "
                "neither the Trainer nor AuxFreeBalanceCallback can know when the optimizer has stepped. "
                "Use DDP, FSDP or ModelParallelStrategy."
            )
        self._attach(pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach to what the module has built in its own ``setup`` or ``configure_model``, and check it."""
        if self.install_bias:
            self._install(pl_module)
        self._leave_alone_or_take_over(pl_module, trainer.optimizers)
        self._attach(pl_module)
        if not self._routers:
            raise MisconfigurationException(no_router_message(pl_module, self._adapters))
        if isinstance(self.freeze, bool):
            self._frozen = {router.name for router in self._routers} if self.freeze else set()
        else:
            self._frozen = matching_routers(self._routers, self.freeze)
        if self.dry_run:
            return
        without_bias = [router.path for router in self._routers if router.bias_tensor is None]
        if len(without_bias) == len(self._routers):
            raise MisconfigurationException(
                f"None of the {len(without_bias)} routers of {type(pl_module).__name__} has a routing bias "
                f"to move ({', '.join(without_bias[:4])}{', ...' if len(without_bias) > 4 else ''}). Give "
                'them one (topk_method="noaux_tc" in DeepSeekV3Config, install_bias=True for Hugging Face models), or '
                "measure only: AuxFreeBalanceCallback(dry_run=True)."
            )
        if without_bias:
            rank_zero_warn(f"These routers have no bias and are only measured: {', '.join(without_bias)}")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start counting, at 0 or where a checkpoint stopped: the model is on its device and restored."""
        self._group = data_parallel_group(trainer)
        self._seen_all_routers = False
        self._observer.start(trainer.strategy.root_device)
        self._broken_forwards = torch.zeros(len(self._routers), dtype=torch.int64, device=trainer.strategy.root_device)
        self._step_watcher.watch(trainer.optimizers)
        self._bar.attach(trainer, [router.name for router in self._routers])
        self._global_step = trainer.global_step
        self._tokens_seen = self._tokens_seen.to(trainer.strategy.root_device)
        self._window = None
        if self._restored_window:
            self._window = self._share_of_window(self._restored_window)
            self._observer.restore(self._window)
            self._restored_window = {}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count from here."""
        if not self._observer.is_attached:  # added to the Trainer while it was training
            self.setup(trainer, pl_module, "fit")
            self.on_fit_start(trainer, pl_module)
            self.on_train_start(trainer, pl_module)
        self._observer.open(mask=padding_mask(batch, self.mask_key))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count to here; move the biases if the optimizer has stepped."""
        self._observer.close()
        if pl_module.automatic_optimization and not outputs:
            self._observer.restore(self._window)
        elif not self._seen_all_routers:
            self._require_all_routers_seen()
        # Optimizers that manual optimization calls past the Trainer do not move global_step, but are seen to
        # step.
        if trainer.global_step == self._global_step and not self._step_watcher.seen:
            self._window = self._observer.snapshot()
            return
        self._global_step = trainer.global_step
        self._window = None
        counts = self._observer.take(self._group)
        # K is 0 until a forward has been seen, and the counts with it.
        self._tokens_seen += counts[0].sum() // max(1, self._observer.num_experts_per_tok[0])
        stepped = self._step_watcher.take()
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
                held=self._left_alone | self._frozen,
                freeze_after_tokens=self.freeze_after_tokens,
            )
        if trainer.strategy.root_device.type == "cpu" or trainer._logger_connector.should_update_logs:
            self._require_finite()
        self._bar.update(counts)
        self._log_violation(trainer, pl_module, counts)

    # A copy's bias is read where its weights take the live ones' place (before a validation epoch, at the end of
    # training) and where it is saved. Averaging writes it after a batch and after an epoch. With the hooks below one of
    # this callback's lies between a writing and a reading that follows it, whichever of the two callbacks comes first.

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give averaged copies of the model the bias."""
        self._update_averaged_copies(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give averaged copies of the model the bias."""
        self._update_averaged_copies(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give averaged copies of the model the bias; say what no log has said yet."""
        self._update_averaged_copies(trainer)
        self._require_finite()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the tokens seen, and the counts of an open accumulation window over all ranks.

        This hook and not ``state_dict``, because Lightning would meet a second owner of the bias with an
        error about state keys before this class can say what is wrong.
        """
        # A copy that the checkpoint has already is there by reference (`Module.state_dict`), and gets the bias as well.
        self._update_averaged_copies(trainer)
        window = {}
        if self._window is not None:
            # Windows are open on all ranks or on none, and Lightning saves on all, so the collective is safe.
            counts = self._observer.split(sum_over_ranks(self._window.clone(), self._group).cpu())
            window = {router.name: counts_E.clone() for router, counts_E in zip(self._routers, counts, strict=True)}
        checkpoint.setdefault("callbacks", {})[self.state_key] = {
            "tokens_seen": self.tokens_seen,
            "window_counts": window,
        }
        if rounded := self._biases.state(self._routers):
            checkpoint["callbacks"][self.state_key]["float32_biases"] = rounded

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Read what :meth:`on_save_checkpoint` wrote; the biases themselves are part of the model."""
        state = checkpoint["callbacks"].get(self.state_key)
        if state is not None:
            self._tokens_seen = torch.tensor(state["tokens_seen"], dtype=torch.int64)
            self._restored_window = dict(state["window_counts"])
            self._biases.load_state(state.get("float32_biases", {}))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let go of the model."""
        self._detach()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the model."""
        self._detach()

    @property
    def _routers(self) -> list[ObservedRouter]:
        return self._observer.routers

    def _attach(self, pl_module: pl.LightningModule) -> None:
        routers = find_routers(pl_module, self._adapters)
        if [router.module for router in routers] != [router.module for router in self._routers]:
            self._detach()
            self._observer = RouterObserver(routers)
        if not self.dry_run:
            self._own_biases()
        self._observer.attach()

    def _own_biases(self) -> None:
        trained = []
        for router in self._routers:
            tensor = router.bias_tensor
            if tensor is None or router.name in self._left_alone:
                continue
            claim_bias(router.module, self, router.name)
            if tensor.requires_grad:
                tensor.requires_grad_(False)
                trained.append(router.name)
            self._biases.of(router)
        if trained:
            rank_zero_warn(
                f"The routing bias was a trainable parameter, which weight decay shrinks, and is one no more "
                f"(requires_grad=False): {', '.join(trained)}"
            )

    def _install(self, pl_module: pl.LightningModule) -> None:
        """Give routers a bias, at the latest before a checkpoint is loaded into what ``configure_model`` builds."""
        install_biases(pl_module, self._adapters)
        if pl_module not in self._installs_at_load:
            self._installs_at_load.add(pl_module)
            install_biases_before_loading(pl_module, self._adapters)

    def _leave_alone_or_take_over(self, pl_module: pl.LightningModule, optimizers: Sequence[Any]) -> None:
        self._left_alone = set()
        if self.dry_run:
            return
        updaters = native_updaters(find_routers(pl_module, self._adapters), optimizers)
        names = ", ".join(sorted({updater.name for updater in updaters.values()}))
        if updaters and self.take_over:
            for updater in updaters.values():
                updater.stop()
            rank_zero_info(f"AuxFreeBalanceCallback moves the biases of {', '.join(updaters)} in place of {names}.")
        elif updaters:
            self._left_alone = set(updaters)
            for router in self._routers:
                if router.name in updaters:
                    release_bias(router.module, self)
            rank_zero_warn(
                f"{names} moves the biases of {', '.join(updaters)} already, so AuxFreeBalanceCallback only measures "
                "there. With take_over=True it moves them itself and switches the other off."
            )

    def _detach(self) -> None:
        self._observer.detach()
        self._step_watcher.stop()
        self._bar.detach()
        for router in self._routers:
            release_bias(router.module, self)

    def _require_all_routers_seen(self) -> None:
        unobserved = "; ".join(self._observer.unobserved())
        if unobserved:
            raise MisconfigurationException(
                f"Nothing was counted in the first training batch for {unobserved}. A router must be called "
                "as a module (not through its .forward), in training mode, and compiled only after the "
                "Trainer's setup hooks; one that is not used in training has to be taken out of the model."
            )
        self._seen_all_routers = True

    def _require_finite(self) -> None:
        if not self.dry_run:
            require_finite_routing(self._routers, self._broken_forwards)

    def _update_averaged_copies(self, trainer: pl.Trainer) -> None:
        # Also after an exception, when the model is no longer this callback's: a checkpoint may yet be saved.
        if not self.dry_run and trainer.state.fn == "fit":
            for copy in averaged_copies(trainer.callbacks):  # type: ignore[attr-defined]
                copy_biases(self._routers, copy, self._adapters)

    def _log_violation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, counts: list[Tensor]) -> None:
        # A call of `log` takes the host longer than the update of all biases, so only what will be written is logged.
        # Values go there as tensors: whoever writes them makes the host wait, not this step.
        if not trainer._logger_connector.should_update_logs:
            return
        violation_L = max_violations(counts)
        pl_module.log("moe/max_violation", violation_L.nanmean(), on_step=True, on_epoch=False)
        for router, violation in zip(self._routers, violation_L.unbind(), strict=True):
            pl_module.log(f"moe/{router.name}/max_violation", violation, on_step=True, on_epoch=False)

    def _share_of_window(self, window: Mapping[str, Tensor]) -> Tensor:
        """Return this rank's part of restored counts: all of them on the first rank, 0 on the others."""
        shapes = {name: list(counts_E.shape) for name, counts_E in window.items()}
        expected = {router.name: [router.num_experts] for router in self._routers}
        if shapes != expected:
            raise MisconfigurationException(
                f"The checkpoint was saved within an accumulation window, with counts for {shapes}; the "
                f"model's routers are {expected}. Resume with the same model, or from a checkpoint at an "
                "optimizer step."
            )
        counts = torch.cat([window[router.name] for router in self._routers])
        is_first = self._group is None or dist.get_rank(self._group) == 0
        return (counts if is_first else torch.zeros_like(counts)).to(self._tokens_seen.device)
