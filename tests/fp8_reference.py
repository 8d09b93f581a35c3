"""E4M3 and its tiles, written out in float64: what the FP8 tests are held against."""

from __future__ import annotations

import math

import numpy as np
import torch

# Positive numbers of E4M3 in the order of their codes: 4 bits of exponent with bias 7, 3 of mantissa. The last code
# (exponent 15, mantissa 7) is NaN, and there is no infinity.
CODES = np.array(
    [(m / 8) * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:-1]
)


def e4m3(x: np.ndarray) -> np.ndarray:
    """Nearest E4M3 number in float64, ties to the even mantissa, which are the even codes."""
    magnitude = np.abs(x.astype(np.float64))
    assert magnitude.max(initial=0) <= 448, "saturates"
    above = np.searchsorted(CODES, magnitude).clip(0, len(CODES) - 1)
    below = (above - 1).clip(0)
    up, down = CODES[above] - magnitude, magnitude - CODES[below]
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return np.copysign(CODES[code], x)


def loop(x: torch.Tensor, block: tuple[int, int], pow2: bool) -> tuple[np.ndarray, np.ndarray]:
    """Tile by tile in float64 with exact powers of two: data and scales."""
    values = x.double().numpy()
    data, scales = (
        np.zeros_like(values),
        np.ones([-(-size // length) for size, length in zip(x.shape, block, strict=True)]),
    )
    for i, j in np.ndindex(*scales.shape):
        tile = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
        amax = np.abs(values[tile]).max()
        if amax > 0:
            exponent = math.floor(math.log2(amax / 448)) - 1
            while amax > 448 * math.ldexp(1, exponent):
                exponent += 1
            power = math.ldexp(1, max(exponent, -149))
            scales[i, j] = power if pow2 else float(np.float32(amax / 448))
        scaled = (values[tile] / scales[i, j]).astype(np.float32) if not pow2 else values[tile] / scales[i, j]
        data[tile] = e4m3(np.clip(scaled, -448, 448))
    return data, scales


def restored_by_loop(x: torch.Tensor, block: tuple[int, int], pow2: bool = True) -> np.ndarray:
    """What the tiles hold, in float64."""
    data, scales = loop(x, block, pow2)
    return data * np.kron(scales, np.ones(block))[: x.shape[0], : x.shape[1]]
