"""The table of implementations: who is chosen, when that is looked up, what forcing does, and what is said of it."""

from __future__ import annotations

import importlib.metadata
import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import lightning as L
import pytest
import pytorch_lightning as pl
import torch
from tiny_run import quiet_trainer, tiny_data, tiny_module
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import lightning_dsv3.pytorch_lightning
from lightning_dsv3.callbacks import KernelChoice
from lightning_dsv3.config import KERNELS, ConfigError, KernelConfig, load_run_config
from lightning_dsv3.module import DeepSeekV3Module
from lightning_dsv3.ops import backends
from lightning_dsv3.ops.backends import (
    Case,
    chosen,
    decide,
    force_kernels,
    forced_kernels,
    is_interpreted,
    refusals,
    used_kernels,
)
from lightning_dsv3.ops.libraries import LIBRARIES, library

X = torch.ones(2)
TRAINING = Case("cpu", torch.float32, True)


@pytest.fixture(autouse=True)
def fresh_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing chosen, said or loaded yet."""
    monkeypatch.setattr(backends, "_said", set())
    force_kernels()
    library.cache_clear()
    yield
    force_kernels()
    library.cache_clear()


class Rules:
    """Rules of the router that can be changed, and count how often they are asked."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.asked: list[Case] = []

    def __call__(self, case: Case) -> str | None:
        self.asked.append(case)
        return self.reason


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> Rules:
    rule = Rules()
    monkeypatch.setitem(backends._RULES, ("router", "triton"), rule)
    return rule


def test_the_first_that_refuses_nothing_is_taken(triton: Rules) -> None:
    assert chosen("router", X) == "triton"
    triton.reason = "the moon is full"
    force_kernels()  # forgets what was chosen
    assert chosen("router", X) == "torch"
    assert decide("router", TRAINING) == ("torch", False, {"triton": "the moon is full"})
    assert refusals("router", TRAINING) == {"triton": "the moon is full", "torch": None}


def test_rules_are_asked_once_per_kind_of_call(triton: Rules) -> None:
    for _ in range(3):
        chosen("router", X, experts=8)
        with torch.no_grad():
            chosen("router", X, experts=8)
        chosen("router", X.double(), experts=8)
        chosen("router", X.to("meta"), experts=8)
        chosen("router", X, experts=9)
    sizes = (("experts", 8),)
    assert triton.asked == [
        Case("cpu", torch.float32, True, sizes),
        Case("cpu", torch.float32, False, sizes),
        Case("cpu", torch.float64, True, sizes),
        Case("meta", torch.float32, True, sizes),
        Case("cpu", torch.float32, True, (("experts", 9),)),
    ]
    assert triton.asked[0].size("experts") == 8


@pytest.mark.parametrize("op", KERNELS)
@pytest.mark.parametrize("device", ["cpu", "mps", "xpu", "meta"])
def test_the_last_of_an_operation_refuses_nothing(op: str, device: str) -> None:
    assert (op, KERNELS[op][-1]) not in backends._RULES
    assert (op, KERNELS[op][-1]) not in backends._ON_REQUEST


def test_every_rule_belongs_to_an_implementation() -> None:
    known = {(op, name) for op, names in KERNELS.items() for name in names}
    assert set(backends._RULES) <= known
    assert set(backends._ON_REQUEST) <= known


def test_what_is_no_gain_is_taken_only_where_it_is_forced(triton: Rules, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._ON_REQUEST, ("router", "triton"), lambda case: "slower" if case.grad else None)
    assert decide("router", TRAINING) == ("torch", False, {"triton": "only by kernels.router=triton: slower"})
    assert decide("router", TRAINING._replace(grad=False)).name == "triton"
    assert refusals("router", TRAINING)["triton"] is None  # it could be had
    with forced_kernels(router="triton"):
        assert chosen("router", X) == "triton"
    triton.reason = "no device"  # comes before: nothing is gained by asking for it
    assert decide("router", TRAINING).passed_over == {"triton": "no device"}


class TestForcing:
    def test_a_forced_one_is_taken_and_the_rest_is_left_alone(self, triton: Rules) -> None:
        force_kernels(KernelConfig(router="torch"))
        assert chosen("router", X) == "torch"
        assert triton.asked == []
        assert chosen("norm", X) == "torch"
        assert decide("router", TRAINING).why == "forced"

    def test_one_that_refuses_is_one_error_with_key_reason_and_fix(self, triton: Rules) -> None:
        triton.reason = "the moon is full"
        force_kernels(router="triton")
        for _ in range(2):  # nothing else takes its place later
            with pytest.raises(ConfigError) as caught:
                chosen("router", X)
            assert str(caught.value) == (
                "kernels.router=triton: the moon is full; use kernels.router=auto, or torch, which can be had here"
            )

    def test_names_are_laid_over_a_configuration(self) -> None:
        force_kernels(KernelConfig(router="torch", permute="torch"), permute="auto", norm="torch")
        assert backends._table.forced == {"router": "torch", "norm": "torch"}

    @pytest.mark.parametrize(
        ("names", "words"),
        [
            ({"rooter": "torch"}, ["kernels.rooter='torch'", "did you mean 'router'"]),
            ({"router": "tritn"}, ["kernels.router='tritn'", "did you mean 'triton'"]),
            ({"router": "cuda"}, ["kernels.router='cuda'", "auto, torch, triton"]),
        ],
    )
    def test_a_wrong_name_is_one_error_and_changes_nothing(self, names: dict[str, str], words: list[str]) -> None:
        force_kernels(norm="torch")
        for force in (lambda: force_kernels(**names), lambda: forced_kernels(**names).__enter__()):
            with pytest.raises(ConfigError) as caught:
                force()
            for word in words:
                assert word in str(caught.value)
        assert backends._table.forced == {"norm": "torch"}

    def test_a_while_ends_also_by_an_error_and_nests(self, triton: Rules) -> None:
        with forced_kernels(router="torch"):
            with pytest.raises(RuntimeError, match="inside"), forced_kernels(router="auto", norm="torch"):  # noqa: PT012
                assert chosen("router", X) == "triton"
                raise RuntimeError("inside")
            assert backends._table.forced == {"router": "torch"}
            assert chosen("router", X) == "torch"
        assert chosen("router", X) == "triton"

    def test_a_thread_that_was_choosing_meanwhile_leaves_nothing_behind(self, monkeypatch: pytest.MonkeyPatch) -> None:
        entered, go_on = threading.Event(), threading.Event()

        def slow(case: Case) -> str | None:
            entered.set()
            assert go_on.wait(30)
            return None

        monkeypatch.setitem(backends._RULES, ("router", "triton"), slow)
        answers: list[str] = []
        thread = threading.Thread(target=lambda: answers.append(chosen("router", X)))
        thread.start()
        assert entered.wait(30)
        force_kernels(router="torch")
        go_on.set()
        thread.join()
        assert answers == ["triton"]  # what held when it asked
        assert chosen("router", X) == "torch"
        assert used_kernels() == {"router": ["torch"]}


class TestCompiled:
    @staticmethod
    def function(x: Tensor, experts: int) -> Tensor:
        return x + 1 if chosen("router", x, experts=experts, biased=True) == "torch" else x - 1

    def test_one_graph_without_a_break_or_a_guard_on_the_table(self, triton: Rules) -> None:
        torch._dynamo.reset()
        triton.reason = "not today"
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(self.function, backend=counter, fullgraph=True)
        x = torch.randn(3, 4, requires_grad=True)
        assert torch.equal(compiled(x, 8), x + 1)
        compiled(x, 8).sum().backward()
        assert triton.asked == [Case("cpu", torch.float32, True, (("experts", 8), ("biased", True)))]
        triton.reason = None
        force_kernels()
        assert torch.equal(compiled(x, 8), x + 1)  # as it was traced
        assert counter.frame_count == 1
        with torch.no_grad():
            assert torch.equal(compiled(x, 8), x - 1)  # another graph, another choice
        assert counter.frame_count == 2

    @pytest.mark.parametrize("dynamic", [None, True])
    def test_a_width_that_changes_is_chosen_for_anew(self, dynamic: bool | None, triton: Rules) -> None:
        torch._dynamo.reset()

        def function(x: Tensor) -> Tensor:
            return x + 1 if chosen("router", x, experts=x.shape[-1], biased=True) == "triton" else x - 1

        compiled = torch.compile(function, backend="eager", fullgraph=True, dynamic=dynamic)
        for experts in (8, 9, 10):
            x = torch.zeros(3, experts)
            assert torch.equal(compiled(x), x + 1)
            assert torch.equal(compiled(x[:2]), x[:2] + 1)
        assert [case.size("experts") for case in triton.asked] == [8, 9, 10]

    def test_a_forced_one_that_refuses_is_the_same_error_while_tracing(self, triton: Rules) -> None:
        torch._dynamo.reset()
        triton.reason = "the moon is full"
        with (
            forced_kernels(router="triton"),
            pytest.raises(Exception, match=r"kernels\.router=triton: the moon is full"),
        ):
            torch.compile(self.function, backend="eager", fullgraph=True)(X, 8)


class TestSaid:
    def lines(self, caplog: pytest.LogCaptureFixture) -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == backends.logger.name]

    def test_a_choice_is_one_line_with_its_reason(self, triton: Rules, caplog: pytest.LogCaptureFixture) -> None:
        triton.reason = "the moon is full"
        with caplog.at_level(logging.INFO):
            for experts in (8, 9):
                chosen("router", X, experts=experts)
        assert self.lines(caplog) == ["router on cpu in float32: torch (triton: the moon is full)"]
        with caplog.at_level(logging.INFO), forced_kernels(router="torch"):
            chosen("router", X)
            chosen("router", X)
        assert self.lines(caplog)[1:] == ["router on cpu in float32: torch (forced)"]

    def test_other_ranks_are_silent(
        self, triton: Rules, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RANK", "1")
        with caplog.at_level(logging.INFO):
            chosen("router", X)
            monkeypatch.delenv("RANK")
            monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
            monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
            chosen("router", X, experts=1)
        assert self.lines(caplog) == []

    def test_what_was_used_is_known_since_the_last_forcing(self, triton: Rules) -> None:
        chosen("norm", X)
        chosen("router", X)
        triton.reason = "not without gradients"
        with torch.no_grad():
            chosen("router", X)
        assert used_kernels() == {"router": ["torch", "triton"], "norm": ["torch"]}
        force_kernels()
        assert used_kernels() == {}


class TestLibraries:
    """Fake packages, and a machine that has a GPU."""

    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        before = set(sys.modules)
        yield
        for name in set(sys.modules) - before:
            if name.startswith(("transformer_engine", "liger_kernel", "flash_attn_interface")):
                del sys.modules[name]

    @staticmethod
    def fake(monkeypatch: pytest.MonkeyPatch, folder: Path, module: str, code: str) -> None:
        path = folder.joinpath(*module.split("."))
        path.mkdir(parents=True)
        (path / "__init__.py").write_text(code)
        for name in [name for name in sys.modules if name.partition(".")[0] == module.partition(".")[0]]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.syspath_prepend(folder)

    @pytest.mark.parametrize("error", ["RuntimeError", "OSError", "FileNotFoundError", "AssertionError", "ImportError"])
    def test_whatever_goes_wrong_is_the_reason(
        self, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        code = f"raise {error}('libnccl.so.2: cannot be opened\\nand a second line')"
        self.fake(monkeypatch, tmp_path, "transformer_engine.pytorch", code)
        module, reason = library("transformer_engine")
        assert module is None
        assert reason == f"transformer_engine.pytorch does not load: {error}: libnccl.so.2: cannot be opened"

    def test_a_package_that_is_not_there_is_told_with_its_installation(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "path", [])
        for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
            monkeypatch.delitem(sys.modules, name)
        reason = library("transformer_engine").reason
        assert reason is not None
        assert reason.startswith(
            "not installed (pip install --no-build-isolation 'transformer-engine[pytorch]==2.20.*'"
        )

    def test_a_missing_package_of_a_package_is_told_by_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.fake(monkeypatch, tmp_path, "transformer_engine.pytorch", "import no_such_package")
        reason = library("transformer_engine").reason
        assert reason == "transformer_engine.pytorch does not load: No module named 'no_such_package'"

    @pytest.mark.parametrize(
        ("code", "expected"),
        [
            ("def is_fp8_block_scaling_available(return_reason): return True, ''", None),
            ("def is_fp8_block_scaling_available(return_reason): return False, 'needs CUDA 12.9'", "needs CUDA 12.9"),
            ("def is_fp8_block_scaling_available(return_reason): return False, ''", "no FP8 block scaling here"),
            ("def is_fp8_block_scaling_available(return_reason): raise RuntimeError('no driver')", "no driver"),
        ],
    )
    def test_transformer_engine_says_itself_whether_blocks_can_be_scaled(
        self, code: str, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.fake(monkeypatch, tmp_path, "transformer_engine.pytorch", code)
        module, reason = library("transformer_engine")
        assert (module is None) == (expected is not None)
        assert reason == expected or (expected is not None and reason is not None and expected in reason)

    def test_without_a_gpu_nothing_is_imported(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fake(monkeypatch, tmp_path, "transformer_engine.pytorch", "raise SystemExit('imported')")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        for cuda, words in ((None, "built without CUDA"), ("13.0", "no CUDA device")):
            monkeypatch.setattr(torch.version, "cuda", cuda)
            library.cache_clear()
            assert words in str(library("transformer_engine").reason)

    def test_another_release_of_liger_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fake(monkeypatch, tmp_path, "liger_kernel.ops", "")
        for version, refused in (("0.8.5", False), ("0.9.0", True), ("0.80.0", True)):
            monkeypatch.setattr(importlib.metadata, "version", lambda package, version=version: version)
            library.cache_clear()
            assert (library("liger_kernel").module is None) == refused
            assert (version in str(library("liger_kernel").reason)) == refused

    def test_it_is_loaded_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        counted = SimpleNamespace(times=0)
        monkeypatch.setattr(sys.modules[__name__], "COUNTED", counted, raising=False)
        self.fake(
            monkeypatch,
            tmp_path,
            "flash_attn_interface",
            f"import {__name__} as t\nt.COUNTED.times += 1\nraise OSError('x')",
        )
        assert library("flash_attn_3") == library("flash_attn_3")
        assert counted.times == 1

    def test_every_library_of_a_rule_is_known(self) -> None:
        assert set(LIBRARIES) == {"triton", "liger_kernel", "flash_attn_3", "transformer_engine"}


class TestRun:
    @pytest.mark.parametrize(
        ("package", "trainer"),
        [(lightning_dsv3, L.Trainer), (lightning_dsv3.pytorch_lightning, pl.Trainer)],
        ids=["lightning", "pytorch_lightning"],
    )
    def test_a_run_tells_once_what_computed_it(
        self, package: ModuleType, trainer: type, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = quiet_trainer(KernelChoice(router="torch"), trainer_class=trainer, max_steps=2)
        run.fit(tiny_module(package), tiny_data(package))
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("kernels")]
        assert line.startswith("kernels on cpu: ")
        for word in ("router torch", "norm torch", "swiglu torch", "cross_entropy chunked", "dsv3 doctor"):
            assert word in line
        assert len(line) < 240

    def test_it_is_forced_for_the_run_alone(self, triton: Rules) -> None:
        triton.reason = "the moon is full"
        seen: list[dict[str, str]] = []

        class Look(KernelChoice):
            def on_train_batch_end(self, *arguments: object) -> None:
                seen.append(dict(backends._table.forced))

        with forced_kernels(norm="torch"):
            quiet_trainer(Look(router="torch"), max_steps=1).fit(tiny_module(), tiny_data())
            assert backends._table.forced == {"norm": "torch"}
        assert seen == [{"norm": "torch", "router": "torch"}]

    def test_one_that_cannot_be_had_ends_the_run_and_is_forgotten(self, triton: Rules) -> None:
        triton.reason = "the moon is full"
        trainer = quiet_trainer(KernelChoice(KernelConfig(router="triton")))
        with pytest.raises(ConfigError, match=r"kernels\.router=triton: the moon is full"):
            trainer.fit(tiny_module(), tiny_data())
        assert backends._table.forced == {}

    def test_a_wrong_name_is_an_error_before_anything_is_built(self) -> None:
        with pytest.raises(ConfigError, match="did you mean 'router'"):
            KernelChoice(rooter="torch")

    def test_a_checkpoint_is_used_elsewhere_whatever_was_forced(self, triton: Rules, tmp_path: Path) -> None:
        triton.reason = "the moon is full"
        trainer = quiet_trainer(KernelChoice(router="torch"), max_steps=1)
        trainer.fit(tiny_module(), tiny_data())
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
        assert "KernelChoice" not in str(saved["callbacks"])
        assert "kernels" not in str(saved["hyper_parameters"])
        module = DeepSeekV3Module.load_from_checkpoint(tmp_path / "a.ckpt")
        with torch.no_grad():
            assert torch.isfinite(module.model(torch.ones(1, 4, dtype=torch.int64)).logits).all()

    def test_a_run_is_resumed_elsewhere_by_one_word(self, tmp_path: Path) -> None:
        (tmp_path / "config.yaml").write_text("kernels: {router: triton, norm: torch}\n")
        resumed = load_run_config([f"resume={tmp_path}"]).kernels
        assert (resumed.router, resumed.norm) == ("triton", "torch")
        elsewhere = load_run_config(["kernels.router=auto", f"resume={tmp_path}"]).kernels
        assert (elsewhere.router, elsewhere.norm) == ("auto", "torch")


def test_the_suite_does_not_run_interpreted() -> None:
    assert not is_interpreted()
