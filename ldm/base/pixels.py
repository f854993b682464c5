"""The coding of 8-bit pixels as floats in [-1, 1]."""

from __future__ import annotations

from typing import Any

from ldm.base.lazy import Tensor, torch

BIN = 2 / 255  # distance between neighbouring 8-bit values in [-1, 1]


def to_float(pixels: Any) -> Tensor:
    """8-bit images, uint8 (N, C, H, W) of numpy or torch, to float32 in [-1, 1]."""
    return torch.as_tensor(pixels).float() * BIN - 1


def to_uint8(x: Tensor) -> Tensor:
    """Images in [-1, 1] to the nearest 8-bit values."""
    return ((x + 1) / BIN).round().clamp(0, 255).to(torch.uint8)


def centred_levels(x: Tensor) -> Tensor:
    """The 8-bit value of x counted from the middle of the range: -127.5, -126.5, …, 127.5, exact in float32."""
    return (x / BIN + 127.5).round() - 127.5
