"""Averages and spreads over draws of a decoder's weights, against decoders that have them as their own and numpy in float64."""

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from torch import Tensor

from ldm.base.errors import InputError
from ldm.base.pixels import to_float
from ldm.bayes.likelihoods.discrete import DiscretizedLogistic
from ldm.langevin.chains import Draws
from ldm.langevin.decoder import DecoderPosterior
from ldm.nets.autoencoder import AutoencoderKL

CHAINS, DRAWS = 2, 3
NAMES = ("conv_out.weight", "conv_out.bias", "conv_norm_out.weight")


def net() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(1, 1, 2, [8, 8], norm_num_groups=4).eval().requires_grad_(False)


def some_draws(steps: list[float]) -> Draws:
    """About the weights as they are, each drawn with a step size of its own."""
    weights, generator = net().decoder.state_dict(), torch.Generator().manual_seed(1)
    shape = CHAINS, len(steps)
    values = {n: weights[n] + 0.1 * torch.randn(*shape, *weights[n].shape, generator=generator) for n in NAMES}
    return Draws(values, torch.tensor(steps, dtype=torch.float64))


@pytest.fixture(params=[[0.5, 0.5, 0.5], [4.0, 1.0, 2.0]], ids=["equal weights", "weighted"])
def posterior(request) -> DecoderPosterior:
    return DecoderPosterior(net(), DiscretizedLogistic(log_scale=-1.0).build(), some_draws(request.param))


def pixels() -> Tensor:
    return torch.randint(0, 256, (5, 1, 8, 8), generator=torch.Generator().manual_seed(2)).to(torch.uint8)


@pytest.fixture
def images() -> Tensor:
    return to_float(pixels())


def shares(posterior: DecoderPosterior) -> np.ndarray:
    """What each draw counts: chain after chain, by its step size."""
    steps = posterior.draws.weights.numpy()
    return np.tile(steps, CHAINS) / (CHAINS * steps.sum())


def each(posterior: DecoderPosterior, z: Tensor) -> list[Tensor]:
    """Outputs of decoders that hold the draws as their own weights."""
    outputs, values = [], posterior.draws.values
    for chain in range(CHAINS):
        for draw in range(DRAWS):
            one = net()
            one.decoder.load_state_dict({**one.decoder.state_dict(), **{n: v[chain, draw] for n, v in values.items()}})
            outputs.append(one.decode(z))
    return outputs


def nats(posterior: DecoderPosterior, x: Tensor, z: Tensor) -> np.ndarray:
    return np.stack([posterior.likelihood.log_prob(x, o).double().sum((1, 2, 3)).detach().numpy() for o in each(posterior, z)])


def test_every_draw_is_a_decoder_with_those_weights(posterior, images):
    z = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    found, expected = posterior.log_prob(images, z), nats(posterior, images, z)
    assert found.shape == (6, 5) and found.dtype == torch.float64
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (expected.std(0) > 1).all()  # the draws differ
    for name, value in net().decoder.state_dict().items():  # and left no trace
        assert torch.equal(posterior.autoencoder.decoder.state_dict()[name], value)


def test_the_average_is_the_log_of_the_weighted_mean_probability(posterior):
    values = torch.tensor(np.random.default_rng(0).normal(-1000, 5, (6, 4)))  # nats, whose exponentials are all 0
    expected = logsumexp(values.numpy(), axis=0, b=shares(posterior)[:, None])
    np.testing.assert_allclose(posterior.average(values), expected, rtol=1e-12)
    assert (posterior.average(values).numpy() >= shares(posterior) @ values.numpy()).all()  # Jensen's inequality
    same = values[:1].expand(6, 4)
    torch.testing.assert_close(posterior.average(same), same[0])


def weighted(values: np.ndarray, share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased variance under reliability weights: of equal ones, the usual variance over n - 1."""
    mean = np.average(values, axis=0, weights=share)
    return mean, np.average((values - mean) ** 2, axis=0, weights=share) / (1 - (share**2).sum())


def test_spread_and_scores(posterior, images):
    z = posterior.autoencoder.encode(images).mean
    values = nats(posterior, images, z)
    expected = np.sqrt(weighted(values, shares(posterior))[1])
    np.testing.assert_allclose(posterior.moments(torch.from_numpy(values))[1], expected, rtol=1e-10)
    np.testing.assert_allclose(posterior.scores(pixels()), expected, rtol=1e-3)
    if len(set(posterior.draws.weights.tolist())) == 1:
        np.testing.assert_allclose(expected, values.std(0, ddof=1))


def test_a_weighted_variance_is_unbiased(posterior):
    """Over many sets of draws its mean is the variance they come from."""
    values = torch.tensor(np.random.default_rng(0).normal(3, 2, (6, 40_000)))
    squares = posterior.moments(values)[1].square().numpy()
    assert squares.mean() == pytest.approx(4, abs=3 * squares.std() / 200)


def test_uncertainty_of_every_pixel(posterior):
    z = 3 * torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    mean, std = posterior.uncertainty(z)
    meant = np.stack([output.clamp(-1, 1).double().numpy() for output in each(posterior, z)])  # of a symmetric likelihood
    expected, variance = weighted(meant, shares(posterior))
    np.testing.assert_allclose(mean, expected, atol=1e-5)
    np.testing.assert_allclose(std, np.sqrt(variance), rtol=1e-3, atol=1e-5)
    assert mean.shape == std.shape == (5, 1, 8, 8)


def test_uncertainty_of_reconstructions(posterior, images, monkeypatch):
    """In parts, as at once."""
    monkeypatch.setenv("LDM_MEMORY_GB", "1e-9")
    found, expected = posterior.reconstructions(pixels()), posterior.uncertainty(posterior.autoencoder.encode(images).mean)
    torch.testing.assert_close(found, expected)


def test_one_draw_has_no_spread():
    one = Draws({name: value[:1, :1] for name, value in some_draws([1.0]).values.items()}, torch.ones(1))
    posterior = DecoderPosterior(net(), DiscretizedLogistic().build(), one)
    with pytest.raises(InputError, match="2 or more posterior samples"):
        posterior.moments(torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("conv_in.weight", (8, 2, 3), r"posterior samples have conv_in\.weight \(8, 2, 3\), the decoder \(8, 2, 3, 3\)"),
        ("conv_aut.bias", (1,), r"posterior samples have conv_aut\.bias \(1,\), the decoder has not"),
        ("conv_out.bias", (), r"posterior samples have conv_out\.bias \(\), the decoder \(1,\)"),
    ],
)
def test_samples_of_another_decoder_are_refused(name, shape, message):
    draws = Draws({name: torch.zeros(CHAINS, DRAWS, *shape)}, torch.ones(DRAWS))
    with pytest.raises(InputError, match=message):
        DecoderPosterior(net(), DiscretizedLogistic().build(), draws)
