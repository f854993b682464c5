"""The evidence lower bound against log p(x) of linear-Gaussian models and torch.distributions."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ldm.bayes.elbo import elbo
from ldm.bayes.likelihoods import DiscretizedLogistic, to_float
from ldm.nets.autoencoder import AutoencoderKL, DiagonalGaussian

GAIN, NOISE = 1.7, 0.4  # x = GAIN z + NOISE n, z ~ N(0, 1)


@dataclass
class Scaling:
    """An autoencoder of one gain: the exact posterior of x = GAIN z + NOISE n, its variance widened by `widen`."""

    widen: float = 1.0

    def encode(self, x: Tensor) -> DiagonalGaussian:
        variance = 1 / (1 + GAIN**2 / NOISE**2)
        logvar = torch.full_like(x, math.log(variance * self.widen))
        return DiagonalGaussian(variance * GAIN / NOISE**2 * x, logvar)

    def decode(self, z: Tensor) -> Tensor:
        return GAIN * z


class Gaussian:
    """p(x | z) = N(mean, NOISE²)."""

    def log_prob(self, x: Tensor, mean: Tensor) -> Tensor:
        return Normal(mean, NOISE).log_prob(x)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def evidence(x: Tensor) -> Tensor:
    return Normal(0.0, math.sqrt(GAIN**2 + NOISE**2)).log_prob(x).flatten(1).sum(1)


def average(autoencoder: Scaling, x: Tensor, repeats: int) -> tuple[Tensor, Tensor]:
    """Mean of the bound over posterior samples, and its standard error."""
    found = torch.stack([elbo(autoencoder, Gaussian(), x, normal(*x.shape, seed=i)).nats for i in range(repeats)])
    return found.mean(0), found.std(0) / math.sqrt(repeats)


def test_the_exact_posterior_gives_the_evidence():
    x = 2 * normal(3, 1, 4, 4, seed=9)
    mean, error = average(Scaling(), x, 2000)
    assert ((mean - evidence(x)).abs() < 4 * error).all()
    assert (error < 0.2).all()


def test_a_wrong_posterior_loses_its_divergence_from_the_right_one():
    x = 2 * normal(3, 1, 4, 4, seed=9)
    mean, error = average(Scaling(widen=2.0), x, 2000)
    right, wrong = (Scaling(widen).encode(x) for widen in (1.0, 2.0))
    loss = kl_divergence(Normal(wrong.mean, wrong.std), Normal(right.mean, right.std)).flatten(1).sum(1)
    assert (loss > 10 * error).all()  # enough to be seen
    assert ((evidence(x) - loss - mean).abs() < 4 * error).all()


def test_correlated_pixels():
    """Two pixels of one latent (probabilistic PCA): log p(x) is of a full covariance; KL and reconstruction in closed form."""
    loading = np.array([1.5, -0.5])
    x = np.array([[0.3, 1.1], [-2.0, 0.4]])
    variance = 1 / (1 + loading @ loading / NOISE**2)

    class PPCA:
        def encode(self, x: Tensor) -> DiagonalGaussian:
            mean = (x * torch.from_numpy(loading).view(1, 1, 1, 2)).sum(3, keepdim=True) * variance / NOISE**2
            return DiagonalGaussian(mean, torch.full_like(mean, math.log(variance)))

        def decode(self, z: Tensor) -> Tensor:
            return z * torch.from_numpy(loading).view(1, 1, 1, 2)

    exact = multivariate_normal([0, 0], np.outer(loading, loading) + NOISE**2 * np.eye(2)).logpdf(x)
    images = torch.from_numpy(x).view(2, 1, 1, 2)
    found = torch.stack([elbo(PPCA(), Gaussian(), images, normal(2, 1, 1, 1, seed=i)).nats for i in range(4000)])
    np.testing.assert_array_less((found.mean(0) - torch.from_numpy(exact)).abs(), 4 * found.std(0) / math.sqrt(4000))


@pytest.fixture(scope="module")
def tiny() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(3, 3, 2, [8, 16], norm_num_groups=4).eval()


@torch.no_grad()
def test_terms_of_the_real_networks(tiny):
    x = to_float(torch.randint(0, 256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8))
    noise = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    likelihood = DiscretizedLogistic(-2.0)
    found = elbo(tiny, likelihood, x, noise)
    mean, logvar = tiny.quant_conv(tiny.encoder(x)).chunk(2, dim=1)
    posterior = Normal(mean, (logvar / 2).exp())
    torch.testing.assert_close(found.kl, kl_divergence(posterior, Normal(0.0, 1.0)).sum((1, 2, 3)))
    pixels = likelihood.log_prob(x, tiny.decode(posterior.mean + posterior.stddev * noise))
    torch.testing.assert_close(found.reconstruction, pixels.sum((1, 2, 3)))
    torch.testing.assert_close(found.nats, found.reconstruction - found.kl)
    assert found.dims == 3 * 8 * 8
    torch.testing.assert_close(found.bits_per_dim, -found.nats / 192 / math.log(2))


@torch.no_grad()
def test_an_image_is_bounded_by_itself(tiny):
    """A batch's other images change nothing."""
    x = to_float(torch.randint(0, 256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8))
    noise = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    whole = elbo(tiny, DiscretizedLogistic(), x, noise).nats
    alone = torch.cat([elbo(tiny, DiscretizedLogistic(), x[i : i + 1], noise[i : i + 1]).nats for i in range(4)])
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=0)


def test_uniform_pixels_cost_eight_bits():
    """A decoder that knows nothing, its scale wide, pays about log2 256 a value for pixels in the middle."""

    class Blank:
        def encode(self, x: Tensor) -> DiagonalGaussian:
            return DiagonalGaussian(torch.zeros_like(x), torch.zeros_like(x))

        def decode(self, z: Tensor) -> Tensor:
            return torch.zeros_like(z)

    x = torch.full((1, 1, 8, 8), 1 / 255, dtype=torch.float64)
    found = elbo(Blank(), DiscretizedLogistic(math.log(0.5)).double(), x, torch.zeros_like(x))
    assert found.kl.item() == 0
    # the logistic density at its centre is 1 / (4 scale); a bin is 2 / 255 wide
    assert found.bits_per_dim.item() == pytest.approx(-math.log2(2 / 255 / (4 * 0.5)), abs=1e-3)
