"""FP8 by Transformer Engine in models and runs, with the stand-in of :mod:`te_stand_in` in its place."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import te_stand_in
import torch
import torch.distributed as dist
from te_stand_in import Call, installed
from test_fp8_emulated import FITTING
from test_precision import Losses, fitting_module
from tiny_model import tiny_model
from tiny_run import assert_same, quiet_trainer, tiny_data
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_dsv3.callbacks import AuxFreeBalanceCallback, FP8Monitor
from lightning_dsv3.config import ConfigError
from lightning_dsv3.layers.linear import Linear
from lightning_dsv3.layers.te import MicroBatches
from lightning_dsv3.module import DeepSeekV3Module
from lightning_dsv3.ops.backends import forced_kernels
from lightning_dsv3.parallel import checkpoint_blocks
from lightning_dsv3.parallel.fp8 import convert_from_fp8, convert_to_fp8, is_fp8, share_micro_batches
from lightning_dsv3.precision import FP8BlockPrecision

calls = te_stand_in.calls


def loss_and_gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids, labels=ids)
    loss = output.loss + sum(output.mtp_losses)
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_near(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative to each tensor's length: BF16 sums in another order, so a number may be rounded the other way."""
    assert ours.keys() == expected.keys()
    for name in ours:
        error = (ours[name] - expected[name]).norm() / expected[name].norm().clamp(min=1e-30)
        assert error < tolerance, (name, error)


class TestModel:
    def test_it_has_the_emulation_s_loss_and_gradients(self, calls):
        model, ids = tiny_model(**FITTING), torch.randint(0, 64, (2, 30))
        found = []
        for backend in ("te", "emulate"):
            convert_to_fp8(model, backend=backend)
            found.append(loss_and_gradients(model, ids))
        assert abs(found[0]["loss"] - found[1]["loss"]) < 1e-3 * found[1]["loss"]
        assert_near(*found, tolerance=0.06)
        assert {call.kind for call in calls} == {"Linear", "LayerNormLinear", "GroupedLinear"}

    def test_nothing_of_it_is_seen_from_outside(self, calls):
        model, ids = tiny_model(**FITTING), torch.randint(0, 64, (2, 9))
        names, parameters = list(model.state_dict()), dict(model.named_parameters())
        convert_to_fp8(model, backend="te")
        loss_and_gradients(model, ids)
        assert list(model.state_dict()) == names
        assert not [name for name in names if name.endswith("_extra_state")]
        assert {name: id(p) for name, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
        assert not [m for m in model.modules() if isinstance(m, te_stand_in.Module)]

    def test_copies_and_pickles_have_their_own(self, calls):
        model, ids = tiny_model(**FITTING), torch.randint(0, 64, (2, 9))
        convert_to_fp8(model, backend="te")
        share_micro_batches(model, MicroBatches(keep=True, sharded=False))
        model.train()
        expected = loss_and_gradients(model, ids)
        linear = model.blocks[1].attention.kv_down
        assert vars(linear)["_te"].modules
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            copied = other.blocks[1].attention.kv_down
            assert not vars(copied)["_te"].modules
            assert vars(copied)["_te"].micro_batches is None
            assert_same(loss_and_gradients(other, ids), expected)
            with torch.no_grad():
                copied.weight.mul_(2)
            loss_and_gradients(other, ids)
        assert_same(loss_and_gradients(model, ids), expected)

    def test_there_and_back(self, calls):
        model, ids = tiny_model(**FITTING), torch.randint(0, 64, (2, 9))
        plain, classes = model(ids).logits, [type(m) for m in model.modules()]
        convert_to_fp8(model, backend="te")
        rounded = model(ids).logits
        assert calls
        assert not torch.equal(rounded, plain)
        convert_from_fp8(model)
        assert [type(m) for m in model.modules()] == classes
        assert torch.equal(model(ids).logits, plain)
        assert not [m for m in model.modules() if "_te" in vars(m) or "backend" in vars(m)]

    def test_scales_may_change_between_two_calls(self, calls):
        model, ids = tiny_model(**FITTING), torch.randint(0, 64, (2, 9))
        outputs = []
        for pow2 in (True, False, True):
            convert_to_fp8(model, backend="te", pow2_scales=pow2)
            outputs.append(model(ids).logits)
        assert torch.equal(outputs[0], outputs[2])
        assert not torch.equal(outputs[0], outputs[1])

    @pytest.mark.parametrize("policy", ["block", "keep_routing"])
    @pytest.mark.parametrize("keep", [True, False], ids=["kept", "fresh"])
    def test_recomputed_activations_give_the_same_gradients(self, calls, policy, keep):
        ids, found, firsts = torch.randint(0, 64, (2, 30)), [], []
        for chosen in ("none", policy):
            model = checkpoint_blocks(tiny_model(**FITTING), chosen).train()
            convert_to_fp8(model, backend="te")
            share_micro_batches(model, MicroBatches(keep=keep, sharded=False))
            calls.clear()
            found.append(loss_and_gradients(model, ids))
            firsts.append([call.first for call in calls])
        assert_same(*found)
        plain, recomputed = firsts[0], firsts[1][len(firsts[0]) :]
        assert firsts[1][: len(plain)] == plain
        assert len(recomputed) > 0.9 * len(plain)  # torch stops once it has what the backward needs
        # Recomputing does not round the weights again.
        assert (set(plain), set(recomputed)) == (({True}, {False}) if keep else ({None}, {None}))

    def test_a_graph_breaks_and_goes_on(self, calls):
        layers, x = nn.Sequential(Linear(16, 32), nn.SiLU(), Linear(32, 16)), torch.randn(5, 16)
        convert_to_fp8(layers, backend="te")
        plain = layers(x)
        layers.compile(backend="eager")
        assert torch.equal(layers(x), plain)
        assert len(calls) == 4


class TestChoice:
    def test_auto_takes_it_where_it_can_be_had(self, calls, caplog):
        model, ids = tiny_model(**FITTING), torch.randint(0, 64, (1, 9))
        assert convert_to_fp8(model).summary().startswith("FP8 products (te) in ")
        with caplog.at_level("INFO"):
            model(ids)
        assert calls
        assert "fp8 on cpu in float32: te (preferred)" in caplog.text

    def test_the_table_of_kernels_forces_the_other(self, calls):
        model, ids = tiny_model(**FITTING), torch.randint(0, 64, (1, 9))
        with forced_kernels(fp8="emulate"):
            assert convert_to_fp8(model).summary().startswith("FP8 products (emulate, as forced) in ")
            model(ids)
        assert not calls

    def test_where_it_cannot_be_had_the_reason_is_told(self):
        model, ids = tiny_model(**FITTING), torch.randint(0, 64, (1, 9))
        reason = "no CUDA device" if torch.version.cuda else "this torch is built without CUDA"
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        with pytest.raises(
            ConfigError, match=rf"backend='te' of FP8: Transformer Engine cannot be used here \({reason}"
        ):
            convert_to_fp8(model, backend="te")
        assert not any(map(is_fp8, model.modules()))
        assert (
            convert_to_fp8(model, backend="auto").summary().startswith(f"FP8 products (emulate, as te: {reason}) in ")
        )
        emulated = model(ids).logits
        convert_to_fp8(model, backend="emulate")
        assert torch.equal(model(ids).logits, emulated)
        assert not [name for name in sys.modules if name.startswith("transformer_engine")]

    def test_an_input_elsewhere_is_one_error(self):
        model, ids = tiny_model(**FITTING), torch.randint(0, 64, (1, 9))
        with installed():
            convert_to_fp8(model, backend="te")
        with pytest.raises(ValueError, match="FP8 by Transformer Engine on cpu: for CUDA, not for cpu; move the model"):
            model(ids)


class TestMicroBatches:
    def run(self, model: nn.Module, calls: list[Call]) -> set[bool | None]:
        calls.clear()
        loss_and_gradients(model, torch.randint(0, 64, (1, 9)))
        return {call.first for call in calls}

    def test_weights_are_rounded_once_a_step(self, calls):
        model = tiny_model(**FITTING).train()
        convert_to_fp8(model, backend="te")
        micro_batches = MicroBatches(keep=True, sharded=False)
        share_micro_batches(model, micro_batches)
        assert self.run(model, calls) == {True}
        assert self.run(model, calls) == {False}
        micro_batches.step += 1
        assert self.run(model, calls) == {True}

    def test_a_weight_that_changes_is_noticed_without_a_step(self, calls):
        model = tiny_model(**FITTING).train()
        convert_to_fp8(model, backend="te")
        share_micro_batches(model, MicroBatches(keep=True, sharded=False))
        self.run(model, calls)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        assert self.run(model, calls) == {True}
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.detach() * 2))
        assert self.run(model, calls) == {True}
        assert self.run(model, calls) == {False}

    def test_evaluation_and_unknown_weights_keep_nothing(self, calls):
        model, ids = tiny_model(**FITTING).train(), torch.randint(0, 64, (1, 9))
        convert_to_fp8(model, backend="te")
        assert self.run(model, calls) == {None}
        for micro_batches in (MicroBatches(keep=True), MicroBatches(keep=True, sharded=True)):
            share_micro_batches(model, micro_batches)
            assert self.run(model, calls) == {None}
        share_micro_batches(model, MicroBatches(keep=True, sharded=False))
        calls.clear()
        with torch.no_grad():
            model(ids)
        model.eval()(ids)
        assert {call.first for call in calls} == {None}


def fit(steps: int = 2, ckpt_path: Any = None, backend: str = "te", **arguments: Any) -> tuple[Any, Any, list[float]]:
    losses, module = Losses(), fitting_module()
    plugin = FP8BlockPrecision(backend, **arguments.pop("plugin", {}))
    trainer = quiet_trainer(AuxFreeBalanceCallback(0.01), losses, max_steps=steps, plugins=[plugin], **arguments)
    trainer.fit(module, tiny_data(), ckpt_path=ckpt_path)
    return trainer, module, losses.values


class TestRun:
    def test_it_learns_as_the_emulation_does(self, calls):
        _, module, losses = fit(5)
        assert calls
        calls.clear()
        _, other, expected = fit(5, backend="emulate")
        assert not calls
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=5e-3, atol=0)
        assert losses[0] == pytest.approx(expected[0], rel=1e-4)
        assert losses[-1] < losses[0] - 0.5
        assert list(module.state_dict()) == list(other.state_dict())
        assert not [m for m in module.modules() if "_te" in vars(m) or is_fp8(m)]

    def test_micro_batches_share_fp8_weights_and_validation_does_not(self, calls):
        fit(2, accumulate_grad_batches=2, val_check_interval=2, limit_val_batches=1)
        order: list[bool | None] = []
        for call in calls:
            if not order or order[-1] != call.first:
                order.append(call.first)
        assert order == [True, False, None, True, False, None]
        assert all(call.grad == (call.first is not None) for call in calls)
        calls.clear()
        fit(2)
        assert {call.first for call in calls} == {None}

    def test_kept_weights_change_nothing(self, calls):
        _, kept, _ = fit(2, accumulate_grad_batches=2)
        assert False in {call.first for call in calls}
        calls.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lightning_dsv3.layers.te._hold", lambda *_: None)
            _, fresh, _ = fit(2, accumulate_grad_batches=2)
        assert {call.first for call in calls} == {None}
        assert_same(kept.state_dict(), fresh.state_dict())

    @pytest.mark.parametrize("ways", [("te", "emulate"), ("emulate", "te")], ids=lambda ways: " to ".join(ways))
    def test_a_run_goes_on_with_the_other_backend(self, calls, tmp_path, ways):
        trainer, module, _ = fit(2, backend=ways[0])
        trainer.save_checkpoint(tmp_path / "half.ckpt")
        kept = torch.load(tmp_path / "half.ckpt", weights_only=True)
        assert not [name for name in kept["state_dict"] if "extra_state" in name]
        assert_same(kept["state_dict"], module.state_dict())
        calls.clear()
        _, resumed, _ = fit(3, tmp_path / "half.ckpt", backend=ways[1])
        assert bool(calls) == (ways[1] == "te")
        _, straight, _ = fit(3, backend=ways[0])
        # One step of AdamW at learning rate 0.01 apart, of which few numbers go the other way.
        for name, tensor in straight.state_dict().items():
            difference = (resumed.state_dict()[name].float() - tensor.float()).abs().mean()
            assert difference < 1e-3, name
        loaded = DeepSeekV3Module.load_from_checkpoint(tmp_path / "half.ckpt")
        assert_same(loaded.state_dict(), kept["state_dict"])

    def test_another_list_of_modules_is_an_error(self, calls, tmp_path):
        trainer, *_ = fit(1)
        trainer.save_checkpoint(tmp_path / "half.ckpt")
        with pytest.raises(ConfigError, match="in FP8 that this one does not"):
            fit(2, tmp_path / "half.ckpt", plugin={"exclude": ["*.kv_up"]})

    def test_the_monitor_sees_its_operands(self, calls):
        figures = []
        for backend in ("te", "emulate"):
            plugins = [FP8BlockPrecision(backend)]
            trainer = quiet_trainer(FP8Monitor(), max_steps=1, plugins=plugins)
            trainer.fit(fitting_module(), tiny_data())
            figures.append({k: float(v) for k, v in trainer.logged_metrics.items() if k.startswith("fp8/")})
        assert figures[0].keys() == figures[1].keys()
        for key, value in figures[0].items():
            assert value == pytest.approx(figures[1][key], rel=0.05, abs=1e-3), key


@pytest.fixture
def one_process(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_fsdp2_gives_the_same_gradients(calls, one_process):
    model, ids = tiny_model(**FITTING).train(), torch.randint(0, 64, (2, 30))
    convert_to_fp8(model, backend="te")
    expected = loss_and_gradients(model, ids)
    sharded = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (1,))
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    share_micro_batches(sharded, MicroBatches(keep=True, sharded=True))
    calls.clear()
    for _ in range(2):
        sharded.zero_grad()
        found = loss_and_gradients(sharded, ids)
        whole = {name: getattr(t, "full_tensor", lambda t=t: t)() for name, t in found.items()}
        # The gradients of what the model and its MTP module share are added in another order.
        for name in ("embedding.weight", "head.weight"):
            torch.testing.assert_close(whole.pop(name), expected[name], rtol=1e-4, atol=1e-4)
        assert_same(whole, {name: expected[name] for name in whole})
    assert {call.first for call in calls} == {None}
    assert list(sharded.state_dict()) == list(model.state_dict())
