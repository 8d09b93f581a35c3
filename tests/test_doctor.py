"""``dsv3 doctor`` on simulated machines: it says what is there, why something is not, and never fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_run import SHAPE, quiet_trainer, tiny_data, tiny_module

from lightning_dsv3.cli import dsv3, machine
from lightning_dsv3.cli.doctor import as_text
from lightning_dsv3.config import KERNELS, load_run_config, preset_names
from lightning_dsv3.ops import backends, libraries
from lightning_dsv3.ops.backends import force_kernels
from lightning_dsv3.ops.libraries import library
from lightning_dsv3.precision import FP8BlockPrecision


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    library.cache_clear()
    force_kernels()
    yield
    library.cache_clear()
    force_kernels()


def report(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert dsv3.main(["doctor", "--json", *words]) == 0
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return printed


def text(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert dsv3.main(["doctor", *words]) == 0
    return capsys.readouterr().out


def ability(answer: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [ability for ability in answer["abilities"] if ability["name"].startswith(name)]
    return found


def kernel(answer: dict[str, Any], op: str, dtype: str = "bfloat16") -> dict[str, Any]:
    (found,) = [row for row in answer["kernels"] if row["op"] == op and row["dtype"] == dtype]
    return found


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("Found no NVIDIA driver\nand a second line")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs of capability 9.0 under a torch that is built for CUDA 13."""
    properties = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132)
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_properties": lambda index: properties,
        "get_device_capability": lambda *_: (9, 0),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))


class Absent:
    """Finds that nothing optional is installed but Triton."""

    def find_spec(self, name: str, *_: Any) -> None:
        package = name.partition(".")[0]
        if package in ("transformer_engine", "liger_kernel", "flash_attn_interface"):
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)


def fake(monkeypatch: pytest.MonkeyPatch, module: str, **members: Any) -> None:
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    for name, value in members.items():
        setattr(sys.modules[module], name, value)


def test_without_a_gpu_every_operation_has_a_path_and_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    answer = report(capsys)
    assert answer["format"] == 1
    assert {(row["op"], row["dtype"]) for row in answer["kernels"]} == {
        (op, dtype) for op in KERNELS for dtype in ("float32", "bfloat16")
    }
    if torch.cuda.is_available():
        return
    for row in answer["kernels"]:
        assert row["device"] == "cpu"
        assert row["chosen"] in KERNELS[row["op"]]
        preferred = KERNELS[row["op"]][: KERNELS[row["op"]].index(row["chosen"])]
        assert list(row["passed_over"]) == list(preferred)
        assert all(row["passed_over"].values())
    assert kernel(answer, "router")["chosen"] == "torch"
    assert "CUDA" in kernel(answer, "router")["passed_over"]["triton"]
    assert answer["devices"] == []
    assert not ability(answer, "CUDA")["works"]
    assert ability(answer, "gloo")["works"]
    assert answer["versions"]["torch"].startswith(torch.__version__)
    assert answer["processor"]["threads"] == torch.get_num_threads()


def test_the_text_says_the_same_in_narrow_lines(capsys: pytest.CaptureFixture[str]) -> None:
    answer, printed = report(capsys), text(capsys)
    assert max(map(len, printed.splitlines())) <= 120
    for row in answer["kernels"]:
        (line,) = [line for line in printed.splitlines() if line.split()[:1] == [row["op"]]]
        assert row["chosen"] in line.split()
    for found in answer["abilities"]:
        assert f"{found['name']} " in printed
        assert found["detail"].split()[0] in printed
    for name, value in answer["versions"].items():
        assert name in printed
        assert value.split()[0] in printed


@pytest.mark.parametrize("plugins", [[], [FP8BlockPrecision()]], ids=["float32", "fp8-block"])
def test_what_it_foretells_is_what_a_step_takes(plugins: list[Any]) -> None:
    quiet_trainer(max_steps=1, plugins=plugins).fit(tiny_module(), tiny_data())
    words = [f"model.{name}={value}" for name, value in SHAPE.items()]
    run = load_run_config([*words, "train.sequence_length=24"])
    taken = dict(backends._table.choices)
    for (op, device, dtype, grad, *sizes), name in taken.items():
        told = machine.sizes(op, run)
        assert set(dict(sizes)) == set(told), f"{op}: machine.sizes names other sizes than the operation does"
        assert backends.decide(op, backends.Case(device.type, dtype, grad, tuple(told.items()))).name == name
    assert {op for op, *_ in taken} >= {"router", "norm", "swiglu", "cross_entropy", "attention"}
    if plugins:
        assert {op for op, *_ in taken} >= {"fp8", "quantize"}
    else:
        assert (
            "attention",
            torch.device("cpu"),
            torch.float32,
            True,
            *machine.sizes("attention", run).items(),
        ) in taken


@pytest.mark.usefixtures("hopper")
class TestHopper:
    def test_bare(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
        answer = report(capsys, "model=671b")
        assert [device["capability"] for device in answer["devices"]] == ["9.0", "9.0"]
        assert answer["devices"][0]["memory_gib"] == 80
        for name in ("CUDA", "BF16", "FP8 tensor cores", "NCCL", "Triton"):
            assert ability(answer, name)["works"], name
        assert not ability(answer, "FP8 products by Transformer Engine")["works"]
        assert "--no-build-isolation" in ability(answer, "FP8 products by Transformer Engine")["detail"]
        assert {row["device"] for row in answer["kernels"]} == {"cuda"}
        assert kernel(answer, "fp8")["chosen"] == "emulate"
        assert kernel(answer, "router")["chosen"] == "triton"  # its logits are float32 in BF16 training too
        assert "not installed" in kernel(answer, "norm")["passed_over"]["liger"]
        printed = text(capsys, "model=671b")
        assert "cuda:1  NVIDIA H100, capability 9.0, 80.0 GiB, 132 multiprocessors" in printed
        assert "2.28.9" in printed
        # What holds for one dtype alone names it, once.
        assert "flex: only by kernels.attention=flex" in printed
        assert "documents to skip (bfloat16)" in " ".join(printed.split())

    def test_with_transformer_engine(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        fake(monkeypatch, "transformer_engine.pytorch", is_fp8_block_scaling_available=lambda return_reason: (True, ""))
        answer = report(capsys, "model=671b")
        assert ability(answer, "FP8 products by Transformer Engine")["works"]
        assert kernel(answer, "fp8")["chosen"] == "te"

    def test_block_scaling_is_refused_by_its_own_word(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reason = "FP8 block scaled GEMM requires compute capability 9.0 or higher and CUDA >= 12.9."
        fake(
            monkeypatch,
            "transformer_engine.pytorch",
            is_fp8_block_scaling_available=lambda return_reason: (False, reason),
        )
        answer = report(capsys)
        assert ability(answer, "FP8 products by Transformer Engine")["detail"] == reason
        assert kernel(answer, "fp8")["passed_over"] == {"te": reason}

    @pytest.mark.parametrize("error", [RuntimeError, OSError, FileNotFoundError, AssertionError])
    def test_libraries_that_raise_are_lines(
        self, error: type[Exception], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(name: str) -> ModuleType:
            raise error(f"{name} is broken")

        monkeypatch.setattr(libraries, "importlib", SimpleNamespace(import_module=fails))
        answer = report(capsys)
        for name in ("FP8 products by", "FlashAttention 3", "liger-kernel", "Triton"):
            found = ability(answer, name)
            assert not found["works"]
            assert f"{error.__name__}: " in found["detail"]
            assert "is broken" in found["detail"]
        assert all(row["chosen"] for row in answer["kernels"])
        assert kernel(answer, "router")["chosen"] == "torch"

    def test_a_gpu_that_fails_at_every_question_is_lines(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("get_device_properties", "get_device_capability"):
            monkeypatch.setattr(torch.cuda, name, broken)
        monkeypatch.setattr(torch.cuda.nccl, "version", broken)
        answer = report(capsys)
        assert "RuntimeError: Found no NVIDIA driver" in answer["devices"][1]["name"]
        assert not ability(answer, "NCCL")["works"]
        assert "second line" not in text(capsys)


def test_a_driver_that_is_missing_is_told_in_its_own_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", broken)
    answer = report(capsys)
    assert ability(answer, "CUDA") == {"name": "CUDA", "works": False, "detail": "RuntimeError: Found no NVIDIA driver"}
    assert "none  RuntimeError: Found no NVIDIA driver" in text(capsys)


def test_a_machine_where_everything_raises_still_gets_its_report(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in [
        (torch.cuda, "is_available"), (torch.distributed, "is_available"), (torch, "get_num_threads"),
        (machine, "_cpuinfo"), (machine.shutil, "disk_usage"), (machine.shutil, "which"), (machine.os, "sysconf"),
        (machine, "decide"), (machine.importlib.metadata, "version"),
    ]:  # fmt: skip
        monkeypatch.setattr(module, name, broken, raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)  # otherwise the driver is asked for its own words
    answer = report(capsys)
    assert ability(answer, "CUDA")["detail"] == "CUDA cannot be asked: RuntimeError: Found no NVIDIA driver"
    assert answer["processor"]["name"] == "RuntimeError: Found no NVIDIA driver"
    assert all(row["chosen"] is None for row in answer["kernels"])
    assert kernel(answer, "router")["error"] == "RuntimeError: Found no NVIDIA driver"
    assert "RuntimeError" in text(capsys)


def test_forcing_is_foretold_as_well(capsys: pytest.CaptureFixture[str]) -> None:
    answer = report(capsys, "kernels.attention=plain", "kernels.fp8=te")
    assert kernel(answer, "attention")["chosen"] == "plain"
    assert kernel(answer, "attention")["forced"]
    if not torch.cuda.is_available():
        assert kernel(answer, "fp8")["chosen"] is None
        assert kernel(answer, "fp8")["error"].startswith("kernels.fp8=te: ")
    assert "plain (forced)" in text(capsys, "kernels.attention=plain")
    assert backends._table.forced == {}


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("preset", preset_names("model"))
def test_every_preset_is_foretold_with_all_that_the_rules_ask_for(
    preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = report(capsys, f"model={preset}", "data.document_mask=true", "balance=[sequence]")
    assert [row for row in answer["kernels"] if "error" in row] == []


def test_kernels_are_compiled_and_one_that_fails_is_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = pytest.importorskip("lightning_dsv3.ops.triton.common")

    def compiles(case: Any, target: int) -> Any:
        if "1" in case.name:
            raise ValueError("no")
        return SimpleNamespace(metadata=SimpleNamespace(shared=target))

    monkeypatch.setattr(common, "compile_ahead", compiles)
    answer = report(capsys, "--compile")["compiled"]
    assert {row["kernel"].partition(":")[0] for row in answer} >= {"router", "permute", "quantize"}
    for row in answer:
        assert row["target"] == "sm_90"
        assert ("error" in row) == ("1" in row["kernel"].partition(": ")[2])
        assert row.get("shared_memory", 90) == 90
    printed = text(capsys, "--compile")
    assert "sm_90: 90 bytes of shared memory" in printed


def test_one_kernel_is_really_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    pytest.importorskip("triton")
    first = next(machine.compiled_kernels())
    assert 0 <= first["shared_memory"] <= 232448
    assert list(tmp_path.rglob("*.cubin"))


@pytest.mark.parametrize("option", ["", "--json"])
def test_a_torch_that_does_not_load_is_all_it_says(option: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')\n")
    command = [sys.executable, "-m", "lightning_dsv3", "doctor", *([option] if option else [])]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reason = "OSError: libcudart.so.13: cannot open shared object file"
    assert done.stdout == (f'{{"format": 1, "error": "{reason}"}}\n' if option else f"torch does not load: {reason}\n")


def test_help_loads_no_torch() -> None:
    program = (
        "import sys\nfrom lightning_dsv3.cli import dsv3\n"
        "try:\n    dsv3.main(['doctor', '--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "kernels.router=torch" in done.stdout


@pytest.mark.parametrize(("word", "hint"), [("kernels.rooter=torch", "did you mean 'router'"), ("seed", "key=value")])
def test_a_wrong_word_is_one_line(word: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dsv3.main(["doctor", word]) == 2
    assert hint in capsys.readouterr().err


def test_a_report_from_a_file_is_laid_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What --json writes is all that the text needs."""
    answer = report(capsys)
    assert as_text(answer, "tiny") == text(capsys).rstrip("\n")
