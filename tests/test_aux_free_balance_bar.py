"""What the progress bar shows of the balance: the mean and the worst layer of the step that it is drawn after."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from foreign_training import LanguageModel, build_model
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from tiny_moe import RATE, Gate, GateAdapter, RestOf, TinyMoE, data, make_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_dsv3.balance import progress
from lightning_dsv3.callbacks import AuxFreeBalanceCallback, StepProgressBar

LAYERS = ("layer 0", "layer 1", "mtp 1")


def expected(module: TinyMoE, names: Any = LAYERS) -> list[dict[str, float]]:
    """The same from the module's own record of what it routed, by step."""
    routed = [[[0] * len(load) for load in module.routed], *(routed for _, routed, _ in module.trace)]
    steps = []
    for before, after in itertools.pairwise(routed):
        loads = [[a - b for a, b in zip(*layer, strict=True)] for layer in zip(after, before, strict=True)]
        violations = [max(load) * len(load) / sum(load) - 1 for load in loads]
        worst = violations.index(max(violations))
        steps.append({"MaxVio": sum(violations) / len(violations), f"worst {names[worst]}": violations[worst]})
    return steps


def drawn(bar: Any) -> dict[str, float]:
    """The figures as the user sees them, read from what the bar draws."""
    if isinstance(bar, RichProgressBar):
        text = ", ".join(bar._metric_component._generate_metrics_texts())
    else:
        text = (bar.train_progress_bar.postfix or "").replace("=", ": ")
    return {key: float(value) for key, value in re.findall(r"([^,:]+): ([^,]+)(?:, |$)", text) if key != "v_num"}


class Drawn(pl.Callback):
    """After each batch, what stands in the bar: a callback that comes after it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.steps.append(drawn(trainer.progress_bar_callback))

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        self.steps.append(drawn(trainer.progress_bar_callback))


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar, StepProgressBar])
def test_every_bar_shows_the_mean_and_names_the_worst_layer(bar):
    module, watch = TinyMoE((6, 6, 5)), Drawn()
    trainer = make_trainer(
        AuxFreeBalanceCallback(RATE), bar(), watch, enable_progress_bar=True, max_steps=8, log_every_n_steps=100
    )
    trainer.fit(module, data(16))
    before, *shown = watch.steps
    assert before == {}
    # Bars show about three digits. A layer that is no longer the worst has left no key behind.
    assert shown == [{key: pytest.approx(value, abs=6e-3) for key, value in step.items()} for step in expected(module)]
    assert len(set(itertools.chain(*shown))) > 2, "the worst layer was now one, now another"
    assert trainer.progress_bar_metrics == pytest.approx(expected(module)[-1], rel=1e-6)
    assert "get_metrics" not in vars(trainer.progress_bar_callback), "the bar is left as it was"


@pytest.mark.parametrize(("arguments", "draws"), [({"refresh_rate": 4}, 2), ({"refresh_rate": 0}, 0), (None, 0)])
def test_nothing_is_worked_out_for_a_bar_that_is_not_drawn(monkeypatch, arguments, draws):
    asked = []
    real = progress.max_violations
    monkeypatch.setattr(progress, "max_violations", lambda counts: asked.append(counts) or real(counts))
    bars = [] if arguments is None else [TQDMProgressBar(**arguments)]
    trainer = make_trainer(AuxFreeBalanceCallback(RATE), *bars, enable_progress_bar=bool(bars), log_every_n_steps=100)
    trainer.fit(TinyMoE(), data(16))
    assert len(asked) == draws
    assert trainer.callback_metrics == {}, "what is logged with prog_bar=True is read by Lightning in every batch"


def test_whoever_changes_what_a_bar_shows_still_does():
    class OwnBar(TQDMProgressBar):
        def get_metrics(self, *arguments: Any) -> Any:
            return {key: value for key, value in super().get_metrics(*arguments).items() if "worst" not in key}

    watch = Drawn()
    trainer = make_trainer(AuxFreeBalanceCallback(RATE), OwnBar(), watch, enable_progress_bar=True)
    trainer.fit(TinyMoE(), data(4))
    assert [set(step) for step in watch.steps] == [set(), {"MaxVio"}, {"MaxVio"}]


def test_a_resumed_run_shows_what_the_run_would_have_shown(tmp_path):
    def run(rows: Any, ckpt_path: Any = None, callbacks: Sequence[pl.Callback] = ()) -> list[dict[str, float]]:
        watch = Drawn()
        trainer = make_trainer(
            AuxFreeBalanceCallback(RATE), StepProgressBar(), watch, *callbacks, enable_progress_bar=True, max_steps=8
        )
        trainer.fit(TinyMoE((6, 6, 5)), rows, ckpt_path=ckpt_path)
        return watch.steps

    class SaveAfterStep3(pl.Callback):
        def __init__(self, path: Path) -> None:
            self.path = path

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(self.path)

    whole = run(data(16))
    run(data(16), callbacks=[SaveAfterStep3(tmp_path / "step.ckpt")])
    rest = run(RestOf(data(16), 3), tmp_path / "step.ckpt")
    assert len(whole) == 9
    assert rest == [{}, *whole[4:]], "nothing until the first step of its own"


def test_a_hugging_face_model():
    class TwoLayers(LanguageModel):
        def on_train_batch_end(self, *_: Any) -> None:
            logged = {name: value.item() for name, value in self.trainer.callback_metrics.items()}
            by_layer = {name: logged[f"moe/layer_{name}/max_violation"] for name in (0, 1)}
            worst = max(by_layer, key=by_layer.__getitem__)
            steps.append({"MaxVio": sum(by_layer.values()) / 2, f"worst layer {worst}": by_layer[worst]})
            shown.append(dict(self.trainer.progress_bar_metrics))

    steps: list[dict[str, float]] = []
    shown: list[dict[str, float]] = []
    trainer = make_trainer(AuxFreeBalanceCallback(RATE), enable_progress_bar=True)
    ids = torch.randint(0, 32, (8, 9), generator=torch.Generator().manual_seed(2))
    trainer.fit(TwoLayers(build_model("minimax_m2")), DataLoader(list(ids), batch_size=2))
    assert len(shown) == 4
    assert shown == [pytest.approx(step, rel=1e-6) for step in steps]


def test_private_routers_have_short_names():
    class Private(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleDict({"gate": Gate()}) for _ in range(4)])

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return torch.stack([block["gate"](batch["x"])[0].mean() for block in self.blocks]).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = make_trainer(AuxFreeBalanceCallback(RATE, routers=[GateAdapter()]), enable_progress_bar=True)
    trainer.fit(Private(), data(2))
    mean, worst = trainer.progress_bar_metrics
    assert mean == "MaxVio"
    assert re.fullmatch(r"worst layer [0-3]", worst)


@pytest.mark.parametrize(
    ("layers", "short"),
    [
        (["layer_0", "mtp_1"], ["layer 0", "mtp 1"]),
        (["gate"], ["gate"]),
        (["model.blocks.3.gate", "model.blocks.12.gate"], ["layer 3", "layer 12"]),
        (
            ["encoder.blocks.0.gate", "encoder.blocks.1.gate", "decoder.blocks.1.gate"],
            ["encoder.blocks.0", "encoder.blocks.1", "decoder.blocks.1"],
        ),
        (["model.encoder.gate", "model.decoder.gate"], ["encoder", "decoder"]),
        (["layer_0", "model.gate"], ["layer_0", "model.gate"]),
    ],
)
def test_names_of_layers_in_the_bar(layers, short):
    assert progress.short_names(layers) == short


def test_a_layer_without_tokens_is_not_the_worst():
    bar, trainer = TQDMProgressBar(), make_trainer()
    trainer.callbacks.append(bar)
    violation = progress.ViolationInBar()
    violation.attach(trainer, ["layer_0", "layer_1"])
    violation.update([torch.tensor([0, 0]), torch.tensor([3, 1])])
    assert bar.get_metrics(trainer, None) == {"MaxVio": 0.5, "worst layer 1": 0.5}
    violation.update([torch.tensor([0, 0]), torch.tensor([0, 0])])
    assert bar.get_metrics(trainer, None) == {}
