"""The LightningModule: losses, optimizer and schedules around a :class:`DeepSeekV3`.

    total = L_main + lambda / D * sum_k L_MTP^k + sum of the balance losses        (report, section 2.2 and 2.1.2)

The module owns losses and never the routing bias: that belongs to ``AuxFreeBalanceCallback``. All schedules run on the
tokens seen by the whole run, so that ranks, micro-batches and a resume do not move them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_dsv3.balance import bias_owner, data_parallel_group, sum_over_ranks
from lightning_dsv3.config import (
    BalanceArgs,
    ConfigError,
    DeepSeekV3Config,
    Mark,
    OptimizerConfig,
    Schedule,
)
from lightning_dsv3.config.balance import check_balance, expert_groups
from lightning_dsv3.layers.router import Router, RouterOutput
from lightning_dsv3.metrics import BitsPerByte, MTPAcceptance
from lightning_dsv3.model import DeepSeekV3, DeepSeekV3Output
from lightning_dsv3.ops.acceptance import chain_counts, teacher_forced_acceptance
from lightning_dsv3.ops.adamw import BF16MomentsAdamW
from lightning_dsv3.ops.balance_methods import BalanceTerms, CountWindow, balance_terms
from lightning_dsv3.ops.cross_entropy import IGNORE_INDEX, shifted_targets

ScheduleLike = float | Schedule | Iterable[Mark | Mapping[str, Any]]


if TYPE_CHECKING:
    _Base = LightningModule
else:
    _Base = object


class DeepSeekV3Steps(_Base):
    """What :class:`DeepSeekV3Module` does, without its base class.

    ``lightning.pytorch`` and ``pytorch_lightning`` hold the same classes twice, and each one's Trainer takes its own
    alone. A module that inherited from both would be taken, but each package tells an overridden hook by comparing it
    with its own default, and would meet the other's. So these steps are put on either base:
    :mod:`lightning_dsv3.pytorch_lightning` has the other one.
    """

    def __init__(
        self,
        config: DeepSeekV3Config | Mapping[str, Any] | str,
        balance: Sequence[str] = ("aux_free", "sequence"),
        balance_args: BalanceArgs | Mapping[str, Mapping[str, Any]] | None = None,
        mtp_loss_weight: ScheduleLike = 0.3,
        learning_rate: ScheduleLike = 2.2e-4,
        optimizer: OptimizerConfig | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(config, str):
            config = DeepSeekV3Config.from_preset(config)
        elif isinstance(config, Mapping):
            config = DeepSeekV3Config.from_dict(config)
        self.balance = tuple(balance)
        self.balance_args = BalanceArgs.of(balance_args)
        check_balance(self.balance, self.balance_args, config)
        self.mtp_loss_weight = Schedule.of(mtp_loss_weight)
        self.learning_rate = Schedule.of(learning_rate)
        self.optimizer_config = (
            optimizer if isinstance(optimizer, OptimizerConfig) else OptimizerConfig(**(optimizer or {}))
        )
        # Plain values only: the checkpoint then loads with `weights_only=True` and rebuilds the module by itself.
        self.save_hyperparameters(
            {
                "config": config.to_dict(),
                "balance": list(self.balance),
                "balance_args": asdict(self.balance_args),
                "mtp_loss_weight": self.mtp_loss_weight.to_list(),
                "learning_rate": self.learning_rate.to_list(),
                "optimizer": asdict(self.optimizer_config),
            }
        )
        self.model = DeepSeekV3(config)
        self.tokens_seen = 0
        self._tokens_of_step = 0  # tokens of the micro-batches since the last optimizer step, all ranks
        self._tokens_of_first = 0  # of the first of them, this rank
        self._balance_counts = CountWindow()
        self._bits_per_byte: dict[str, BitsPerByte] = {}
        self._mtp_acceptance: dict[str, MTPAcceptance] = {}

    def setup(self, stage: str) -> None:
        """Refuse text with ids that the model does not have, before one of them is looked up."""
        tokens = getattr(getattr(self.trainer, "datamodule", None), "vocab_size", 0)
        known = self.model.config.vocab_size
        if tokens > known:
            raise ConfigError(
                f"vocab_size={tokens} of the data module: the model has vocab_size={known}; give the data module "
                f"vocab_size={known}, or the model as many ids as the tokenizer"
            )

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the total loss of a micro-batch."""
        input_ids = batch["input_ids"]
        output = self.model(
            input_ids, labels=batch.get("labels", input_ids), return_logits=False, document=batch.get("document")
        )
        losses = {"train/loss": output.loss}
        total = output.loss
        if output.mtp_losses:
            mtp_loss = torch.stack(output.mtp_losses).mean()
            losses["train/mtp_loss"] = mtp_loss
            # tokens_seen stands still between optimizer steps, so every micro-batch of a step has the same weight.
            total = total + self.mtp_loss_weight(self.tokens_seen) * mtp_loss
        balance = self._balance_terms(output.routing, input_ids.shape[0])
        for loss in balance.losses.values():
            total = total + loss
        for name, value in (balance.losses | balance.figures).items():
            losses[f"train/balance/{name}"] = value
        losses["train/total_loss"] = total
        rows = input_ids.shape[0]
        self.log("loss", output.loss.detach(), prog_bar=True, logger=False, batch_size=rows)
        self.log_dict({key: loss.detach() for key, loss in losses.items()}, batch_size=rows)
        return self._weighted_by_tokens(total, input_ids.numel())

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the learning rate for the tokens seen, this step's included."""
        self._average_over_tokens(optimizer)
        self.tokens_seen += self._tokens_of_step
        self._begin_step()
        rate = self.learning_rate(self.tokens_seen)
        for group in optimizer.param_groups:
            group["lr"] = rate
        self.log("train/learning_rate", rate)
        self.log("train/tokens", float(self.tokens_seen))

    def on_validation_epoch_start(self) -> None:
        """Begin bits per byte and acceptance anew."""
        self._start_metrics()

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Add a batch to the held-out loss, the bits per byte of its domains and the acceptance of MTP's drafts."""
        self._evaluate(batch, "val")

    def on_validation_epoch_end(self) -> None:
        """Log bits per byte and acceptance."""
        self._log_metrics("val")

    def on_test_epoch_start(self) -> None:
        """Begin bits per byte and acceptance anew."""
        self._start_metrics()

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """As in validation, on the test split."""
        self._evaluate(batch, "test")

    def on_test_epoch_end(self) -> None:
        """Log bits per byte and acceptance."""
        self._log_metrics("test")

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Say of each position what the model expects next, and how surprised it is by what comes.

        Rows are run one by one: the logits of one, ``S * vocab_size`` numbers, are all that is in memory at a time.

        Returns:
            ``token_losses``, float32 ``[B, S]``: nats of each label (without labels, of each id of ``input_ids``),
            where position i has the loss of label i + 1, 0 where there is none; ``predicted``, int64 ``[B, S]``: the
            likeliest next id at each position; ``domain`` ``[B]``, if the batch has it.
        """
        input_ids = batch["input_ids"]
        labels, document = batch.get("labels", input_ids), batch.get("document")
        token_losses, predicted = [], []
        for row in range(input_ids.shape[0]):
            one = slice(row, row + 1)
            output = self.model(
                input_ids[one], labels=labels[one], use_mtp=False, document=None if document is None else document[one]
            )
            token_losses.append(output.token_losses)
            predicted.append(output.logits.argmax(dim=-1))
        prediction = {"token_losses": torch.cat(token_losses), "predicted": torch.cat(predicted)}
        return prediction | ({"domain": batch["domain"]} if "domain" in batch else {})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW with weight decay on matrices only (report, section 4.2)."""
        constants = self.optimizer_config
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": constants.weight_decay},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        betas, lr = (constants.betas[0], constants.betas[1]), self.learning_rate(self.tokens_seen)
        if constants.moments == "bfloat16":
            return BF16MomentsAdamW(groups, lr=lr, betas=betas, eps=constants.eps)
        # Lightning refuses to clip the gradients of a fused optimizer in mixed precision, even where nothing is scaled.
        fused = "mixed" not in str(self.trainer.precision)
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=constants.eps, fused=fused)

    def on_train_start(self) -> None:
        """Begin an optimizer step; say once when the routers have a bias that nothing moves."""
        self._begin_step()
        if "aux_free" not in self.balance:
            return
        ownerless = [name for name, m in self.named_modules() if isinstance(m, Router) and bias_owner(m) is None]
        if ownerless:
            rank_zero_warn(
                f"balance has 'aux_free', but nothing moves the routing bias of {len(ownerless)} routers "
                f"({ownerless[0]}, ...): add AuxFreeBalanceCallback() to the Trainer's callbacks."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the tokens seen."""
        checkpoint["tokens_seen"] = self.tokens_seen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from the tokens seen."""
        self.tokens_seen = int(checkpoint.get("tokens_seen", 0))
        self._begin_step()

    def _balance_terms(self, routing: tuple[RouterOutput, ...], num_sequences: int) -> BalanceTerms:
        """Return the balance losses of a micro-batch."""
        num_groups, groups_per_token = expert_groups(self.model.config)
        return balance_terms(
            routing,
            methods=self.balance,
            args=self.balance_args,
            num_sequences=num_sequences,
            num_groups=num_groups,
            groups_per_token=groups_per_token,
            window=self._balance_counts,
            sum_over_ranks=lambda counts: sum_over_ranks(counts, data_parallel_group(self.trainer)),
        )

    # Lightning averages the micro-batches of a step, whatever their sizes, and divides by accumulate_grad_batches where
    # an epoch ends early as well. How many tokens a step will have is not known at its first backward. So each loss is
    # weighted relative to the first one's tokens, and the sum of the weights is divided out of the gradient at the end.
    # Where all are alike, both are 1 and nothing is computed.

    def _weighted_by_tokens(self, total: Tensor, num_tokens: int) -> Tensor:
        if self._tokens_of_step == 0:
            self._tokens_of_first = num_tokens
        self._tokens_of_step += num_tokens * self.trainer.world_size
        return total if num_tokens == self._tokens_of_first else total * (num_tokens / self._tokens_of_first)

    def _average_over_tokens(self, optimizer: torch.optim.Optimizer) -> None:
        even = self.trainer.accumulate_grad_batches * self._tokens_of_first * self.trainer.world_size
        if self._tokens_of_step in (0, even):
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        for gradient in gradients:
            gradient.mul_(even / self._tokens_of_step)

    def _begin_step(self) -> None:
        self._tokens_of_step = self._tokens_of_first = 0
        self._balance_counts.reset()

    def _evaluate(self, batch: Mapping[str, Tensor], stage: str) -> None:
        input_ids = batch["input_ids"]
        labels = batch.get("labels", input_ids)
        output = self.model(input_ids, labels=labels, return_logits=False, document=batch.get("document"))
        targets_BS = shifted_targets(labels, 1)
        weight = int((targets_BS != IGNORE_INDEX).sum())  # 0 for rows that only make the ranks even
        self.log(f"{stage}/loss", output.loss, batch_size=weight, sync_dist=True, on_epoch=True)
        if output.mtp_losses:
            mtp_loss = torch.stack(output.mtp_losses).mean()
            self.log(f"{stage}/mtp_loss", mtp_loss, batch_size=weight, sync_dist=True, on_epoch=True)
            self._count_drafts(output, labels, batch.get("document"))
        if "domain" not in batch or not self._bits_per_byte:
            return
        token_bytes = self.trainer.datamodule.token_bytes.to(input_ids.device)  # type: ignore[attr-defined]
        bytes_BS = torch.where(targets_BS == IGNORE_INDEX, 0, token_bytes[targets_BS.clamp(min=0)])
        for index, metric in enumerate(self._bits_per_byte.values()):
            rows = batch["domain"] == index
            metric.update(output.token_losses[rows], bytes_BS[rows])

    def _count_drafts(self, output: DeepSeekV3Output, labels: Tensor, document: Tensor | None) -> None:
        if not self._mtp_acceptance:
            return
        acceptance = teacher_forced_acceptance(
            output.hidden, output.mtp_hidden, self.model.head.weight, labels, document
        )
        greedy, sampled, counted = acceptance
        self._mtp_acceptance["mtp_acceptance"].update(*chain_counts(greedy, counted))
        self._mtp_acceptance["mtp_acceptance_sampled"].update(*chain_counts(sampled, counted))
        self._mtp_acceptance["mtp_acceptance_alone"].update(counted.sum(dim=(1, 2)), greedy.sum(dim=(1, 2)))

    def _start_metrics(self) -> None:
        """Make every metric on every rank, as computing one is a collective operation."""
        datamodule = getattr(self.trainer, "datamodule", None)
        domains = datamodule.domains if datamodule is not None and hasattr(datamodule, "token_bytes") else []
        self._bits_per_byte = {domain: BitsPerByte().to(self.device) for domain in domains}
        depths = len(self.model.mtp)
        kinds = {"mtp_acceptance": True, "mtp_acceptance_sampled": True, "mtp_acceptance_alone": False}
        self._mtp_acceptance = {
            name: MTPAcceptance(depths, conditional=conditional).to(self.device)
            for name, conditional in (kinds if depths else {}).items()
        }

    def _log_metrics(self, stage: str) -> None:
        for name, metric in self._mtp_acceptance.items():
            for depth, rate in enumerate(metric.compute().flatten(), start=1):
                if metric.conditional or depth > 1:  # nothing is before the first depth: the same figure
                    self.log(f"{stage}/{name}/{depth}", rate)
        if not self._bits_per_byte:
            return
        values = {domain: metric.compute() for domain, metric in self._bits_per_byte.items()}
        self.log_dict({f"{stage}/{domain}/bpb": value for domain, value in values.items()})
        self.log(f"{stage}/bpb", torch.stack(list(values.values())).nanmean(), prog_bar=True)


class DeepSeekV3Module(DeepSeekV3Steps, LightningModule):
    """Train, validate, test and predict with a DeepSeek-V3-style model, in any Trainer (automatic optimisation).

    A batch is a dict with ``input_ids`` int64 ``[B, S]``, and may have ``labels`` int64 ``[B, S]`` (-100 is ignored),
    ``document`` int64 ``[B, S]``, the number of each position's document, beyond which attention does not reach, and
    ``domain`` int64 ``[B]``, an index into the data module's ``domains``, for figures per domain.

    Logged: ``train/loss`` (main head), ``train/mtp_loss``, ``train/balance/<method>``, ``train/total_loss``,
    ``train/learning_rate``; ``val/loss``, ``val/mtp_loss``, and where the data module has ``token_bytes``,
    ``val/<domain>/bpb`` and their mean ``val/bpb``; the same with ``test/``.

    How often speculative decoding would accept the MTP modules' drafts, estimated on the held-out text
    (:mod:`lightning_dsv3.ops.acceptance`), is logged for each depth k: ``val/mtp_acceptance/<k>`` in greedy decoding
    and ``val/mtp_acceptance_sampled/<k>`` in sampling, both of the drafts whose predecessors were accepted, and from
    depth 2 ``val/mtp_acceptance_alone/<k>`` of all drafts, greedy. nan where no draft got so far. This costs two
    products with the head per depth and validation batch, no logits are kept.

    Every token of an optimizer step has the same weight in its gradient, however the step is cut into micro-batches: a
    short one, or a window with fewer of them at the end of an epoch, is weighted by its tokens (padding included; ranks
    must have equally many). The balance losses of a micro-batch are those of :mod:`lightning_dsv3.ops.balance_losses`
    on its tokens, so ``sequence``, ``v2`` and ``z`` are exact in this mean, ``batch`` and ``cv2`` are balance within
    the micro-batch, and ``global_batch`` counts the choices of all ranks in the micro-batches so far of the step.

    Args:
        config: The model: a configuration, its dict, or a preset's name.
        balance: Any of ``aux_free`` (the routers' bias is meant to be moved by ``AuxFreeBalanceCallback``),
            and the balance losses ``sequence``, ``batch``, ``global_batch``, ``v2``, ``cv2`` and ``z``
            (:mod:`lightning_dsv3.ops.balance_losses`).
        balance_args: Parameters per method, as in ``{"sequence": {"alpha": 1e-4, "selection": "unbiased"}}``; see
            :class:`~lightning_dsv3.config.BalanceArgs`.
        mtp_loss_weight: Weight lambda of the MTP losses' mean: a number or a schedule of tokens.
        learning_rate: A number or a schedule of tokens.
        optimizer: AdamW's constants.

    Raises:
        ConfigError: Anything impossible in the arguments.

    Example:
        >>> module = DeepSeekV3Module("tiny", balance=["sequence"], mtp_loss_weight=0.3)
        >>> module.model.config.n_routed_experts
        32
    """
