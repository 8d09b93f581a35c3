"""`balanced` in bare loops and under Fabric: the callback's results bit for bit, without a Trainer."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import test_readme
import torch
import torch.distributed as dist
from conftest import ROOT
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision
from lightning.fabric.utilities.exceptions import MisconfigurationException
from ranks import run_on_ranks
from tiny_moe import RATE, D, Gate, GateAdapter, TinyMoE, data, fit, make_trainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from lightning_dsv3.balance import balanced, bias_owner
from lightning_dsv3.callbacks import AuxFreeBalanceCallback

ROWS = 8  # four batches of two rows, seven tokens each
TOKENS_PER_BATCH = 14


def loop(
    module: TinyMoE,
    accumulate: int = 1,
    rows: int = ROWS,
    within: Callable[[balanced], None] | None = None,
    update_rate: Any = RATE,
    **arguments: Any,
) -> tuple[balanced, list[list[list[float]]]]:
    """Train as `tiny_moe.fit` does, with a loop; return the biases after each batch."""
    optimizer = module.configure_optimizers()
    biases = []
    with balanced(module, optimizer, update_rate, **arguments) as balance:
        for index, batch in enumerate(data(rows)):
            (module.training_step(batch, index) / accumulate).backward()
            if (index + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
            biases.append(module.biases())
            if within is not None:
                within(balance)
    return balance, biases


def num_hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


class TestEqualsTheCallback:
    """The same biases, weights, tokens and MaxVio as a Trainer with the callback, bit for bit."""

    @pytest.mark.parametrize("accumulate", [1, 2])
    @pytest.mark.parametrize("checkpointing", [None, "non_reentrant", "reentrant"])
    def test_in_a_bare_loop(self, accumulate, checkpointing):
        with_trainer, in_loop = (TinyMoE((6, 5, 7), checkpointing=checkpointing) for _ in range(2))
        trainer, callback = fit(with_trainer, accumulate_grad_batches=accumulate)
        balance, biases = loop(in_loop, accumulate)
        assert biases == [biases for _, _, biases in with_trainer.trace]
        assert any(any(layer) for layer in biases[-1])
        for name, tensor in with_trainer.state_dict().items():
            assert torch.equal(tensor, in_loop.state_dict()[name]), name
        assert balance.tokens_seen == callback.tokens_seen == 4 * TOKENS_PER_BATCH
        logged = trainer.callback_metrics
        assert balance.layers == ["layer_0", "layer_1", "mtp_1"]
        assert [logged[f"moe/{name}/max_violation"] for name in balance.layers] == balance.max_violations.tolist()
        assert logged["moe/max_violation"] == balance.max_violations.mean()

    def test_with_a_rate_of_the_tokens_seen_and_another_rule(self):
        def rate(tokens: int) -> float:
            return 1.0 / tokens

        with_trainer, in_loop = TinyMoE(), TinyMoE()
        make_trainer(AuxFreeBalanceCallback(rate, rule="proportional")).fit(with_trainer, data(ROWS))
        loop(in_loop, update_rate=rate, rule="proportional")
        assert in_loop.biases() == with_trainer.biases()

    def test_of_a_fused_optimizer(self):
        with_trainer, in_loop = TinyMoE(fused=True), TinyMoE(fused=True)
        fit(with_trainer)
        loop(in_loop)
        assert in_loop.biases() == with_trainer.biases()

    def test_of_a_private_router(self):
        torch.manual_seed(0)
        gates = [Gate(), Gate()]
        gates[1].load_state_dict(gates[0].state_dict())
        x = torch.randn(63, D)
        for gate in gates:
            optimizer = torch.optim.SGD(gate.parameters(), lr=0.1)
            with balanced(gate, optimizer, RATE, routers=[GateAdapter()]):
                gate(x)[0].sum().backward()
                optimizer.step()
        assert gates[0].correction.abs().max() == torch.tensor(RATE)
        assert torch.equal(gates[0].correction, gates[1].correction)

    def test_in_bfloat16_where_a_rounded_bias_would_swallow_the_steps(self):
        with_trainer, in_loop = TinyMoE().bfloat16(), TinyMoE().bfloat16()
        rows = data(ROWS)
        for module in (with_trainer, in_loop):
            module.training_step = lambda batch, index, of=module: of(batch["x"].bfloat16()).float().pow(2).mean()
        make_trainer(AuxFreeBalanceCallback(1e-3)).fit(with_trainer, rows)
        loop(in_loop, update_rate=1e-3)
        assert in_loop.biases() == with_trainer.biases()
        assert {router.bias.dtype for router in in_loop.model.routers()} == {torch.float32}


class TestFabric:
    """The wrappers that `fabric.setup` returns are looked through."""

    def run(self, module: TinyMoE, fabric: Fabric) -> tuple[balanced, list[list[list[float]]]]:
        biases = []
        model, optimizer = fabric.setup(module, module.configure_optimizers())
        with balanced(model, optimizer, RATE) as balance:
            for index, batch in enumerate(data(ROWS)):
                fabric.backward(model.training_step(batch, index))
                optimizer.step()
                balance.end_step()
                optimizer.zero_grad()
                biases.append(module.biases())
        return balance, biases

    def test_equals_the_callback_with_one_update_per_step(self):
        with_trainer, with_fabric = TinyMoE(), TinyMoE()
        fit(with_trainer)
        balance, _ = self.run(with_fabric, Fabric(accelerator="cpu", devices=1))
        assert with_fabric.biases() == with_trainer.biases()
        assert balance.tokens_seen == 4 * TOKENS_PER_BATCH
        assert balance.layers == ["layer_0", "mtp_1"], "names have nothing of the wrapper"

    def test_its_gradient_scaler_may_skip_a_step(self):
        class OnceInfinite(TinyMoE):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                return super().training_step(batch, batch_idx) * (float("inf") if batch_idx == 1 else 1.0)

        module, plain = OnceInfinite(lr=0), TinyMoE(lr=0)
        precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))
        with mock.patch.object(precision, "forward_context", no_context):
            balance, trace = self.run(module, Fabric(accelerator="cpu", devices=1, plugins=[precision]))
        assert balance.tokens_seen == 4 * TOKENS_PER_BATCH
        _, biases = loop(plain, rows=2)
        assert trace[:2] == [biases[0]] * 2, "the second step moves nothing"
        assert trace[2] != trace[1]


@contextmanager
def no_context() -> Iterator[None]:
    """Half precision off: it would round the affinities, which is not the question here."""
    yield


class TestGradientScaler:
    """A step that torch's GradScaler skips uses up its counts and moves nothing."""

    def train(self, infinite: set[int], fused: bool = False, end_step: bool = True) -> tuple[TinyMoE, list[Any]]:
        module = TinyMoE(lr=0, fused=fused)  # the weights stay, so that every batch's loads are those of any other run
        optimizer = module.configure_optimizers()
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        trace = []
        with balanced(module, optimizer, RATE) as balance:
            for index, batch in enumerate(data(ROWS)):
                loss = module.training_step(batch, index) * (float("inf") if index in infinite else 1.0)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                if end_step:
                    balance.end_step()
                optimizer.zero_grad()
                trace.append((module.biases(), balance.max_violations.tolist(), balance.tokens_seen))
        return module, trace

    @pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
    def test_moves_nothing_and_uses_up_the_counts(self, fused):
        _, all_real = self.train(set(), fused)
        _, one_skipped = self.train({1}, fused)
        zero = [[0.0] * 6, [0.0] * 5]
        assert one_skipped[0] == all_real[0]
        assert one_skipped[0][0] != zero
        assert one_skipped[1][0] == one_skipped[0][0], "the skipped step moves nothing"
        assert one_skipped[2][0] != one_skipped[1][0], "the next one does"
        # With counts left over, MaxVio would be that of two batches, and the tokens of the skipped step would be late.
        assert [tokens for _, _, tokens in one_skipped] == [TOKENS_PER_BATCH * n for n in (1, 2, 3, 4)]

    def test_the_step_after_it_sees_its_own_batch_alone(self):
        module, trace = self.train({0, 1, 2})
        alone = TinyMoE(lr=0)
        last = list(data(ROWS))[3]
        optimizer = alone.configure_optimizers()
        with balanced(alone, optimizer, RATE) as balance:
            alone.training_step(last, 0).backward()
            optimizer.step()
        assert module.biases() == alone.biases()
        assert trace[-1][1] == balance.max_violations.tolist()

    def test_without_end_step_its_counts_go_to_the_next_step(self):
        _, told = self.train({0})
        _, untold = self.train({0}, end_step=False)
        assert untold[1][2] == told[1][2] == 2 * TOKENS_PER_BATCH
        assert untold[1][1] != told[1][1], "the docstring says so"

    def test_of_a_fused_optimizer_is_known_without_a_word(self):
        assert self.train({1}, fused=True, end_step=False)[1] == self.train({1}, fused=True)[1]

    def test_a_real_step_is_not_counted_again_by_end_step(self):
        module, plain = TinyMoE(), TinyMoE()
        loop(plain)
        balance, _ = loop(module, within=lambda balance: balance.end_step())
        assert module.biases() == plain.biases()
        assert balance.tokens_seen == 4 * TOKENS_PER_BATCH


class TestWhatCounts:
    def test_a_forward_in_eval_mode_does_not(self):
        def validate(balance: balanced) -> None:
            module.eval()
            module(next(iter(data(ROWS, seed=3)))["x"])
            module.train()

        module, plain = TinyMoE(), TinyMoE()
        loop(plain)
        balance, _ = loop(module, within=validate)
        assert module.biases() == plain.biases()
        assert balance.tokens_seen == 4 * TOKENS_PER_BATCH

    def test_padding_does_not_where_the_loop_gives_a_mask(self):
        def train(module: TinyMoE, masks: list[Tensor | None]) -> int:
            optimizer = module.configure_optimizers()
            with balanced(module, optimizer, RATE) as balance:
                for batch, mask in zip(data(ROWS), masks, strict=True):
                    balance.mask(mask)
                    module.training_step(batch, 0).backward()
                    optimizer.step()
                    optimizer.zero_grad()
            return balance.tokens_seen

        masks = torch.ones(4, 2, 7, dtype=torch.int64)
        masks[0, 1, 3:] = 0
        with_trainer, in_loop = TinyMoE(), TinyMoE()
        rows = [
            row | {"attention_mask": mask} for row, mask in zip(data(ROWS).dataset, masks.flatten(0, 1), strict=True)
        ]
        callback = AuxFreeBalanceCallback(RATE)
        make_trainer(callback).fit(with_trainer, DataLoader(rows, batch_size=2))
        assert train(in_loop, list(masks)) == callback.tokens_seen == 4 * TOKENS_PER_BATCH - 4
        assert in_loop.biases() == with_trainer.biases()
        assert train(TinyMoE(), [masks[0], None, None, None]) == 4 * TOKENS_PER_BATCH - 4, (
            "None counts everything again"
        )

    def test_a_closure_of_the_optimizer_does(self):
        module, plain = TinyMoE(), TinyMoE()
        loop(plain)
        optimizer = module.configure_optimizers()
        with balanced(module, optimizer, RATE):
            for index, batch in enumerate(data(ROWS)):

                def closure(batch: Any = batch, index: int = index) -> Tensor:
                    optimizer.zero_grad()
                    loss = module.training_step(batch, index)
                    loss.backward()
                    return loss

                optimizer.step(closure)
        assert module.biases() == plain.biases()

    def test_dry_run_measures_and_moves_nothing(self):
        module, moving = TinyMoE(), TinyMoE()
        measured: list[list[float]] = []
        loop(module, dry_run=True, within=lambda balance: measured.append(balance.max_violations.tolist()))
        assert not any(any(layer) for layer in module.biases())
        assert all(value > 0 for values in measured for value in values)
        assert bias_owner(module.model.routers()[0]) is None
        first: list[list[float]] = []
        loop(moving, within=lambda balance: first.append(balance.max_violations.tolist()))
        assert first[0] == measured[0]

    def test_max_violation_before_the_first_step_is_nan(self):
        module = TinyMoE()
        with balanced(module, module.configure_optimizers()) as balance:
            assert balance.max_violations.isnan().tolist() == [True, True]


class TestResume:
    def test_goes_on_bit_for_bit(self):
        whole, first, second = TinyMoE(lr=0), TinyMoE(lr=0), TinyMoE(lr=0)
        balance, _ = loop(whole)
        states: list[dict[str, Any]] = []
        loop(first, rows=4, within=lambda balance: states.append(balance.state_dict()))
        second.load_state_dict(first.state_dict())
        optimizer = second.configure_optimizers()
        resumed = balanced(second, optimizer, RATE)
        resumed.load_state_dict(states[-1])
        with resumed:
            for batch in list(data(ROWS))[2:]:
                second.training_step(batch, 0).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert second.biases() == whole.biases()
        assert resumed.tokens_seen == balance.tokens_seen == 4 * TOKENS_PER_BATCH

    def test_state_is_of_plain_things(self, tmp_path):
        balance, _ = loop(TinyMoE())
        torch.save(balance.state_dict(), tmp_path / "state.pt")
        assert torch.load(tmp_path / "state.pt", weights_only=True)["tokens_seen"] == 4 * TOKENS_PER_BATCH


class TestRelease:
    def test_the_model_is_as_before_after_the_block(self):
        module = TinyMoE()
        hooks = num_hooks(module)
        seen: list[tuple[int, Any]] = []
        balance, _ = loop(
            module, within=lambda _: seen.append((num_hooks(module), bias_owner(module.model.routers()[0])))
        )
        assert seen[0][0] > hooks
        assert seen[0][1] is balance
        assert num_hooks(module) == hooks
        assert bias_owner(module.model.routers()[0]) is None
        before = module.biases()
        optimizer = module.configure_optimizers()
        module.training_step(next(iter(data(ROWS))), 0).backward()
        optimizer.step()
        assert module.biases() == before

    def test_also_after_an_exception_which_goes_on(self):
        module = TinyMoE()
        optimizer = module.configure_optimizers()
        with pytest.raises(KeyError, match="mine"), balanced(module, optimizer):
            raise KeyError("mine")
        assert num_hooks(module) == 0
        assert bias_owner(module.model.routers()[0]) is None
        assert not optimizer._optimizer_step_post_hooks

    def test_what_was_taken_before_a_refusal_is_given_back(self):
        module = TinyMoE()
        first, second = module.model.routers()
        owner = balanced(nn.ModuleList([second]), module.configure_optimizers())
        with owner:
            with pytest.raises(MisconfigurationException, match="two owners"):
                balanced(module, module.configure_optimizers()).__enter__()
            assert bias_owner(first) is None
            assert bias_owner(second) is owner
            assert not first._forward_hooks

    def test_the_model_is_not_kept_alive(self):
        module = TinyMoE()
        reference = weakref.ref(module)
        loop(module)
        del module
        gc.collect()
        assert reference() is None

    def test_a_second_block_goes_on_counting(self):
        module = TinyMoE()
        optimizer = module.configure_optimizers()
        balance = balanced(module, optimizer, RATE)
        for batch in data(4):
            with balance:
                module.training_step(batch, 0).backward()
                optimizer.step()
        assert balance.tokens_seen == 2 * TOKENS_PER_BATCH


class TestErrors:
    """One error each, with the remedy."""

    def test_an_owner_within_an_owner(self):
        module = TinyMoE()
        optimizer = module.configure_optimizers()
        with balanced(module, optimizer), pytest.raises(MisconfigurationException, match=r"two owners.*dry_run=True"):
            balanced(module, optimizer).__enter__()

    def test_a_model_without_routers(self):
        linear = nn.Linear(2, 2)
        with pytest.raises(MisconfigurationException, match=r"No router found in Linear.*routers=\[\.\.\.\]"):
            balanced(linear, torch.optim.SGD(linear.parameters())).__enter__()

    def test_routers_without_a_bias(self):
        module = TinyMoE(topk_method="greedy")
        with pytest.raises(MisconfigurationException, match=r"None of the 2 routers.*install_biases"):
            balanced(module, module.configure_optimizers()).__enter__()
        loop(TinyMoE(topk_method="greedy"), dry_run=True)

    def test_a_router_that_is_not_seen(self):
        module = TinyMoE()
        module.model.routers()[1].eval()
        with pytest.raises(MisconfigurationException, match=r"mtp_1 .*eval\(\) mode; call \.train\(\)"):
            loop(module)

    @pytest.mark.parametrize("rate", [-1.0, float("nan")])
    def test_an_impossible_rate(self, rate):
        module = TinyMoE()
        with pytest.raises(ValueError, match="update_rate"):
            balanced(module, module.configure_optimizers(), rate)
        with pytest.raises(ValueError, match="update_rate"):
            loop(module, update_rate=lambda tokens: rate)

    def test_an_unknown_rule(self):
        module = TinyMoE()
        with pytest.raises(ValueError, match="sign, proportional, centred"):
            balanced(module, module.configure_optimizers(), rule="sgin")

    def test_what_is_no_torch_optimizer(self):
        with pytest.raises(TypeError, match=r"optimizer is a object.*torch\.optim\.Optimizer"):
            balanced(TinyMoE(), object())

    def test_gate_values_that_are_not_finite(self):
        module = TinyMoE()
        batch = next(iter(data(ROWS)))

        def train() -> None:
            optimizer = module.configure_optimizers()
            with balanced(module, optimizer):
                module.training_step({"x": batch["x"] * float("nan")}, 0).backward()
                optimizer.step()

        with pytest.raises(RuntimeError, match=r"layer_0.*not finite"):
            train()
        assert not any(any(layer) for layer in module.biases())


def rows_of(rank: int, world_size: int) -> list[Tensor]:
    """Batches of this rank; those of all ranks together are the same for any number of ranks."""
    rows = torch.stack([row["x"] for row in data(24).dataset])
    return list(rows[rank::world_size].split(8 // world_size))


def train_on_rank(world_size: int, skip: bool = False) -> dict[str, Any]:
    """Train with lr=0, as the rounding of other ranks' gradients may choose another expert."""
    if world_size > 1:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if world_size > 1 else 0
    module = TinyMoE((6, 6, 5), lr=0)
    model: nn.Module = DistributedDataParallel(module) if world_size > 1 else module
    optimizer = module.configure_optimizers()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    trace = []
    with (
        mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce,
        balanced(model, optimizer, RATE) as balance,
    ):
        for index, x in enumerate(rows_of(rank, world_size)):
            # An infinity in one rank's gradient is in every rank's after their sum.
            infinite = skip and index == 1 and rank == world_size - 1
            scaler.scale(model(x).pow(2).mean() * (float("inf") if infinite else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            balance.end_step()
            optimizer.zero_grad()
            trace.append((module.biases(), balance.max_violations.tolist(), balance.tokens_seen))
    if world_size > 1:
        dist.destroy_process_group()
    return {"trace": trace, "collectives": all_reduce.call_count, "layers": balance.layers}


@pytest.mark.distributed
@pytest.mark.parametrize("skip", [False, True], ids=["all_real", "one_skipped"])
def test_two_ranks_equal_one_with_one_collective_per_step(skip):
    one = train_on_rank(1, skip)
    assert one["collectives"] == 0
    for rank in run_on_ranks(2, train_on_rank, 2, skip):
        assert rank["trace"] == one["trace"]
        assert rank["collectives"] == 3
        assert rank["layers"] == one["layers"] == ["layer_0", "layer_1", "mtp_1"], "names have nothing of DDP"


PAGE = ROOT / "docs" / "balance.md"
BLOCKS = [block for block in test_readme.read_blocks(PAGE.read_text(encoding="utf-8")) if block.language == "python"]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_the_page_on_balance_shows_code_that_runs(block, tmp_path):
    test_readme.test_python_block_runs(block, tmp_path)


def test_each_loop_on_the_page_takes_ten_lines():
    loops = [block.code for block in BLOCKS if "with balanced(" in block.code]
    assert len(loops) >= 2
    for code in loops:
        assert len([line for line in code.splitlines() if line.strip()]) <= 10
