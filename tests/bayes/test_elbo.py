"""The bounds against log p(x) of linear-Gaussian models, enumeration and torch.distributions."""

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, norm
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ldm.base.errors import InputError
from ldm.base.pixels import to_float
from ldm.bayes.elbo import Elbo, elbo, importance_bound, standard_normal
from ldm.bayes.likelihoods.continuous import Gaussian
from ldm.bayes.likelihoods.discrete import DiscretizedLogistic
from ldm.nets.autoencoder import AutoencoderKL, DiagonalGaussian


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass
class PPCA:
    """Probabilistic PCA (Tipping & Bishop 1999): z ~ N(0, I), x = W z + offset + noise n, W's columns orthogonal.

    Its posterior is then diagonal and `encode` gives it, but for a mean off by `shift` and a variance too large by `widen`.
    """

    loadings: Tensor  # (dims, latents)
    offset: Tensor  # (dims,)
    noise: float = math.exp(-1.25)  # whose log is exact in float32
    shift: float = 0.0
    widen: float = 1.0

    @classmethod
    def random(cls, dims: int, latents: int, seed: int) -> "PPCA":
        directions = torch.linalg.qr(normal(dims, latents, seed=seed)).Q
        return cls(directions * torch.linspace(0.2, 2.0, latents, dtype=torch.float64), normal(dims, seed=seed + 1))

    def encode(self, x: Tensor) -> DiagonalGaussian:
        variance = 1 / (1 + self.loadings.square().sum(0) / self.noise**2)  # (latents,)
        mean = (x.flatten(1) - self.offset) @ self.loadings * variance / self.noise**2 + self.shift
        logvar = (variance * self.widen).log().expand_as(mean)
        return DiagonalGaussian(mean[..., None, None], logvar[..., None, None])  # (B, latents, 1, 1)

    def decode(self, z: Tensor) -> Tensor:
        return (z.flatten(1) @ self.loadings.T + self.offset)[:, None, None]  # (B, 1, 1, dims)

    @property
    def likelihood(self) -> Gaussian:
        return Gaussian(log_scale=math.log(self.noise), scale="fixed").build().double()

    def images(self, count: int, seed: int = 5) -> Tensor:
        dims, latents = self.loadings.shape
        return self.decode(normal(count, latents, seed=seed)) + self.noise * normal(count, 1, 1, dims, seed=seed + 1)

    def evidence(self, x: Tensor) -> Tensor:
        """log p(x), by scipy."""
        w = self.loadings.numpy()
        covariance = w @ w.T + self.noise**2 * np.eye(len(w))
        return torch.from_numpy(multivariate_normal(self.offset.numpy(), covariance).logpdf(x.flatten(1).numpy()))

    def loss(self, x: Tensor) -> Tensor:
        """KL(q || p(z | x)) in closed form, (B,)."""
        wrong, right = self.encode(x), replace(self, shift=0.0, widen=1.0).encode(x)
        return kl_divergence(Normal(wrong.mean, wrong.std), Normal(right.mean, right.std)).sum((1, 2, 3))

    def expected_elbo(self, x: Tensor) -> Tensor:
        """E[elbo], without sampling: the noises ±sqrt(d) e_i are a cubature that is exact for polynomials of degree 3."""
        latents = self.loadings.shape[1]
        points = math.sqrt(latents) * torch.eye(latents, dtype=torch.float64).view(latents, latents, 1, 1)
        bounds = [elbo(self, self.likelihood, x, point.expand(len(x), -1, -1, -1)).nats for point in (*points, *-points)]
        return torch.stack(bounds).mean(0)


SIZES = pytest.mark.parametrize(("dims", "latents", "seed"), [(2, 1, 0), (5, 2, 10), (16, 7, 20), (64, 16, 30)])


@SIZES
def test_at_the_exact_posterior_every_sample_is_the_evidence(dims, latents, seed):
    """p(x, z) / q(z | x) is p(x) whatever z is: one draw, however unlikely, is enough."""
    model = PPCA.random(dims, latents, seed)
    x = model.images(50)
    exact = model.evidence(x)
    for draw in range(5):
        noise = (1 + draw) * normal(50, latents, 1, 1, seed=draw)
        found = importance_bound(model, model.likelihood, x, [noise])
        sampled = elbo(model, model.likelihood, x, noise, log_prior=lambda z: standard_normal(z).sum((1, 2, 3)))
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-9)
        torch.testing.assert_close(sampled.nats, exact, rtol=0, atol=1e-9)
    torch.testing.assert_close(model.expected_elbo(x), exact, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("shift", "widen"), [(0.1, 1.0), (0.0, 3.0), (0.0, 0.2), (-0.2, 1.5)])
@SIZES
def test_away_from_it_the_gap_is_the_divergence_from_the_posterior(dims, latents, seed, shift, widen):
    model = replace(PPCA.random(dims, latents, seed), shift=shift, widen=widen)
    x = model.images(50)
    gap = model.evidence(x) - model.expected_elbo(x)
    assert (gap > 1e-3).all()
    torch.testing.assert_close(gap, model.loss(x), rtol=1e-9, atol=1e-9)


def test_both_estimators_average_to_the_expected_elbo():
    model = replace(PPCA.random(5, 2, 10), shift=0.2, widen=2.0)
    x = model.images(1).expand(20_000, -1, -1, -1)
    noise = normal(20_000, 2, 1, 1, seed=3)
    expected = model.expected_elbo(x[:1]).item()
    for nats in (elbo(model, model.likelihood, x, noise).nats, importance_bound(model, model.likelihood, x, [noise])):
        error = nats.std() / math.sqrt(len(nats))
        assert error < 0.1
        assert abs(nats.mean() - expected) < 4 * error


def test_the_importance_bound_rises_with_k_to_the_evidence():
    model = replace(PPCA.random(6, 3, 40), shift=0.1, widen=2.0)
    x = model.images(400)
    exact = model.evidence(x)
    sizes = [1, 2, 5, 20, 100, 1000]
    gaps = []
    for size in sizes:
        draws = (normal(len(x), 3, 1, 1, seed=1000 * size + k) for k in range(size))
        gaps.append(exact - importance_bound(model, model.likelihood, x, draws))
    means = torch.stack(gaps).mean(1)
    errors = torch.stack(gaps).std(1) / math.sqrt(len(x))
    assert abs(means[0] - model.loss(x).mean()) < 4 * errors[0]
    assert (means[:-1] - means[1:] > 2 * torch.hypot(errors[:-1], errors[1:])).all(), means
    assert abs(means[-1]) < 0.02


def test_the_importance_bound_is_the_log_of_the_mean_weight_and_holds_one_draw_at_a_time():
    model = replace(PPCA.random(5, 2, 10), shift=0.3)
    x = model.images(4)
    posterior = model.encode(x)
    log_weights, alive = [], []

    def draws() -> Iterator[Tensor]:
        for k in range(7):
            noise = normal(4, 2, 1, 1, seed=k)
            z = (posterior.mean + posterior.std * noise).numpy()
            terms = norm.logpdf(x.numpy(), model.decode(torch.from_numpy(z)).numpy(), model.noise).sum((1, 2, 3))
            terms += norm.logpdf(z).sum((1, 2, 3))
            log_weights.append(terms - norm.logpdf(z, posterior.mean.numpy(), posterior.std.numpy()).sum((1, 2, 3)))
            alive.append(weakref.ref(noise))
            assert sum(reference() is not None for reference in alive) <= 2  # this one and the one in the caller's hand
            yield noise
            del noise

    found = importance_bound(model, model.likelihood, x, draws())
    expected = np.logaddexp.reduce(log_weights, axis=0) - math.log(7)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    assert found.dtype == torch.float64
    with pytest.raises(InputError, match="no noises"):
        importance_bound(model, model.likelihood, x, [])


def test_float32_latents_of_a_narrow_posterior_keep_their_digits():
    """A standard deviation of 3e-7, the least of an autoencoder, is below the spacing of float32 around 3."""
    model = PPCA.random(5, 2, 10)
    wide = model.encode(model.images(4))
    narrow = DiagonalGaussian(wide.mean + 3, torch.full_like(wide.mean, -30.0))
    single = replace(model, loadings=model.loadings.float(), offset=model.offset.float())
    x, noise = model.images(4), normal(4, 2, 1, 1)
    model.encode = lambda x: narrow
    single.encode = lambda x: DiagonalGaussian(narrow.mean.float(), narrow.logvar.float())
    exact = importance_bound(model, model.likelihood, x, [noise])
    found = importance_bound(single, model.likelihood.float(), x.float(), [noise.float()])
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-3)


@dataclass
class Bimodal(PPCA):
    """One latent with the prior 0.3 N(-1, 0.4²) + 0.7 N(1, 0.4²): x is a mixture of two Gaussians."""

    def log_prior(self, z: Tensor) -> Tensor:
        parts = [math.log(weight) + Normal(centre, 0.4).log_prob(z) for weight, centre in ((0.3, -1.0), (0.7, 1.0))]
        return torch.logaddexp(*parts).sum((1, 2, 3))

    def evidence(self, x: Tensor) -> Tensor:
        w = self.loadings.numpy()
        covariance = 0.4**2 * w @ w.T + self.noise**2 * np.eye(len(w))
        parts = [
            math.log(weight)
            + multivariate_normal(self.offset.numpy() + centre * w[:, 0], covariance).logpdf(x.flatten(1).numpy())
            for weight, centre in ((0.3, -1.0), (0.7, 1.0))
        ]
        return torch.from_numpy(np.logaddexp(*parts))


def test_a_prior_without_closed_form():
    start = PPCA.random(3, 1, 50)
    model = Bimodal(6 * start.loadings, start.offset, noise=math.exp(0.25), widen=1.5)
    x = model.images(300)
    exact = model.evidence(x)
    draws = (normal(300, 1, 1, 1, seed=k) for k in range(500))
    many = importance_bound(model, model.likelihood, x, draws, log_prior=model.log_prior)
    torch.testing.assert_close(many, exact, rtol=0, atol=0.3)
    assert abs((many - exact).mean()) < 0.01
    sampled = [elbo(model, model.likelihood, x, normal(300, 1, 1, 1, seed=k), log_prior=model.log_prior) for k in range(100)]
    below = exact - torch.stack([bound.nats for bound in sampled]).mean(0)
    assert below.mean() > 0.02  # the posterior has two modes, q has one
    standard = importance_bound(model, model.likelihood, x, [normal(300, 1, 1, 1, seed=k) for k in range(100)])
    assert (standard - exact).abs().mean() > 0.05  # planted: another prior is another evidence


def test_a_sampled_kl_averages_to_the_exact_one():
    model = replace(PPCA.random(5, 2, 10), shift=0.2, widen=2.0)
    x = model.images(1).expand(20_000, -1, -1, -1)
    noise = normal(20_000, 2, 1, 1, seed=3)
    exact = elbo(model, model.likelihood, x, noise)
    sampled = elbo(model, model.likelihood, x, noise, log_prior=lambda z: standard_normal(z).sum((1, 2, 3)))
    torch.testing.assert_close(sampled.reconstruction, exact.reconstruction)
    assert (sampled.kl.mean() - exact.kl[0]).abs() < 4 * sampled.kl.std() / math.sqrt(20_000)
    torch.testing.assert_close(exact.kl, model.encode(x).kl().sum((1, 2, 3)))


class Quantised:
    """A VQ autoencoder of two positions and four codes of one channel; images are two pixels."""

    def __init__(self) -> None:
        self.config = {"num_vq_embeddings": 4}
        self.codes = torch.tensor([-1.0, -0.25, 0.5, 1.25], dtype=torch.float64)

    def quantize(self, h: Tensor) -> Tensor:
        return self.codes[(h[..., None] - self.codes).abs().argmin(-1)]

    def encode(self, x: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian(2 * x, torch.full_like(x, -30.0))

    def decode(self, z: Tensor) -> Tensor:
        return self.quantize(z) / 2


def test_a_vq_autoencoder_pays_for_the_choice_of_a_code_at_every_position():
    model, likelihood = Quantised(), Gaussian(log_scale=-2.25, scale="fixed").build().double()
    x = normal(200, 1, 1, 2, seed=1) / 2
    found = elbo(model, likelihood, x, torch.full((200, 1, 1, 2), math.nan))
    torch.testing.assert_close(found.kl, torch.full((200,), 2 * math.log(4), dtype=torch.float64))
    images = torch.tensor(list(product(model.codes.tolist(), repeat=2))).double() / 2  # the 16 that it can decode, (16, 2)
    joint = norm.logpdf(x.numpy(), images.numpy(), math.exp(-2.25)).reshape(200, 16, 2).sum(2) - 2 * math.log(4)
    np.testing.assert_allclose(found.nats.numpy(), joint.max(1), rtol=1e-6, atol=1e-6)  # of the code that the encoder is sure of
    evidence = np.logaddexp.reduce(joint, axis=1)
    assert (found.nats.numpy() <= evidence + 1e-6).all()
    assert np.median(evidence - found.nats.numpy()) < 0.2
    with pytest.raises(InputError, match="uniform over its codes"):
        elbo(model, likelihood, x, x, log_prior=lambda z: z)
    with pytest.raises(InputError, match="report its elbo"):
        importance_bound(model, likelihood, x, [x])


def test_standard_error_is_of_the_mean_over_images():
    reconstruction, kl = torch.tensor([-3.0, -5.0, -10.0]), torch.tensor([1.0, 1.0, 2.0])
    found = Elbo(reconstruction, kl, 4)
    assert found.standard_error == pytest.approx(np.std([-4, -6, -12], ddof=1) / math.sqrt(3))
    torch.testing.assert_close(found.bits_per_dim, torch.tensor([4.0, 6.0, 12.0]) / 4 / math.log(2))
    assert math.isnan(Elbo(reconstruction[:1], kl[:1], 4).standard_error)


@pytest.fixture(scope="module")
def tiny() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(3, 3, 2, [8, 16], norm_num_groups=4).eval()


@torch.no_grad()
def test_terms_of_the_real_networks(tiny):
    x = to_float(torch.randint(0, 256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8))
    noise = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    likelihood = DiscretizedLogistic(log_scale=-2.0).build()
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
    likelihood = DiscretizedLogistic().build()
    whole = elbo(tiny, likelihood, x, noise).nats
    alone = torch.cat([elbo(tiny, likelihood, x[i : i + 1], noise[i : i + 1]).nats for i in range(4)])
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=0)


def test_uniform_pixels_cost_eight_bits():
    """A decoder that knows nothing, its scale wide, pays about log2 256 a value for pixels in the middle."""

    class Blank:
        def encode(self, x: Tensor) -> DiagonalGaussian:
            return DiagonalGaussian(torch.zeros_like(x), torch.zeros_like(x))

        def decode(self, z: Tensor) -> Tensor:
            return torch.zeros_like(z)

    x = torch.full((1, 1, 8, 8), 1 / 255, dtype=torch.float64)
    found = elbo(Blank(), DiscretizedLogistic(log_scale=math.log(0.5)).build().double(), x, torch.zeros_like(x))
    assert found.kl.item() == 0
    # the logistic density at its centre is 1 / (4 scale); a bin is 2 / 255 wide
    assert found.bits_per_dim.item() == pytest.approx(-math.log2(2 / 255 / (4 * 0.5)), abs=1e-3)
