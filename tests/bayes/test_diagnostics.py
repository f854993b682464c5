"""Diagnostics of latents against linear-Gaussian encoders, where all is known, and quadrature."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ldm.base.errors import InputError
from ldm.bayes import diagnostics
from ldm.bayes.diagnostics import Diagnostics, diagnose


def linear(count: int, gains: list[float], stds: list[float], size: int = 4, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Posteriors of z = offset + gain x + std n, x ~ N(0, 1), one gain and std a channel: mean and logvar (N, c, size, size)."""
    x = torch.randn(count, len(gains), size, size, generator=torch.Generator().manual_seed(3))
    gain, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (gains, stds))
    return offset + gain * x, (2 * std.log()).expand_as(x)


@pytest.mark.parametrize("offset", [0.0, 0.7])
def test_a_linear_encoder_has_known_moments_and_information(offset):
    gains, stds = [0.8, 1.5, 0.3], [0.6, 0.2, 0.9]
    mean, logvar = linear(4000, gains, stds, offset=offset)
    found = diagnose(mean, logvar)
    spread = np.hypot(gains, stds)
    np.testing.assert_allclose(found.mean, [offset] * 3, atol=0.02)
    np.testing.assert_allclose(found.std, spread, rtol=0.02)
    exact = kl_divergence(Normal(mean.double(), (logvar.double() / 2).exp()), Normal(0.0, 1.0))
    np.testing.assert_allclose(found.kl, exact.mean(0).sum((1, 2)), rtol=1e-9)
    aggregate = 0.5 * (spread**2 + offset**2 - 1 - np.log(spread**2))
    np.testing.assert_allclose(found.aggregate_kl, aggregate, rtol=0.05, atol=0.03)
    np.testing.assert_allclose(found.value_information, np.log(spread / stds), rtol=0.05, atol=0.03)
    assert found.value_ceiling == pytest.approx(math.log(2048))
    assert (found.positions, found.active_units, found.metrics()["active_units_fraction"]) == (16, 48, 1)


def test_the_information_of_whole_latents():
    """Of independent units it is the sum over them, as long as that is far below the ceiling."""
    gains, stds = [0.8, 0.9], [0.6, 0.5]
    found = diagnose(*linear(5000, gains, stds, size=1))
    assert found.mutual_information == pytest.approx(np.log(np.hypot(gains, stds) / stds).sum(), abs=0.1)
    assert found.mutual_information < found.ceiling == pytest.approx(math.log(1024))
    copied = linear(5000, gains, stds, size=1)[0][:, :1]  # a second copy of a unit, as noisy: less than twice its information
    twice = diagnose(copied.repeat(1, 2, 1, 1), torch.full((5000, 2, 1, 1), 2 * math.log(0.6)))
    assert twice.mutual_information == pytest.approx(0.5 * math.log(1 + 2 * 0.8**2 / 0.6**2), abs=0.1)
    assert float(twice.value_information.sum()) == pytest.approx(2 * 0.5 * math.log(1 + 0.8**2 / 0.6**2), abs=0.1)


@pytest.mark.parametrize("count", [50, 3000])
def test_information_above_the_ceiling_is_reported_as_the_ceiling(count):
    found = diagnose(*linear(count, [1.0] * 4, [0.1] * 4))  # 64 units of 2.3 nats
    assert found.ceiling == pytest.approx(math.log(min(count, 1024)))
    assert found.mutual_information == pytest.approx(found.ceiling, abs=1e-9)


def test_five_posteriors_by_quadrature():
    centres, stds = np.array([-2.0, -1.9, 0.0, 0.3, 1.5]), np.array([0.3, 0.1, 0.8, 0.2, 0.5])

    def aggregate(z: float) -> float:
        return norm.pdf(z, centres, stds).mean()

    distance = quad(lambda z: aggregate(z) * (math.log(aggregate(z)) - norm.logpdf(z)), -6, 6, limit=200)[0]
    kl = kl_divergence(Normal(torch.tensor(centres), torch.tensor(stds)), Normal(0.0, 1.0)).mean().item()
    mean, logvar = (torch.from_numpy(v).repeat(400).view(-1, 1, 1, 1) for v in (centres, 2 * np.log(stds)))
    found = [diagnose(mean, logvar, seed) for seed in range(5)]
    assert np.mean([f.aggregate_kl.item() for f in found]) == pytest.approx(distance, abs=0.03)
    assert np.mean([f.value_information.item() for f in found]) == pytest.approx(kl - distance, abs=0.03)
    assert np.mean([f.mutual_information for f in found]) == pytest.approx(kl - distance, abs=0.05)
    assert kl - distance > 0.8  # five that are told apart, nearly, have ln 5


def collapsed(*channels: int, total: int = 4) -> Diagnostics:
    mean, logvar = linear(500, [0.9] * total, [0.4] * total)
    for channel in channels:
        mean[:, channel] *= 1e-2
        logvar = logvar.clone()
        logvar[:, channel] = 1e-2
    return diagnose(mean, logvar)


def test_a_collapsed_channel_is_named_and_a_healthy_one_is_not():
    found = collapsed(1, 3)
    assert found.collapsed == [1, 3]
    assert found.active_units == 2 * 16
    message = found.warning()
    for words in (
        "2 of 4 latent channels (1, 3) carry less than 0.1 nats a position, at most 6.",
        "lower autoencoder.regulariser.beta, or set its beta_warmup_images or free_bits",
        "fewer autoencoder.latent_channels (2 carry all there is)",
    ):
        assert words in message
    np.testing.assert_allclose(found.value_information[[1, 3]], 0, atol=1e-3)
    assert (found.value_information[[0, 2]] > 0.5).all()
    assert collapsed().warning() is None
    everything = collapsed(0, 1, 2, 3)
    assert "4 of 4 latent channels (0, 1, 2, 3)" in everything.warning()
    assert "latent_channels (" not in everything.warning()  # none is not a number of channels to go down to
    assert everything.mutual_information < 0.05


def test_a_unit_is_active_if_its_mean_moves():
    """Burda et al.'s threshold, 0.01 of variance; the noise of the posterior does not count."""
    for deviation, active in ((0.11, True), (0.09, False)):
        mean = deviation * torch.tensor([-1.0, 1.0]).repeat(500).view(-1, 1, 1, 1) + 3
        found = diagnose(mean, torch.zeros_like(mean))
        assert found.active_units == active


def test_metrics_are_flat_numbers():
    metrics = collapsed(2).metrics()
    assert all(type(value) is float and math.isfinite(value) for value in metrics.values())
    assert metrics["collapsed_channels"] == 1
    assert metrics["active_units_fraction"] == 0.75
    assert {f"{name}_channel_{i}" for name in ("kl_nats", "latent_mean", "latent_std") for i in range(4)} <= metrics.keys()
    assert metrics["kl_nats_channel_2"] < 0.01 < metrics["kl_nats_channel_1"]


def test_in_pieces_and_again_it_is_the_same(monkeypatch):
    mean, logvar = linear(300, [0.8, 0.1], [0.6, 0.9])
    once = diagnose(mean, logvar)
    assert diagnose(mean, logvar).metrics() == once.metrics()
    assert diagnose(mean, logvar, seed=1).mutual_information != once.mutual_information
    monkeypatch.setattr(diagnostics, "CHUNK", 100)  # three images at a time
    assert diagnose(mean, logvar).metrics() == pytest.approx(once.metrics(), rel=1e-9)


@pytest.mark.parametrize(("count", "most"), [(5, 10), (10, 10), (11, 10), (5003, 1024), (2**40 + 7, 2048)])
def test_a_subsample_has_no_index_twice(count, most):
    found = diagnostics._spread_out(count, most, torch.Generator().manual_seed(0))
    assert len(found) == min(count, most)
    assert (found.diff() > 0).all()
    assert found[0] >= 0
    assert found[-1] < count
    assert found[-1] >= count - 2 * math.ceil(count / most)


def test_posteriors_as_narrow_as_points_stay_finite():
    mean = linear(200, [1.0], [1.0])[0]
    found = diagnose(mean, torch.full_like(mean, -30.0))
    assert all(math.isfinite(value) for value in found.metrics().values())
    assert found.mutual_information == pytest.approx(math.log(200))
    assert found.value_information.item() == pytest.approx(math.log(2048), abs=1)


def test_what_cannot_be_diagnosed_is_refused():
    with pytest.raises(InputError, match="found 1, give 2 or more"):
        diagnose(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2))
    with pytest.raises(ValueError, match=r"found \(3, 4\) and \(3, 4\)"):
        diagnose(torch.zeros(3, 4), torch.zeros(3, 4))
