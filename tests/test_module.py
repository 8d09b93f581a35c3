"""The LightningModule in real Trainers: losses, schedules, accumulation, precision, checkpoints and resume."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_dsv3.callbacks import AuxFreeBalanceCallback
from lightning_dsv3.config import ConfigError, DeepSeekV3Config, Schedule
from lightning_dsv3.data import DeepSeekV3DataModule
from lightning_dsv3.layers.router import Router
from lightning_dsv3.module import DeepSeekV3Module
from lightning_dsv3.parallel import checkpoint_blocks, compile_model

LENGTH = 12
SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 8, "n_routed_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip


class Tokens(Dataset):
    """Rows that depend on their index alone."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {"input_ids": torch.randint(0, 61, (LENGTH,), generator=generator)}


class ListLogger(L.pytorch.loggers.logger.Logger):
    """Keep what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    name = version = "list"

    def log_hyperparams(self, *_: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append({**metrics, "step": float(step or 0)})

    def series(self, key: str) -> list[float]:
        return [row[key] for row in self.rows if key in row]


def loader(batch_size: int = 4) -> DataLoader:
    return DataLoader(Tokens(), batch_size=batch_size)


def module(seed: int = 0, overrides: dict[str, Any] | None = None, **arguments: Any) -> DeepSeekV3Module:
    torch.manual_seed(seed)
    config = DeepSeekV3Config.from_preset("tiny", **(SMALL | (overrides or {})))
    return DeepSeekV3Module(config, **({"learning_rate": 1e-2} | arguments))


def trainer(folder: Path, callbacks: list[L.Callback] | None = None, **arguments: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "max_steps": 4, "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "log_every_n_steps": 1,
        "default_root_dir": folder, "gradient_clip_val": 1.0,
    }  # fmt: skip
    callbacks = [AuxFreeBalanceCallback(update_rate=0.01)] if callbacks is None else callbacks
    return L.Trainer(callbacks=callbacks, **(defaults | arguments))


def state_of(trained: DeepSeekV3Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trained.model.state_dict().items()}


def assert_equal_states(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_total_is_main_plus_weighted_mtp_plus_balance(tmp_path: Path) -> None:
    logger = ListLogger()
    trained = module(
        overrides={"num_nextn_predict_layers": 2},
        balance=["aux_free", "sequence", "batch"],
        balance_args={"sequence": {"alpha": 0.5}, "batch": {"alpha": 0.25}},
        mtp_loss_weight=0.3,
    )
    trainer(tmp_path, logger=logger).fit(trained, loader())
    for row in [row for row in logger.rows if "train/loss" in row]:
        expected = row["train/loss"] + 0.3 * row["train/mtp_loss"]
        expected += row["train/balance/sequence"] + row["train/balance/batch"]
        assert row["train/total_loss"] == pytest.approx(expected, rel=1e-5)
        # Three routers near balance: each balance loss is near alpha per router.
        assert row["train/balance/sequence"] == pytest.approx(1.5, rel=0.2)
        assert row["train/balance/batch"] == pytest.approx(0.75, rel=0.2)


def test_schedules_follow_tokens(tmp_path: Path) -> None:
    logger = ListLogger()
    step = 4 * LENGTH
    trained = module(
        learning_rate=[{"until": 2 * step, "value": 0.01, "shape": "linear"}, {"until": 9 * step, "value": 0.001}],
        mtp_loss_weight=[{"until": 2 * step, "value": 1.0}, {"until": 3 * step, "value": 0.0}],
    )
    trainer(tmp_path, logger=logger).fit(trained, loader())
    # The first step already learns: its rate is that of the tokens with this step's.
    assert logger.series("train/learning_rate") == pytest.approx([0.005, 0.01, 0.001, 0.001])
    assert trained.tokens_seen == 4 * step
    assert logger.series("train/tokens") == [step, 2 * step, 3 * step, 4 * step]
    rows = [row for row in logger.rows if "train/total_loss" in row]
    with_mtp = [row["train/total_loss"] - row["train/loss"] > 0.5 * row["train/mtp_loss"] for row in rows]
    assert with_mtp == [True, True, True, False]


def test_micro_batches_equal_one_batch(tmp_path: Path) -> None:
    whole, parts = module(), module()
    trainer(tmp_path).fit(whole, loader(8))
    trainer(tmp_path, accumulate_grad_batches=4).fit(parts, loader(2))
    assert whole.tokens_seen == parts.tokens_seen
    one, four = state_of(whole), state_of(parts)
    for name in one:
        torch.testing.assert_close(one[name], four[name], rtol=1e-3, atol=1e-4, msg=name)
        if name.endswith("bias"):
            assert torch.equal(one[name], four[name]), name


@pytest.mark.parametrize("policy", ["block", "keep_routing"])
def test_activation_checkpointing_moves_nothing(policy: str, tmp_path: Path) -> None:
    plain, recomputed = module(), module()
    checkpoint_blocks(recomputed.model, policy)
    trainer(tmp_path).fit(plain, loader())
    trainer(tmp_path).fit(recomputed, loader())
    assert_equal_states(state_of(plain), state_of(recomputed))


def test_compiled_blocks_have_the_biases_of_plain_ones(tmp_path: Path) -> None:
    plain, compiled = module(), module()
    compile_model(compiled.model, "blocks", backend="eager")
    trainer(tmp_path, max_steps=3).fit(plain, loader())
    trainer(tmp_path, max_steps=3).fit(compiled, loader())
    one, other = state_of(plain), state_of(compiled)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-4, msg=name)
        if name.endswith("bias"):
            assert torch.equal(one[name], other[name]), name
            assert one[name].abs().max() > 0


def test_decay_and_clipping_are_the_reports(tmp_path: Path) -> None:
    trained = module()
    fitted = trainer(tmp_path, max_steps=1)
    fitted.fit(trained, loader())
    (optimizer,) = fitted.optimizers
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"], decayed["betas"]) == (0.1, 0.0, (0.9, 0.95))
    assert all(p.dim() > 1 for p in decayed["params"])
    assert all(p.dim() == 1 for p in plain["params"])
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(trained.parameters()))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_bias_learns_in_float32_in_every_precision(precision: str, tmp_path: Path) -> None:
    trained = module()
    trainer(tmp_path, precision=precision).fit(trained, loader())
    for name, router in trained.named_modules():
        if isinstance(router, Router):
            assert router.bias.dtype == torch.float32, name
            steps = router.bias / 0.01
            torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
            assert router.bias.abs().max() > 0
    expected = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert trained.model.head.weight.dtype == expected


def test_checkpoint_is_plain_and_rebuilds_the_module_without_arguments(tmp_path: Path) -> None:
    trained = module(overrides={"v_head_dim": 12}, balance=["aux_free"], mtp_loss_weight=0.2)
    fitted = trainer(tmp_path)
    fitted.fit(trained, loader())
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    plain = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert plain["tokens_seen"] == 4 * 4 * LENGTH
    assert plain["hyper_parameters"]["config"]["v_head_dim"] == 12
    rebuilt = DeepSeekV3Module.load_from_checkpoint(tmp_path / "a.ckpt")
    assert rebuilt.model.config == trained.model.config
    assert (rebuilt.balance, rebuilt.mtp_loss_weight, rebuilt.tokens_seen) == (
        trained.balance,
        trained.mtp_loss_weight,
        trained.tokens_seen,
    )
    assert_equal_states(state_of(rebuilt), state_of(trained))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_continues_bit_for_bit(accumulate: int, tmp_path: Path) -> None:
    schedule = Schedule.of([{"until": 300.0, "value": 0.01, "shape": "linear"}, {"until": 600.0, "value": 0.0}])

    def run(steps: int, checkpoint: Path | None, rows: int = 0) -> DeepSeekV3Module:
        trained = module(learning_rate=schedule, mtp_loss_weight=schedule)
        balance = AuxFreeBalanceCallback(update_rate=schedule)
        fitted = trainer(tmp_path, [balance], max_steps=steps, accumulate_grad_batches=accumulate)
        fitted.fit(
            trained, DataLoader(torch.utils.data.Subset(Tokens(), range(rows, 64)), batch_size=4), ckpt_path=checkpoint
        )
        fitted.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return trained

    whole = state_of(run(6, None))
    half = run(3, None)
    # A plain DataLoader does not know where it stopped, so the rest of the rows is given by hand.
    resumed = run(6, tmp_path / "3.ckpt", rows=3 * 4 * accumulate)
    assert half.tokens_seen * 2 == resumed.tokens_seen
    assert_equal_states(whole, state_of(resumed))


def test_bias_that_nothing_moves_is_said_once(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="AuxFreeBalanceCallback") as caught:
        trainer(tmp_path, callbacks=[]).fit(module(), loader())
    assert len([w for w in caught if "AuxFreeBalanceCallback" in str(w.message)]) == 1
    for quiet in ({"callbacks": None}, {"callbacks": [], "balance": ["sequence"]}):
        with warnings.catch_warnings(record=True) as silent:
            warnings.simplefilter("always")
            balance = quiet.get("balance", ["aux_free"])
            trainer(tmp_path, quiet["callbacks"]).fit(module(balance=balance), loader())
        assert not [w for w in silent if "nothing moves" in str(w.message)]


def test_model_learns(tmp_path: Path) -> None:
    logger = ListLogger()
    trainer(tmp_path, logger=logger, max_steps=40, overfit_batches=1).fit(module(), loader(8))
    losses = logger.series("train/loss")
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"balance": ["aux"]}, "aux"),
        ({"balance_args": {"sequence": {"beta": 1}}}, "beta"),
        ({"balance_args": {"seq": {}}}, "known methods"),
        ({"balance_args": {"sequence": {"alpha": -1}}}, "alpha"),
        ({"optimizer": {"betas": [0.9, 1.5]}}, "betas"),
        ({"learning_rate": [{"until": -1, "value": 1}]}, "until"),
    ],
)
def test_impossible_arguments_are_named(arguments: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        module(**arguments)


@pytest.mark.parametrize("stage", ["fit", "validate", "predict"])
def test_text_with_ids_that_the_model_does_not_have_is_refused(stage: str, tmp_path: Path) -> None:
    data = DeepSeekV3DataModule(
        vocab_size=512, sequence_length=8, documents={"prose": ["It was the best of times."] * 9}
    )
    with pytest.raises(ConfigError, match=r"vocab_size=512 of the data module: the model has vocab_size=61"):
        getattr(trainer(tmp_path), stage)(module(), datamodule=data)
