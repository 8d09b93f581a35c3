"""Add auxiliary-loss-free balancing to a Trainer that exists: one callback, nothing else changes.

    python examples/existing_trainer.py              about a minute on a CPU; real text, fetched once
    python examples/existing_trainer.py --offline    with the part of the text that is on this machine already

The module is anybody's: a Hugging Face mixture of experts, built from a configuration, in a plain LightningModule. It
is trained twice from the same seed on the same batches, and the load of its experts is printed side by side. MaxVio is
the mean over layers of max load / mean load - 1: 0 is balance.
"""

import argparse
import logging
from typing import Any

import lightning as L
import torch
import transformers
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor

from lightning_dsv3 import DeepSeekV3DataModule
from lightning_dsv3.callbacks import AuxFreeBalanceCallback

SIZES: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32,
    "num_hidden_layers": 3, "first_k_dense_replace": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "q_lora_rank": None, "kv_lora_rank": 32, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 32,
    "n_routed_experts": 16, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "initializer_range": 0.05,
}  # fmt: skip
# The report's 0.001 is for runs of many thousand steps; in a few hundred a bias could not get anywhere.
UPDATE_RATE = 0.005


class LanguageModel(L.LightningModule):
    """What a user has: a model, its loss, an optimizer. It knows nothing of balancing."""

    def __init__(self) -> None:
        super().__init__()
        self.model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**SIZES))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of the next token."""
        loss: Tensor = self.model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def train(balance: AuxFreeBalanceCallback, steps: int, offline: bool) -> list[list[float]]:
    """Train with ``balance`` added to the Trainer's callbacks; return MaxVio and the loss of every step."""
    L.seed_everything(0, verbose=False)
    data = DeepSeekV3DataModule({"offline": offline}, vocab_size=SIZES["vocab_size"], sequence_length=64, batch_size=8)
    data.setup("fit")
    figures: list[list[float]] = []

    def keep(trainer: L.Trainer, *_: Any) -> None:
        figures.append([trainer.callback_metrics[key].item() for key in ("moe/max_violation", "loss")])

    trainer = L.Trainer(
        max_steps=steps, log_every_n_steps=1, callbacks=[balance, LambdaCallback(on_train_batch_end=keep)],
        logger=False, enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(LanguageModel(), data.train_dataloader())
    return figures


def main() -> None:
    """Train with the callback and without it, and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of each run")
    parser.add_argument("--offline", action="store_true", help="fetch no text")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    runs = {
        "with the callback": train(AuxFreeBalanceCallback(UPDATE_RATE), arguments.steps, arguments.offline),
        "without it": train(AuxFreeBalanceCallback(dry_run=True), arguments.steps, arguments.offline),
    }
    n = max(1, arguments.steps // 10)
    print(f"\n{f'mean of {n} steps':<20}{'MaxVio, first':>16}{'MaxVio, last':>16}{'loss, last':>14}")
    for name, steps in runs.items():
        (first, _), (last, loss) = (torch.tensor(part).mean(dim=0).tolist() for part in (steps[:n], steps[-n:]))
        print(f"{name:<20}{first:>16.2f}{last:>16.2f}{loss:>14.3f}")


if __name__ == "__main__":
    main()
