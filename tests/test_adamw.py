"""AdamW with BF16 moments: against the formula in float64, against torch's, and in a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tiny_run import assert_same, differ, quiet_trainer, tiny_data, tiny_module
from torch import Tensor

from lightning_dsv3.config import ConfigError
from lightning_dsv3.config.run import OptimizerConfig
from lightning_dsv3.ops.adamw import BF16MomentsAdamW

SETTING: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def gradients_of(steps: int, shape: tuple[int, ...] = (7, 33)) -> list[Tensor]:
    return [torch.randn(shape) * 10.0 ** torch.randint(-6, 2, shape) for _ in range(steps)]


def run(optimizer: torch.optim.Optimizer, parameter: Tensor, gradients: list[Tensor]) -> None:
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()


def test_it_is_the_formula_with_rounded_moments():
    parameter, gradients = torch.nn.Parameter(torch.randn(7, 33)), gradients_of(12)
    p, m, v = parameter.detach().double().clone(), torch.zeros(7, 33).double(), torch.zeros(7, 33).double()
    optimizer = BF16MomentsAdamW([parameter], **SETTING)
    for step, gradient in enumerate(gradients, 1):
        run(optimizer, parameter, [gradient])
        g = gradient.double()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        p = p - 0.01 * (0.1 * p + (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8))
        torch.testing.assert_close(parameter.detach().double(), p, rtol=1e-5, atol=1e-6)
        state = optimizer.state[parameter]
        # Rounded from float32 here and from float64 there: a tie may fall the other way.
        for moment, name in ((m, "exp_avg"), (v, "exp_avg_sq")):
            assert state[name].dtype == torch.bfloat16
            torch.testing.assert_close(state[name].double(), moment, rtol=2**-8, atol=1e-30)
        m, v = state["exp_avg"].double(), state["exp_avg_sq"].double()
        p = parameter.detach().double()


def test_the_first_step_is_torch_s_and_later_ones_stay_near():
    start, gradients = torch.randn(7, 33), gradients_of(20)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    our_optimizer, optimizer = BF16MomentsAdamW([ours], **SETTING), torch.optim.AdamW([theirs], **SETTING)
    run(our_optimizer, ours, gradients[:1])
    run(optimizer, theirs, gradients[:1])
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    run(our_optimizer, ours, gradients[1:])
    run(optimizer, theirs, gradients[1:])
    moved = (theirs - start).norm()
    assert 0 < (ours - theirs).norm() < 0.01 * moved


def test_a_state_of_either_kind_goes_on():
    gradients = gradients_of(6)

    def after(kinds: tuple[type, type], steps: tuple[int, int]) -> Tensor:
        torch.manual_seed(3)
        parameter = torch.nn.Parameter(torch.randn(7, 33))
        first = kinds[0]([parameter], **SETTING)
        run(first, parameter, gradients[: steps[0]])
        second = kinds[1]([parameter], **SETTING)
        second.load_state_dict(first.state_dict())
        run(second, parameter, gradients[steps[0] : sum(steps)])
        return parameter.detach()

    straight = after((BF16MomentsAdamW, BF16MomentsAdamW), (6, 0))
    assert torch.equal(after((BF16MomentsAdamW, BF16MomentsAdamW), (3, 3)), straight)
    for kinds in ((BF16MomentsAdamW, torch.optim.AdamW), (torch.optim.AdamW, BF16MomentsAdamW)):
        torch.testing.assert_close(after(kinds, (3, 3)), straight, rtol=0, atol=1e-3)


def test_parameters_without_a_gradient_stay_and_a_closure_is_called():
    used, unused = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = BF16MomentsAdamW([used, unused], **SETTING)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = used.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3
    assert used.max() < 1
    assert torch.equal(unused, torch.ones(3))
    assert list(optimizer.state) == [used]


def test_a_rate_whose_steps_would_be_rounded_away_is_refused():
    with pytest.raises(ValueError, match=r"take a second rate below 0.999 or moments in float32"):
        BF16MomentsAdamW([torch.nn.Parameter(torch.ones(1))], betas=(0.9, 0.999))


class TestRun:
    def fit(self, steps: int, moments: str = "bfloat16", ckpt_path: Path | None = None) -> tuple[Any, Any]:
        module = tiny_module(optimizer={"moments": moments})
        trainer = quiet_trainer(max_steps=steps)
        trainer.fit(module, tiny_data(), ckpt_path=ckpt_path)
        return trainer, module

    def test_a_run_keeps_them_and_resumes_exactly(self, tmp_path):
        trainer, module = self.fit(4)
        (optimizer,) = trainer.optimizers
        dtypes = {t.dtype for state in optimizer.state.values() for name, t in state.items() if name != "step"}
        assert dtypes == {torch.bfloat16}
        half, _ = self.fit(2)
        half.save_checkpoint(tmp_path / "half.ckpt")
        _, resumed = self.fit(4, ckpt_path=tmp_path / "half.ckpt")
        assert_same(resumed.state_dict(), module.state_dict())
        _, float32 = self.fit(4, "float32")
        assert differ(float32.state_dict(), module.state_dict())
        assert {p.dtype for p in module.parameters()} == {torch.float32}

    def test_it_learns_as_with_float32(self):
        class Losses(L.Callback):
            def __init__(self) -> None:
                self.values: list[float] = []

            def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
                self.values.append(float(outputs["loss"].detach()))

        curves = []
        for moments in ("bfloat16", "float32"):
            losses = Losses()
            trainer = quiet_trainer(losses, max_steps=12, max_epochs=-1)
            trainer.fit(tiny_module(optimizer={"moments": moments}), tiny_data())
            curves.append(torch.tensor(losses.values))
        assert curves[0][0] - curves[0][-1] > 1
        torch.testing.assert_close(curves[0], curves[1], rtol=0.02, atol=0)

    def test_other_words_are_refused(self):
        with pytest.raises(ConfigError, match=r"train.optimizer.moments='fp16': .*float32"):
            OptimizerConfig(moments="fp16")
        with pytest.raises(ConfigError, match=r"train.optimizer.*0.999"):
            OptimizerConfig(moments="bfloat16", betas=[0.9, 0.999])
