"""The balance losses in DeepSeekV3Module: what is added, what reaches the routers, micro-batches and ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from ranks import run_on_ranks
from test_module import LENGTH, SMALL, ListLogger, Tokens, loader, module, trainer
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lightning_dsv3.config import BalanceArgs, ConfigError, DeepSeekV3Config, load_run_config
from lightning_dsv3.layers.router import Router, RouterOutput
from lightning_dsv3.module import DeepSeekV3Module
from lightning_dsv3.ops import balance_losses as ops
from lightning_dsv3.ops.balance_methods import CountWindow, balance_terms

METHODS = ("sequence", "batch", "global_batch", "v2", "cv2", "z")
GROUPS, GROUPS_PER_TOKEN = 4, 2  # of the tiny preset


def routing_of(model: torch.nn.Module, rows: range) -> tuple[RouterOutput, ...]:
    ids = torch.stack([Tokens()[i]["input_ids"] for i in rows])
    return model(ids, labels=ids, return_logits=False).routing


def by_hand(method: str, r: RouterOutput, num_sequences: int) -> Tensor:
    """A method with its default strengths on one router."""
    tokens = {"affinity_TE": r.affinity_TE, "expert_TK": r.expert_TK}
    sequences = {**tokens, "num_sequences": num_sequences}
    groups = {**sequences, "num_groups": GROUPS}
    match method:
        case "sequence":
            return ops.sequence_balance_loss(**sequences, alpha=1e-4)
        case "batch":
            return ops.batch_balance_loss(**tokens, alpha=1e-3)
        case "global_batch":
            counts = ops.count_choices(**tokens)
            return ops.global_batch_balance_loss(affinity_TE=r.affinity_TE, counts_E=counts, alpha=1e-3)
        case "v2":
            return (
                ops.sequence_balance_loss(**sequences, alpha=0.003, selection="executed")
                + ops.device_balance_loss(**groups, alpha=0.05)
                + ops.communication_balance_loss(**groups, groups_per_token=GROUPS_PER_TOKEN, alpha=0.02)
            )
        case "cv2":
            return ops.importance_loss(gate_TK=r.gate_TK, expert_TK=r.expert_TK, num_experts=8, alpha=0.01)
        case _:
            return ops.router_z_loss(logits_TE=r.logits_TE, alpha=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_the_sum_of_its_routers_and_its_gradient_reaches_each(method: str, tmp_path: Path) -> None:
    logger, trained = ListLogger(), module(balance=[method], mtp_loss_weight=0.0)
    routing = routing_of(trained.model, range(4))
    assert len(routing) == 2, "one block and the MTP module"
    expected = sum(by_hand(method, r, num_sequences=4) for r in routing)
    routers = [m for m in trained.modules() if isinstance(m, Router)]
    gradients = torch.autograd.grad(expected, [router.weight for router in routers])
    assert all(gradient.abs().max() > 0 for gradient in gradients)

    plain = module(balance=[], mtp_loss_weight=0.0)
    for each in (trained, plain):
        trainer(tmp_path, [], logger=logger, max_steps=1, gradient_clip_val=None).fit(each, loader())
    row, without = (row for row in logger.rows if "train/total_loss" in row)
    assert row[f"train/balance/{method}"] == pytest.approx(expected.item(), rel=1e-5)
    assert row["train/total_loss"] - row["train/loss"] == pytest.approx(expected.item(), rel=1e-2, abs=1e-6)
    assert not [key for key in without if "balance" in key]
    plain_routers = [m for m in plain.modules() if isinstance(m, Router)]
    for router, other, gradient in zip(routers, plain_routers, gradients, strict=True):
        added = router.weight.grad - other.weight.grad
        assert (added - gradient).abs().max() < 5e-3 * gradient.abs().max()


def test_methods_add_up_and_each_is_logged(tmp_path: Path) -> None:
    logger = ListLogger()
    trainer(tmp_path, [], logger=logger).fit(module(balance=METHODS, mtp_loss_weight=0.0), loader())
    for row in [row for row in logger.rows if "train/total_loss" in row]:
        added = sum(row[f"train/balance/{method}"] for method in METHODS)
        assert row["train/total_loss"] == pytest.approx(row["train/loss"] + added, rel=1e-6)
        parts = [row[f"train/balance/v2_{level}"] for level in ("expert", "device", "communication")]
        assert row["train/balance/v2"] == pytest.approx(sum(parts), rel=1e-6)
        assert 0 < row["train/balance/cv2_load"] < 7


def test_v2_lite_has_the_expert_level_alone(tmp_path: Path) -> None:
    lite = {"expert_alpha": 0.001, "device_alpha": 0.0, "communication_alpha": 0.0}
    model = module(overrides={"n_group": 1, "topk_group": 1}).model
    routing = routing_of(model, range(4))
    terms = balance_terms(routing, methods=["v2"], args=BalanceArgs.of({"v2": lite}), num_sequences=4)
    assert set(terms.figures) == {"v2_expert"}
    expected = sum(
        ops.sequence_balance_loss(
            affinity_TE=r.affinity_TE, expert_TK=r.expert_TK, num_sequences=4, alpha=0.001, selection="executed"
        )
        for r in routing
    )
    assert terms.losses["v2"].item() == pytest.approx(expected.item())


def test_the_choice_of_selection_reaches_the_losses() -> None:
    model = module().model
    for router in [m for m in model.modules() if isinstance(m, Router)]:
        router.bias[0] = 9.0  # every token executes expert 0
    routing = routing_of(model, range(4))
    for method in ("sequence", "batch", "global_batch", "v2"):
        values = [
            balance_terms(
                routing,
                methods=[method],
                args=BalanceArgs.of({method: {"selection": selection}}),
                num_sequences=4,
                num_groups=GROUPS,
                groups_per_token=GROUPS_PER_TOKEN,
            ).losses[method]
            for selection in ("unbiased", "executed")
        ]
        assert values[0] != values[1], method


class KeepsGradients(DeepSeekV3Module):
    """Keeps each step's gradients as the optimizer gets them, and the balance losses of its micro-batches."""

    def on_train_start(self) -> None:
        super().on_train_start()
        self.steps: list[dict[str, Tensor]] = []
        self.seen: list[float] = []

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in self.named_parameters() if p.grad is not None})

    def log_dict(self, dictionary: Any, *arguments: Any, **keywords: Any) -> None:
        self.seen += [value.item() for key, value in dictionary.items() if key.endswith("global_batch")]
        super().log_dict(dictionary, *arguments, **keywords)


def keeps_gradients(**arguments: Any) -> KeepsGradients:
    torch.manual_seed(0)
    config = DeepSeekV3Config.from_preset("tiny", **SMALL)
    return KeepsGradients(config, **({"learning_rate": 0.0} | arguments))


def rows(start: int, stop: int, batch_size: int) -> DataLoader:
    return DataLoader(Subset(Tokens(), range(start, stop)), batch_size=batch_size)


@pytest.mark.parametrize("accumulate", [3, 5], ids=["short_micro_batch", "short_window_too"])
def test_uneven_micro_batches_equal_one_batch(accumulate: int, tmp_path: Path) -> None:
    strong = {"sequence": {"alpha": 1.0}, "z": {"alpha": 0.1}}
    arguments = {"balance": ["sequence", "v2", "z"], "balance_args": strong}
    whole, parts = keeps_gradients(**arguments), keeps_gradients(**arguments)
    trainer(tmp_path, [], max_steps=1).fit(whole, rows(0, 10, 10))
    trainer(tmp_path, [], max_steps=1, accumulate_grad_batches=accumulate).fit(parts, rows(0, 10, 4))
    assert whole.tokens_seen == parts.tokens_seen == 10 * LENGTH
    (one,), (other,) = whole.steps, parts.steps
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=1e-3, atol=1e-6, msg=name)


def test_even_micro_batches_are_left_bit_for_bit_as_lightning_averages_them(tmp_path: Path) -> None:
    trained = keeps_gradients(balance=["sequence"])
    trainer(tmp_path, [], max_steps=1, accumulate_grad_batches=2).fit(trained, rows(0, 8, 4))
    plain = keeps_gradients(balance=["sequence"])
    plain.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    plain.log = plain.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    for start in (0, 4):
        ids = torch.stack([Tokens()[i]["input_ids"] for i in range(start, start + 4)])
        (plain.training_step({"input_ids": ids}, 0) / 2).backward()
    for name, p in plain.named_parameters():
        assert p.grad is None or torch.equal(p.grad, trained.steps[0][name]), name


def running_losses(model: torch.nn.Module, micro_batches: list[range]) -> list[float]:
    """The global-batch loss of each micro-batch of one window, from the counts so far."""
    counts: list[Tensor] | None = None
    values = []
    for micro_batch in micro_batches:
        routing = routing_of(model, micro_batch)
        new = [ops.count_choices(affinity_TE=r.affinity_TE, expert_TK=r.expert_TK) for r in routing]
        counts = new if counts is None else [a + b for a, b in zip(counts, new, strict=True)]
        losses = [
            ops.global_batch_balance_loss(affinity_TE=r.affinity_TE, counts_E=c, alpha=1.0)
            for r, c in zip(routing, counts, strict=True)
        ]
        values.append(sum(losses).item())
    return values


GLOBAL = {"balance": ["global_batch"], "balance_args": {"global_batch": {"alpha": 1.0}}}


def test_global_batch_counts_the_window_so_far_and_begins_anew_at_each_step(tmp_path: Path) -> None:
    trained = keeps_gradients(**GLOBAL)
    # Validation after every micro-batch sees other rows, and must not count.
    fitted = trainer(tmp_path, [], max_steps=2, accumulate_grad_batches=2, val_check_interval=1)
    fitted.fit(trained, rows(0, 16, 4), rows(40, 48, 4))
    expected = [
        *running_losses(trained.model, [range(4), range(4, 8)]),
        *running_losses(trained.model, [range(8, 12), range(12, 16)]),
    ]
    assert trained.seen == pytest.approx(expected, rel=1e-5)
    alone = running_losses(trained.model, [range(4, 8)])
    assert trained.seen[1] != pytest.approx(alone[0], rel=1e-5)


def test_a_second_fit_does_not_go_on_with_an_open_window(tmp_path: Path) -> None:
    trained = keeps_gradients(**GLOBAL)

    class Stop(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(tmp_path, [Stop()], accumulate_grad_batches=4).fit(trained, rows(0, 16, 4))
    trainer(tmp_path, [], max_steps=1).fit(trained, rows(16, 20, 4))
    assert trained.seen == pytest.approx(running_losses(trained.model, [range(16, 20)]), rel=1e-5)


def global_batch_on(world_size: int, accumulate: int, folder: str) -> dict[str, Any]:
    trained = keeps_gradients(**GLOBAL)
    fitted = trainer(
        Path(folder),
        [],
        max_steps=1,
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        accumulate_grad_batches=accumulate,
        use_distributed_sampler=False,
    )
    mine = list(range(16))[fitted.global_rank :: world_size]
    fitted.fit(trained, DataLoader(Subset(Tokens(), mine), batch_size=16 // world_size // accumulate))
    return {"gradients": trained.steps[0], "seen": trained.seen}


@pytest.mark.distributed
def test_global_batch_on_two_ranks_is_that_of_one_process(tmp_path: Path) -> None:
    one = global_batch_on(1, 1, str(tmp_path))
    ranks = run_on_ranks(2, global_batch_on, 2, 1, str(tmp_path))
    for rank in ranks:
        for name, gradient in one["gradients"].items():
            torch.testing.assert_close(rank["gradients"][name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    # Each rank's loss has its own P; their mean is the whole batch's.
    assert sum(rank["seen"][0] for rank in ranks) / 2 == pytest.approx(one["seen"][0], rel=1e-5)


@pytest.mark.distributed
def test_global_batch_on_two_ranks_with_accumulation_is_that_of_one_with_it(tmp_path: Path) -> None:
    one = global_batch_on(1, 2, str(tmp_path))
    for rank in run_on_ranks(2, global_batch_on, 2, 2, str(tmp_path)):
        for name, gradient in one["gradients"].items():
            torch.testing.assert_close(rank["gradients"][name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_a_window_reduces_all_routers_at_once_and_keeps_the_first_ones_when_one_is_missing() -> None:
    calls = []

    def doubled(counts: Tensor) -> Tensor:
        calls.append(len(counts))
        return counts * 2

    window = CountWindow()
    window.add([torch.tensor([1, 2]), torch.tensor([3, 4, 5])], doubled)
    (only,) = window.add([torch.tensor([1, 1])], doubled)
    assert (calls, only.tolist()) == ([5, 2], [4, 6])
    assert [c.tolist() for c in window.add([torch.tensor([0, 0]), torch.tensor([1, 0, 0])])] == [[4, 6], [7, 8, 10]]


def test_a_model_without_routers_has_no_terms() -> None:
    assert balance_terms([], methods=METHODS, args=BalanceArgs(), num_sequences=1).losses == {}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["balance=[sequenc]"], ["sequenc", "did you mean 'sequence'"]),
        (["balance=[v2]", "model.n_group=1", "model.topk_group=1"], ["v2", "model.n_group=1", "device_alpha=0"]),
        (["balance=[cv2]", "model.num_experts_per_tok=1", "model.topk_group=1"], ["cv2", "norm_topk_prob=false"]),
        (["balance_args.v2.device_alpha=-1"], ["device_alpha=-1"]),
        (["balance_args.v2.selection=biased"], ["biased", "unbiased, executed"]),
        (["balance_args.z.alpha=nan"], ["alpha=nan"]),
        (["balance_args.z.selection=executed"], ["selection", "no such key"]),
        (["balance_args.aux_free.rule=signs"], ["rule='signs'", "sign, proportional, centred"]),
    ],
    ids=lambda words: " ".join(words),
)
def test_what_cannot_be_is_one_error_with_key_and_fix(words: list[str], named: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_run_config(words)
    assert all(word in str(error.value) for word in named), error.value


def test_parameters_are_read_and_the_other_defaults_stay() -> None:
    args = load_run_config(["balance=[batch,v2,z]", "balance_args.batch.selection=executed"]).balance_args
    assert (args.batch.alpha, args.batch.selection) == (1e-3, "executed")
    assert (args.v2.expert_alpha, args.v2.device_alpha, args.v2.communication_alpha) == (0.003, 0.05, 0.02)
    assert DeepSeekV3Module("tiny", balance_args={"batch": {"selection": "executed"}}).balance_args == args


def test_a_checkpoint_keeps_the_methods_and_their_parameters(tmp_path: Path) -> None:
    trained = module(balance=["global_batch", "v2", "z"], balance_args={"v2": {"device_alpha": 0.5}})
    fitted = trainer(tmp_path, [], max_steps=1)
    fitted.fit(trained, loader())
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    rebuilt = DeepSeekV3Module.load_from_checkpoint(tmp_path / "a.ckpt")
    assert (rebuilt.balance, rebuilt.balance_args) == (trained.balance, trained.balance_args)
    assert not [key for key in torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"] if "count" in key]
