"""Every kernel in every setting, compiled ahead of time for Hopper: no GPU is needed to know that it fits."""

from __future__ import annotations

import importlib

import pytest
from triton_cases import SHARED_MEMORY, compiled

pytest.importorskip("triton")

from lightning_dsv3.ops.triton.common import kernel_modules


@pytest.mark.parametrize("module", kernel_modules())
def test_every_setting_fits_registers_and_shared_memory_of_hopper(module: str) -> None:
    cases = compiled(module)
    assert all(".target sm_90a" in case["ptx"] for case in cases)
    assert {case["name"]: case["stack"] for case in cases if case["stack"]} == {}, "registers spill to memory"
    assert {case["name"]: case["shared"] for case in cases if case["shared"] > SHARED_MEMORY} == {}
    if module == "quantize":  # whose scales reach down to 2^-149
        assert [case["name"] for case in cases if ".ftz" in case["ptx"]] == []


@pytest.mark.parametrize("module", kernel_modules())
def test_no_kernel_is_forgotten(module: str) -> None:
    code = importlib.import_module(f"lightning_dsv3.ops.triton.{module}")
    names = [case.name for case in code.COMPILED]
    assert len(names) == len(set(names))
    kernels = {name for name in vars(code) if name.endswith("_kernel")}
    assert kernels == {case.kernel.__name__ for case in code.COMPILED}
