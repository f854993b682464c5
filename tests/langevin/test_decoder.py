"""The loss whose posterior the decoder's chains sample: which weights, which data, its value."""

import pytest
import torch
from torch import Tensor

from ldm.base.errors import InputError
from ldm.base.pixels import to_float
from ldm.bayes.likelihoods.discrete import DiscretizedLogistic
from ldm.langevin.decoder import DecoderLoss, part_of
from ldm.nets.autoencoder import AutoencoderKL

PIXELS = torch.randint(0, 256, (6, 1, 8, 8), generator=torch.Generator().manual_seed(2)).to(torch.uint8)


def net() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(1, 1, 2, [8, 16], norm_num_groups=4).eval().requires_grad_(False)


def make(seed: int = 3) -> DecoderLoss:
    likelihood = DiscretizedLogistic(log_scale=-1.0).build()
    return DecoderLoss(net(), likelihood, lambda numbers: PIXELS[numbers], len(PIXELS), ("conv_out",), seed)


def test_the_loss_is_that_of_a_decoder_with_those_weights():
    loss, other = make(), net()
    weights = {name: value + 0.1 for name, value in loss.start.items()}
    other.decoder.load_state_dict({**other.decoder.state_dict(), **weights})
    h, x = loss.data([4, 1])
    expected = -loss.likelihood.log_prob(x, other.decoder(h)).sum((1, 2, 3)).mean()
    torch.testing.assert_close(loss(weights, h, x), expected)
    assert abs(loss(weights, h, x) - loss(loss.start, h, x)) > 1


def test_latents_of_an_image_are_drawn_once_from_its_posterior():
    """Whatever images are beside it; by the seed; (z - mean) / std, of many images, is standard normal."""
    loss = make()
    h, x = loss.data([4, 1, 0])
    torch.testing.assert_close(x, to_float(PIXELS[[4, 1, 0]]))
    torch.testing.assert_close(loss.data([1])[0], h[1:2])
    assert not torch.allclose(make(seed=4).data([1])[0], h[1:2])

    def noise(seed: int) -> Tensor:
        loss = make(seed)
        loss.autoencoder.post_quant_conv = torch.nn.Identity()
        posterior = loss.autoencoder.encode(to_float(PIXELS))
        return (loss.data(list(range(6)))[0] - posterior.mean) / posterior.std

    drawn = torch.cat([noise(seed) for seed in range(100)]).flatten()
    assert abs(float(drawn.mean())) < 4 / len(drawn) ** 0.5 and abs(float(drawn.var()) - 1) < 4 * (2 / len(drawn)) ** 0.5


def test_minibatches_are_drawn_for_each_chain_and_step():
    loss = make()
    h, x = loss.minibatches("posterior", 5, chains=2, size=4)
    assert h.shape == (2, 4, 2, 4, 4) and x.shape == (2, 4, 1, 8, 8)
    for chain in range(2):
        for number in range(4):
            index = next(i for i in range(6) if torch.equal(x[chain, number], to_float(PIXELS[i])))
            torch.testing.assert_close(h[chain, number], loss.data([index])[0][0])
    again, other = (loss.minibatches("posterior", step, chains=2, size=4)[1] for step in (5, 6))
    assert torch.equal(x, again) and not torch.equal(x, other) and not torch.equal(x[0], x[1])


def test_which_weights_a_part_names():
    decoder = net().decoder
    names = [name for name, _ in decoder.named_parameters()]
    default = {name for name in names if name.startswith(("up_blocks.1.", "conv_norm_out.", "conv_out."))}
    assert part_of(decoder, None).keys() == default
    assert part_of(decoder, ("conv_out",)).keys() == {"conv_out.weight", "conv_out.bias"}
    assert part_of(decoder, ("conv_norm_out", "up_blocks.0.resnets.1")).keys() == {
        name for name in names if name.startswith(("conv_norm_out.", "up_blocks.0.resnets.1."))
    }
    with pytest.raises(
        InputError, match=r"posterior\.part: the decoder has no 'conv_ou'; it has conv_in, conv_norm_out, conv_out"
    ):
        part_of(decoder, ("conv_out", "conv_ou"))
    with pytest.raises(InputError, match=r"posterior\.part: mid_block\.downsamplers of the decoder holds no weights"):
        part_of(decoder, ("mid_block.downsamplers",))
