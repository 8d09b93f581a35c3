"""ExpertLoadMonitor: the load of validation, by layer and domain."""

from __future__ import annotations

import json
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.demos.boring_classes import BoringModel
from tiny_moe import Gate, GateAdapter, TinyMoE, data, make_trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dsv3.callbacks import AuxFreeBalanceCallback, ExpertLoadMonitor

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
        class WithGate(MoE):
            def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
                self.gate(batch["x"])
                super().validation_step(batch, batch_idx)

        module = WithGate()
        module.gate = Gate()
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
        violation = []
        for layer in range(2):
            load = [sum(n) for n in zip(*(module.by_domain[name][layer] for name in DOMAINS), strict=True)]
            violation.append(max(load) * len(load) / sum(load) - 1)
        assert {name: value.item() for name, value in trainer.callback_metrics.items()} == {
            "val/moe/layer_0/max_violation": pytest.approx(violation[0], rel=1e-6),
            "val/moe/mtp_1/max_violation": pytest.approx(violation[1], rel=1e-6),
            "val/moe/max_violation": pytest.approx(sum(violation) / 2, rel=1e-6),
        }


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
