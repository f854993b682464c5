"""Images larger than the device's memory: encoder and decoder on overlapping tiles, with the seams blended."""

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from ldm.base.errors import InputError
from ldm.nets.autoencoder import Autoencoder, DiagonalGaussian

Window = tuple[slice, slice, Tensor]  # of the input, of the output, and the weights of the latter's pixels


def encode_tiled(autoencoder: Autoencoder, x: Tensor, tile: int, overlap: int) -> DiagonalGaussian:
    """`autoencoder.encode` of images x (B, C, H, W); `tile` and `overlap` in pixels, multiples of the factor f.

    Mean and logvar are blended linearly, each by itself.
    """

    def moments(part: Tensor) -> Tensor:
        posterior = autoencoder.encode(part)
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    ratio = Fraction(1, autoencoder.factor)
    return DiagonalGaussian(*tiled(moments, x, tile, overlap, ratio, _device(autoencoder)).chunk(2, dim=1))


def decode_tiled(autoencoder: Autoencoder, z: Tensor, tile: int, overlap: int) -> Tensor:
    """`autoencoder.decode` of latents z (B, C, H/f, W/f); `tile` and `overlap` in pixels, multiples of the factor f."""
    factor = autoencoder.factor
    _check(tile, overlap, factor)
    return tiled(autoencoder.decode, z, tile // factor, overlap // factor, Fraction(factor), _device(autoencoder))


@torch.no_grad()
def tiled(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    tile: int,
    overlap: int,
    ratio: Fraction,
    device: torch.device | str | None = None,
) -> Tensor:
    """`function` of x (B, C, H, W) by square tiles, `tile` input pixels a side, that share `overlap` or more.

    `ratio`: output pixels per input pixel, on a side; 1/f for an encoder, f for a decoder. One tile at a time is moved to
    `device`; the output lies where x does. Where tiles overlap, their weights run linearly from one to the other.
    A function of single pixels is unchanged by all this. Convolutions differ near the inner edges of tiles, which the
    weights all but hide; group norms and attention differ throughout, for they see no more than their tile.
    """
    unit = ratio.denominator
    _check(tile, overlap, unit)
    rows, columns = (_windows(side, tile, overlap, ratio, x.device) for side in x.shape[2:])
    out = None
    for above, below, down in rows:
        for left, right, across in columns:
            part = function(x[:, :, above, left].to(device or x.device)).to(x.device)
            if out is None:
                out = part.new_zeros(*part.shape[:2], *(side // unit * ratio.numerator for side in x.shape[2:]))
            out[:, :, below, right] += part * (down[:, None] * across)
    assert out is not None
    return out


def _windows(side: int, tile: int, overlap: int, ratio: Fraction, device: torch.device) -> list[Window]:
    """The fewest tiles that cover a side, evenly spread; at every output pixel their weights sum to 1."""
    unit, scale = ratio.denominator, ratio.numerator  # input pixels per cell, output pixels per cell
    cells, size, shared = side // unit, tile // unit, overlap // unit  # tiles hold whole cells, so that outputs align
    count = max(-(-(cells - shared) // (size - shared)), 1)
    starts = [i * (cells - size) // max(count - 1, 1) for i in range(count)]
    ends = [min(start + size, cells) for start in starts]

    def column(positions: list[int]) -> Tensor:
        return torch.tensor(positions)[:, None] * scale

    start, end, before, after = map(column, (starts, ends, [0, *ends[:-1]], [*starts[1:], cells]))
    centre = torch.arange(cells * scale) + 0.5  # of the output's pixels
    rise, fall = (centre - start) / (before - start), (end - centre) / (end - after)  # 0 to 1 over the overlap; else ±inf
    weights = torch.minimum(rise, fall).clamp(0, 1)
    weights = (weights / weights.sum(0)).to(device)  # more than two tiles may meet
    windows = []
    for i, (first, last) in enumerate(zip(starts, ends, strict=True)):
        until = side if i == count - 1 else last * unit  # pixels short of a cell are seen by the last tile
        inside = slice(first * scale, last * scale)
        windows.append((slice(first * unit, until), inside, weights[i, inside]))
    return windows


def _check(tile: int, overlap: int, unit: int) -> None:
    if not 0 <= overlap < tile or tile % unit or overlap % unit:
        raise InputError(f"tile = {tile}, overlap = {overlap}: expected multiples of {unit}, 0 <= overlap < tile")


def _device(autoencoder: Autoencoder) -> torch.device:
    return next(autoencoder.parameters()).device
