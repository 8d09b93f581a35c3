"""ExpertLoadMonitor: the load of validation, by layer and domain."""

from __future__ import annotations

import ast
import csv
import itertools
import json
import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import ROOT
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from tiny_moe import Gate, GateAdapter, TinyMoE, data, make_trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dsv3.callbacks import AuxFreeBalanceCallback, ExpertLoadMonitor, expert_load_monitor

DOMAINS = ["english", "code", "math"]


class MoE(TinyMoE):
    """Records what validation routes, by domain, from what its forwards return."""

    def on_validation_start(self) -> None:
        names = [*DOMAINS, "all"]
        self.by_domain = {name: [[0] * len(load) for load in self.routed] for name in names}

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        x_TD = batch["x"].flatten(0, 1)
        num_rows, length = batch["x"].shape[:2]
        for index, layer in enumerate(self.model.layers()):
            x_TD, expert_TK = layer(x_TD)
            for row, experts in enumerate(expert_TK.view(num_rows, length, -1)):
                if "labels" in batch and (batch["labels"][row] == -100).all():
                    continue
                name = DOMAINS[batch["domain"][row]] if "domain" in batch else "all"
                for expert in experts.flatten().tolist():
                    self.by_domain[name][index][expert] += 1


class WithGate(MoE):
    """With a private router beside its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.gate(batch["x"])
        super().validation_step(batch, batch_idx)


class Data(pl.LightningDataModule):
    domains = DOMAINS

    def __init__(self, val: DataLoader) -> None:
        super().__init__()
        self.val = val

    def train_dataloader(self) -> DataLoader:
        return data(8)

    def val_dataloader(self) -> DataLoader:
        return self.val


def val_data(num_rows: int = 6, *, padding: int = 0, rows_per_batch: int = 4, **columns: Any) -> DataLoader:
    labels = torch.zeros(num_rows, 7, dtype=torch.int64)
    labels[:, :3] = -100  # some padding in every row, which counts
    labels[num_rows - padding :] = -100
    return data(num_rows, rows_per_batch=rows_per_batch, seed=5, labels=labels, **columns)


def domain_of(num_rows: int, *, num_domains: int = 2) -> Tensor:
    return torch.arange(num_rows) % num_domains


class TestLoads:
    def test_counts_by_domain_are_exact(self):
        monitor, module = ExpertLoadMonitor(), MoE((6, 6, 5))
        make_trainer(monitor).validate(module, Data(val_data(7, domain=domain_of(7))), verbose=False)
        assert monitor.loads == {
            "format": 1,
            "layers": ["layer_0", "layer_1", "mtp_1"],
            "domains": DOMAINS,
            "counts": {name: module.by_domain[name] for name in DOMAINS},
            "tokens": {"english": 4 * 7, "code": 3 * 7, "math": 0},
        }
        assert sum(map(sum, monitor.loads["counts"]["code"])) == 3 * 3 * 7 * 2

    def test_rows_of_padding_do_not_count(self):
        monitor, module = ExpertLoadMonitor(), MoE()
        val = val_data(7, padding=2, domain=domain_of(7))
        make_trainer(monitor).validate(module, Data(val), verbose=False)
        assert monitor.loads["counts"] == {name: module.by_domain[name] for name in DOMAINS}
        assert sum(monitor.loads["tokens"].values()) == 5 * 7

    @pytest.mark.parametrize("key", ["attention_mask", "is_text"])
    @pytest.mark.parametrize("with_domains", [True, False])
    def test_padding_inside_rows_does_not_count(self, key, with_domains):
        """Held against the model's own record of a run in which the padded positions are left out."""
        mask = torch.arange(7) < torch.tensor([7, 3, 1, 5, 6, 2, 4]).unsqueeze(1)
        columns = {key: mask.long()} | ({"domain": domain_of(7)} if with_domains else {})

        class Masked(MoE):
            def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
                super().validation_step({name: value for name, value in batch.items() if name != "domain"}, batch_idx)
                for row, is_text in enumerate(batch[key].bool()):
                    alone = {name: value[row : row + 1] for name, value in batch.items()}
                    alone["x"] = alone["x"][:, is_text]
                    seen.append(alone)

        seen: list[dict[str, Tensor]] = []
        module = Masked()
        monitor = ExpertLoadMonitor(**({} if key == "attention_mask" else {"mask_key": key}))
        make_trainer(monitor).validate(module, Data(val_data(7, **columns)), verbose=False)
        module.on_validation_start()
        with torch.no_grad():
            for batch in seen:
                MoE.validation_step(module, batch, 0)
        used = DOMAINS if with_domains else [*DOMAINS, "all"]
        assert monitor.loads["counts"] == {name: module.by_domain[name] for name in used}
        assert sum(monitor.loads["tokens"].values()) == int(mask.sum())

    def test_a_mask_that_is_hidden_from_it_counts_like_text(self):
        monitor, module = ExpertLoadMonitor(mask_key=None), MoE()
        val = val_data(attention_mask=torch.zeros(6, 7, dtype=torch.int64))
        make_trainer(monitor).validate(module, val, verbose=False)
        assert monitor.loads["counts"] == {"all": module.by_domain["all"]}

    def test_a_named_mask_that_is_missing_is_an_error(self):
        with pytest.raises(MisconfigurationException, match="mask_key='is_text'"):
            make_trainer(ExpertLoadMonitor(mask_key="is_text")).validate(MoE(), val_data(), verbose=False)

    @pytest.mark.parametrize("padding", [0, 3])
    def test_without_domains_everything_is_one(self, padding):
        monitor, module = ExpertLoadMonitor(), MoE()
        make_trainer(monitor).validate(module, val_data(padding=padding), verbose=False)
        assert monitor.loads["domains"] == ["all"]
        assert monitor.loads["counts"] == {"all": module.by_domain["all"]}
        assert monitor.loads["tokens"] == {"all": (6 - padding) * 7}

    def test_batches_that_are_no_mapping_count_as_one_domain(self):
        class Plain(MoE):
            def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
                super().validation_step({"x": batch[0]}, batch_idx)

        monitor, module = ExpertLoadMonitor(), Plain()
        rows = torch.utils.data.TensorDataset(torch.randn(3, 7, 8))
        make_trainer(monitor).validate(module, DataLoader(rows, batch_size=2), verbose=False)
        assert monitor.loads["counts"] == {"all": module.by_domain["all"]}

    def test_domains_can_be_named_without_a_datamodule(self):
        monitor, module = ExpertLoadMonitor(domains=DOMAINS), MoE()
        make_trainer(monitor).validate(module, val_data(domain=domain_of(6)), verbose=False)
        assert monitor.loads["domains"] == DOMAINS
        assert monitor.loads["counts"]["code"] == module.by_domain["code"]

    @pytest.mark.parametrize("num_names", [0, 1])
    def test_a_domain_without_a_name_is_an_error(self, num_names):
        monitor = ExpertLoadMonitor(domains=DOMAINS[:num_names])
        with pytest.raises(MisconfigurationException, match=rf"domain 1, and only {num_names} domains"):
            make_trainer(monitor).validate(MoE(), val_data(domain=domain_of(6)), verbose=False)

    def test_a_layer_that_validation_does_not_run_is_left_out(self):
        module = MoE((6, 6, 5))
        module.model.layers = lambda: list(module.model.blocks)
        monitor = ExpertLoadMonitor()
        trainer = make_trainer(monitor)
        trainer.validate(module, val_data(), verbose=False)
        assert monitor.loads["layers"] == ["layer_0", "layer_1"]
        assert len(monitor.loads["counts"]["all"]) == 2
        assert "val/moe/mtp_1/max_violation" not in trainer.callback_metrics
        assert trainer.callback_metrics["val/moe/max_violation"].isfinite()

    def test_the_sanity_check_does_not_count(self):
        monitor, module = ExpertLoadMonitor(), MoE()
        trainer = make_trainer(monitor, num_sanity_val_steps=1, limit_val_batches=1)
        seen = []
        trainer.callbacks[0].on_train_start = lambda *_: seen.append(monitor.loads)
        trainer.fit(module, Data(val_data(domain=domain_of(6))))
        assert seen == [None]
        assert sum(monitor.loads["tokens"].values()) == 4 * 7
        assert monitor.loads["counts"]["code"] == module.by_domain["code"]

    def test_training_does_not_count(self):
        monitor, module = ExpertLoadMonitor(), MoE()
        trainer = make_trainer(monitor, val_check_interval=2)
        trainer.fit(module, Data(val_data(domain=domain_of(6))))
        assert sum(monitor.loads["tokens"].values()) == 6 * 7

    def test_forwards_outside_a_validation_batch_do_not_count(self):
        class Sampler(pl.Callback):
            def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
                pl_module(torch.randn(4, 7, 8))

        monitor, module = ExpertLoadMonitor(), MoE()
        make_trainer(Sampler(), monitor).validate(module, val_data(8), verbose=False)
        assert monitor.loads["counts"] == {"all": module.by_domain["all"]}

    def test_keeps_the_first_and_the_last_validation(self):
        monitor, module = ExpertLoadMonitor(), MoE()
        loads = []
        trainer = make_trainer(monitor, AuxFreeBalanceCallback(0.05), val_check_interval=1)

        class Record(pl.Callback):
            def on_validation_end(self, *_: Any) -> None:
                loads.append(monitor.loads)

        trainer.callbacks.append(Record())
        trainer.fit(module, Data(val_data(domain=domain_of(6))))
        assert len(loads) == 4
        assert monitor.first_loads == loads[0]
        assert monitor.loads == loads[-1] != loads[0]

    def test_a_private_router_is_seen_through_its_adapter(self):
        module = WithGate()
        monitor = ExpertLoadMonitor(routers=[GateAdapter()])
        make_trainer(monitor).validate(module, val_data(), verbose=False)
        assert monitor.loads["layers"] == ["layer_0", "mtp_1", "gate"]
        assert sum(monitor.loads["counts"]["all"][2]) == 6 * 7 * 2

    def test_a_model_without_routers_is_an_error(self):
        with pytest.raises(MisconfigurationException, match="No router found in BoringModel"):
            make_trainer(ExpertLoadMonitor()).validate(BoringModel(), verbose=False)

    def test_lets_go_of_the_model(self):
        module = MoE()
        make_trainer(ExpertLoadMonitor()).validate(module, val_data(), verbose=False)
        assert not any(router._forward_hooks for router in module.model.routers())


class TestLogging:
    def test_logs_the_violation_of_the_whole_validation_set(self):
        module = MoE()
        trainer = make_trainer(ExpertLoadMonitor())
        trainer.validate(module, Data(val_data(7, domain=domain_of(7))), verbose=False)
        expected = {}
        for index, layer in enumerate(["layer_0", "mtp_1"]):
            load = [sum(n) for n in zip(*(module.by_domain[name][index] for name in DOMAINS), strict=True)]
            shares = [n / sum(load) for n in load if n]
            expected |= {
                f"val/moe/{layer}/max_violation": max(load) * len(load) / sum(load) - 1,
                f"val/moe/{layer}/load_entropy": -sum(p * math.log(p) for p in shares) / math.log(len(load)),
                f"val/moe/{layer}/dead_experts": load.count(0),
            }
        for key, divisor in {"max_violation": 2, "load_entropy": 2, "dead_experts": 1}.items():
            values = [expected[f"val/moe/{layer}/{key}"] for layer in ("layer_0", "mtp_1")]
            expected[f"val/moe/{key}"] = sum(values) / divisor
        logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
        assert {name: logged[name] for name in logged if name.startswith("val/")} == pytest.approx(expected, rel=1e-5)
        assert {name for name in logged if not name.startswith("val/")} == {
            "moe/bias_norm",
            "moe/layer_0/bias_norm",
            "moe/mtp_1/bias_norm",
        }

    def test_dead_experts_are_those_of_layers_that_ran(self):
        module = MoE((6, 6, 5))
        module.model.layers = lambda: list(module.model.blocks)
        for router in module.model.routers():
            router.bias.copy_(torch.arange(router.num_experts) * 10.0)  # every token chooses the last two
        trainer = make_trainer(ExpertLoadMonitor())
        trainer.validate(module, val_data(), verbose=False)
        metrics = trainer.callback_metrics
        assert metrics["val/moe/layer_1/dead_experts"] == 4
        assert metrics["val/moe/dead_experts"] == 8
        assert "val/moe/mtp_1/dead_experts" not in metrics

    def test_per_layer_false_leaves_the_figures_for_all_layers(self):
        logged = []
        for per_layer in (True, False):
            trainer = make_trainer(ExpertLoadMonitor(per_layer=per_layer), AuxFreeBalanceCallback(0.05, dry_run=True))
            trainer.fit(MoE((6, 6, 5)), Data(val_data(domain=domain_of(6))))
            monitored = {
                k: v for k, v in trainer.callback_metrics.items() if not k.endswith(("MaxVio", "max_violation"))
            }
            logged.append(monitored)
        assert set(logged[1]) == {"val/moe/load_entropy", "val/moe/dead_experts", "moe/bias_norm"}
        assert {key: logged[0][key] for key in logged[1]} == logged[1]
        assert len(logged[0]) == 3 + 3 * 3

    def test_a_private_router_and_its_bias_have_figures_too(self):
        module = WithGate()
        module.gate.correction += torch.tensor([3.0, 1.0, 1.0, -1.0])
        trainer = make_trainer(ExpertLoadMonitor(routers=[GateAdapter()]))
        trainer.validate(module, val_data(), verbose=False)
        assert trainer.callback_metrics["moe/gate/bias_norm"].item() == pytest.approx(math.sqrt(8), rel=1e-6)
        for key in ("max_violation", "load_entropy", "dead_experts"):
            assert trainer.callback_metrics[f"val/moe/gate/{key}"].isfinite()

    def test_a_csv_file_gets_every_figure(self, tmp_path):
        trainer = make_trainer(
            ExpertLoadMonitor(), AuxFreeBalanceCallback(0.05), val_check_interval=2, logger=CSVLogger(tmp_path)
        )
        trainer.fit(MoE(), Data(val_data(domain=domain_of(6))))
        with open(trainer.logger.log_dir + "/metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        first, last = [row for row in rows if row["val/moe/max_violation"]]
        for layer in ("layer_0", "mtp_1"):
            keys = [f"val/moe/{layer}/{key}" for key in ("max_violation", "load_entropy", "dead_experts")]
            keys += [f"moe/{layer}/bias_norm", f"moe/{layer}/bias_drift"]
            assert all(last[key] for key in keys)
            assert not first[f"moe/{layer}/bias_drift"]


class TestBiasFigures:
    def watch(self, module: MoE, *callbacks: Any, **arguments: Any) -> list[dict[str, Any]]:
        """Train and validate; return the biases and the logged bias figures of each validation."""
        seen = []

        class Record(pl.Callback):
            def on_validation_end(self, trainer: Any, *_: Any) -> None:
                figures = {k: v.item() for k, v in trainer.callback_metrics.items() if "/bias_" in k}
                seen.append({"biases": module.biases(), **figures})

        trainer = make_trainer(*callbacks, Record(), **{"val_check_interval": 1} | arguments)
        trainer.fit(module, Data(val_data(domain=domain_of(6))))
        return seen

    def test_norm_and_drift_are_those_of_the_biases_less_their_mean(self):
        seen = self.watch(MoE(), ExpertLoadMonitor(), AuxFreeBalanceCallback(0.05))

        def centred(bias: list[float]) -> list[float]:
            return [b - sum(bias) / len(bias) for b in bias]

        assert len(seen) == 4
        assert not any("bias_drift" in key for key in seen[0])
        for before, now in itertools.pairwise(seen):
            norms, drifts = [], []
            for index, layer in enumerate(["layer_0", "mtp_1"]):
                old, new = centred(before["biases"][index]), centred(now["biases"][index])
                norms.append(math.hypot(*new))
                drifts.append(math.dist(new, old))
                assert now[f"moe/{layer}/bias_norm"] == pytest.approx(norms[-1], rel=1e-5)
                assert now[f"moe/{layer}/bias_drift"] == pytest.approx(drifts[-1], rel=1e-5)
            assert now["moe/bias_norm"] == pytest.approx(sum(norms) / 2, rel=1e-5)
            assert now["moe/bias_drift"] == pytest.approx(sum(drifts) / 2, rel=1e-5)
            assert min(norms) > 0
            assert min(drifts) > 0

    def test_a_shift_of_all_biases_is_no_change(self):
        class Shifts(MoE):
            def on_train_batch_end(self, *_: Any) -> None:
                for router in self.model.routers():
                    router.bias += 0.5

        module = Shifts()
        for router in module.model.routers():
            router.bias.copy_(torch.arange(router.num_experts) * 0.25)
        *_, last = self.watch(module, ExpertLoadMonitor())
        assert last["biases"][1][0] == 2.0
        assert last["moe/layer_0/bias_norm"] == pytest.approx(0.25 * math.sqrt(17.5), rel=1e-6)
        assert last["moe/layer_0/bias_drift"] == pytest.approx(0, abs=1e-6)

    def test_a_router_without_a_bias_has_none(self):
        seen = self.watch(MoE(topk_method="greedy"), ExpertLoadMonitor())
        assert all(list(figures) == ["biases"] for figures in seen)

    def test_drift_goes_on_over_a_resume(self, tmp_path):
        def callbacks() -> list[pl.Callback]:
            return [ExpertLoadMonitor(), AuxFreeBalanceCallback(0.05)]

        def run(*callbacks: Any, **arguments: Any) -> tuple[Any, MoE, list[float]]:
            drifts = []

            class Record(pl.Callback):
                def on_validation_end(self, trainer: Any, *_: Any) -> None:
                    drifts.append(trainer.callback_metrics.get("moe/bias_drift"))

            module = MoE(lr=0.0)
            trainer = make_trainer(*callbacks, Record(), max_epochs=arguments.pop("max_epochs"))
            trainer.fit(module, Data(val_data(domain=domain_of(6))), **arguments)
            return trainer, module, drifts

        *_, whole = run(*callbacks(), max_epochs=2)
        trainer, *_ = run(*callbacks(), max_epochs=1)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        torch.load(tmp_path / "last.ckpt", weights_only=True)
        *_, resumed = run(*callbacks(), max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
        assert whole[0] is None
        assert whole[1] == resumed[0] > 0

    def test_a_checkpoint_from_before_there_were_biases_in_it_loads(self):
        monitor = ExpertLoadMonitor()
        monitor.load_state_dict({"first_loads": None, "loads": None})
        make_trainer(monitor).validate(MoE(), val_data(), verbose=False)
        assert set(monitor.state_dict()["biases"]) == {"layer_0", "mtp_1"}

    def test_a_sharded_bias_is_said_once_and_stops_nothing(self):
        class Sharded(GateAdapter):
            def bias(self, module: Gate) -> Tensor:
                return module.correction[:2]

        module = MoE()
        module.gate = Gate()
        monitor = ExpertLoadMonitor(routers=[Sharded()])
        trainer = make_trainer(monitor, val_check_interval=1)
        with pytest.warns(UserWarning, match=r"No figures of a routing bias.*gate.*2 of 4 values") as caught:
            trainer.fit(module, Data(val_data(domain=domain_of(6))))
        assert len([warning for warning in caught if "No figures of a routing bias" in str(warning.message)]) == 1
        assert "moe/gate/bias_norm" not in trainer.callback_metrics
        assert "moe/layer_0/bias_norm" in trainer.callback_metrics


class TestFigureFile:
    def test_is_drawn_after_each_validation_where_asked(self, tmp_path, monkeypatch):
        drawn = []
        draw = expert_load_monitor.expert_load_figure
        monkeypatch.setattr(expert_load_monitor, "expert_load_figure", lambda loads: drawn.append(loads) or draw(loads))
        monitor = ExpertLoadMonitor(figures_dir=tmp_path / "run" / "figures")
        trainer = make_trainer(monitor, AuxFreeBalanceCallback(0.05), val_check_interval=2)
        trainer.fit(MoE(), Data(val_data(domain=domain_of(6))))
        assert drawn == [monitor.first_loads, monitor.loads]
        (file,) = (tmp_path / "run" / "figures").iterdir()
        assert file.name == "expert_load.png"
        assert file.read_bytes().startswith(b"\x89PNG")

    def test_is_not_drawn_unless_asked(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        make_trainer(ExpertLoadMonitor()).validate(MoE(), val_data(), verbose=False)
        assert not list(tmp_path.iterdir())

    def test_without_matplotlib_the_reason_is_said(self, tmp_path, monkeypatch):
        monkeypatch.setattr(expert_load_monitor, "plotting_problem", lambda: "pip install it")
        with pytest.warns(UserWarning, match="not drawn: pip install it"):
            make_trainer(ExpertLoadMonitor(figures_dir=tmp_path)).validate(MoE(), val_data(), verbose=False)
        assert not list(tmp_path.iterdir())


class TestSaving:
    def test_save_writes_the_load_file_and_nothing_else(self, tmp_path):
        monitor = ExpertLoadMonitor()
        make_trainer(monitor).validate(MoE(), Data(val_data(domain=domain_of(6))), verbose=False)
        monitor.save(tmp_path / "run" / "loads.json")
        assert json.loads((tmp_path / "run" / "loads.json").read_text()) == monitor.loads
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["loads.json"]

    def test_a_crash_while_writing_leaves_the_old_file(self, tmp_path, monkeypatch):
        monitor = ExpertLoadMonitor()
        make_trainer(monitor).validate(MoE(), val_data(), verbose=False)
        monitor.save(tmp_path / "loads.json")
        before = (tmp_path / "loads.json").read_text()
        monitor.loads["tokens"] = {"all": 0}

        def crash(*_: Any) -> None:
            raise OSError("power cut")

        monkeypatch.setattr("os.replace", crash)
        with pytest.raises(OSError, match="power cut"):
            monitor.save(tmp_path / "loads.json")
        assert (tmp_path / "loads.json").read_text() == before

    def test_saving_before_any_validation_is_an_error(self, tmp_path):
        with pytest.raises(RuntimeError, match="run a validation first"):
            ExpertLoadMonitor().save(tmp_path / "loads.json")

    def test_loads_survive_a_resume(self, tmp_path):
        monitor = ExpertLoadMonitor()
        datamodule = Data(val_data(domain=domain_of(6)))
        trainer = make_trainer(monitor)
        trainer.fit(MoE(), datamodule)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        torch.load(tmp_path / "last.ckpt", weights_only=True)
        resumed = ExpertLoadMonitor()
        make_trainer(resumed, max_epochs=2).fit(MoE(), datamodule, ckpt_path=tmp_path / "last.ckpt")
        assert resumed.first_loads == monitor.first_loads
        assert resumed.loads != monitor.loads


@pytest.mark.parametrize("name", ["aux_free_balance", "expert_load_monitor"])
def test_takes_from_balance_what_is_public(name):
    """Everybody's own callback can be made of the same parts."""
    tree = ast.parse((ROOT / "callbacks" / f"{name}.py").read_text(encoding="utf-8"))
    homes = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [home for home in homes if home and home.startswith("lightning_dsv3.balance.")]
