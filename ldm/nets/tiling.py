"""Images larger than the device's memory: encoder and decoder on overlapping tiles, with the seams blended."""

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from ldm.base.errors import InputError
from ldm.nets.autoencoder import Autoencoder, DiagonalGaussian


def encode_tiled(autoencoder: Autoencoder, x: Tensor, tile: int, overlap: int) -> DiagonalGaussian:
    """`autoencoder.encode` of images x (B, C, H, W) by tiles; see `tiled`. Mean and logvar are blended each by itself."""

    def moments(part: Tensor) -> Tensor:
        posterior = autoencoder.encode(part)
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    device = next(autoencoder.parameters()).device
    return DiagonalGaussian(*tiled(moments, x, tile, overlap, Fraction(1, autoencoder.factor), device).chunk(2, dim=1))


def decode_tiled(autoencoder: Autoencoder, z: Tensor, tile: int, overlap: int) -> Tensor:
    """`autoencoder.decode` of latents z (B, C, H/f, W/f) by tiles; see `tiled`."""
    device = next(autoencoder.parameters()).device
    return tiled(autoencoder.decode, z, tile, overlap, Fraction(autoencoder.factor), device)


@torch.no_grad()
def tiled(
    function: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, ratio: Fraction, device: torch.device | str = "cpu"
) -> Tensor:
    """`function` of x (B, C, H, W) by square tiles of `tile` pixels a side, which overlap by `overlap` pixels or more.

    `ratio`: the output's size by the input's, 1/f for an encoder and f for a decoder; pixels are those of the larger of the two,
    and `tile` and `overlap` multiples of f. One tile at a time is moved to `device`; the output lies where x does. Where tiles
    overlap, their weights run linearly from one to the other. Convolutions differ from those of the whole image near the inner
    edges of tiles, where weights are small; group norms and attention differ everywhere, because they see one tile only.
    """
    factor = max(ratio.numerator, ratio.denominator)
    if not 0 <= overlap < tile or tile % factor or overlap % factor:
        raise InputError(f"tile = {tile}, overlap = {overlap}: expected multiples of {factor}, 0 <= overlap < tile")
    rows, columns = (_windows(side, tile // factor, overlap // factor, ratio, x.device) for side in x.shape[2:])
    out = torch.empty(0)
    for above, below, down in rows:
        for left, right, across in columns:
            part = function(x[:, :, above, left].to(device)).to(x.device)
            if not len(out):
                out = part.new_zeros(*part.shape[:2], rows[-1][1].stop, columns[-1][1].stop)
            out[:, :, below, right] += part * (down[:, None] * across)
    return out


def _windows(side: int, size: int, overlap: int, ratio: Fraction, device: torch.device) -> list[tuple[slice, slice, Tensor]]:
    """The fewest tiles that cover a side, evenly spread: slices of input and output, and the weights of the output's pixels.

    `size` and `overlap` are in cells, latents; at every output pixel the weights of all tiles sum to 1.
    """
    unit, scale = ratio.denominator, ratio.numerator  # input and output pixels of a cell
    cells = side // unit
    count = max(-(-(cells - overlap) // (size - overlap)), 1)
    starts = [i * (cells - size) // max(count - 1, 1) for i in range(count)]
    ends = [min(start + size, cells) for start in starts]
    # (count, 1) each; `before` ends the tile before, and `after` begins the tile after
    start, end, before, after = torch.tensor([starts, ends, [0, *ends[:-1]], [*starts[1:], cells]])[..., None] * scale
    centre = torch.arange(cells * scale) + 0.5  # of the output's pixels
    rise, fall = (centre - start) / (before - start), (end - centre) / (end - after)  # 0 to 1 over the overlap; else ±inf
    weights = torch.minimum(rise, fall).clamp(0, 1)
    weights = (weights / weights.sum(0)).to(device)  # more than two tiles may meet
    inputs = [slice(a * unit, b * unit if b < cells else side) for a, b in zip(starts, ends, strict=True)]  # to the last pixel
    outputs = [slice(a * scale, b * scale) for a, b in zip(starts, ends, strict=True)]
    return [(inside, out, row[out]) for inside, out, row in zip(inputs, outputs, weights, strict=True)]
