"""liger-kernel behind norm, SwiGLU and loss: a stand-in, and where it is installed its kernels in the interpreter."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import liger_standin
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton_cases import run_interpreted

from lightning_dsv3.ops import backends, libraries
from lightning_dsv3.ops.backends import chosen, forced_kernels, is_interpreted
from lightning_dsv3.ops.cross_entropy import IGNORE_INDEX, linear_cross_entropy
from lightning_dsv3.ops.libraries import library
from lightning_dsv3.ops.norm import rms_norm
from lightning_dsv3.ops.swiglu import swiglu

INSTALLED = importlib.util.find_spec("liger_kernel") is not None
FORCED = {"norm": "liger", "swiglu": "liger", "cross_entropy": "liger"}
# Half a unit in the last place of each rounding on the way: two in BF16 products and sums of them.
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.bfloat16: {"rtol": 2**-7, "atol": 2**-9}}


def compare(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected.double(), **TOLERANCE[dtype])


class Checks:
    """What holds for the stand-in and for the kernels; the interpreter computes in float32 alone."""

    def check_norm(self, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
        x = torch.randn(2, 7, 24).to(dtype).requires_grad_()
        weight = (torch.randn(24) + 1).to(weight_dtype).requires_grad_()
        upstream = torch.randn(2, 7, 24).to(dtype)
        kept = upstream.clone()
        y = rms_norm(x, weight, 1e-5)
        y.backward(upstream)
        assert torch.equal(upstream, kept), "the gradient may be another branch's as well"
        truth = [t.detach().double().requires_grad_() for t in (x, weight)]
        expected = F.rms_norm(truth[0], (24,), truth[1], 1e-5)
        expected.backward(kept.double())
        compare(y, expected, dtype)
        compare(x.grad, truth[0].grad, dtype)
        compare(weight.grad, truth[1].grad, weight_dtype)

    def check_swiglu(self, dtype: torch.dtype, rows: int) -> None:
        z = torch.randn(rows, 48).to(dtype).requires_grad_()
        kept, upstream = z.detach().clone(), torch.randn(rows, 24).to(dtype)
        y = swiglu(z)
        y.backward(upstream)
        assert torch.equal(z, kept), "what came before may be needed by its own backward"
        truth = kept.double().requires_grad_()
        gate, up = truth.chunk(2, dim=-1)
        expected = F.silu(gate) * up
        expected.backward(upstream.double())
        compare(y, expected, dtype)
        compare(z.grad, truth.grad, dtype)

    def check_loss(self, dtype: torch.dtype, wants: tuple[bool, bool], targets: str) -> None:
        hidden = torch.randn(13, 24).to(dtype).requires_grad_(wants[0])
        weight = (torch.randn(37, 24) / 5).to(dtype).requires_grad_(wants[1])
        target = torch.randint(0, 37, (13,))
        if targets != "all":
            target[:: 1 if targets == "none" else 3] = IGNORE_INDEX
        denominator = torch.tensor(24.0)
        loss, token_losses = linear_cross_entropy(hidden, weight, target, denominator)
        truth = [t.detach().double().requires_grad_(t.requires_grad) for t in (hidden, weight)]
        logits = truth[0] @ truth[1].T
        expected = F.cross_entropy(logits, target, ignore_index=IGNORE_INDEX, reduction="none")
        # Logits are rounded to the dtype of the operands before the loss is taken of them.
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-6}[dtype]
        torch.testing.assert_close(token_losses.double(), expected.detach(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(loss.double(), expected.sum() / 24, rtol=tolerance, atol=tolerance)
        assert token_losses[target == IGNORE_INDEX].eq(0).all()
        assert (token_losses.dtype, token_losses.requires_grad, loss.dtype) == (torch.float32, False, torch.float32)
        if not any(wants):
            assert not loss.requires_grad
            return
        (3 * loss).backward()
        (3 * expected.sum() / 24).backward()
        for ours, theirs in zip((hidden, weight), truth, strict=True):
            assert (ours.grad is None) == (theirs.grad is None)
            if ours.grad is not None:
                assert ours.grad.dtype == dtype
                scale = theirs.grad.abs().max().clamp(min=1e-30)
                torch.testing.assert_close(
                    ours.grad / scale, theirs.grad / scale, rtol=0, atol=tolerance, check_dtype=False
                )


LOSSES = [((True, True), "all"), ((True, False), "some"), ((False, True), "some"), ((False, False), "some"),
          ((True, True), "none")]  # fmt: skip


class TestStandIn(Checks):
    @pytest.fixture(autouse=True)
    def liger(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        for name, module in liger_standin.standin().items():
            monkeypatch.setitem(sys.modules, name, module)
        for module in (backends, libraries):
            monkeypatch.setattr(module, "is_interpreted", lambda: True)
        monkeypatch.setattr(importlib.metadata, "version", lambda package: liger_standin.VERSION)
        library.cache_clear()
        with forced_kernels(**FORCED):
            yield
        library.cache_clear()

    @pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_norm(self, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
        self.check_norm(dtype, weight_dtype)

    def test_norm_is_float32_throughout(self) -> None:
        """Rounding before the weight, as in another casting mode, would differ in a fifth of the numbers."""
        x, weight = torch.randn(64, 24).bfloat16(), torch.randn(24)
        assert torch.equal(rms_norm(x, weight, 1e-6), F.rms_norm(x.float(), (24,), weight, 1e-6).bfloat16())

    @pytest.mark.parametrize("rows", [0, 1, 5])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_swiglu(self, dtype: torch.dtype, rows: int) -> None:
        self.check_swiglu(dtype, rows)

    @pytest.mark.parametrize(("wants", "targets"), LOSSES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_loss(self, dtype: torch.dtype, wants: tuple[bool, bool], targets: str) -> None:
        self.check_loss(dtype, wants, targets)

    def test_loss_equals_the_chunked_one_under_autocast(self) -> None:
        hidden, weight = torch.randn(13, 24, requires_grad=True), torch.randn(37, 24, requires_grad=True)
        target = torch.randint(0, 37, (13,))
        found: list[Any] = []
        for name in ("liger", "chunked"):
            with forced_kernels(cross_entropy=name), torch.autocast("cpu", torch.bfloat16):
                loss = linear_cross_entropy(hidden, weight, target).loss
            found.append([loss, *torch.autograd.grad(loss, (hidden, weight))])
        for ours, theirs in zip(*found, strict=True):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=2**-10)

    def test_no_token_at_all_has_loss_0(self) -> None:
        hidden, weight = torch.randn(0, 24, requires_grad=True), torch.randn(37, 24, requires_grad=True)
        loss = linear_cross_entropy(hidden, weight, torch.empty(0, dtype=torch.int64)).loss
        loss.backward()
        assert loss == 0
        assert weight.grad is not None
        assert not weight.grad.any()

    def test_double_precision_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"kernels\.norm=liger: not for float64"):
            rms_norm(torch.ones(2, 4, dtype=torch.float64), torch.ones(4), 1e-6)

    @pytest.mark.parametrize("op", FORCED)
    def test_it_is_never_taken_unasked(self, op: str) -> None:
        with forced_kernels(**{op: "auto"}):
            assert chosen(op, torch.ones(1)) != "liger"
            assert "no GPU has measured it" in backends.decide(op, backends.Case("cpu", torch.float32, True)).why


@pytest.mark.skipif(not INSTALLED, reason="liger-kernel is not installed")
def test_the_stand_in_has_the_signatures_of_the_package() -> None:
    from liger_kernel import ops

    assert importlib.metadata.version("liger-kernel") == liger_standin.VERSION
    for name in ("LigerRMSNormFunction", "LigerSiLUMulFunction"):
        theirs, ours = getattr(ops, name).forward, getattr(liger_standin, name).forward
        assert str(inspect.signature(theirs)) == str(inspect.signature(ours, eval_str=True))
    ours = inspect.signature(liger_standin.fused_linear_cross_entropy_forward, eval_str=True)
    assert str(inspect.signature(ops.fused_linear_cross_entropy_forward)) == str(ours)


class TestInterpreted(Checks):
    """The package's own kernels; collected in the process that the test below starts."""

    __test__ = INSTALLED and is_interpreted()

    @pytest.fixture(autouse=True)
    def liger(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        import numpy as np
        import triton.language as tl
        from triton.runtime import interpreter

        convert = interpreter._implicit_cvt

        def with_floats(argument: Any) -> Any:
            """The compiler makes a tensor of a float, the interpreter leaves it; kernels call its methods."""
            if not isinstance(argument, float):
                return convert(argument)
            handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)

        monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)
        # A function of CUDA's library, which the interpreter does not have.
        norm = importlib.import_module("liger_kernel.ops.rms_norm")
        monkeypatch.setattr(norm, "rsqrt", lambda x: tl.math.rsqrt(x))
        with forced_kernels(**FORCED):
            yield

    def test_norm(self) -> None:
        self.check_norm(torch.float32, torch.float32)

    @pytest.mark.parametrize("rows", [0, 1, 5])
    def test_swiglu(self, rows: int) -> None:
        self.check_swiglu(torch.float32, rows)

    @pytest.mark.parametrize(("wants", "targets"), LOSSES)
    def test_loss(self, wants: tuple[bool, bool], targets: str) -> None:
        self.check_loss(torch.float32, wants, targets)


@pytest.mark.skipif(not INSTALLED, reason="liger-kernel is not installed")
def test_in_the_interpreter() -> None:
    run_interpreted(__file__)
