"""The whole system's bound against models whose log p(x) is known."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor
from torch.distributions import Normal

from ldm.base.errors import InputError
from ldm.base.options import kinds
from ldm.bayes.bound import Bound, diffusion_bound, whole_bound
from ldm.bayes.likelihoods.family import Family
from ldm.nets.autoencoder import DiagonalGaussian

SHAPE = (1, 4, 4)
D = math.prod(SHAPE)
Denoise = Callable[[Tensor, Tensor], Tensor]


def gaussian(std: float, mean: float = 0.0) -> Denoise:
    """The denoiser of data N(mean, std²)."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        variance = sigma.view(-1, 1, 1, 1) ** 2
        return (std**2 * x + variance * mean) / (std**2 + variance)

    return denoise


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positions(levels: int, count: int, seed: int = 0) -> Tensor:
    """One position in each of `levels` equal parts of [0, 1), (levels, count)."""
    random = torch.Generator().manual_seed(seed)
    return (torch.arange(levels)[:, None] + torch.rand(levels, count, generator=random, dtype=torch.float64)) / levels


def bound_of(z: Tensor, denoise: Denoise, sigma_min: float, sigma_max: float, levels: int = 64, seed: int = 0) -> Tensor:
    u, noise = positions(levels, len(z), seed), normal(levels, *z.shape, seed=seed + 1)
    return diffusion_bound(denoise, z, sigma_min, sigma_max, u, noise)


def meets(found: Tensor, exact: Tensor | float) -> bool:
    """Whether the mean difference is within four standard errors, which must be small enough to mean something."""
    difference = found - exact
    error = difference.std() / math.sqrt(len(difference))
    return bool(difference.mean().abs() < 4 * error and error < 0.05 * D)


@pytest.mark.parametrize(("sigma_min", "sigma_max"), [(1e-2, 80.0), (1e-3, 1e3)])
@pytest.mark.parametrize("std", [0.5, 1.0, 2.0])
def test_meets_the_evidence_of_gaussian_data(std, sigma_min, sigma_max):
    z = std * normal(4000, *SHAPE, seed=7)
    found = bound_of(z, gaussian(std), sigma_min, sigma_max)
    assert found.shape == (4000,)
    assert found.dtype == torch.float64
    assert meets(found, Normal(0.0, std).log_prob(z).sum((1, 2, 3)))
    assert meets(found, -0.5 * D * (1 + math.log(2 * math.pi * std**2)))  # minus the entropy


def test_is_its_own_expectation_at_one_point():
    """At a fixed z, far from the typical, the mean over draws is the integral over noise levels, by quadrature."""
    std, low, high = 0.8, 0.05, 5.0
    z = torch.full((20_000, *SHAPE), 1.3, dtype=torch.float64)
    square = 1.3**2 * D

    def integrand(log_sigma: float) -> float:
        """E|z - D|² / sigma²."""
        variance = math.exp(2 * log_sigma)
        return (square * variance + D * std**4) / (std**2 + variance) ** 2

    integral = quad(integrand, math.log(low), math.log(high))[0]
    endpoint = 0.5 * (D * (-1 / (high**2 + 1) + math.log1p(1 / high**2)) + square / (high**2 + 1))
    expected = -(integral + endpoint + 0.5 * D * (1 + math.log(2 * math.pi * low**2)))
    found = bound_of(z, gaussian(std), low, high, levels=4)
    assert abs(found.mean() - expected) < 4 * found.std() / math.sqrt(len(found))


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (gaussian(1.5), "another width"),
        (gaussian(1.0, mean=0.5), "another centre"),
        (lambda x, sigma: torch.zeros_like(x), "blind"),
        (lambda x, sigma: x, "idle"),
        (lambda x, sigma: 1.2 * gaussian(1.0)(x, sigma), "guided"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_worse_denoiser_lowers_the_bound(wrong, name):
    z = normal(1000, *SHAPE, seed=7)
    lost = bound_of(z, gaussian(1.0), 1e-2, 80.0) - bound_of(z, wrong, 1e-2, 80.0)  # under the same noise
    assert lost.mean() > 10 * lost.std() / math.sqrt(len(lost))


@pytest.mark.parametrize("term", ["endpoint", "sigma_min", "span"])
def test_each_term_is_needed(term):
    """Planted: the formula without one of its terms misses the evidence by more than the test above allows."""
    std, low, high = 2.0, 1e-2, 5.0
    z = std * normal(4000, *SHAPE, seed=7)
    right = bound_of(z, gaussian(std), low, high)
    square = z.square().sum((1, 2, 3))
    endpoint = 0.5 * (D * (-1 / (high**2 + 1) + math.log1p(1 / high**2)) + square / (high**2 + 1))
    constant = 0.5 * D * (1 + math.log(2 * math.pi * low**2))
    wrong = {
        "endpoint": right + endpoint,
        "sigma_min": right + constant,
        "span": -endpoint - constant + (right + endpoint + constant) / math.log(high / low),
    }[term]
    exact = Normal(0.0, std).log_prob(z).sum((1, 2, 3))
    assert not meets(wrong, exact)


def test_float32_latents_lose_nothing():
    z = normal(256, *SHAPE, seed=7)
    u, noise = positions(32, 256), normal(32, 256, *SHAPE)
    exact = diffusion_bound(gaussian(1.0), z, 2e-3, 80.0, u, noise)
    found = diffusion_bound(gaussian(1.0), z.float(), 2e-3, 80.0, u.float(), noise.float())
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, exact, rtol=0, atol=0.05)


@dataclass
class Linear:
    """x = gain z + offset + noise n with latents z ~ N(centre, std²): encoder, decoder and likelihood in one, exact."""

    gain: float = 0.6
    offset: float = -0.2
    noise: float = 0.3
    centre: float = 3.0
    std: float = 2.5
    discrete: ClassVar = True  # as a likelihood: taken for one, or there would be no exact evidence

    def encode(self, x: Tensor) -> DiagonalGaussian:
        precision = 1 / self.std**2 + self.gain**2 / self.noise**2
        mean = (self.centre / self.std**2 + self.gain * (x - self.offset) / self.noise**2) / precision
        return DiagonalGaussian(mean, torch.full_like(mean, -math.log(precision)))

    def decode(self, z: Tensor) -> Tensor:
        return self.gain * z + self.offset

    def log_prob(self, x: Tensor, mean: Tensor) -> Tensor:
        return Normal(mean, self.noise).log_prob(x)

    def images(self, count: int) -> Tensor:
        latents = self.centre + self.std * normal(count, *SHAPE, seed=21)
        return self.decode(latents) + self.noise * normal(count, *SHAPE, seed=22)

    def evidence(self, x: Tensor) -> Tensor:
        spread = math.hypot(self.gain * self.std, self.noise)
        return Normal(self.gain * self.centre + self.offset, spread).log_prob(x).sum((1, 2, 3))

    def bound(self, x: Tensor, shift: float, scale: float, sigma_min: float = 1e-3, sigma_max: float = 1e4) -> Bound:
        """With latents standardised by `shift` and `scale`, where they are N((centre - shift) / scale, (std / scale)²)."""
        levels = 64
        return whole_bound(
            self,
            self,
            gaussian(self.std / scale, (self.centre - shift) / scale),
            x,
            latent_mean=torch.full((1, 1, 1, 1), shift, dtype=torch.float64),
            latent_std=torch.full((1, 1, 1, 1), scale, dtype=torch.float64),
            sigma_min=sigma_min / scale,
            sigma_max=sigma_max / scale,
            latent_noise=normal(*x.shape, seed=31),
            u=positions(levels, len(x)),
            noise=normal(levels, *x.shape, seed=32),
        )


def test_the_whole_bound_meets_the_evidence():
    """Exact posterior, exact denoiser: every loss is zero, so the mean of the bound is log p(x)."""
    model = Linear()
    x = model.images(4000)
    found = model.bound(x, model.centre, model.std)
    assert found.dims == D
    assert meets(found.nats, model.evidence(x))
    torch.testing.assert_close(found.nats, found.reconstruction + found.entropy + found.prior)
    torch.testing.assert_close(found.bits_per_dim, -found.nats / (D * math.log(2)))


def test_standardising_the_latents_moves_nats_between_terms_only():
    """The same draws in raw and in standardised latents: d ln std passes from the entropy to the prior."""
    model = Linear()
    x = model.images(500)
    raw, standard = model.bound(x, 0.0, 1.0), model.bound(x, model.centre, model.std)
    torch.testing.assert_close(raw.nats, standard.nats, rtol=0, atol=1e-3)
    torch.testing.assert_close(raw.reconstruction, standard.reconstruction)
    jacobian = torch.full((500,), D * math.log(model.std), dtype=torch.float64)
    torch.testing.assert_close(raw.entropy - standard.entropy, jacobian)
    torch.testing.assert_close(standard.prior - raw.prior, jacobian, rtol=0, atol=1e-3)
    assert jacobian[0] > 10  # planted: forgetting it would show


def test_entropy_is_the_posteriors_in_standardised_latents():
    model = Linear()
    x = model.images(8)
    posterior = model.encode(x)
    expected = Normal(posterior.mean / model.std, posterior.std / model.std).entropy().sum((1, 2, 3))
    torch.testing.assert_close(model.bound(x, model.centre, model.std).entropy, expected)


def test_a_channel_has_its_own_scale():
    """Statistics (1, C, 1, 1) of two channels: the Jacobian counts each over its positions."""
    model = Linear()
    x = torch.cat([model.images(4), model.images(4)], 1)
    scale = torch.tensor([2.0, 0.5], dtype=torch.float64).view(1, 2, 1, 1)
    found = whole_bound(
        model,
        model,
        gaussian(1.0),
        x,
        latent_mean=torch.zeros_like(scale),
        latent_std=scale,
        sigma_min=0.01,
        sigma_max=80.0,
        latent_noise=normal(*x.shape),
        u=positions(2, 4),
        noise=normal(2, *x.shape),
    )
    raw = model.encode(x).entropy().sum((1, 2, 3))
    torch.testing.assert_close(found.entropy, raw)  # ln 2 + ln 0.5 = 0 at every position
    assert found.dims == 2 * D


def test_what_has_no_such_bound_is_refused():
    model = Linear()
    model.discrete = False
    model.kind = "gaussian"
    with pytest.raises(InputError, match="a gaussian likelihood gives densities: take discretized_gaussian"):
        model.bound(model.images(2), 0.0, 1.0)
    model.discrete = True
    model.quantize = lambda z: z
    with pytest.raises(InputError, match="undefined for a VQ autoencoder: report rate and distortion"):
        model.bound(model.images(2), 0.0, 1.0)


@pytest.mark.parametrize("kind", ["discretized_gaussian", "discretized_logistic", "bernoulli"])
def test_any_likelihood_of_8_bit_values_will_do(kind):
    model, likelihood = Linear(), kinds(Family)[kind]().build().double()
    x = torch.where(normal(3, *SHAPE) > 0, 1.0, -1.0).double()
    noise = normal(*x.shape, seed=1)
    found = whole_bound(
        model,
        likelihood,
        gaussian(1.0),
        x,
        latent_mean=torch.zeros(1, 1, 1, 1).double(),
        latent_std=torch.ones(1, 1, 1, 1).double(),
        sigma_min=0.01,
        sigma_max=80.0,
        latent_noise=noise,
        u=positions(2, 3),
        noise=normal(2, *x.shape),
    )
    expected = likelihood.log_prob(x, model.decode(model.encode(x).sample(noise))).sum((1, 2, 3))
    torch.testing.assert_close(found.reconstruction, expected)
    assert math.isfinite(found.standard_error)
