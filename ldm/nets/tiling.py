"""Images larger than the device's memory: encoder and decoder on overlapping tiles, with the seams blended."""

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from ldm.base.errors import InputError
from ldm.nets.autoencoder import Autoencoder, DiagonalGaussian


def encode_tiled(autoencoder: Autoencoder, x: Tensor, tile: int, overlap: int) -> DiagonalGaussian:
    """`autoencoder.encode` of images x (B, C, H, W); `tile` and `overlap` in pixels, multiples of the factor f.

    Mean and logvar are blended linearly, each by itself.
    """

    def moments(part: Tensor) -> Tensor:
        posterior = autoencoder.encode(part)
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    device = next(autoencoder.parameters()).device
    return DiagonalGaussian(*tiled(moments, x, tile, overlap, Fraction(1, autoencoder.factor), device).chunk(2, dim=1))


def decode_tiled(autoencoder: Autoencoder, z: Tensor, tile: int, overlap: int) -> Tensor:
    """`autoencoder.decode` of latents z (B, C, H/f, W/f); `tile` and `overlap` in pixels, multiples of the factor f."""
    factor, device = autoencoder.factor, next(autoencoder.parameters()).device
    _check(tile, overlap, factor)
    return tiled(autoencoder.decode, z, tile // factor, overlap // factor, Fraction(factor), device)


@torch.no_grad()
def tiled(
    function: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, ratio: Fraction, device: torch.device | str = "cpu"
) -> Tensor:
    """`function` of x (B, C, H, W) by square tiles of `tile` input pixels a side, which overlap by `overlap` or more.

    `ratio`: output pixels per input pixel, on a side; 1/f for an encoder, f for a decoder. One tile at a time is moved to
    `device`; the output lies where x does. Where tiles overlap, their weights run linearly from one to the other. Convolutions
    differ from those of the whole image near the inner edges of tiles, where weights are small; group norms and attention differ
    everywhere, because they see one tile only.
    """
    _check(tile, overlap, ratio.denominator)
    rows, columns = (_windows(side, tile, overlap, ratio, x.device) for side in x.shape[2:])
    out = torch.empty(0)
    for above, below, down in rows:
        for left, right, across in columns:
            part = function(x[:, :, above, left].to(device)).to(x.device)
            if not len(out):
                height, width = (side // ratio.denominator * ratio.numerator for side in x.shape[2:])
                out = part.new_zeros(*part.shape[:2], height, width)
            out[:, :, below, right] += part * (down[:, None] * across)
    return out


def _windows(side: int, tile: int, overlap: int, ratio: Fraction, device: torch.device) -> list[tuple[slice, slice, Tensor]]:
    """The fewest tiles that cover a side, evenly spread: slices of input and output, and the weights of the output's pixels.

    At every output pixel the weights of all tiles sum to 1.
    """
    unit, scale = ratio.denominator, ratio.numerator  # input and output pixels of a cell; tiles hold whole cells
    cells, size, shared = side // unit, tile // unit, overlap // unit
    count = max(-(-(cells - shared) // (size - shared)), 1)
    starts = [i * (cells - size) // max(count - 1, 1) for i in range(count)]
    ends = [min(start + size, cells) for start in starts]
    edges = torch.tensor([starts, ends, [0, *ends[:-1]], [*starts[1:], cells]])[..., None] * scale
    start, end, before, after = edges  # (count, 1); `before` ends the tile before, and `after` begins the tile after
    centre = torch.arange(cells * scale) + 0.5  # of the output's pixels
    rise, fall = (centre - start) / (before - start), (end - centre) / (end - after)  # 0 to 1 over the overlap; else ±inf
    weights = torch.minimum(rise, fall).clamp(0, 1)
    weights = (weights / weights.sum(0)).to(device)  # more than two tiles may meet
    windows = []
    for i, (first, last) in enumerate(zip(starts, ends, strict=True)):
        until = side if i == count - 1 else last * unit  # the last tile also has the pixels short of a cell
        inside = slice(first * scale, last * scale)
        windows.append((slice(first * unit, until), inside, weights[i, inside]))
    return windows


def _check(tile: int, overlap: int, unit: int) -> None:
    if not 0 <= overlap < tile or tile % unit or overlap % unit:
        raise InputError(f"tile = {tile}, overlap = {overlap}: expected multiples of {unit}, 0 <= overlap < tile")
