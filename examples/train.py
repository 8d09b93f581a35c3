"""Train a DeepSeek-V3-style mixture of experts with multi-token prediction and auxiliary-loss-free balancing.

    lightning run model examples/train.py                                  minutes on a laptop, real text, no GPU
    lightning run model examples/train.py train.total_tokens=4000000 model.hidden_size=256
    lightning run model examples/train.py study=no_aux_free                 the same with the bias left alone
    lightning run model --devices 2 --accelerator cpu examples/train.py    two processes, same steps
    lightning run model examples/train.py resume=runs/<run>                go on

Every word `key=value` changes the configuration; `lightning run model --help` and the README tell more.
"""

import sys

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import distributed

from lightning_dsv3 import DeepSeekV3DataModule, DeepSeekV3Module
from lightning_dsv3.callbacks import (
    AuxFreeBalanceCallback,
    ExpertLoadMonitor,
    KernelChoice,
    RunFolder,
    StepProgressBar,
)
from lightning_dsv3.cli.trainer_arguments import trainer_arguments
from lightning_dsv3.config import ConfigError, load_run_config
from lightning_dsv3.parallel import checkpoint_blocks, compile_model


def main() -> None:
    """Run what the command line asks for."""
    config = load_run_config(sys.argv[1:])
    train, aux_free = config.train, config.balance_args.aux_free
    run = RunFolder(config)
    monitor = ExpertLoadMonitor()
    balance = AuxFreeBalanceCallback(
        update_rate=train.scheduled("bias_update_rate") if aux_free.update_rate is None else aux_free.update_rate,
        rule=aux_free.rule,
        dry_run="aux_free" not in config.balance,  # still measures MaxVio
    )
    arguments = {
        "max_steps": train.max_steps,
        "gradient_clip_val": train.gradient_clip_norm,
        "val_check_interval": train.validate_every_steps,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 5,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(
        logger=run.loggers(),
        callbacks=[
            balance,
            monitor,
            run,
            StepProgressBar(),
            KernelChoice(config.kernels),
            ModelCheckpoint(
                dirpath=run.path / "checkpoints", filename="step-{step}", auto_insert_metric_name=False,
                every_n_train_steps=train.validate_every_steps, save_last=True,
            ),
        ],
        **trainer_arguments(arguments, config.trainer),
    )  # fmt: skip

    L.seed_everything(config.seed, verbose=False)
    module = DeepSeekV3Module(
        config.model,
        balance=config.balance,
        balance_args=config.balance_args,
        mtp_loss_weight=train.scheduled("mtp_loss_weight"),
        learning_rate=train.scheduled("learning_rate"),
        optimizer=train.optimizer,
    )
    checkpoint_blocks(module.model, train.activation_checkpointing)
    compile_model(module.model, train.compile)
    data = DeepSeekV3DataModule(
        config.data,
        vocab_size=config.model.vocab_size,
        sequence_length=train.sequence_length,
        batch_size=train.batch_sizes,
        seed=config.seed,
    )
    trainer.fit(module, data, ckpt_path=run.checkpoint, **run.safe_loading)
    if not run.validated(trainer):
        trainer.validate(module, data, verbose=False, **run.safe_loading)
    run.finish(trainer, module, monitor)
    if distributed.is_initialized():
        distributed.destroy_process_group()  # Lightning leaves gloo's open, which can abort the process at its exit
    if run.stopped_by is not None:
        sys.exit(128 + run.stopped_by)


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
