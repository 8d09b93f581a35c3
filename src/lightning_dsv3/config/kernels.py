"""Which implementation of an operation is used, where there is more than one.

    kernels.router=torch          force one
    kernels.router=auto           the first that can take the device, the dtype and the shape (the default)

What each of them needs, and what it refuses, is told by :mod:`lightning_dsv3.ops.backends`; ``dsv3 doctor`` prints what
this machine would take, and why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_dsv3.config.errors import ConfigError, did_you_mean

AUTO = "auto"
KERNELS: dict[str, tuple[str, ...]] = {
    "attention": ("flash_attn_3", "flex", "sdpa", "plain"),
    "router": ("triton", "torch"),
    "permute": ("triton", "torch"),
    "grouped_matmul": ("grouped_mm", "loop"),
    "norm": ("liger", "torch"),
    "swiglu": ("liger", "torch"),
    "cross_entropy": ("liger", "chunked"),
    "quantize": ("triton", "torch"),
    "fp8": ("te", "emulate"),
}
"""Implementations of each operation, the preferred ones first; the last takes everything."""


@dataclass(frozen=True)
class KernelConfig:
    """The implementation of each operation: ``auto``, or one of :data:`KERNELS`.

    Attributes:
        attention: Causal attention of a training pass.
        router: From router logits to chosen experts, gate values and counts.
        permute: From tokens to slots sorted by expert, and back.
        grouped_matmul: One matrix product for all experts.
        norm: RMSNorm.
        swiglu: The gated activation.
        cross_entropy: Head and loss in one.
        quantize: From a matrix to FP8 tiles.
        fp8: The products of ``trainer.precision=fp8-block``.
    """

    attention: str = AUTO
    router: str = AUTO
    permute: str = AUTO
    grouped_matmul: str = AUTO
    norm: str = AUTO
    swiglu: str = AUTO
    cross_entropy: str = AUTO
    quantize: str = AUTO
    fp8: str = AUTO

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            choice, choices = getattr(self, field.name), (AUTO, *KERNELS[field.name])
            if choice not in choices:
                raise ConfigError(f"kernels.{field.name}={choice!r}: {did_you_mean(str(choice), choices)}")

    @classmethod
    def from_dict(cls, names: Mapping[str, str]) -> KernelConfig:
        """Build from names by operation; an unknown operation is an error.

        >>> KernelConfig.from_dict({"router": "torch"}).router
        'torch'
        """
        for op in names:
            if op not in KERNELS:
                raise ConfigError(
                    f"kernels.{op}={names[op]!r}: there is no such operation; {did_you_mean(op, KERNELS)}"
                )
        return cls(**names)
