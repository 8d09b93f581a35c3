"""Bits per byte: a language model's loss in a unit that does not depend on its vocabulary."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class BitsPerByte(Metric):
    """Negative log-likelihood per byte of text, in bits.

    ``sum of token losses in nats / (ln 2 * sum of the tokens' bytes)``. A general compressor's output in bits
    per byte of input is the same quantity, so gzip and xz are fair company.

    ``update`` takes

    - ``losses``: cross entropy of each target token in nats, any float dtype, any shape;
    - ``token_bytes``: UTF-8 bytes of each target token, integers of the same shape; 0 for special tokens and for
      targets that are ignored. Tokens of 0 bytes are left out of both sums.

    ``compute`` returns a float64 scalar, nan before any byte was seen. Sums are kept in float64 and int64: a
    float32 sum stops growing exactly after some 16 million tokens.

    Example:
        >>> import math
        >>> metric = BitsPerByte()
        >>> # Two tokens of 2 and 4 bytes, and an end-of-sequence token, each predicted with probability 1/8.
        >>> metric.update(torch.full((3,), math.log(8)), torch.tensor([2, 4, 0]))
        >>> round(metric.compute().item(), 6)
        1.0
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    nats: Tensor
    num_bytes: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("nats", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_bytes", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, losses: Tensor, token_bytes: Tensor) -> None:
        """Add the losses of target tokens, and their bytes."""
        nats, num_bytes = _bits_per_byte_update(losses, token_bytes)
        self.nats += nats
        self.num_bytes += num_bytes

    def compute(self) -> Tensor:
        """Return the bits per byte of everything seen, on all ranks."""
        return _bits_per_byte_compute(self.nats, self.num_bytes)


def _bits_per_byte_update(losses: Tensor, token_bytes: Tensor) -> tuple[Tensor, Tensor]:
    if losses.shape != token_bytes.shape:
        raise ValueError(
            f"BitsPerByte: losses have shape {list(losses.shape)} and token_bytes {list(token_bytes.shape)}; "
            "give one loss and one number of bytes for each target token."
        )
    has_text = token_bytes > 0
    nats = torch.where(has_text, losses.detach().to(torch.float64), 0.0).sum()
    return nats, torch.where(has_text, token_bytes, 0).sum()


def _bits_per_byte_compute(nats: Tensor, num_bytes: Tensor) -> Tensor:
    return nats / (math.log(2) * num_bytes.to(torch.float64))
