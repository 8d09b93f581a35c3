"""How Triton kernels are proved on a machine without a GPU: run in the interpreter, compiled for sm_90.

Triton reads ``TRITON_INTERPRET`` when a kernel's module is imported, so a process either interprets or compiles. The
process that runs the suite does neither: both happen in processes of their own, one per file, started from here.

A file of interpreter tests looks like this::

    class TestInterpreted:
        __test__ = is_interpreted()  # collected in the process that run_interpreted starts, and nowhere else

        @pytest.fixture(autouse=True)
        def poison(self, monkeypatch):
            poison_empty(monkeypatch)

        def test_...(self): ...

    def test_in_the_interpreter():
        run_interpreted(__file__)

    @pytest.mark.gpu
    def test_on_cuda(): ...
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

SHARED_MEMORY = 232448
"""Bytes that one program may have on sm_90."""


def run_interpreted(file: str) -> None:
    """Run the class ``TestInterpreted`` of a test file in a process whose kernels are interpreted."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{file}::TestInterpreted"]
    result = subprocess.run(command, env=_environment(TRITON_INTERPRET="1"), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"\d+ passed", result.stdout), result.stdout


def compiled(module: str) -> list[dict[str, Any]]:
    """Compile every case of a kernel module for sm_90: name, registers, stack, shared memory and PTX of each."""
    with tempfile.TemporaryDirectory() as folder:
        environment = _environment(TRITON_CACHE_DIR=folder)
        environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, __file__, module]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return list(json.loads(result.stdout.splitlines()[-1]))


def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``torch.empty`` return NaN, and -77 for integers: what a kernel does not write is then seen."""
    empty: Callable[..., Tensor] = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        out = empty(*size, **options)
        if out.dtype == torch.float8_e4m3fn:
            out.view(torch.uint8).fill_(0x7F)
        else:
            out.fill_(float("nan") if out.is_floating_point() else -77)
        return out

    monkeypatch.setattr(torch, "empty", poisoned)


def _environment(**more: str) -> dict[str, str]:
    # Without what tells pytest that it is a worker of another run.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return {**environment, "TRITON_DEFAULT_FP_FUSION": "1", **more}


def _facts(module: str) -> list[dict[str, Any]]:
    from lightning_dsv3.ops.triton.common import compile_ahead

    facts = []
    for case in importlib.import_module(f"lightning_dsv3.ops.triton.{module}").COMPILED:
        binary = compile_ahead(case)
        usage = _resource_usage(binary.asm["cubin"])
        facts.append({"name": case.name, "shared": binary.metadata.shared, "ptx": binary.asm["ptx"], **usage})
    return facts


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of stack: there goes what does not fit into registers."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    assert found, printed
    return {"registers": int(found[1]), "stack": int(found[2])}


if __name__ == "__main__":
    print(json.dumps(_facts(sys.argv[1])))
