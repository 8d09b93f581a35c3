"""The benchmarks of kernels and of FP8 steps in their small form: their figures hang together, so they don't rot."""

import json
import math
import sys

import pytest
import torch
from conftest import ROOT

from lightning_dsv3.config.kernels import KERNELS


@pytest.fixture
def benchmarks(monkeypatch):
    """The folder of benchmarks on the path, and modules of it gone afterwards."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(ROOT / "benchmarks") in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_every_kernel_has_a_row_or_a_reason(benchmarks, tmp_path, capsys):
    import kernel_speed

    kernel_speed.main(["--small", "--device", "cpu", "--repeats", "4", "--output", str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text())
    assert all(rate > 0 for rate in result["ceilings"].values())
    measured = {(row["op"], row["implementation"]) for row in result["rows"] if "seconds" in row}
    told = {(row["op"], row["implementation"]): row["reason"] for row in result["rows"] if "reason" in row}
    for op, names in KERNELS.items():
        assert (op, names[-1]) in measured  # the plain form
        for name in names:
            assert ((op, name) in measured) != ((op, name) in told)
    assert told["router", "triton"] == "Triton's kernels are for CUDA, not for cpu"  # without key and remedy
    for row in result["rows"]:
        if "seconds" in row:
            assert row["rate"] > 0
            assert math.isfinite(row["share_of_ceiling"])
            # FP8's tiles keep three bits; all else is float32.
            assert row["error"] < (0.2 if row["op"] == "fp8" else 1e-4), row
    passes = [row["pass"] for row in result["rows"] if (row["op"], row["implementation"]) == ("norm", "torch")]
    assert passes == ["forward", "training"]
    assert "attention, 8 documents" in capsys.readouterr().out


def test_a_wrong_kernel_shows_in_its_error(benchmarks, tmp_path, monkeypatch):
    import kernel_speed

    from lightning_dsv3.ops import dispatch

    loop = dispatch.grouped_matmul_loop
    monkeypatch.setattr(dispatch, "grouped_matmul_loop", lambda *operands: 1.5 * loop(*operands))
    words = ["--small", "--device", "cpu", "--repeats", "4", "--ops", "grouped_matmul"]
    kernel_speed.main([*words, "--output", str(tmp_path / "result.json")])
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    error = next(row["error"] for row in rows if row["implementation"] == "grouped_mm" and row["pass"] == "forward")
    assert error == pytest.approx(1 / 3, rel=1e-4)


def test_what_there_is_no_time_for_is_named(benchmarks, tmp_path):
    import kernel_speed

    words = ["--small", "--device", "cpu", "--ops", "norm", "--seconds", "0"]
    kernel_speed.main([*words, "--output", str(tmp_path / "result.json")])
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [row["left_out"] for row in rows] == ["the 0 seconds were over"]


def test_full_shapes_on_a_cpu_are_refused(benchmarks, capsys):
    import kernel_speed

    with pytest.raises(SystemExit):
        kernel_speed.main(["--device", "cpu"])
    assert "--small" in capsys.readouterr().err


def test_a_step_in_bf16_and_one_in_fp8(benchmarks, tmp_path, monkeypatch):
    import fp8_step

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["--small", "--steps", "4", "--turns", "1", "--output", str(tmp_path / "result.json")]
    fp8_step.main(words)
    result = json.loads((tmp_path / "result.json").read_text())
    bf16, fp8 = result["rows"]["bf16"], result["rows"]["emulate"]
    assert len(bf16["losses"]) == len(fp8["losses"]) == 4
    assert 0 < fp8["largest_loss_difference"] < 0.01  # other numbers, but near ones
    assert fp8["speed_over_bf16"] == pytest.approx(bf16["step_seconds"] / fp8["step_seconds"])
