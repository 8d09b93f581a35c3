"""A bias is moved in float32 whatever the model's precision, and what a checkpoint brings is not overwritten."""

from __future__ import annotations

import pytest
import torch
from foreign_training import WITH_BIAS, LanguageModel, build_model, fit, moved
from lightning.pytorch.callbacks import Callback
from tiny_moe import Gate, GateAdapter, TinyMoE, data, make_trainer
from torch import Tensor

from lightning_dsv3.balance import Float32Biases, find_routers
from lightning_dsv3.callbacks import AuxFreeBalanceCallback

START = 5.001  # bfloat16 has 5.0 and 5.03125
SMALL_RATE = 0.001


def fill(module: LanguageModel, value: float = START) -> LanguageModel:
    for router in find_routers(module.model):
        router.bias.fill_(value)
    return module


def biases(module: LanguageModel) -> list[list[float]]:
    return [router.bias.tolist() for router in find_routers(module.model)]


class CountsWindows(LanguageModel):
    """Keeps the bias that the rule gives, on lists."""

    def on_train_start(self) -> None:
        start = float(torch.tensor(START))
        self.expected = [[start] * router.num_experts for router in find_routers(self.model)]

    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
        loads = [given[: len(bias)] for given, bias in zip(self.given.values(), self.expected, strict=True)]
        self.expected = [moved(*layer, SMALL_RATE) for layer in zip(self.expected, loads, strict=True)]
        self.given = {}


@pytest.mark.parametrize("family", WITH_BIAS)
def test_a_model_in_bfloat16_follows_the_rule_in_float32(family):
    module = fill(CountsWindows(build_model(family)))
    fit(module, AuxFreeBalanceCallback(SMALL_RATE), precision="bf16-true")
    assert next(module.model.parameters()).dtype == torch.bfloat16
    assert all(router.bias_tensor.dtype == torch.float32 for router in find_routers(module.model))
    assert biases(module) == module.expected


def test_a_model_that_was_cast_before_starts_from_the_values_it_has():
    module = fill(LanguageModel(build_model("deepseek_v3")))
    module.model.to(torch.bfloat16)
    fit(module, AuxFreeBalanceCallback(SMALL_RATE))
    [[*bias]] = biases(module)
    steps = [(value - 5.0) / SMALL_RATE for value in bias]
    assert steps == pytest.approx([round(step) for step in steps], abs=1e-2)
    assert any(round(step) for step in steps)


@pytest.mark.parametrize("precision", ["bf16-true", "32-true"])
@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe", "afmoe"])
def test_resume_is_bit_equal(family, precision, tmp_path):
    modules = [fill(LanguageModel(build_model(family))) for _ in range(2)]
    fit(modules[0], AuxFreeBalanceCallback(SMALL_RATE), max_epochs=2, precision=precision)
    path = tmp_path / "half.ckpt"
    half = fill(LanguageModel(build_model(family)))
    fit(half, AuxFreeBalanceCallback(SMALL_RATE), precision=precision).save_checkpoint(path)
    fit(modules[1], AuxFreeBalanceCallback(SMALL_RATE), ckpt_path=path, max_epochs=2, precision=precision)
    states = [module.state_dict() for module in modules]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert biases(modules[0]) == biases(modules[1]) != biases(half)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_that_is_loaded_in_mid_fit_wins(assign, dtype):
    class Loads(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
            if batch_idx == 2:
                state = module.state_dict()
                module.load_state_dict(
                    {k: torch.full_like(v, 3.0, dtype=dtype) if "bias" in k else v for k, v in state.items()},
                    assign=assign,
                )

    module = fill(LanguageModel(build_model("minimax_m2"), lr=0.0))
    fit(module, AuxFreeBalanceCallback(SMALL_RATE), Loads(), precision="bf16-true")
    assert all(abs(value - 3.0) < 1.5 * SMALL_RATE for layer in biases(module) for value in layer)
    assert any(value != 3.0 for layer in biases(module) for value in layer)


class RoundedGate(Gate):
    """A router whose forward refuses a bias of another precision than its weights."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert self.correction.dtype == self.proj.weight.dtype
        return super().forward(x)


class RoundedGateAdapter(GateAdapter):
    takes_float32_bias = False


class WithRoundedGate(TinyMoE):
    def __init__(self) -> None:
        super().__init__(lr=0.0)
        torch.manual_seed(0)
        self.gate = RoundedGate()
        self.gate.correction.fill_(START)
        self.chosen: list[list[int]] = []

    def training_step(self, batch, batch_idx):
        weights, indices = self.gate(batch["x"])
        self.chosen.append([int((indices == expert).sum()) for expert in range(4)])
        return weights.float().sum() + super().training_step(batch, batch_idx)


class TestRouterThatNeedsItsOwnPrecision:
    """The callback keeps the float32 values and writes rounded ones."""

    def fit(self, module, rows=16, ckpt_path=None, max_epochs=1):
        callback = AuxFreeBalanceCallback(0.01, routers=[RoundedGateAdapter()])
        trainer = make_trainer(callback, precision="bf16-true", max_epochs=max_epochs)
        trainer.fit(module, data(rows), ckpt_path=ckpt_path)
        return trainer

    def test_small_steps_add_up_although_each_alone_would_be_lost(self):
        module = WithRoundedGate()
        self.fit(module)
        expected = [float(torch.tensor(START))] * 4
        for load in module.chosen:
            expected = moved(expected, load, 0.01)
        assert module.gate.correction.dtype == torch.bfloat16
        assert torch.equal(module.gate.correction, torch.tensor(expected).bfloat16())
        assert (module.gate.correction != torch.tensor(START).bfloat16()).any()

    def test_the_float32_values_are_in_the_checkpoint_and_resume_bit_for_bit(self, tmp_path):
        path = tmp_path / "half.ckpt"
        self.fit(WithRoundedGate(), rows=8).save_checkpoint(path)
        [state] = [s for s in torch.load(path, weights_only=True)["callbacks"].values() if "float32_biases" in s]
        assert list(state["float32_biases"]) == ["gate"]
        assert state["float32_biases"]["gate"].dtype == torch.float32

        whole, resumed = WithRoundedGate(), WithRoundedGate()
        final = []
        for module, arguments in ((whole, {}), (resumed, {"ckpt_path": path})):
            self.fit(module, rows=8, max_epochs=2, **arguments).save_checkpoint(tmp_path / "end.ckpt")
            saved = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"].values()
            [state] = [s for s in saved if "float32_biases" in s]
            final.append(state["float32_biases"]["gate"])
        assert torch.equal(*final)


class TestFloat32Biases:
    def test_a_stale_master_gives_way_to_what_the_module_holds(self):
        gate = RoundedGate().bfloat16()
        [router] = find_routers(gate, [RoundedGateAdapter()])
        kept = Float32Biases()
        kept.of(router).fill_(1.001)
        kept.write_rounded([router])
        assert kept.of(router)[0] == torch.tensor(1.001)  # the module holds its rounded form
        gate.load_state_dict(gate.state_dict() | {"correction": torch.full((4,), 2.0)})
        assert kept.of(router).tolist() == [2.0] * 4

    def test_a_module_in_float32_is_the_truth_and_nothing_is_kept_beside_it(self):
        gate = Gate()
        [router] = find_routers(gate, [GateAdapter()])
        kept = Float32Biases()
        assert kept.of(router) is gate.correction
        assert kept.state([router]) == {}

    def test_it_never_reads_the_device(self):
        class NoReading(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                name = getattr(func, "__name__", "")
                assert name not in ("item", "__bool__", "__float__", "__int__", "tolist", "equal", "nonzero", "cpu")
                return func(*args, **(kwargs or {}))

        gate = RoundedGate().bfloat16()
        [router] = find_routers(gate, [RoundedGateAdapter()])
        kept = Float32Biases()
        kept.of(router)
        with NoReading():
            kept.of(router).add_(0.001)
            kept.write_rounded([router])
