"""What FP8 loses in a run, held against a measurement by hand."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from fp8_reference import restored_by_loop
from lightning.fabric.utilities.exceptions import MisconfigurationException
from test_precision import fitting_module
from tiny_run import assert_same, quiet_trainer, tiny_data

from lightning_dsv3.callbacks.fp8_monitor import FP8Monitor
from lightning_dsv3.parallel import checkpoint_blocks
from lightning_dsv3.precision import FP8BlockPrecision


class Logged(L.Callback):
    """What was logged at every micro-batch."""

    def __init__(self) -> None:
        self.figures: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        logged = trainer.logged_metrics
        self.figures.append({key: float(value) for key, value in logged.items() if key.startswith("fp8/")})


def fit(monitor: FP8Monitor | None, module: Any = None, **arguments: Any) -> tuple[Any, list[dict[str, float]]]:
    module, logged = module or fitting_module(), Logged()
    callbacks = [logged] if monitor is None else [monitor, logged]
    trainer = quiet_trainer(*callbacks, **({"plugins": [FP8BlockPrecision()], "max_steps": 5} | arguments))
    trainer.fit(module, tiny_data())
    return module, logged.figures


def lost(x: torch.Tensor, block: tuple[int, int]) -> tuple[float, float]:
    """Underflow and relative error, in float64."""
    kept, exact = restored_by_loop(x, block), x.double().numpy()
    return float(((kept == 0) & (exact != 0)).mean()), float(np.linalg.norm(kept - exact) / np.linalg.norm(exact))


def test_figures_of_weights_and_inputs_are_those_measured_by_hand():
    module = fitting_module()
    seen = {}
    name = "model.blocks.0.attention.kv_down"  # reads the norm's float32, which autocast rounds first
    module.get_submodule(name).register_forward_hook(lambda _, arguments, __: seen.update(x=arguments[0]))
    module.get_submodule(name).register_full_backward_hook(lambda _, __, grads: seen.update(grad=grads[0]))
    weight = module.get_submodule(name).weight.detach().clone()
    experts = module.model.blocks[1].feed_forward.experts
    stacked = [m.detach().clone() for w in (experts.gate_up, experts.down) for m in w.unbind(0)]
    figures = fit(FP8Monitor(), module, max_steps=1)[1][0]
    operands = {
        "input": (seen["x"].bfloat16().flatten(0, 1), (1, 128)),
        "weight": (weight, (128, 128)),
        "gradient": (seen["grad"].flatten(0, 1), (1, 128)),
    }
    for operand, (x, block) in operands.items():
        underflowed, error = lost(x.detach().float(), block)
        assert figures[f"fp8/{name}/{operand}/relative_error"] == pytest.approx(error, rel=1e-5)
        assert figures[f"fp8/{name}/{operand}/underflowed"] == pytest.approx(underflowed, abs=1e-7)
        assert figures[f"fp8/{name}/{operand}/clipped"] == 0
    errors = np.sqrt(sum((lost(m, (128, 128))[1] * m.double().norm().item()) ** 2 for m in stacked))
    errors /= np.sqrt(sum(m.double().norm().item() ** 2 for m in stacked))
    assert figures["fp8/model.blocks.1.feed_forward.experts/weight/relative_error"] == pytest.approx(errors, rel=1e-5)
    for operand in operands:
        for figure in ("clipped", "underflowed", "relative_error"):
            every = [v for k, v in figures.items() if k.endswith(f"/{operand}/{figure}") and k.count("/") == 3]
            assert len(every) == 23
            assert figures[f"fp8/{operand}/{figure}"] == max(every)


def test_only_every_nth_step_is_measured_and_training_is_not_touched():
    several = {"accumulate_grad_batches": 2, "max_steps": 3}
    module, figures = fit(FP8Monitor(every_n_steps=2, per_layer=False), **several)
    assert {len(step) for step in figures} == {9}
    for operand in ("input", "weight", "gradient"):
        errors = [step[f"fp8/{operand}/relative_error"] for step in figures]  # the Trainer keeps the last figures
        assert errors[0] == errors[1] == errors[2] == errors[3]
        assert errors[3] != errors[4] == errors[5]
    assert not any(part._forward_hooks for part in module.modules())
    assert_same(module.state_dict(), fit(None, **several)[0].state_dict())


def test_recomputed_activations_change_no_figure():
    figures = []
    for policy in ("none", "block"):
        module = fitting_module()
        checkpoint_blocks(module.model, policy)
        figures.append(fit(FP8Monitor(), module, max_steps=1)[1][0])
    assert figures[0] == figures[1]


def test_errors_name_the_remedy():
    with pytest.raises(MisconfigurationException, match=r"no module computes in FP8; train with trainer.precision=fp8"):
        quiet_trainer(FP8Monitor()).fit(fitting_module(), tiny_data())
    with pytest.raises(MisconfigurationException, match="every_n_steps=0"):
        FP8Monitor(every_n_steps=0)
