"""Tiled encoding and decoding against the same at once."""

from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ldm.base.errors import InputError
from ldm.nets.autoencoder import AutoencoderKL, VQModel
from ldm.nets.tiling import decode_tiled, encode_tiled, tiled

SHAPE = {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": [16, 32], "norm_num_groups": 4}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def resample(ratio: Fraction) -> tuple[list[tuple[int, ...]], object]:
    """Each pixel repeated, or the first of each f x f; and the shapes that the function was given."""
    seen: list[tuple[int, ...]] = []

    def function(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        factor = ratio.denominator
        height, width = (side // factor * factor for side in x.shape[2:])
        return F.interpolate(x[:, :, :height:factor, :width:factor], scale_factor=ratio.numerator) * 2 + 1

    return seen, function


@st.composite
def problems(draw: st.DrawFn) -> tuple[Fraction, tuple[int, int], int, int]:
    factor = draw(st.sampled_from([1, 2, 3, 8]))
    ratio = draw(st.sampled_from([Fraction(factor), Fraction(1, factor)]))
    tile = draw(st.integers(1, 7))
    overlap = draw(st.integers(0, tile - 1))
    sides = draw(st.tuples(*[st.integers(ratio.denominator, 24 * ratio.denominator)] * 2))
    return ratio, sides, tile * factor, overlap * factor


@settings(max_examples=100, deadline=None)
@given(problems())
def test_functions_of_single_pixels_are_unchanged(problem: tuple[Fraction, tuple[int, int], int, int]) -> None:
    ratio, sides, tile, overlap = problem
    seen, function = resample(ratio)
    x = normal(2, 3, *sides)
    found = tiled(function, x, tile, overlap, ratio)
    tile, overlap = tile // ratio.numerator, overlap // ratio.numerator  # in pixels of the input
    shapes, (_, whole) = seen.copy(), resample(ratio)
    torch.testing.assert_close(found, whole(x), rtol=1e-5, atol=1e-5)
    assert max(max(shape[2:]) for shape in shapes) < tile + ratio.denominator  # pixels short of a latent ride along
    unit = ratio.denominator
    fewest = [max(int(np.ceil((side // unit * unit - overlap) / (tile - overlap))), 1) for side in sides]
    assert len(shapes) == fewest[0] * fewest[1]


def test_seams_are_linear() -> None:
    """Tiles of constant 0, 1, 2, …: between two of them the weights are those of a straight line at pixel centres."""
    calls = iter(range(100))
    found = tiled(lambda x: torch.full((1, 1, 8, 16), float(next(calls))), normal(1, 1, 4, 14), 16, 4, Fraction(2))
    ramp = (np.arange(4) + 0.5) / 4  # two pixels of overlap, at twice the resolution
    np.testing.assert_allclose(found[0, 0, 3].numpy(), [*np.zeros(12), *ramp, *np.ones(12)], atol=1e-6)


def test_convolutions_differ_at_the_inner_edges_of_tiles_only() -> None:
    x = normal(1, 2, 8, 14)
    error = tiled(lambda t: F.avg_pool2d(t, 3, stride=1, padding=1), x, 8, 2, Fraction(1)) - F.avg_pool2d(x, 3, 1, 1)
    wrong = error.abs().amax((0, 1, 2)) > 1e-6
    assert wrong.nonzero().flatten().tolist() == [6, 7]  # where the second tile begins and the first ends
    lost = F.pad(x[..., 8], (1, 1)).unfold(2, 3, 1).sum(-1) / 9  # the first tile's last column lacks its right neighbours
    torch.testing.assert_close(error[..., 7], -lost / 4, rtol=1e-5, atol=1e-6)  # and has a quarter of the weight there


@pytest.mark.parametrize("kind", [AutoencoderKL, VQModel])
def test_one_tile_is_the_whole(kind: type[AutoencoderKL] | type[VQModel]) -> None:
    net, x = kind(**SHAPE).eval(), normal(2, 3, 21, 14)
    with torch.no_grad():
        expected = net.encode(x)
        pixels = net.decode(expected.mean)
    found = encode_tiled(net, x, 32, 8)
    assert torch.equal(found.mean, expected.mean)
    assert torch.equal(found.logvar, expected.logvar)
    assert torch.equal(decode_tiled(net, expected.mean, 32, 8), pixels)
    assert found.mean.shape[1:] == net.latent_shape(21, 14)


@pytest.mark.parametrize("attention", [True, False])
def test_seams_of_a_decoder_are_no_larger_than_its_other_errors(attention: bool) -> None:
    """Measured: errors of 0.06 to 0.09 standard deviations of the image, against 0.3 with tiles side by side."""
    torch.manual_seed(0)
    net, z = AutoencoderKL(**SHAPE, mid_block_add_attention=attention).eval(), normal(1, 4, 64, 64)
    with torch.no_grad():
        whole = net.decode(z)

    def errors(overlap: int) -> tuple[float, Tensor]:
        error = (decode_tiled(net, z, 64, overlap) - whole) / whole.std()
        return float(error.std()), error.diff(dim=3).square().mean((0, 1, 2)).sqrt()  # between columns

    (blended, jumps), (side_by_side, seams) = errors(16), errors(0)
    assert blended < 0.12 < side_by_side
    assert jumps.max() < 2 * jumps.median()
    assert seams.argmax() == 63
    assert seams.max() > 3 * seams.median()


def test_posteriors_of_an_encoder_by_tiles() -> None:
    """Measured: 0.06 to 0.1 standard deviations, in mean and logvar."""
    torch.manual_seed(0)
    net, x = AutoencoderKL(**SHAPE).eval(), normal(1, 3, 97, 130)
    with torch.no_grad():
        expected = net.encode(x)
    found = encode_tiled(net, x, 48, 16)
    assert found.mean.shape == (1, *net.latent_shape(97, 130))
    for ours, theirs in ((found.mean, expected.mean), (found.logvar, expected.logvar)):
        assert (ours - theirs).std() < 0.15 * theirs.std()


def test_only_tiles_visit_the_device() -> None:
    devices = []

    def function(part: Tensor) -> Tensor:
        devices.append(part.device.type)
        return torch.ones(part.shape, device="cpu")  # what lies on meta has no values to bring back

    found = tiled(function, normal(1, 1, 9, 9), 6, 2, Fraction(1), device="meta")
    assert devices == ["meta"] * 4
    assert found.device.type == "cpu"
    torch.testing.assert_close(found, torch.ones(1, 1, 9, 9))


@pytest.mark.parametrize(("tile", "overlap"), [(0, 0), (8, 8), (8, -2), (7, 2), (8, 3), (-8, -16)])
def test_bad_tiles_are_refused(tile: int, overlap: int) -> None:
    net = AutoencoderKL(**SHAPE)
    for run, x in ((encode_tiled, normal(1, 3, 16, 16)), (decode_tiled, normal(1, 4, 8, 8))):
        with pytest.raises(InputError, match=f"tile = {tile}, overlap = {overlap}: expected multiples of 2, 0 <= overlap < tile"):
            run(net, x, tile, overlap)
